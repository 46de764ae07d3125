"""Detection on images, videos and streams.

Three things go on at once: a thread reads, decodes and fits frames into the network's input; the main thread runs the
network; a third thread draws and writes. Bounded queues lie between them and keep the order.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from data.config import load_data_config
from data.sources.files import open_source
from data.sources.frames import Frame, Source
from engine.cli.config import DetectConfig
from engine.cli.plugins import load_plugins
from engine.predict.detections import Detections, DrawStyle, annotated
from engine.predict.inference import NmsSettings, Prepared, infer, prepare
from engine.predict.pipeline import Drain, Feed
from engine.predict.progress import Progress
from engine.predict.writers import (
    CropWriter,
    CsvWriter,
    FileNames,
    ImageWriter,
    JsonWriter,
    LabelWriter,
    Outputs,
    Writer,
    write_image,
)
from engine.runtimes.base import Runtime
from engine.runtimes.pytorch import PyTorchRuntime
from engine.runtimes.registry import CHECKPOINT_SUFFIXES, choose_weights, open_runtime, split_device
from models.checkpoint.io import strip
from utils.device import Profile, describe_device, select_device
from utils.draw import feature_map_image
from utils.errors import ConfigError
from utils.files import ROOT, increment_path, make_folder
from utils.log import set_error_folder
from utils.structures import to_unit

LOGGER = logging.getLogger(__name__)
AHEAD = 4  # frames decoded ahead of the network, and frames waiting to be written


@dataclass(frozen=True)
class DetectReport:
    """What a run of detection did.

    Attributes:
        folder: where results are; None when nothing was to be written.
        frames: number of images and frames that went through the network.
        detections: number of boxes.
        failures: one line per input that could not be read.
        seconds: per frame, of preparation, network, and NMS.
        elapsed_s: from the first frame to the last file.
    """

    folder: Path | None
    frames: int
    detections: int
    failures: tuple[str, ...]
    seconds: tuple[float, float, float]
    elapsed_s: float


def detect(config: DetectConfig) -> DetectReport:
    """Detect as the options say, and write what they ask for.

    Raises:
        UserError: options, weights or sources that cannot be used; nothing has been written then.
        KeyboardInterrupt: Ctrl-C, after the files have been finished (a live source just ends).
    """
    load_plugins(config.plugin)
    if config.view_img:
        check_display()
    device_name, provider = split_device(config.device)
    device = select_device(device_name)
    weights = choose_weights(config.weights)
    runtime = open_runtime(
        weights, device, half=config.half, amp=config.amp, augment=config.augment, dnn=config.dnn, provider=provider
    )
    LOGGER.info("Detecting on %s", describe_device(device))
    if config.update and any(Path(path).suffix.lower() not in CHECKPOINT_SUFFIXES for path in weights):
        raise ConfigError(f"--update: rewrites checkpoints only; allowed: {', '.join(CHECKPOINT_SUFFIXES)}")
    names = class_names(runtime, config.data)
    check_classes(config.classes, names)
    if config.visualize and not isinstance(runtime, PyTorchRuntime):
        raise ConfigError("--visualize: looks into a PyTorch model; give a .pt file as --weights")
    with open_source(found_source(config.source), config.vid_stride) as source:
        predictor = Predictor(runtime, config, names, input_size(config.imgsz, runtime))
        report = predictor.run(source)
    if config.update:
        for path in weights:
            strip(Path(path))
            LOGGER.info("%s: rewritten without its training state", path)
    return report


def found_source(text: str) -> str:
    """Return the source as given, or the project's `data/images` if the working directory has none."""
    default = DetectConfig.source
    own = ROOT / default
    return str(own) if text == default and not Path(text).exists() and own.exists() else text


