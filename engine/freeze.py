"""Freezing parts of a model by row or by name, and keeping them still."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from models.backbones.base import Backbone
from utils.errors import ConfigError


def rows_to_freeze(model: nn.Module, selection: Sequence[str]) -> list[int]:
    """Row numbers that `--freeze` means.

    Args:
        model: detector; its rows are `model.model`.
        selection: one number n = rows 0..n-1 (0 = none); several numbers = those rows; `backbone` = the backbone rows.

    Raises:
        ConfigError: neither a number nor `backbone`, a row that is not there, or no backbone row to freeze.
    """
    rows = list(model.get_submodule("model").children())
    if list(selection) == ["backbone"]:
        found = [i for i, row in enumerate(rows) if isinstance(row, Backbone)]
        if not found:
            raise ConfigError("--freeze backbone: no row of this model is a backbone; give row numbers instead")
        return found
    if not all(str(s).isdigit() for s in selection):
        raise ConfigError(f"--freeze {' '.join(selection)}: allowed are row numbers or the word 'backbone'")
    numbers = [int(s) for s in selection]
    wanted = list(range(numbers[0])) if len(numbers) == 1 else numbers
    beyond = [n for n in wanted if n >= len(rows)]
    if beyond:
        raise ConfigError(f"--freeze: row {beyond[0]} is not there; the model has rows 0 to {len(rows) - 1}")
    return wanted


def freeze_rows(model: nn.Module, rows: Sequence[int]) -> list[str]:
    """Switch gradients off in these rows.

    Returns:
        Names of the frozen parameters.
    """
    prefixes = tuple(f"model.{row}." for row in rows)
    frozen = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes) if prefixes else True)
        if not parameter.requires_grad:
            frozen.append(name)
    return frozen


def keep_still(model: nn.Module, rows: Sequence[int]) -> None:
    """Put frozen rows into evaluation mode, so that their batch statistics do not move either.

    Call it after every `model.train()`.
    """
    for row in rows:
        model.get_submodule(f"model.{row}").eval()
