"""Compare exported files with the trained detector: verification, mAP, and boxes in a video, for real weights.

    python -m benchmarks.export_agreement --weights NAME=FILE.pt ... --data DATA.yaml --source VIDEO [--imgsz 320]
        [--kinds onnx onnx-free ...] [--vid-stride 10] [--conf-thres 0.1] [--keep]

Each checkpoint is exported as every kind, as export.py does it; then, file by file against the checkpoint:

- the values of the file's own verification (`<file>.proof.json`): training form against re-parameterized model, and
re-parameterized model against the file;
- `val.py` (`engine.evaluate.evaluator.validate`): mAP50 and mAP50-95;
- `detect.py --save-txt --save-conf` on every n-th frame of a video: boxes matched one to one per frame;
- files with free sizes: rows at sizes of 256 to 640, square and not, in batches of 1 to 8, against the checkpoint.

A file of one size is given square images, where val.py and detect.py give a checkpoint the smallest rectangle: such a
file is compared with the checkpoint on squares too. --keep keeps the rows of detectors that an earlier run measured.

Results: benchmarks/results/export_agreement.json and .md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.report import RESULTS, machine, markdown_table, write_results
from data.config import load_data_config
from data.sources.files import open_source
from engine.cli.config import DetectConfig, ValConfig
from engine.evaluate.evaluator import EvalOptions, EvalResult, build_loader, evaluate, split_annotations, validate
from engine.export.config import ExportConfig
from engine.export.exporter import ExportedFile, export
from engine.export.verification import TOLERANCES, match
from engine.predict.predictor import Predictor, detect
from engine.runtimes.pytorch import PyTorchRuntime
from engine.runtimes.registry import open_runtime
from utils.boxes import xywh2xyxy

NAME = "export_agreement"
CPU = torch.device("cpu")
FREE_SHAPES = ((1, 256, 256), (8, 256, 352), (3, 640, 416), (1, 640, 640))
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino", "opencv-python", "timm")
# Boxes in label files are rounded to whole pixels, which takes a small one far below the IoU of a verification.
ROUNDED_IOU = 0.7
FLAT, FREE = "squares", "rectangles"


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name in the tables, the format, and the options of export.py."""

    name: str
    format: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> str:
        """Shape of the images that val.py and detect.py give it."""
        return FREE if self.options.get("dynamic") else FLAT

    @property
    def precision(self) -> str:
        """Key of `TOLERANCES`."""
        return "int8" if self.options.get("int8") else "float16" if self.options.get("half") else "float32"


KINDS = {
    "onnx": Kind("ONNX", "onnx"),
    "onnx-free": Kind("ONNX, free sizes", "onnx", {"dynamic": True}),
    "torchscript": Kind("TorchScript", "torchscript"),
    "openvino": Kind("OpenVINO", "openvino"),
    "onnx-half": Kind("ONNX float16", "onnx", {"half": True}),
    "openvino-half": Kind("OpenVINO float16", "openvino", {"half": True}),
    "onnx-int8": Kind("ONNX int8", "onnx", {"int8": True}),
    "openvino-int8": Kind("OpenVINO int8", "openvino", {"int8": True}),
}


class FixedSize(PyTorchRuntime):
    """A checkpoint run like a file of one size: letterboxed into it, not into the smallest rectangle."""

    def __init__(self, weights: Path, imgsz: int) -> None:
        super().__init__([weights], CPU)
        self.imgsz = (imgsz, imgsz)


Boxes = dict[str, np.ndarray]
"""Frame -> (n, 6) xyxy in pixels, confidence, class."""


@dataclass(frozen=True)
class Measured:
    """Metrics and boxes of a detector, or of a file exported from it."""

    map50: float
    map: float
    boxes: Boxes


