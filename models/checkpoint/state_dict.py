"""Reading of published weights files, and loading of a state dict into a module with a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoint.inert import LoadedFile, contents
from utils.errors import CheckpointError, did_you_mean

WRAPPERS = ("module.", "backbone.", "model.")  # prefixes that training frameworks add to the keys of the network
MIN_MATCHED = 0.9
# Keys under which training scripts store the state dict.
WRAPPED_STATES = ("state_dict", "model", "model_state", "model_state_dict", "state_dict_ema", "state")

KeyMap = Callable[[str], str | None]
Resize = Callable[[str, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class LoadReport:
    """Outcome of every entry; keys are the module's own, except those of `unexpected`, which are the file's.

    Attributes:
        matched: entries copied unchanged.
        resized: entries copied after resizing (position embeddings).
        missing: entries of the module that are not in the file; they keep their initial values.
        unexpected: entries of the file that were not used, each with the reason.
        mismatched: entries with a different shape, not copied: key, the file's shape, the module's shape.
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
        """Number of entries copied from the file."""
        return len(self.matched) + len(self.resized)

    def summary(self) -> str:
        """Return one line: `Transferred 228/234 items; 6 new: norm0.weight, ...; 2 of the file not used: ...`."""
        parts = [f"Transferred {self.transferred}/{self.total} items"]
        shapes = [f"{key} {list(shape)} -> {list(target)}" for key, shape, target in self.mismatched]
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
    """Return the first `count` items joined by commas, with `...` if there are more."""
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a published weights file: a state dict, bare or under `state_dict`, `model`, `model_state` ...

    Returns:
        Key -> CPU tensor, as stored. Other entries of the file (options, a pickled module) are ignored, never executed.

    Raises:
        CheckpointError: missing, damaged, or not a weights file.
    """
    file = LoadedFile(Path(path), strict=False)
    state = tensors_in(file.value)
    if not state:
        raise CheckpointError(
            f"{path}: no weights in it (found: {contents(file.value)}); "
            "a state dict is needed: torch.save(model.state_dict(), path)"
        )
    return {key: file.tensor(value) for key, value in state.items()}


def tensors_in(value: object) -> dict[str, Tensor]:
    """Return the tensors of a state dict, bare or wrapped; empty if there are none."""
    if not isinstance(value, Mapping):
        return {}
    entries = {key: entry for key, entry in value.items() if isinstance(key, str) and isinstance(entry, Tensor)}
    return entries or next((inner for key in WRAPPED_STATES if (inner := tensors_in(value.get(key)))), {})


def upgraded(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of an earlier version of `module` with the current keys; a current one unchanged.

    A submodule whose layers were merged since defines `upgrade_state(state, prefix)`, which replaces its old entries by
    their concatenation along the first dimension, in place.
    """
    state = dict(state)
    for name, part in module.named_modules():
        if hasattr(part, "upgrade_state"):
            part.upgrade_state(state, f"{name}." if name else "")
    return state


def entries_merged(module: nn.Module, keys: Iterable[str]) -> dict[str, int]:
    """Return how many entries of a state dict with these keys become one in `upgraded`, by the key of the result."""
    ones = upgraded(module, {key: torch.ones(1) for key in keys})
    return {key: value.numel() for key, value in ones.items()}


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
    """Copy `state` into `module` by name; the module is changed only if the check passes.

    A key of the file is looked up unchanged, then without the wrappers `module.`, `backbone.`, `model.`. Values are
    cast to the dtype and moved to the device of their target.

    Args:
        module: any module; its parameters and buffers are written in place.
        state: entries of the file.
        partial: accept different shapes and any number of missing entries.
        key_map: the file's key -> the module's key; None for one that is known but not needed.
        ignore: glob patterns of the file's keys that are known but not needed (`head.*`).
        allow_new: glob patterns of the module's keys that may be missing from the file (`norm0.*`).
        resize: called as `resize(key, value, target)` if shapes differ; returns a tensor shaped like `target` or None.
        where: name of the file, for messages.

    Returns:
        The outcome of every entry.

    Raises:
        CheckpointError: two entries for one key; or, unless `partial`, a different shape, or fewer than 90 % of the
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
    """Return entries by the module's keys, in the module's order, and unused keys of the file with a reason."""
    routed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    unexpected: list[tuple[str, str]] = []
    for key, value in state.items():
        names = list(_unwrapped(key))
        if any(fnmatchcase(name, pattern) for name in names for pattern in ignore):
            unexpected.append((key, "not needed"))
            continue
        targets = [key_map(name) if key_map else name for name in names]
        target = next((t for t in targets if t is not None and t in own), None)
        if target is None:
            unexpected.append((key, "no such entry" if any(t is not None for t in targets) else "not needed"))
        elif target in origin:
            raise CheckpointError(f"{where}: '{origin[target]}' and '{key}' are both for '{target}'")
        else:
            routed[target], origin[target] = value, key
    return {key: routed[key] for key in own if key in routed}, unexpected


def _unwrapped(key: str) -> Iterator[str]:
    """Yield the key, then the key with one wrapper after another removed."""
    yield key
    while (prefix := next((w for w in WRAPPERS if key.startswith(w)), None)) is not None:
        key = key[len(prefix) :]
        yield key


def _check(report: LoadReport, name: str, allow_new: Sequence[str], where: str) -> None:
    """Raise a CheckpointError if less was loaded than required."""
    if report.mismatched:
        key, shape, target = report.mismatched[0]
        others = f" (and {len(report.mismatched) - 1} more)" if len(report.mismatched) > 1 else ""
        raise CheckpointError(f"{where}: '{key}' has shape {list(shape)}, {name} needs {list(target)}{others}")
    # BatchNorm did not count its batches before torch 0.4.1; the count is not used with a fixed momentum.
    patterns = (*allow_new, "*num_batches_tracked")
    lacking = [key for key in report.missing if not any(fnmatchcase(key, pattern) for pattern in patterns)]
    needed = report.transferred + len(lacking)
    if report.transferred < MIN_MATCHED * needed:
        spare = [key for key, reason in report.unexpected if reason == "no such entry"]
        raise CheckpointError(
            f"{where}: holds {report.transferred} of the {needed} entries of {name}; "
            f"missing: {shorten(lacking)}; not used: {shorten(spare) or 'none'}{did_you_mean(lacking[0], spare)}"
        )
