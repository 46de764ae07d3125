"""Detection on images, videos and streams (detect.py).

Three threads work at once: one reads, decodes and letterboxes frames; the main thread runs inference and NMS; a third
one draws and writes. Bounded queues between them keep the order.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
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
from engine.predict.inference import NmsSettings, Prepared, as_tensor, infer, prepare
from engine.predict.pipeline import Drain, Feed
from engine.predict.progress import Progress
from engine.predict.tiles import TiledRuntime, tile_settings
from engine.predict.writers import FileNames, Outputs, open_outputs, write_image
from engine.runtimes.base import Runtime
from engine.runtimes.pytorch import PyTorchRuntime, check_size
from engine.runtimes.registry import CHECKPOINT_SUFFIXES, choose_weights, open_runtime, sides_for, split_device
from models.checkpoint.io import strip
from models.eigencam import heat_maps
from utils.device import Profile, describe_device, select_device
from utils.draw import feature_map_image, heat_map_sheet
from utils.errors import ConfigError
from utils.files import ROOT, make_folder, make_run_folder, warn_of_earlier_files
from utils.log import set_error_folder
from utils.structures import to_unit

LOGGER = logging.getLogger(__name__)
AHEAD = 4  # frames decoded ahead of the network, and frames waiting to be written


@dataclass(frozen=True)
class DetectReport:
    """Result of a detection run.

    Attributes:
        folder: folder of the output files; None if no files were requested.
        frames: number of images and frames processed.
        detections: number of boxes.
        failures: one line per input that could not be read, and per file that could not be written.
        seconds: per frame, of preprocessing, inference, and NMS.
        elapsed_s: seconds from the first frame to the last file.
    """

    folder: Path | None
    frames: int
    detections: int
    failures: tuple[str, ...]
    seconds: tuple[float, float, float]
    elapsed_s: float


def detect(config: DetectConfig) -> DetectReport:
    """Run detection and write the requested files.

    Raises:
        UserError: options, weights or sources that cannot be used; nothing has been written then.
        KeyboardInterrupt: Ctrl-C, after the files have been completed (a live source just ends).
    """
    load_plugins(config.plugin)
    warn_without_effect(config)
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
        raise ConfigError("--visualize: shows layers of a PyTorch model; give a .pt file as --weights")
    if config.visualize and config.tile is not None:
        raise ConfigError("--visualize: shows whole images; leave --tile out")
    with open_source(resolve_source(config.source), config.vid_stride) as source:
        sides = sides_for(runtime, config.imgsz, config.is_given("imgsz"))
        size = input_size(sides, runtime)
        check_size(runtime, *size)
        predictor = Predictor(runtime, config, names, size)
        report = predictor.run(source)
    if config.update:
        for path in weights:
            strip(Path(path))
            LOGGER.info("%s: rewritten without its training state", path)
    return report


def warn_without_effect(config: DetectConfig) -> None:
    """Log a warning for every given option that has no effect with the other options."""
    drawn = config.view_img or not config.nosave
    rules = (
        ("save_conf", not config.save_txt, "no label files are written; add --save-txt"),
        ("save_format", not config.save_txt, "no label files are written; add --save-txt"),
        ("line_thickness", not drawn, "--nosave draws nothing"),
        ("hide_labels", not drawn, "--nosave draws nothing"),
        ("hide_conf", config.hide_labels or not drawn, "no captions are drawn"),
    )
    for name, useless, reason in rules:
        if useless and config.is_given(name):
            LOGGER.warning("--%s has no effect: %s", name.replace("_", "-"), reason)


def resolve_source(text: str) -> str:
    """Return the source as given, or the project's `data/images` if the working directory has none."""
    default = DetectConfig.source
    shipped = ROOT / default
    return str(shipped) if text == default and not Path(text).exists() and shipped.exists() else text