class Bench:
    """One detector: its own metrics on squares and rectangles, and those of every kind of file.

    Args:
        weights: the checkpoint.
        options: of the command.
        folder: for temporary files.
    """

    def __init__(self, weights: Path, options: argparse.Namespace, folder: Path) -> None:
        self.weights, self.folder = weights, folder
        self.kinds = [KINDS[key] for key in options.kinds]
        self.val = ValConfig(
            weights=[str(weights)], data=options.data, imgsz=options.imgsz, workers=0, project=str(folder / "val")
        )
        self.detect = DetectConfig(
            weights=[str(weights)], source=options.source, imgsz=[options.imgsz], vid_stride=options.vid_stride,
            conf_thres=options.conf_thres, nosave=True, save_txt=True, save_conf=True, project=str(folder / "detect"),
        )  # fmt: skip
        video = cv2.VideoCapture(options.source)
        self.frame = video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT)
        video.release()

    def run(self) -> dict[str, Any]:
        """Return all metrics, as plain values."""
        own = {FREE: self.of_file(self.weights)}
        if any(kind.images == FLAT for kind in self.kinds):
            own[FLAT] = self.on_squares()
        metrics = {
            about: {"mAP50": m.map50, "mAP50-95": m.map, "boxes": sum(map(len, m.boxes.values()))}
            for about, m in own.items()
        }
        return {"checkpoint": metrics, "files": [self.of_kind(kind, own[kind.images]) for kind in self.kinds]}

    def of_kind(self, kind: Kind, own: Measured) -> dict[str, Any]:
        """Export, validate, detect, compare."""
        about: dict[str, Any] = {"kind": kind.name, "precision": kind.precision, "images": kind.images}
        folder = self.folder / kind.name.replace(",", "").replace(" ", "-")
        folder.mkdir()
        weights = Path(shutil.copy(self.weights, folder / "best.pt"))
        report = export(
            replace(
                ExportConfig(weights=[str(weights)], imgsz=[self.val.imgsz], data=self.val.data, include=[kind.format]),
                **kind.options,
            )
        )
        if report.failures:
            return {**about, "failure": report.failures[0]}
        exported_file = report.exported_files[0]
        found = self.of_file(exported_file.path)
        about |= verification_values(exported_file)
        about |= {"mAP50": found.map50, "mAP50-95": found.map}
        about["mAP50-95 gap"] = found.map - own.map
        about["video"] = compare_frames(own.boxes, found.boxes, kind.precision, self.detect.conf_thres)
        if kind.options.get("dynamic"):
            about["sizes"] = self.at_free_sizes(exported_file)
        return about

    def of_file(self, path: Path) -> Measured:
        """Run val.py and detect.py on a checkpoint or an exported file."""
        result = validate(replace(self.val, weights=[str(path)]))
        report = detect(replace(self.detect, weights=[str(path)]))
        assert report.folder is not None
        return self._measured(result, report.folder)

    def on_squares(self) -> Measured:
        """Return the same values of the checkpoint, on the images that a file of fixed size gets."""
        runtime, data = FixedSize(self.weights, self.val.imgsz), load_data_config(self.val.data)
        loader = build_loader(self.val, split_annotations(self.val, data), runtime, rect=True)
        result = evaluate(runtime, loader, EvalOptions(names=data.names))
        predictor = Predictor(runtime, self.detect, runtime.names, (self.val.imgsz, self.val.imgsz))
        with open_source(self.detect.source, self.detect.vid_stride) as source:
            report = predictor.run(source)
        assert report.folder is not None
        return self._measured(result, report.folder)

    def _measured(self, result: EvalResult, folder: Path) -> Measured:
        return Measured(result.map50, result.map, read_labels(folder / "labels", self.frame))

    def at_free_sizes(self, exported_file: ExportedFile) -> list[dict[str, Any]]:
        """Return the largest differences of rows at sizes not used in the verification."""
        file, own = open_runtime([str(exported_file.path)], CPU), PyTorchRuntime([self.weights], CPU)
        rows = []
        for shape in FREE_SHAPES:
            batch, height, width = shape
            images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width))
            gap = (file(images) - own(images)).abs()
            rows.append({"shape": shape, "px": float(gap[..., :4].max()), "score": float(gap[..., 4:].max())})
        return rows