def check_display() -> None:
    """Raise a ConfigError when windows cannot be shown (OpenCV would abort the whole program)."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ConfigError("--view-img: there is no display (DISPLAY is not set); leave it out and look at the files")
    try:
        cv2.namedWindow("detect")
        cv2.destroyWindow("detect")
    except cv2.error as error:
        raise ConfigError(
            "--view-img: this OpenCV has no windows; pip install opencv-python instead of opencv-python-headless"
        ) from error


def class_names(runtime: Runtime, data: str) -> Mapping[int, str]:
    """Return the model's class names, or those of the dataset YAML if the model has none.

    Raises:
        ConfigError: the YAML has another number of classes.
    """
    names = runtime.names
    if not data or any(name != str(number) for number, name in names.items()):
        return names
    given = load_data_config(data).names
    if len(given) != len(names):
        raise ConfigError(f"--data {data}: has {len(given)} classes, the model has {len(names)}")
    return given


def check_classes(classes: Sequence[int] | None, names: Mapping[int, str]) -> None:
    """Raise a ConfigError for class numbers that the model does not have."""
    unknown = [c for c in classes or () if c not in names]
    if unknown:
        raise ConfigError(f"--classes {unknown[0]}: no such class; the model has 0 to {len(names) - 1}")


def input_size(imgsz: Sequence[int], runtime: Runtime) -> tuple[int, int]:
    """Height and width of the network's input: as asked for, rounded up to the model's grid; or its own fixed size.

    Raises:
        ConfigError: more than two numbers.
    """
    if len(imgsz) > 2:
        raise ConfigError(f"--imgsz: {len(imgsz)} numbers; allowed are one (square) or two (height width)")
    asked = (imgsz[0], imgsz[-1])
    if runtime.imgsz is not None:
        if tuple(runtime.imgsz) != asked:
            LOGGER.info("--imgsz %d %d: the model has a fixed input of %d %d, which is used", *asked, *runtime.imgsz)
        return runtime.imgsz
    stride = runtime.stride
    height, width = (-(-side // stride) * stride for side in asked)
    if (height, width) != asked:
        LOGGER.warning("--imgsz %d %d: made %d %d, multiples of the stride %d", *asked, height, width, stride)
    return height, width


@dataclass
class _Tally:
    """Running figures."""

    frames: int = 0
    detections: int = 0
    preparation: Profile = field(default_factory=Profile)


def _threshold(config: DetectConfig, runtime: Runtime) -> float:
    """Return the confidence threshold, for `auto` the one stored in the weights."""
    if config.conf_thres != "auto":
        return float(config.conf_thres)
    stored: float | None = getattr(runtime, "best_conf", None)
    if stored is None:
        raise ConfigError(f"--conf-thres auto: {', '.join(config.weights)}: no threshold is stored; give a number")
    LOGGER.info("Confidence threshold %.3f (--conf-thres auto)", stored)
    return stored


class Predictor:
    """Runs a detector over a source and hands the results to the writers.

    Args:
        runtime: the detector.
        config: the options.
        names: class names by number.
        size: (height, width) of the input, multiples of the runtime's stride.
    """

    def __init__(self, runtime: Runtime, config: DetectConfig, names: Mapping[int, str], size: tuple[int, int]) -> None:
        self.runtime, self.config, self.names, self.size = runtime, config, names, size
        self.style = DrawStyle(names, config.line_thickness, not config.hide_labels, not config.hide_conf)
        c = config
        self.nms = NmsSettings(_threshold(c, runtime), c.iou_thres, c.classes, c.agnostic_nms, max_det=c.max_det)
        self.network = Profile(runtime.device)
        self.nms_time = Profile(runtime.device)
        self.tally = _Tally()
        self.folder: Path | None = None
        self._features_shown: set[int] = set()

    def run(self, source: Source) -> DetectReport:
        """Process the source to its end."""
        self.runtime.warmup((1, 3, *self.size))
        outputs = self._outputs()
        start = time.perf_counter()
        depth = 1 if source.live else AHEAD
        feed = Feed(self._prepared(source), depth)
        drain = Drain(outputs.write, AHEAD)
        interrupted = False
        try:
            self._loop(feed, drain)
        except KeyboardInterrupt:
            interrupted = True
            LOGGER.warning("interrupted; finishing the files")
        finally:
            source.close()
            feed.close()
            try:
                drain.close()
            finally:
                outputs.close()
        report = self._report(source, outputs, time.perf_counter() - start)
        if interrupted and not source.live:  # Ctrl-C is how a live source ends
            raise KeyboardInterrupt
        return report

    def _loop(self, feed: Feed[Prepared], drain: Drain[tuple[Detections, NDArray[np.uint8] | None]]) -> None:
        with Progress(self.names, self.config.vid_stride) as progress:
            for prepared in feed:
                for number, found in enumerate(self.predict(prepared)):
                    drawn = annotated(found, self.style) if self.config.view_img else None
                    drain.put((found, drawn))
                    progress.show(found)
                    if self.config.visualize:
                        self._show_features(found.frame, prepared.images[number : number + 1])
                    if drawn is not None and show(found.frame, drawn):
                        return

    def _prepared(self, source: Source) -> Generator[Prepared, None, None]:
        auto = self.runtime.imgsz is None
        for frames in source:
            with self.tally.preparation:
                prepared = prepare(frames, self.size, self.runtime.stride, auto)
            yield prepared

    def predict(self, prepared: Prepared) -> list[Detections]:
        """Run one batch and count it; see `infer`."""
        count = len(prepared.frames)
        out = infer(self.runtime, prepared, self.nms, self.network, self.nms_time)
        self.tally.frames += count
        self.tally.detections += sum(len(d.boxes) for d in out)
        return out

    def _outputs(self) -> Outputs:
        """Return the writers that the options ask for, and the run folder if there are any."""
        c = self.config
        if c.nosave and not (c.save_txt or c.save_csv or c.save_json or c.save_crop or c.visualize):
            return Outputs()
        folder = self.folder = make_folder(increment_path(Path(c.project) / c.name, exist_ok=c.exist_ok))
        set_error_folder(folder)
        left = sum(path.is_file() for path in folder.rglob("*"))
        if left:
            LOGGER.warning(
                "--exist-ok: %s holds %d file(s) of earlier runs, which stay unless overwritten", folder, left
            )
        names = FileNames()
        writers: list[Writer] = []
        if not c.nosave:
            writers.append(ImageWriter(folder, self.style, names))
        if c.save_txt:
            writers.append(LabelWriter(folder / "labels", names, corners=c.save_format == 1, scores=c.save_conf))
        if c.save_csv:
            writers.append(CsvWriter(folder / "predictions.csv", self.names))
        if c.save_json:
            writers.append(JsonWriter(folder / "predictions.json", self.names))
        if c.save_crop:
            writers.append(CropWriter(folder / "crops", self.names, names))
        return Outputs(writers)

    def _show_features(self, frame: Frame, image: torch.Tensor) -> None:
        """features/<stem>/<slot>.png for an image, or for the first frame of a video or stream."""
        assert isinstance(self.runtime, PyTorchRuntime) and self.folder is not None
        if frame.number in self._features_shown:
            return
        self._features_shown.add(frame.number)
        model = self.runtime.models[0]
        maps = model.feature_maps(to_unit(image.to(self.runtime.device), self.runtime.dtype))
        folder = make_folder(increment_path(self.folder / "features" / frame.path.stem))
        shown = cv2.cvtColor(image[0].permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2BGR).astype(np.uint8)
        for slot, features in maps.items():
            row, _, rest = slot.partition("_")  # 01_..., 02_..., so that a listing has the order of the network
            write_image(folder / f"{row:>02}_{rest}.png", feature_map_image(features[0], slot, shown))
        LOGGER.info("%s: feature maps of %d slots in %s", frame.origin, len(maps), folder)

    def _report(self, source: Source, outputs: Outputs, elapsed: float) -> DetectReport:
        frames = max(self.tally.frames, 1)
        totals = (self.tally.preparation.total, self.network.total, self.nms_time.total)
        seconds = (totals[0] / frames, totals[1] / frames, totals[2] / frames)
        LOGGER.info(
            "Per image at %dx%d: %.1f ms preparation, %.1f ms network, %.1f ms NMS; %d image(s), %.1f a second in all",
            *self.size, *(1000 * s for s in seconds), self.tally.frames, self.tally.frames / max(elapsed, 1e-9),
        )  # fmt: skip
        for writer in outputs.writers:
            if isinstance(writer, LabelWriter):
                LOGGER.info("%d label file(s) in %s", writer.files, self.folder and self.folder / "labels")
        if self.folder is not None:
            LOGGER.info("Results saved to %s", self.folder)
        lost = [line for writer in outputs.writers for line in getattr(writer, "failures", ())]
        if source.failures:
            LOGGER.warning("%d input(s) could not be read: %s", len(source.failures), "; ".join(source.failures))
        return DetectReport(
            self.folder, self.tally.frames, self.tally.detections, (*source.failures, *lost), seconds, elapsed
        )


def show(frame: Frame, drawn: NDArray[np.uint8]) -> bool:
    """Show the annotated frame (H, W, 3) in a window; return True if `q` or Escape was pressed."""
    cv2.imshow(frame.path.name if frame.kind == "live" else "detect", drawn)
    return cv2.waitKey(0 if frame.kind == "image" else 1) & 0xFF in (ord("q"), 27)
