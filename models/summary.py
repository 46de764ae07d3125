"""Model summary: parameters, operations, and the table of rows."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from models.build.dry_run import call_on_meta
from models.build.rows import Route, Rows
from models.common import Conv
from utils.device import synchronize
from utils.draw import feature_map_image
from utils.files import atomic_path, make_folder
from utils.log import aligned

LOGGER = logging.getLogger(__name__)
# A norm per element: subtract the mean, multiply by 1 / std and by the weight, add the bias. The counter of PyTorch
# leaves norms out; YOLOv5's summaries count them, and in small models they are 2 %.
NORM_FLOPS = 4
NORMS = frozenset(
    getattr(namespace, name)
    for namespace in (torch, functional)
    for name in ("batch_norm", "group_norm", "instance_norm", "layer_norm")
)
PARTS = ("backbone", "neck", "head")


class PartSize(NamedTuple):
    """Size of a part of a detector.

    Attributes:
        name: one of `PARTS`.
        parameters: number of parameters.
        gflops: operations in 1e9 for one image; NaN where they cannot be counted.
    """

    name: str
    parameters: int
    gflops: float

    def __str__(self) -> str:
        return f"{self.name} {self.parameters:,} parameters, {self.gflops:.1f} GFLOPs"


class ModelInfo(NamedTuple):
    """Size of a model.

    Attributes:
        layers: modules without submodules, as YOLOv5 counts them.
        parameters: number of parameters.
        gradients: number of those that are trained.
        gflops: operations (a multiply-add is two) in 1e9 for one image; NaN where they cannot be counted.
        parts: the same for backbone, neck and head of a detector; empty for other modules.
    """

    layers: int
    parameters: int
    gradients: int
    gflops: float
    parts: tuple[PartSize, ...] = ()

    def __str__(self) -> str:
        whole = (
            f"{self.layers} layers, {self.parameters:,} parameters, {self.gradients:,} gradients, "
            f"{self.gflops:.1f} GFLOPs"
        )
        return f"{whole}\n{'; '.join(map(str, self.parts))}" if self.parts else whole


def summarize(model: nn.Module, channels: int, height: int, width: int, rows: Rows | None = None) -> ModelInfo:
    """Count modules, parameters and the operations for an image of height x width pixels.

    Args:
        model: takes one image batch.
        channels: of the image.
        height, width: in pixels.
        rows: those of a detector, to count its parts too.
    """
    parameters = list(model.parameters())
    modules = list(rows) if rows is not None else []
    total, by_row = _gflops(model, (1, channels, height, width), modules)
    return ModelInfo(
        layers=_count_layers(model),
        parameters=sum(p.numel() for p in parameters),
        gradients=sum(p.numel() for p in parameters if p.requires_grad),
        gflops=total,
        parts=_parts(rows, by_row) if rows is not None else (),
    )


def _parts(rows: Rows, gflops: Sequence[float]) -> tuple[PartSize, ...]:
    """Return the sizes of backbone (the rows of that section), neck (all between) and head (the last row)."""
    parameters, operations = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0.0)
    for module, route, count in zip(rows, rows.routes, gflops, strict=True):
        last = route is rows.routes[-1]
        part = "head" if last else "backbone" if route.layer.section == "backbone" else "neck"
        parameters[part] += sum(p.numel() for p in module.parameters())
        operations[part] += count
    return tuple(PartSize(part, parameters[part], operations[part]) for part in PARTS)


def _gflops(model: nn.Module, shape: Sequence[int], modules: Sequence[nn.Module]) -> tuple[float, list[float]]:
    """Return the GFLOPs of the whole model, and of each of `modules`."""
    try:
        total, counts = _count(model, shape, modules)
    except (RuntimeError, TypeError) as error:  # a backbone of the user that needs real values
        LOGGER.info("GFLOPs are not counted: %s", str(error).splitlines()[0])
        return math.nan, [math.nan] * len(modules)
    return total / 1e9, [count / 1e9 for count in counts]


def _count_layers(model: nn.Module) -> int:
    """Count modules without submodules as YOLOv5 does.

    Its convolutions share one default activation, and a folded norm is no longer a module.
    """
    convs = [module for module in model.modules() if isinstance(module, Conv)]
    shared = sum(conv.has_default_act for conv in convs)
    folded = sum(isinstance(conv.bn, nn.Identity) for conv in convs)
    leaves = sum(1 for module in model.modules() if not any(module.children()))
    return leaves - max(shared - 1, 0) - folded


def count_flops(model: nn.Module, shape: Sequence[int]) -> int:
    """Return the operations of one forward pass in evaluation mode, counted on shapes alone (nothing is computed).

    Args:
        model: takes one image batch. Its mode and values do not change.
        shape: (B, C, H, W).
    """
    return _count(model, shape, ())[0]


def _count(model: nn.Module, shape: Sequence[int], modules: Sequence[nn.Module]) -> tuple[int, list[int]]:
    """Return the operations of the model, and of each of the modules in it."""
    matmuls, norms = FlopCounterMode(display=False), _NormCounter()

    def total() -> int:
        return matmuls.get_total_flops() + norms.flops

    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    with evaluating(model), torch.no_grad(), matmuls, norms, _counting(modules, total) as counts:
        call_on_meta(model, torch.empty(tuple(shape), device="meta", dtype=dtype))
    return total(), counts


@contextmanager
def _counting(modules: Sequence[nn.Module], total: Callable[[], int]) -> Iterator[list[int]]:
    """Collect the operations of each module while the model runs; `total` returns those so far."""
    counts = [0] * len(modules)

    def before(place: int) -> None:
        counts[place] -= total()

    def after(place: int) -> None:
        counts[place] += total()

    handles = []
    for place, module in enumerate(modules):
        handles.append(module.register_forward_pre_hook(lambda _module, _args, at=place: before(at)))
        handles.append(module.register_forward_hook(lambda _module, _args, _out, at=place: after(at)))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


class _NormCounter(TorchFunctionMode):
    """Count the operations of norms at the functions a model calls.

    Which aten operators a norm becomes, and whether `FlopCounterMode` looks up a formula for them, depends on the
    PyTorch version: 2.6 to 2.14 decompose `native_batch_norm` before its formula is found.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in NORMS:
            self.flops += NORM_FLOPS * (args[0] if args else kwargs["input"]).numel()
        return func(*args, **kwargs)  # runs without this mode, so a norm counts once


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode inside the block and restore each module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def level_name(stride: int) -> str:
    """Return `P3` for stride 8; `stride12` for one that is not a power of two."""
    return f"P{stride.bit_length() - 1}" if stride & (stride - 1) == 0 else f"stride{stride}"