def check_display() -> None:
    """Raise a ConfigError when windows cannot be shown (OpenCV would abort the whole program)."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ConfigError("--view-img: there is no display (DISPLAY is not set); leave it out and open the files")
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
    """Return (height, width) of the input: `imgsz` rounded up to multiples of the stride, or the file's fixed size.

    Raises:
        ConfigError: more than two numbers.
    """
    if len(imgsz) > 2:
        raise ConfigError(f"--imgsz: {len(imgsz)} numbers; allowed are one (square) or two (height width)")
    asked = (imgsz[0], imgsz[-1])
    if runtime.imgsz is not None:
        if tuple(runtime.imgsz) != asked:
            LOGGER.info("--imgsz %d %d: the model has a fixed input of %d x %d, which is used", *asked, *runtime.imgsz)
        return runtime.imgsz
    stride = runtime.stride
    height, width = (-(-side // stride) * stride for side in asked)
    if (height, width) != asked:
        LOGGER.warning("--imgsz %d %d: rounded up to %d %d, multiples of the stride %d", *asked, height, width, stride)
    return height, width


def confidence_threshold(config: DetectConfig, runtime: Runtime) -> float:
    """Return the confidence threshold, for `auto` the one stored in the weights.

    Raises:
        ConfigError: `auto`, and none is stored.
    """
    if config.conf_thres != "auto":
        return float(config.conf_thres)
    stored: float | None = getattr(runtime, "best_conf", None)
    if stored is None:
        raise ConfigError(f"--conf-thres auto: {', '.join(config.weights)}: no threshold is stored; give a number")
    LOGGER.info("Confidence threshold %.3f (--conf-thres auto)", stored)
    return stored


class Predictor:
    """Runs a detector over a source and passes the detections to the writers.

    Args:
        runtime: the detector.
        config: the options.
        names: class names by number.
        size: (height, width) of the input, multiples of the runtime's stride.

    Attributes:
        preprocess_time, inference_time, nms_time: accumulated over all frames.
    """

    def __init__(self, runtime: Runtime, config: DetectConfig, names: Mapping[int, str], size: tuple[int, int]) -> None:
        self.runtime, self.config, self.names, self.size = runtime, config, names, size
        self.style = DrawStyle(names, config.line_thickness, not config.hide_labels, not config.hide_conf)
        c = config
        conf_thres = confidence_threshold(c, runtime)
        self.nms = NmsSettings(conf_thres, c.iou_thres, c.classes, c.agnostic_nms, max_det=c.max_det)
        tiles = tile_settings(c)
        self._tiled = TiledRuntime(runtime, tiles, size, self.nms) if tiles else None
        self.preprocess_time, self.inference_time = Profile(), Profile(runtime.device)
        self.nms_time = Profile(runtime.device)
        self.folder: Path | None = None
        self._frames = self._detections = 0
        self._file_names = FileNames()
        self._features_of: set[int] = set()

    def run(self, source: Source) -> DetectReport:
        """Process the source to its end."""
        self.runtime.warmup((1, 3, *self.size))
        outputs = self._outputs()
        start = time.perf_counter()
        feed = Feed(self._prepared(source), depth=1 if source.live else AHEAD)
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
        with closing(Progress(self.names, self.config.vid_stride)) as progress:
            for prepared in feed:
                for number, found in enumerate(self.predict(prepared)):
                    drawn = annotated(found, self.style) if self.config.view_img else None
                    drain.put((found, drawn))
                    progress.show(found)
                    if self.config.visualize:
                        self._write_features(found.frame, prepared.images[number : number + 1])
                    if drawn is not None and show(found.frame, drawn):
                        return

    def _prepared(self, source: Source) -> Generator[Prepared, None, None]:
        auto = self.runtime.imgsz is None
        for frames in source:
            if self._tiled is not None:
                yield from (Prepared((frame,), as_tensor(frame.image), letterboxed=False) for frame in frames)
                continue
            with self.preprocess_time:
                prepared = prepare(frames, self.size, self.runtime.stride, auto)
            yield prepared

    def predict(self, prepared: Prepared) -> list[Detections]:
        """Run `infer` on one batch, and count its frames and detections."""
        out = infer(self._tiled or self.runtime, prepared, self.nms, self.inference_time, self.nms_time)
        self._frames += len(prepared.frames)
        self._detections += sum(len(d.boxes) for d in out)
        return out

    def _outputs(self) -> Outputs:
        """Create the run folder if files are requested, and return the writers."""
        c = self.config
        if c.nosave and not (c.save_txt or c.save_csv or c.save_json or c.save_crop or c.visualize):
            return Outputs()
        self.folder = make_run_folder(Path(c.project) / c.name, c.exist_ok)
        set_error_folder(self.folder)
        warn_of_earlier_files(self.folder)
        return open_outputs(c, self.folder, self.style, self._file_names)

    def _write_features(self, frame: Frame, image: torch.Tensor) -> None:
        """Write features/<stem>/*.png for an image (1, 3, H, W), or for the first frame of a video or stream."""
        assert isinstance(self.runtime, PyTorchRuntime) and self.folder is not None
        if frame.number in self._features_of:
            return
        self._features_of.add(frame.number)
        model = self.runtime.models[0]
        pixels = to_unit(image.to(self.runtime.device), self.runtime.dtype)
        maps = model.feature_maps(pixels)
        folder = make_folder(self.folder / "features" / self._file_names.stem_for(frame))
        shown = cv2.cvtColor(image[0].permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2BGR).astype(np.uint8)
        for slot, features in maps.items():
            row, _, rest = slot.partition("_")  # 01_..., 02_..., so that file names sort in network order
            write_image(folder / f"{row:>02}_{rest}.png", feature_map_image(features[0], slot, shown))
        heats = {level: heat[0].numpy() for level, heat in heat_maps(model, pixels).items()}
        write_image(folder / "eigencam.png", heat_map_sheet(shown, heats, "EigenCAM of the maps that the head reads"))
        LOGGER.info("%s: feature maps of %d slots and heat maps in %s", frame.origin, len(maps), folder)

    def _report(self, source: Source, outputs: Outputs, elapsed: float) -> DetectReport:
        stages = self.preprocess_time, self.inference_time, self.nms_time
        preprocess, inference, nms = (stage.total / max(self._frames, 1) for stage in stages)
        LOGGER.info(
            "Speed per image at %dx%d: %.1f ms preprocess, %.1f ms inference, %.1f ms NMS; %d image(s), %.1f images/s "
            "overall", *self.size, 1000 * preprocess, 1000 * inference, 1000 * nms, self._frames,
            self._frames / max(elapsed, 1e-9),
        )  # fmt: skip
        if self.folder is not None:
            LOGGER.info("Results saved to %s", self.folder)
        if source.failures:
            LOGGER.warning("%d input(s) could not be read: %s", len(source.failures), "; ".join(source.failures))
        failures = (*source.failures, *outputs.failures)
        seconds = (preprocess, inference, nms)
        return DetectReport(self.folder, self._frames, self._detections, failures, seconds, elapsed)


def show(frame: Frame, drawn: NDArray[np.uint8]) -> bool:
    """Show the annotated frame (H, W, 3) in a window; return True if `q` or Escape was pressed."""
    cv2.imshow(frame.path.name if frame.kind == "live" else "detect", drawn)
    return cv2.waitKey(0 if frame.kind == "image" else 1) & 0xFF in (ord("q"), 27)
