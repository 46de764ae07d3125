"""Freezing of parameters by row, backbone stage or name (`--freeze`), and unfreezing."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from models.backbones.base import Backbone, wholly_inside
from models.yolo import DetectionModel
from utils.errors import ConfigError, did_you_mean

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frozen:
    """Parameters frozen by `--freeze`.

    Attributes:
        names: parameters without gradients, including those the backbone froze by itself.
        unfreeze: the subset that was trainable before.
    """

    names: frozenset[str] = frozenset()
    unfreeze: tuple[str, ...] = ()


def backbone_rows(model: DetectionModel) -> list[int]:
    """Return the rows of the backbone: `Backbone` modules, or else the rows of the YAML's section `backbone:`."""
    rows = [i for i, row in enumerate(model.model) if isinstance(row, Backbone)]
    return rows or [i for i, route in enumerate(model.model.routes) if route.layer.section == "backbone"]


def names_to_freeze(model: DetectionModel, selection: Sequence[str]) -> set[str]:
    r"""Return the names of the parameters that `--freeze` selects.

    Args:
        model: detector; its rows are `model.model`.
        selection: one number n = rows 0..n-1 (0 = none); several numbers = those rows; or words: `backbone`,
            `backbone:K` = its stem and first K stages (0 = the stem; of a plain YOLOv5 model: the first K rows), or a
            regular expression searched for in the names (`model\.24\.m`).

    Raises:
        ConfigError: no such row or stage, an invalid expression or one without a match, rows and words mixed.
    """
    numbers = [int(word) for word in selection if word.isdecimal()]
    if len(numbers) == len(selection):
        rows = list(range(min(numbers[0], len(model.model) + 1))) if len(numbers) == 1 else numbers
        beyond = [n for n in rows if n >= len(model.model)]
        hint = _stages_hint(model, rows) if len(numbers) == 1 else ""
        if beyond:
            raise ConfigError(f"--freeze: no row {beyond[0]}; the model has rows 0 to {len(model.model) - 1}{hint}")
        if hint:
            LOGGER.warning("--freeze %d: freezes rows 0 to %d%s", numbers[0], rows[-1], hint)
        return _of_rows(model, rows)
    if numbers:
        raise ConfigError(
            f"--freeze {' '.join(selection)}: give row numbers, or words (backbone:2, model.24), not both"
        )
    return set().union(*(_by_word(model, word) for word in selection))


def _stages_hint(model: DetectionModel, rows: Sequence[int]) -> str:
    """Return how to freeze stages if these rows contain a backbone that is one row, and rows of the neck."""
    own = backbone_rows(model)
    backbone = model.model[own[0]] if own else None
    if not isinstance(backbone, Backbone) or not set(own) < set(rows):
        return ""
    return (
        f"; the whole backbone ({type(backbone).__name__}) is row {own[0]}, the others are neck and head: to freeze "
        f"its stem and first K stages: --freeze backbone:K, K = 0 to {backbone.num_stages}"
    )


def _of_rows(model: DetectionModel, rows: Sequence[int]) -> set[str]:
    prefixes = tuple(f"model.{row}." for row in rows)
    return {name for name, _ in model.named_parameters() if prefixes and name.startswith(prefixes)}


def _by_word(model: DetectionModel, word: str) -> set[str]:
    kind, colon, stages = word.partition(":")
    if kind == "backbone":
        if not colon:
            return _of_rows(model, backbone_rows(model))
        if not stages.isdecimal():
            raise ConfigError(f"--freeze {word}: the number of stages is missing, as in backbone:2")
        return _of_stages(model, int(stages))
    names = [name for name, _ in model.named_parameters()]
    try:
        matches = {name for name in names if re.search(word, name)}
    except re.error as error:
        raise ConfigError(
            f"--freeze {word}: neither a row, nor backbone[:K], nor a regular expression: {error}"
        ) from error
    if not matches:
        near = did_you_mean(word, ["backbone", *names, *(name.rsplit(".", 1)[0] for name in names)])
        raise ConfigError(f"--freeze {word}: matches no parameter name; allowed: rows, backbone, backbone:K{near}")
    return matches


def _of_stages(model: DetectionModel, stages: int) -> set[str]:
    rows = backbone_rows(model)
    names: set[str] = set()
    for row in rows:
        backbone = model.model[row]
        if not isinstance(backbone, Backbone):
            if stages > len(rows):
                raise ConfigError(
                    f"--freeze backbone:{stages}: the backbone has {len(rows)} rows; allowed: 0 to {len(rows)}"
                )
            return _of_rows(model, rows[:stages])
        if stages > backbone.num_stages:
            allowed = f"{type(backbone).__name__} has {backbone.num_stages} stages"
            raise ConfigError(f"--freeze backbone:{stages}: {allowed}; allowed: 0 to {backbone.num_stages}")
        own = (name for name, _ in backbone.named_parameters() if backbone.stage_of(name) <= stages)
        names |= {f"model.{row}.{name}" for name in own}
    return names


def freeze(model: nn.Module, names: set[str]) -> Frozen:
    """Disable gradients of these parameters; the result records which of them were trainable."""
    trainable = tuple(name for name, p in model.named_parameters() if name in names and p.requires_grad)
    for name in trainable:
        model.get_parameter(name).requires_grad_(False)
    return Frozen(frozenset(names), trainable)


def unfreeze(model: nn.Module, frozen: Frozen) -> None:
    """Revert `freeze`; batch statistics are updated again after the next `model.train()`."""
    for name in frozen.unfreeze:
        model.get_parameter(name).requires_grad_(True)


def eval_frozen(model: nn.Module, frozen: Frozen) -> None:
    """Put fully frozen modules into evaluation mode, so that their batch statistics are not updated either.

    Call it after every `model.train()`.
    """
    for module in wholly_inside(model, frozen.names):
        module.eval()


def log_frozen(model: DetectionModel, frozen: Frozen) -> None:
    """Log the frozen tensors and parameters of each row."""
    for index, row in enumerate(model.model):
        own = dict(row.named_parameters())
        selected = [p for name, p in own.items() if f"model.{index}.{name}" in frozen.names]
        if selected:
            size, kind = sum(p.numel() for p in selected), type(row).__name__
            counts = len(selected), len(own), size
            LOGGER.info("freezing row %d (%s): %d of %d tensors, %d parameters", index, kind, *counts)
