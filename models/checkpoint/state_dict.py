"""Put a state dict into a module, and say what went where: nothing is left out in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from utils.errors import CheckpointError, did_you_mean

WRAPPERS = ("module.", "backbone.", "model.")  # what training frameworks put before the keys of the network itself
MIN_MATCHED = 0.9

KeyMap = Callable[[str], str | None] | Mapping[str, str]
Resize = Callable[[str, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class LoadReport:
    """What became of every entry; keys are the module's own, but those of `unexpected` are the file's.

    Attributes:
        matched: entries copied as they are.
        resized: entries copied after a change of size (position embeddings).
        missing: entries of the module that the file does not have; they keep the values they were made with.
        unexpected: entries of the file that were not used, each with the reason.
        mismatched: entries of another shape: key, the file's shape, the module's shape; not copied.
    """

    matched: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[tuple[str, str], ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def total(self) -> int:
        """Number of entries in the module's state dict."""
        return len(self.matched) + len(self.resized) + len(self.missing) + len(self.mismatched)

    @property
    def transferred(self) -> int:
        """Number of entries that now hold values of the file."""
        return len(self.matched) + len(self.resized)

    def summary(self) -> str:
        """One line: `Transferred 228/234 items; 6 new: norm0.weight, ...; 2 of the file not used: ...`."""
        parts = [f"Transferred {self.transferred}/{self.total} items"]
        shapes = [f"{key} {list(found)} -> {list(wanted)}" for key, found, wanted in self.mismatched]
        reasons = [f"{key} ({reason})" for key, reason in self.unexpected]
        for title, items in (
            ("resized", self.resized),
            ("new", self.missing),
            ("of another shape", shapes),
            ("of the file not used", reasons),
        ):
            if items:
                parts.append(f"{len(items)} {title}: {shorten(items)}")
        return "; ".join(parts)


def shorten(items: Sequence[str], count: int = 4) -> str:
    """The first `count` items, and whether there are more, for a one-line message."""
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")


def load_state(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    partial: bool = False,
    key_map: KeyMap | None = None,
    ignore: Sequence[str] = (),
    allow_new: Sequence[str] = (),
    resize: Resize | None = None,
    where: str = "weights",
) -> LoadReport:
    """Copy `state` into `module`, entry by entry, by name; the module is changed only when the whole fits.

    A key of the file is looked up as it stands, then without the wrappers `module.`, `backbone.`, `model.`. Values are
    cast to the type and moved to the device of the entry they fill.

    Args:
        module: any module; its parameters and buffers are written in place.
        state: entries of the file.
        partial: accept wrong shapes and any number of missing entries.
        key_map: the file's key -> the module's key; None (or no entry) for one that is known and not needed.
        ignore: glob patterns of the file's keys that are known and not needed (`head.*`).
        allow_new: glob patterns of the module's keys that the file need not have (`norm0.*`).
        resize: called as `resize(key, value, target)` when shapes differ; gives a tensor like `target`, or None.
        where: the file, for messages.

    Raises:
        CheckpointError: two entries for one key; or, unless `partial`, a wrong shape, or fewer than 90 % of the
            module's entries (without those of `allow_new`) are in the file.
    """
    own = module.state_dict()
    values, unexpected = _route(own, state, key_map, ignore, where)
    ready: dict[str, Tensor] = {}
    resized, mismatched = [], []
    for key, value in values.items():
        fitted: Tensor | None = value
        if value.shape != own[key].shape:
            fitted = resize(key, value, own[key]) if resize else None
            if fitted is None or fitted.shape != own[key].shape:
                mismatched.append((key, tuple(value.shape), tuple(own[key].shape)))
                continue
            resized.append(key)
        ready[key] = fitted  # type: ignore[assignment]
    report = LoadReport(
        matched=tuple(key for key in ready if key not in resized),
        resized=tuple(resized),
        missing=tuple(key for key in own if key not in values),
        unexpected=tuple(unexpected),
        mismatched=tuple(mismatched),
    )
    if not partial:
        _check(report, type(module).__name__, allow_new, where)
    with torch.no_grad():
        for key, value in ready.items():
            own[key].copy_(value)
    return report


def _route(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], key_map: KeyMap | None, ignore: Sequence[str], where: str
) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """The file's entries under the module's keys, in the module's order; and those without a place, with a reason."""
    routed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    unexpected: list[tuple[str, str]] = []
    mapped = key_map.get if isinstance(key_map, Mapping) else key_map
    for key, value in state.items():
        names = list(_unwrapped(key))
        if any(fnmatchcase(name, pattern) for name in names for pattern in ignore):
            unexpected.append((key, "not needed"))
            continue
        targets = [mapped(name) if mapped else name for name in names]
        target = next((t for t in targets if t is not None and t in own), None)
        if target is None:
            known = mapped is not None and all(t is None for t in targets)
            unexpected.append((key, "not needed" if known else "no such entry"))
        elif target in origin:
            raise CheckpointError(f"{where}: '{origin[target]}' and '{key}' are both for '{target}'")
        else:
            routed[target], origin[target] = value, key
    return {key: routed[key] for key in own if key in routed}, unexpected


def _unwrapped(key: str) -> Iterator[str]:
    """The key as it stands, then with one wrapper after the other taken off."""
    yield key
    while (prefix := next((w for w in WRAPPERS if key.startswith(w)), None)) is not None:
        key = key[len(prefix) :]
        yield key


def _check(report: LoadReport, name: str, allow_new: Sequence[str], where: str) -> None:
    """CheckpointError when less was loaded than was asked for."""
    if report.mismatched:
        key, found, wanted = report.mismatched[0]
        others = f" (and {len(report.mismatched) - 1} more)" if len(report.mismatched) > 1 else ""
        raise CheckpointError(f"{where}: '{key}' has shape {list(found)}, {name} needs {list(wanted)}{others}")
    # BatchNorm did not count its batches before torch 0.4.1; the count plays no part with a fixed momentum.
    patterns = (*allow_new, "*num_batches_tracked")
    lacking = [key for key in report.missing if not any(fnmatchcase(key, pattern) for pattern in patterns)]
    needed = report.transferred + len(lacking)
    if report.transferred < MIN_MATCHED * needed:
        spare = [key for key, reason in report.unexpected if reason == "no such entry"]
        raise CheckpointError(
            f"{where}: holds {report.transferred} of the {needed} entries of {name}; "
            f"missing: {shorten(lacking)}; not used: {shorten(spare) or 'none'}{did_you_mean(lacking[0], spare)}"
        )
