"""Run an exported ONNX detector with ONNX Runtime alone: `python examples/onnx_runtime.py best.onnx image.jpg`."""

import ast
import sys

import cv2
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = ast.literal_eval(session.get_modelmeta().custom_metadata_map["names"])
side = session.get_inputs()[0].shape[2]  # a file of fixed size; for --dynamic choose a multiple of the stride
image = cv2.imread(sys.argv[2])
scale = side / max(image.shape[:2])
small = cv2.resize(image, None, fx=scale, fy=scale)
square = np.full((side, side, 3), 114, np.uint8)
square[: small.shape[0], : small.shape[1]] = small  # padded on the right or below: boxes only need division by scale
pixels = square[None, :, :, ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 255  # (1, 3, side, side), RGB in [0, 1]
rows = session.run(None, {"images": pixels})[0][0]  # (N, 5 + nc): cxcywh in pixels, objectness, class probabilities
scores = rows[:, 4:5] * rows[:, 5:]
best = scores.max(1) > 0.25
rows, scores, classes = rows[best], scores[best].max(1), scores[best].argmax(1)
boxes = np.concatenate((rows[:, :2] - rows[:, 2:4] / 2, rows[:, 2:4]), 1) / scale  # xywh in pixels of the image
for i in cv2.dnn.NMSBoxesBatched(boxes.tolist(), scores.tolist(), classes.tolist(), 0.25, 0.45):
    print(f"{names[classes[i]]} {scores[i]:.2f}", *(round(float(value)) for value in boxes[i]))
