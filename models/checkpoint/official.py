"""Content of official YOLOv5 checkpoints: pickled modules, read as data (see `models.checkpoint.inert`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.checkpoint.inert import Inert, LoadedFile, contents
from utils.errors import CheckpointError

DETECTION_CLASSES = ("models.yolo.DetectionModel", "models.yolo.Model")
ONLY_DETECTORS = f"only {' and '.join(DETECTION_CLASSES)} are detectors"
OTHER_TASKS = {
    "models.yolo.SegmentationModel": "segmentation is not supported; give the detector of that size (yolov5s.pt for "
    "yolov5s-seg.pt), which detects the same classes",
    "models.yolo.ClassificationModel": "classification is not supported; give a detector (yolov5s.pt for "
    "yolov5s-cls.pt), or train one with boxes",
}


def official_content(file: LoadedFile) -> dict[str, Any]:
    """Return the fields of a `Checkpoint` from an official file.

    Returns:
        `spec`, `state` (of 'ema' if there is one, else of 'model'), `names`, `stride`, `epoch`, `metadata` and `train`
        (None when the run was stripped); plain values and tensors, not yet validated.

    Raises:
        CheckpointError: no detection model in the file, or one that cannot be rebuilt.
    """
    entries = file.value if isinstance(file.value, dict) else {"model": file.value}
    module = _detection_module(file, entries.get("ema") or entries.get("model"))
    # Heads of before 2021 store pixel anchors beside the grid anchors; they follow from anchors and strides.
    state = {key: t for key, t in file.module_state(module).items() if not key.endswith(".anchor_grid")}
    if not state:
        raise CheckpointError(f"{file.path}: the pickled {DETECTION_CLASSES[0]} has no weights")
    spec, names, stride, hyp = (file.plain(module.get(key)) for key in ("yaml", "names", "stride", "hyp"))
    about = {key: file.plain(entries.get(key)) for key in ("opt", "git", "date", "wandb_id", "best_fitness")}
    epoch, optimizer = entries.get("epoch"), entries.get("optimizer")
    train = None
    if isinstance(optimizer, dict) and entries.get("model") is not None:
        train = {
            "model": file.module_state(_detection_module(file, entries["model"])),
            "optimizer": file.plain(optimizer, keep_tensors=True),
            "updates": file.plain(entries.get("updates")),
            "best_fitness": float(np.ravel(about["best_fitness"] or [0.0])[0]),
            "opt": about["opt"],
            "hyp": hyp,
        }
    return {
        "spec": spec,
        "state": state,
        "names": names or [f"class{i}" for i in range(spec["nc"] if isinstance(spec.get("nc"), int) else 0)],
        "stride": stride or [32.0],  # as YOLOv5 takes it
        "epoch": epoch if isinstance(epoch, int) else -1,
        "metadata": {"hyp": hyp, **about},
        "train": train,
    }


def _detection_module(file: LoadedFile, found: object) -> Inert:
    """Return `found` if it is a pickled detection model; otherwise raise an error that says what it is."""
    if not isinstance(found, Inert):
        raise CheckpointError(
            f"{file.path}: no pickled model in it under 'ema' or 'model' (found: {contents(file.value)})"
        )
    if found.name not in DETECTION_CLASSES:
        raise CheckpointError(f"{file.path}: holds a {found.name}; {OTHER_TASKS.get(found.name, ONLY_DETECTORS)}")
    if not isinstance(found.get("yaml"), dict):
        raise CheckpointError(f"{file.path}: the pickled model has no 'yaml', so it cannot be rebuilt")
    return found