def verification_values(exported_file: ExportedFile) -> dict[str, Any]:
    """Return the verification values of a file."""
    verification = json.loads(exported_file.verification.read_text(encoding="utf-8"))
    keys = ("row_px", "row_score", "mean_px", "reference", "found", "matched", "edge")
    stages = [{key: stage[key] for key in keys} for stage in verification["stages"]]
    megabytes, inputs = round(exported_file.megabytes, 2), verification["inputs"]
    return {"MB": megabytes, "verification": {"images": inputs["images"], "deployed": stages[0], "file": stages[1]}}


def read_labels(folder: Path, frame: tuple[float, float]) -> Boxes:
    """Return the label files with confidences, by name; boxes (n, 6) in pixels."""
    found: Boxes = {}
    for path in sorted(folder.glob("*.txt")):
        label, x, y, w, h, confidence = np.loadtxt(path, ndmin=2).T
        boxes_xyxy = xywh2xyxy(np.stack((x, y, w, h), 1)) * np.array([*frame, *frame])
        found[path.stem] = np.concatenate((boxes_xyxy, confidence[:, None], label[:, None]), 1)
    return found


def compare_frames(own: Boxes, found: Boxes, precision: str, conf: float) -> dict[str, Any]:
    """Match the boxes of every frame; count unmatched ones, and measure the differences of the pairs."""
    tolerance = replace(TOLERANCES[precision], iou=min(TOLERANCES[precision].iou, ROUNDED_IOU))
    counts = dict.fromkeys(("boxes", "boxes of the file", "matched", "alone", "alone, at the threshold"), 0)
    px = score = 0.0
    for name in sorted(own.keys() | found.keys()):
        a, b = (torch.from_numpy(side.get(name, np.zeros((0, 6)))) for side in (own, found))
        has_a, has_b = match(a, b, tolerance)
        single = torch.cat((a[~has_a, 4], b[~has_b, 4]))
        counts["boxes"] += len(a)
        counts["boxes of the file"] += len(b)
        counts["matched"] += int(has_a.sum())
        counts["alone"] += len(single)
        counts["alone, at the threshold"] += int((single <= conf + tolerance.edge_score).sum())
        for row in a[has_a]:
            gap = (b[has_b & (b[:, 5] == row[5])] - row).abs()
            nearest = gap[gap[:, :4].amax(1).argmin()]
            px, score = max(px, float(nearest[:4].max())), max(score, float(nearest[4]))
    return {"frames with boxes": len(own.keys() | found.keys()), **counts, "px": round(px, 3), "score": round(score, 6)}


# ---- tables ---------------------------------------------------------------------------------------------------------


