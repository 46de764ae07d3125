"""Train a small detector from Python, then detect with it. Run it from the project's root.

    python -m examples.train_from_python --epochs 10 --imgsz 160

The default dataset is generated on first use; pass `--data my.yaml` for your own.
"""

from __future__ import annotations

import argparse

import detect
import train


def main() -> None:
    """Train on a dataset, then run the best weights on the shipped images."""
    parser = argparse.ArgumentParser(description="Train and detect from Python.")
    parser.add_argument("--data", default="data/shapes.yaml")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--project", default="runs/examples")
    args = parser.parse_args()

    # Keywords are the flags of train.py; a wrong name or value raises utils.errors.UserError.
    trained = train.run(
        cfg="models/yolov5n.yaml", data=args.data, epochs=args.epochs, imgsz=args.imgsz, project=args.project, workers=0
    )
    weights = trained.best or trained.last
    print(f"weights: {weights}")

    report = detect.run(weights=weights, source="data/images", imgsz=args.imgsz, project=args.project, name="detect")
    print(f"{report.detections} detections in {report.frames} images, written to {report.folder}")


if __name__ == "__main__":
    main()
