"""Errors that a user can fix: one line each, printed by the scripts without a traceback (exit status 2)."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Sequence

MAX_MESSAGE = 4000
"""Maximum length of an error message, in characters."""

MAX_HIDDEN = 10_000
"""Characters that `shown` searches for passwords: longer values are first cut in the middle."""

HIDDEN = "***"
"""Replacement written by `hide_passwords`."""

_KEY = r"[\w.\-]{0,24}(?:pass?|psw|pwd|token|key|secret|auth|sig|sign|signature|credential|session|login|user|usr)"
_SCHEME = r"((?:://|(?<![a-z])(?:https?|rtsps?|rtmp\w?|ftps?|tcp|udp|srt|rtp):/(?!/)))"  # pathlib writes http:/host
_SECRETS = tuple(
    (re.compile(pattern, re.IGNORECASE), r"\1***" + end)
    for pattern, end in (
        (rf"{_SCHEME}[^\s/?#]*@", "@"),  # user and password
        (rf"{_SCHEME}(?!\*{{3}}@)[^\s/@]*:(?!\d{{1,5}}/)[^\s@]*@", "@"),  # a password that contains a slash
        (rf"((?:[?&;,/_#]|(?<=\*)){_KEY}[\w.\-]{{0,24}}=)(?:[^&\s;,'\":]|:(?!\s|$))*", ""),
    )
)


def hide_passwords(text: str) -> str:
    """Return the text with users, passwords and keys in its URLs replaced by `***`.

    >>> hide_passwords("rtsp://user:secret@10.0.0.8/live?token=1")
    'rtsp://***@10.0.0.8/live?token=***'
    """
    if ":/" not in text:
        return text
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def printable(text: str) -> str:
    """Return the text as it may be shown in a terminal: control and direction characters escaped, passwords hidden."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c in "\n\t\u3000\xa0" else ascii(c)[1:-1] for c in text)
    return hide_passwords(text)


def one_line(text: object) -> str:
    """Replace the line breaks of a text, such as a library's message or a file name, by spaces."""
    return re.sub(r"\s*\n\s*", " ", str(text).strip("\r\n"))


class _Shown(reprlib.Repr):
    """Hides passwords before a string is cut: cutting may remove the `@` that marks them."""

    def repr_str(self, x: str, level: int) -> str:
        half = MAX_HIDDEN // 2
        return super().repr_str(hide_passwords(x if len(x) <= MAX_HIDDEN else x[:half] + x[-half:]), level)


def shown(value: object, limit: int = 80) -> str:
    """Return `repr(value)` for a message, cut at `limit` characters without ever building a longer text."""
    short = _Shown()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 4, limit, limit, limit
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 8
    try:
        text = short.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"an integer of {value.bit_length() if isinstance(value, int) else '?'} bits"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def listed(names: Sequence[object], most: int = 12) -> str:
    """Return names for a message: the first ones, each cut at 80 characters, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + more


class UserError(ValueError):
    """A mistake in user input (file, name, value), reported in one line: where, what was found, what is allowed."""

    lines = False  # whether a message has one line per mistake

    def __init__(self, message: object = "") -> None:
        text = str(message)[: 2 * MAX_MESSAGE]
        text = printable(text if self.lines else one_line(text))
        super().__init__(text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ...")


class SpecError(UserError):
    """A model YAML that does not describe a network; a line for each mistake."""

    lines = True


class DataError(UserError):
    """A dataset, image, label or source that cannot be used."""


class CheckpointError(UserError):
    """A weights file that cannot be read, or that does not fit the model."""


class ConfigError(UserError):
    """An option, a hyperparameter or a configuration file with a value that is not allowed."""


class MemoryLimitError(ConfigError):
    """Images of a size or number for which the device has too little memory."""


class ExportError(UserError):
    """A model that cannot be exported to a format, or an exported file whose outputs differ from the model's."""


class TrainingError(RuntimeError):
    """A training that cannot continue for reasons other than user input; reported in one line, exit status 1."""


def did_you_mean(found: object, allowed: Iterable[str]) -> str:
    """Return an ending for an error message that suggests the allowed word nearest to `found`.

    Returns:
        `"; did you mean 'C3'?"`, or an empty string if nothing is near.
    """
    names = [str(name) for name in allowed]
    by_lower = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(str(found).lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean '{by_lower[near[0]]}'?" if near else ""
