"""Run an exported ONNX detector with OpenCV alone; nothing of this project is imported.

python export.py --weights best.pt --include onnx --imgsz 640
python examples/onnx_with_opencv.py best.onnx image.jpg out.jpg --imgsz 640
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np


def letterbox(image: np.ndarray, side: int) -> tuple[np.ndarray, float, int, int]:
    """Resize an image into a square without distortion.

    Args:
        image: (H, W, 3) uint8.
        side: side of the square in pixels.

    Returns:
        The square (side, side, 3), the scale, and the left and top padding in pixels.
    """
    height, width = image.shape[:2]
    scale = side / max(height, width)
    new_width, new_height = round(width * scale), round(height * scale)
    left, top = (side - new_width) // 2, (side - new_height) // 2
    square = np.full((side, side, 3), 114, np.uint8)
    square[top : top + new_height, left : left + new_width] = cv2.resize(image, (new_width, new_height))
    return square, scale, left, top


def detect(
    net: cv2.dnn.Net, image: np.ndarray, side: int, conf: float, iou: float
) -> list[tuple[np.ndarray, float, int]]:
    """Return (box xyxy in image pixels, confidence, class index) of each detection, after NMS per class."""
    square, scale, left, top = letterbox(image, side)
    net.setInput(cv2.dnn.blobFromImage(square, 1 / 255, swapRB=True))
    rows = net.forward()[0]  # (N, 5 + nc): cxcywh in input pixels, objectness, class probabilities
    classes = rows[:, 5:].argmax(1)
    confidences = rows[:, 4] * rows[np.arange(len(rows)), 5 + classes]
    likely = confidences > conf
    rows, classes, confidences = rows[likely], classes[likely], confidences[likely]
    xywh = np.concatenate((rows[:, :2] - rows[:, 2:4] / 2, rows[:, 2:4]), 1)
    kept = cv2.dnn.NMSBoxesBatched(xywh.tolist(), confidences.tolist(), classes.tolist(), conf, iou)
    boxes = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), 1)
    boxes = (boxes - (left, top, left, top)) / scale
    return [(boxes[i], float(confidences[i]), int(classes[i])) for i in kept]


def main() -> None:
    """Draw the detections of one image."""
    parser = argparse.ArgumentParser(description="Run an ONNX detector with OpenCV.")
    parser.add_argument("model", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--imgsz", type=int, default=640, help="side that the model was exported for")
    parser.add_argument("--conf", type=float, default=0.25)
    parser.add_argument("--iou", type=float, default=0.45)
    args = parser.parse_args()
    image = cv2.imread(str(args.image))
    if image is None:
        raise SystemExit(f"{args.image}: cannot be read as an image")
    for (x1, y1, x2, y2), confidence, cls in detect(
        cv2.dnn.readNetFromONNX(str(args.model)), image, args.imgsz, args.conf, args.iou
    ):
        cv2.rectangle(image, (round(x1), round(y1)), (round(x2), round(y2)), (0, 160, 0), 2)
        print(f"class {cls}, confidence {confidence:.2f}, box {x1:.0f} {y1:.0f} {x2:.0f} {y2:.0f}")
    cv2.imwrite(str(args.output), image)


if __name__ == "__main__":
    main()
