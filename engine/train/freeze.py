"""Freezing parts of a model by row, by backbone stage or by name, keeping them still, and thawing them again."""

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
    """What `--freeze` holds still.

    Attributes:
        names: parameters without gradients, those a backbone froze by itself among them.
        thaw: those of them that would learn otherwise.
    """

    names: frozenset[str] = frozenset()
    thaw: tuple[str, ...] = ()


def backbone_rows(model: DetectionModel) -> list[int]:
    """Rows of the model that hold its backbone: a `Backbone`, or else the rows of the YAML's section `backbone:`."""
    rows = [i for i, row in enumerate(model.model) if isinstance(row, Backbone)]
    return rows or [i for i, route in enumerate(model.model.routes) if route.layer.section == "backbone"]


def names_to_freeze(model: DetectionModel, selection: Sequence[str]) -> set[str]:
    """Names of the parameters that `--freeze` means.

    Args:
        model: detector; its rows are `model.model`.
        selection: one number n = rows 0..n-1 (0 = none); several numbers = those rows; or words: `backbone`,
            `backbone:K` = its stem and first K stages (0 = the stem; of a plain YOLOv5 model: the first K rows), or a
            regular expression that is searched for in the names (`model\\.24\\.m`).

    Raises:
        ConfigError: a row or a stage that is not there, an expression that is none or finds nothing, rows and words
            mixed.
    """
    numbers = [int(word) for word in selection if word.isdecimal()]
    if len(numbers) == len(selection):
        wanted = list(range(numbers[0])) if len(numbers) == 1 else numbers
        beyond = [n for n in wanted if n >= len(model.model)]
        if beyond:
            raise ConfigError(f"--freeze: row {beyond[0]} is not there; the model has rows 0 to {len(model.model) - 1}")
        return _of_rows(model, wanted)
    if numbers:
        raise ConfigError(
            f"--freeze {' '.join(selection)}: give row numbers, or words (backbone:2, model.24), not both"
        )
    return set().union(*(_by_word(model, word) for word in selection))


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
        found = {name for name in names if re.search(word, name)}
    except re.error as error:
        raise ConfigError(
            f"--freeze {word}: neither a row, nor backbone[:K], nor a regular expression: {error}"
        ) from error
    if not found:
        near = did_you_mean(word, ["backbone", *names, *(name.rsplit(".", 1)[0] for name in names)])
        raise ConfigError(f"--freeze {word}: is in no parameter's name; allowed: rows, backbone, backbone:K{near}")
    return found


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
    """Switch gradients off for these parameters; what is frozen already stays so."""
    thaw = tuple(name for name, p in model.named_parameters() if name in names and p.requires_grad)
    for name in thaw:
        model.get_parameter(name).requires_grad_(False)
    return Frozen(frozenset(names), thaw)


def unfreeze(model: nn.Module, frozen: Frozen) -> None:
    """Let learn again what `freeze` stopped; batch statistics move again after the next `model.train()`."""
    for name in frozen.thaw:
        model.get_parameter(name).requires_grad_(True)


def keep_still(model: nn.Module, frozen: Frozen) -> None:
    """Put what is wholly frozen into evaluation mode, so that its batch statistics do not move either.

    Call it after every `model.train()`.
    """
    for part in wholly_inside(model, frozen.names):
        part.eval()


def log_frozen(model: DetectionModel, frozen: Frozen) -> None:
    """Say what is frozen: a line per row."""
    for index, row in enumerate(model.model):
        own = [(name, p) for name, p in row.named_parameters()]
        still = [p for name, p in own if f"model.{index}.{name}" in frozen.names]
        if still:
            size = sum(p.numel() for p in still)
            kind = type(row).__name__
            LOGGER.info(
                "freezing row %d (%s): %d of %d tensors, %d parameters", index, kind, len(still), len(own), size
            )
