"""One pass of a built model over tensors without data: find rows that cannot run, and check the declared levels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models.build.rows import IMAGE, Route, Rows, padded
from models.build.spec import ModelSpec
from utils.errors import SpecError

LOGGER = logging.getLogger(__name__)
SIDE = 640  # pixels
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError, ArithmeticError, KeyError)


@torch.no_grad()
def dry_run(rows: Rows, spec: ModelSpec, height: int = SIDE, width: int = SIDE) -> None:
    """Run every row once on the meta device, where tensors have shapes only.

    Parameters, BatchNorm statistics and random generators stay as they are. A backbone that cannot run there at any
    size is skipped with a debug message, and its declared levels are used.

    Args:
        rows: of the model.
        spec: for the messages.
        height, width: of the image in pixels, rounded up to the model's multiple.

    Raises:
        SpecError: file, line and row of a module that fails in `forward`, or of a backbone whose maps are not the
            declared ones.
    """
    height, width = (-(-side // rows.size_multiple) * rows.size_multiple for side in (height, width))
    dtype = next((p.dtype for p in rows.parameters()), torch.float32)
    slots = {IMAGE: torch.empty(2, spec.channels or 3, height, width, device="meta", dtype=dtype)}
    for module, route in zip(rows, rows.routes, strict=True):
        maps = [slots[source] for source in route.sources]
        where = f"{spec.where(route.layer.line)}: row {route.layer.row} ({route.layer.module})"
        try:
            found = _run(module, route, maps)
        except FAILURES as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if not route.gives_levels or _runs_larger(module, route, maps[0]):
                shapes = ", ".join(str(tuple(x.shape[1:])) for x in maps)
                raise SpecError(
                    f"{where}: cannot run on a map of {shapes} (channels, height, width), from images of "
                    f"{height} x {width} pixels: {reason}"
                ) from error
            LOGGER.debug("%s: not run on the meta device: %s", where, reason)
            found = [_empty(maps[0], route, i) for i in range(len(route.levels))]
        if route.gives_levels:
            _check_levels(found, maps[0], route, where)
        slots |= {slot: x for slot, x in zip(route.outputs, found, strict=False) if slot is not None}


def call_on_meta(module: nn.Module, x: Tensor | list[Tensor]) -> Any:  # noqa: ANN401 (whatever the module returns)
    """Call a module on the meta device, without changing its parameters, buffers, or any random state.

    Args:
        module: on any device.
        x: its input, meta tensors (B, C, H, W).
    """
    state: dict[str, Tensor] = {}
    for prefix, part in module.named_modules():  # a shared module once: functional_call would restore it wrongly
        own = {"prefix": prefix, "recurse": False, "remove_duplicate": False}
        state |= {name: v.to("meta") for name, v in (*part.named_parameters(**own), *part.named_buffers(**own))}
    return functional_call(module, state, (x,), tie_weights=False)


def _run(module: nn.Module, route: Route, maps: list[Tensor]) -> Sequence[Tensor]:
    out = call_on_meta(module, maps if route.takes_list else padded(maps[0], route.pad_to))
    return list(out) if route.gives_levels else [out]


def _runs_larger(module: nn.Module, route: Route, source: Tensor) -> bool:
    """Return whether a backbone that failed with `source` (B, C, H, W) runs with the larger map of a `SIDE` square."""
    side = SIDE // route.in_stride
    if min(source.shape[2:]) >= side:
        return False
    try:
        _run(module, route, [source.new_empty(*source.shape[:2], side, side)])
    except FAILURES:
        return False
    return True


def _shape(source: Tensor, route: Route, index: int) -> tuple[int, int, int, int]:
    """Return the declared shape of a map of a backbone."""
    level, (batch, _, height, width) = route.levels[index], source.shape
    cells = [-(-side // route.pad_to) * route.pad_to * route.in_stride // level.stride for side in (height, width)]
    return batch, level.channels, cells[0], cells[1]


def _empty(source: Tensor, route: Route, index: int) -> Tensor:
    return torch.empty(_shape(source, route, index), device="meta")


def _check_levels(found: Sequence[Tensor], source: Tensor, route: Route, where: str) -> None:
    """Raise SpecError unless a backbone returns the maps that it declares."""
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in found]
    declared = [_shape(source, route, i) for i in range(len(route.levels))]
    if shapes != declared:
        listed = ", ".join(f"{level.channels}@{level.stride}" for level in route.levels)
        raise SpecError(
            f"{where}: declares the levels {listed} (channels@stride), so maps of {declared} for an image of "
            f"{tuple(source.shape)}, but returns {shapes}"
        )
