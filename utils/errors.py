"""Errors that a user can fix: one line each, printed by the scripts without a traceback (exit status 2)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in user input (file, name, value), reported in one line: where, what was found, what is allowed."""


class SpecError(UserError):
    """A model YAML that does not describe a network."""


class DataError(UserError):
    """A dataset, image, label or source that cannot be used."""


class CheckpointError(UserError):
    """A weights file that cannot be read, or that does not fit the model."""


class ConfigError(UserError):
    """An option, a hyperparameter or a configuration file with a value that is not allowed."""


class ExportError(UserError):
    """A model that cannot be exported to a format, or an exported file whose outputs differ from the model's."""


class TrainingError(RuntimeError):
    """A training that cannot continue for reasons other than user input; reported in one line, exit status 1."""


def did_you_mean(found: object, allowed: Iterable[str]) -> str:
    """Return the ending of an error message that suggests the allowed word nearest to `found`.

    Returns:
        `"; did you mean 'C3'?"`, or an empty text when nothing is near.
    """
    names = [str(name) for name in allowed]
    by_lower = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(str(found).lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean '{by_lower[near[0]]}'?" if near else ""