def row_label(route: Route, stride: int) -> str:
    """Return a name of a row's map that is a valid file name: `17_C3_P3`."""
    module = route.layer.module.removeprefix("nn.").replace("/", "-")
    return f"{route.layer.row}_{module}_{level_name(stride)}"


def layer_table(rows: Rows, width: int | None = None) -> str:
    """Return one line per row: slot, from, n, params, output channels@stride, module with its arguments.

    Args:
        rows: of a detector.
        width: characters of a line, to which the arguments are cut; None = all of them.
    """
    lines: list[tuple[str, ...]] = [("slot", "from", "n", "params", "output", "module")]
    lines += [_table_line(module, route) for module, route in zip(rows, rows.routes, strict=True)]
    table = aligned(lines, left=(4, 5))
    return "\n".join(line if width is None or len(line) <= width else f"{line[: width - 3]}..." for line in table)


def _table_line(module: nn.Module, route: Route) -> tuple[str, ...]:
    sources = route.layer.sources
    levels = " ".join(f"{level.channels}@{level.stride}" for level in route.levels)
    return (
        f"{route.slot}-{route.slot + 4}" if route.gives_levels else str(route.slot),
        _shown(sources[0] if len(sources) == 1 else tuple(sources)),
        str(route.repeats),
        str(sum(p.numel() for p in module.parameters())),
        levels or "predictions",
        f"{route.layer.module} {_shown(route.layer.args if route.gives_levels else route.arguments)}",
    )


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    return str(value)


def recorded_maps(rows: Rows, image: Tensor) -> dict[str, Tensor]:
    """Run the rows and keep the maps of each but the head.

    Returns:
        (B, C, H, W) by `row_label`, in the order of the rows.
    """
    maps: dict[str, Tensor] = {}

    def keep(route: Route, out: Tensor | Sequence[Tensor]) -> None:
        results = (out,) if isinstance(out, Tensor) else out
        for level, result in zip(route.levels, results, strict=False):
            maps[row_label(route, level.stride)] = result.detach()

    handles = [
        module.register_forward_hook(lambda _module, _args, out, route=route: keep(route, out))
        for module, route in zip(rows, rows.routes, strict=True)
    ]
    try:
        rows(image)
    finally:
        for handle in handles:
            handle.remove()
    return maps


def save_maps(maps: Mapping[str, Tensor], image: Tensor, folder: Path) -> None:
    """Write feature maps (B, C, H, W) of the first image (B, 3, H, W) in [0, 1] to `folder/<label>.png`."""
    shown = (image[0].float().cpu().permute(1, 2, 0) * 255).byte().numpy()[..., ::-1]
    make_folder(folder)
    for label, features in maps.items():
        drawn = feature_map_image(features[0], label, np.ascontiguousarray(shown))
        with atomic_path(folder / f"{label}.png") as part:
            part.write_bytes(cv2.imencode(".png", drawn)[1].tobytes())


def time_table(rows: Rows, image: Tensor) -> str:
    """Run the rows on an image (B, C, H, W) and return a table of milliseconds per row."""
    begin: dict[int, float] = {}
    times = [0.0] * len(rows)

    def finish(index: int) -> None:
        synchronize(image.device)
        times[index] = 1000 * (time.perf_counter() - begin[index])

    def start(index: int) -> None:
        synchronize(image.device)
        begin[index] = time.perf_counter()

    handles = []
    for index, module in enumerate(rows):
        handles.append(module.register_forward_pre_hook(lambda _module, _args, at=index: start(at)))
        handles.append(module.register_forward_hook(lambda _module, _args, _out, at=index: finish(at)))
    try:
        with torch.no_grad():
            rows(image)
    finally:
        for handle in handles:
            handle.remove()
    lines = [f"{'time (ms)':>10}  {'params':>10}  module"]
    for module, route, milliseconds in zip(rows, rows.routes, times, strict=True):
        count = sum(p.numel() for p in module.parameters())
        lines.append(f"{milliseconds:>10.2f}  {count:>10}  {route.layer.row} {route.layer.module}")
    return "\n".join([*lines, f"{sum(times):>10.2f}  {'':>10}  total"])