def text(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    files = [(name, file) for name, row in results["detectors"].items() for file in row["files"]]
    made = [(name, file) for name, file in files if "failure" not in file]
    imgsz, data, source = (results[key] for key in ("imgsz", "data", "source"))
    about = (
        f"{imgsz} x {imgsz} pixels, dataset {data}, every {results['vid_stride']}th frame of {source} at a "
        f"confidence of {results['conf_thres']:g}. Everything is compared with the checkpoint in PyTorch."
    )
    parts = [f"# Exported files against their checkpoints\n\n{about}", "## Verification\n\n" + verification_table(made)]
    parts.append("## val.py\n\n" + val_table(results["detectors"]))
    parts.append("## detect.py on a video, boxes in whole pixels\n\n" + video_table(made))
    parts.append("## Free sizes: rows at sizes not used in the verification\n\n" + sizes_table(made))
    failed = [f"- {name}, {file['kind']}: {file['failure']}" for name, file in files if "failure" in file]
    if failed:
        parts.append("## Not exported\n\n" + "\n".join(failed))
    return "\n\n".join(parts) + "\n"


def verification_table(made: list[tuple[str, dict[str, Any]]]) -> str:
    """Return differences of training form, re-parameterized model and file."""
    lines = []
    for name, file in made:
        first, last = file["verification"]["deployed"], file["verification"]["file"]
        gaps = [f"{stage[key]:.2g}" for stage in (first, last) for key in ("row_px", "row_score")]
        lines.append([name, file["kind"], file["MB"], *gaps, f"{last['matched']}/{last['reference']}", last["edge"]])
    header = ["detector", "file", "MB", "re-parameterized: px", "score", "file: px", "score", "matched", "borderline"]
    return markdown_table(header, lines)


def val_table(detectors: Mapping[str, Any]) -> str:
    """Return the mAP of checkpoint and files."""
    lines = []
    for name, row in detectors.items():
        for images, own in row["checkpoint"].items():
            lines.append([name, ".pt", images, f"{own['mAP50']:.4f}", f"{own['mAP50-95']:.4f}", ""])
        for file in row["files"]:
            if "failure" not in file:
                metrics = f"{file['mAP50']:.4f}", f"{file['mAP50-95']:.4f}", f"{file['mAP50-95 gap']:+.4f}"
                lines.append([name, file["kind"], file["images"], *metrics])
    return markdown_table(["detector", "file", "images", "mAP50", "mAP50-95", "to .pt"], lines)


def video_table(made: list[tuple[str, dict[str, Any]]]) -> str:
    """Return the differences of boxes in the frames of a video."""
    keys = ("frames with boxes", "boxes", "matched", "alone", "alone, at the threshold", "px", "score")
    header = ("frames with boxes", "boxes", "matched", "unmatched", "unmatched, at the threshold", "px", "confidence")
    lines = [[name, file["kind"], *(file["video"][key] for key in keys)] for name, file in made]
    return markdown_table(["detector", "file", *header], lines)


def sizes_table(made: list[tuple[str, dict[str, Any]]]) -> str:
    """Return the differences of files with free sizes."""
    lines = [
        [name, " x ".join(map(str, size["shape"])), f"{size['px']:.2g}", f"{size['score']:.2g}"]
        for name, file in made
        for size in file.get("sizes", ())
    ]
    return markdown_table(["detector", "batch x height x width", "px", "score"], lines)


def named(value: str) -> tuple[str, Path]:
    """Parse `NAME=FILE`."""
    name, equals, path = value.partition("=")
    if not equals or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{value}: give NAME=FILE, a checkpoint that exists")
    return name, Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare exported files with their checkpoints.")
    parser.add_argument("--weights", nargs="+", type=named, required=True, metavar="NAME=FILE")
    parser.add_argument("--data", required=True, help="dataset YAML")
    parser.add_argument("--source", required=True, help="a video")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--vid-stride", type=int, default=10)
    parser.add_argument("--conf-thres", type=float, default=0.1)
    parser.add_argument("--keep", action="store_true", help="keep the detectors of an earlier run of the same settings")
    options = parser.parse_args()
    settings = {key: getattr(options, key) for key in ("imgsz", "vid_stride", "conf_thres")}
    settings |= {"data": Path(options.data).name, "source": Path(options.source).name}
    detectors: dict[str, Any] = {}
    before = RESULTS / f"{NAME}.json"
    if options.keep and before.is_file():
        old = json.loads(before.read_text(encoding="utf-8"))
        detectors = old["detectors"] if all(old[key] == value for key, value in settings.items()) else {}
    about = {**machine(CPU), **{package: version(package) for package in PACKAGES}}
    for name, weights in options.weights:
        with tempfile.TemporaryDirectory() as folder:
            detectors[name] = Bench(weights, options, Path(folder)).run()
        results = {"machine": about, **settings, "detectors": detectors}
        write_results(NAME, results, text(results))  # after each: a long run may be interrupted


if __name__ == "__main__":
    main()
