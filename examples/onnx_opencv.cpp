// Run an exported ONNX detector with OpenCV 5 in C++ (OpenCV 4.6 cannot read the Split operator of such files).
// Prints class, confidence and x y w h in pixels of the image.
//
//   python export.py --weights best.pt --include onnx --imgsz 640
//   g++ -std=c++17 examples/onnx_opencv.cpp -o detect $(pkg-config --cflags --libs opencv4)
//   ./detect best.onnx image.jpg 640

#include <algorithm>
#include <iostream>
#include <string>
#include <vector>

#include <opencv2/dnn.hpp>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>

int main(int argc, char** argv) {
    if (argc != 4) {
        std::cerr << "usage: detect MODEL.onnx IMAGE SIDE\n";
        return 2;
    }
    const int side = std::stoi(argv[3]);
    const cv::Mat image = cv::imread(argv[2]);
    if (image.empty()) {
        std::cerr << argv[2] << ": cannot be read as an image\n";
        return 2;
    }
    cv::dnn::Net net = cv::dnn::readNetFromONNX(argv[1]);

    // Resize with the aspect ratio kept, pad on the right or below with gray.
    const float scale = static_cast<float>(side) / std::max(image.rows, image.cols);
    cv::Mat resized, square(side, side, CV_8UC3, cv::Scalar::all(114));
    cv::resize(image, resized, cv::Size(), scale, scale);
    resized.copyTo(square(cv::Rect(0, 0, resized.cols, resized.rows)));

    net.setInput(cv::dnn::blobFromImage(square, 1.0 / 255, cv::Size(), cv::Scalar(), /*swapRB=*/true));
    const cv::Mat output = net.forward();  // 1 x N x (5 + nc): cx, cy, w, h in pixels, objectness, class probabilities
    const int count = output.size[1], columns = output.size[2];

    std::vector<cv::Rect2d> boxes;
    std::vector<float> scores;
    std::vector<int> classes;
    for (int i = 0; i < count; ++i) {
        const float* row = output.ptr<float>(0, i);
        const int cls = static_cast<int>(std::max_element(row + 5, row + columns) - (row + 5));
        const float score = row[4] * row[5 + cls];
        if (score <= 0.25f) continue;
        boxes.emplace_back((row[0] - row[2] / 2) / scale, (row[1] - row[3] / 2) / scale, row[2] / scale, row[3] / scale);
        scores.push_back(score);
        classes.push_back(cls);
    }

    // NMS per class: boxes of different classes are moved apart by an offset.
    std::vector<cv::Rect2d> shifted = boxes;
    const double offset = 2.0 * std::max(image.rows, image.cols);
    for (size_t i = 0; i < shifted.size(); ++i) shifted[i].x += offset * classes[i];
    std::vector<int> keep;
    cv::dnn::NMSBoxes(shifted, scores, 0.25f, 0.45f, keep);
    for (const int i : keep) {
        const cv::Rect2d& box = boxes[i];
        std::cout << classes[i] << ' ' << scores[i] << ' ' << box.x << ' ' << box.y << ' ' << box.width << ' ' << box.height << '\n';
    }
}
