"""Use a trained detector through torch.hub from any folder, by the path of the checkout.

python examples/torch_hub.py runs/train/exp/weights/best.pt image.jpg
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parents[1]


def main(weights: str, image: str) -> None:
    """Print the detections of one image."""
    model = torch.hub.load(str(PROJECT), "custom", path=weights, source="local")
    model.conf = 0.25  # confidence threshold; also iou, classes, max_det, agnostic
    results = model(image, size=640)
    results.print()
    for x1, y1, x2, y2, confidence, cls in results.xyxy[0].tolist():
        print(f"{model.names[int(cls)]} {confidence:.2f} at {x1:.0f} {y1:.0f} {x2:.0f} {y2:.0f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
