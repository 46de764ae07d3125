"""Reading and writing of detector checkpoints: our format, and official YOLOv5 files.

Our file is a dictionary of plain values and tensors, which `torch.load(weights_only=True)` reads: `format`
(`detector-1`), `spec`, `names`, `stride`, `state`, `epoch`, `metadata`, `train`. `state` contains the weights to use
(the averaged ones) in float32. `train` is what a resumed run needs; a finished run has none.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.checkpoint.inert import PLAIN_TYPES, Inert, LoadedFile, contents, errors_of
from models.checkpoint.official import official_content
from models.checkpoint.state_dict import shorten, tensors_in
from utils.errors import CheckpointError
from utils.files import atomic_path

LOGGER = logging.getLogger(__name__)
FORMAT = "detector-1"
REQUIRED = ("spec", "names", "stride", "state")
OWN_TYPES: dict[str, tuple[type, ...]] = {
    "spec": (dict,),
    "names": (dict, list),
    "stride": (list, tuple),
    "state": (dict,),
    "epoch": (int,),
    "metadata": (dict,),
    "train": (dict, type(None)),
}


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint file.

    Attributes:
        path: the file.
        source: 'own' or 'official'.
        spec: the model as a plain mapping, as stored; `models.loading` builds models from it without fetching weights.
        state: the weights to use, float32, in module order.
        names: class index -> name.
        stride: input pixels per cell of each level.
        epoch: last finished epoch, from 0; -1 for a finished run.
        metadata: plain values about the run (options, hyperparameters, date ...).
        train: what a resumed run needs, or None. Of an official file: `model` (the raw weights, stored as float16),
            `optimizer`, `updates` (of the average), `best_fitness`, `opt`, `hyp`.
    """

    path: Path
    source: str
    spec: dict[str, Any]
    state: dict[str, Tensor]
    names: dict[int, str]
    stride: tuple[float, ...]
    epoch: int = -1
    metadata: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] | None = None

    @property
    def nc(self) -> int:
        """Number of classes."""
        return len(self.names)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of ours or of the official project without executing anything of it.

    Raises:
        CheckpointError: one line: missing, damaged, another kind of file, or a pickle with names that are not part of a
            YOLOv5 model.
    """
    file = LoadedFile(Path(path))
    value = file.value
    entries = list(value.values()) if isinstance(value, dict) else [value]
    official = any(isinstance(entry, Inert) for entry in entries)
    with errors_of(file.path):
        content = official_content(file) if official else _own_content(file)
        return Checkpoint(
            path=file.path,
            source="official" if official else "own",
            spec=content["spec"],
            state=_finite(_float32(content["state"]), file.path),
            names=_class_names(content["names"], file.path),
            stride=_strides(content["stride"], file.path),
            epoch=content.get("epoch", -1),
            metadata=content.get("metadata") or {},
            train=content.get("train"),
        )


def write_checkpoint(path: str | Path, mapping: Mapping[str, Any]) -> Path:
    """Write a checkpoint of ours atomically; it is read back with `weights_only=True` before it gets its name.

    Args:
        path: final file; an existing one is replaced only by a complete one.
        mapping: `spec` (see `models.loading.spec_without_weights`), `names`, `stride`, `state`, and optionally `epoch`,
            `metadata` and `train`. NumPy scalars become numbers, paths strings, `state` float32.

    Raises:
        CheckpointError: a key is missing, a value is neither plain nor a tensor (names its key), or the disk is full.
    """
    lacking = [key for key in REQUIRED if key not in mapping]
    if lacking:
        raise CheckpointError(f"{path}: a checkpoint needs {', '.join(REQUIRED)}; '{lacking[0]}' was not given")
    values = {key: _storable(value, key, str(path)) for key, value in mapping.items()}
    values |= {"format": FORMAT, "state": _float32(values["state"])}
    with atomic_path(path) as temporary:
        try:
            torch.save(values, temporary)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as either
            free = shutil.disk_usage(temporary.parent).free / 2**20
            kept = "; the earlier file is unchanged" if Path(path).is_file() else ""
            raise CheckpointError(f"{path}: cannot be written ({free:.0f} MiB are free on its disk){kept}") from error
        written = torch.load(temporary, map_location="cpu", weights_only=True)
        lost = [key for key, value in values.items() if _fingerprint(written.get(key)) != _fingerprint(value)]
        if lost:
            raise CheckpointError(f"{path}: '{lost[0]}' was not stored as it was given; nothing was written")
    return Path(path)


def strip(path: Path) -> None:
    """Rewrite a checkpoint in our format without its training state, if the file exists."""
    if not path.is_file():
        return
    c = read_checkpoint(path)
    if c.source == "official":
        LOGGER.warning("%s: is rewritten in the format of this project, which YOLOv5 cannot read", path)
    content = {"format": FORMAT, "spec": c.spec, "names": c.names, "stride": list(c.stride), "state": c.state}
    write_checkpoint(path, content | {"epoch": c.epoch, "metadata": dict(c.metadata)})


def _own_content(file: LoadedFile) -> dict[str, Any]:
    """Check and return a file that contains plain values and tensors only."""
    path, value = file.path, file.value
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        if isinstance(value, dict) and str(value.get("format", "")).startswith("detector-"):
            raise CheckpointError(f"{path}: written by another version: format {value['format']!r}, not {FORMAT!r}")
        entries = list(tensors_in(value))
        if entries:
            raise CheckpointError(
                f"{path}: a bare state dict ({len(entries)} tensors: {shorten(entries, 2)}) without a model; "
                "weights of a backbone go into its row of the model YAML as 'weights: <path>'"
            )
        raise CheckpointError(f"{path}: not a checkpoint of a detector (found: {contents(value)})")
    for key, allowed in OWN_TYPES.items():
        if (key in value or key in REQUIRED) and not isinstance(value.get(key), allowed):
            found = type(value[key]).__name__ if key in value else "nothing"
            raise CheckpointError(f"{path}: '{key}' is {found}; {allowed[0].__name__} is needed")
    if not all(isinstance(entry, Tensor) for entry in value["state"].values()):
        raise CheckpointError(f"{path}: 'state' contains values that are not tensors")
    content: dict[str, Any] = file.plain(value, keep_tensors=True)
    return content


def _class_names(names: object, path: Path) -> dict[int, str]:
    """Return names by class index, from a list or a dictionary."""
    pairs = list(names.items() if isinstance(names, dict) else enumerate(names if isinstance(names, list) else ()))
    if not pairs or sorted(map(str, dict(pairs))) != sorted(map(str, range(len(pairs)))):
        raise CheckpointError(f"{path}: 'names' must name the classes 0..n-1, found {str(names)[:80]}")
    return {int(index): str(name) for index, name in sorted(pairs, key=lambda pair: int(pair[0]))}


def _strides(values: object, path: Path) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, (int, float)) and v > 0 for v in values):
        raise CheckpointError(f"{path}: 'stride' must be a list of positive numbers, found {str(values)[:80]}")
    return tuple(float(value) for value in values)


def _finite(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the weights, or raise a CheckpointError for the first that is NaN or infinite (masks may be infinite)."""
    for key, value in state.items():
        if value.is_floating_point() and "mask" not in key and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{path}: weight '{key}' is not finite (NaN or infinity); use an earlier checkpoint")
    return state


def _float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _storable(value: object, key: str, where: str) -> Any:  # noqa: ANN401 (of the kind that was given)
    """Return `value` as plain values and tensors; CheckpointError with the key of anything else."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        # A view would be saved with the whole storage behind it.
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if whole else tensor.clone()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        wrong = [name for name in value if type(name) not in (str, int, float, bool)]
        if wrong:
            raise CheckpointError(f"{where}: '{key}' has a key of type {type(wrong[0]).__name__}, not str or int")
        return {name: _storable(entry, f"{key}.{name}", where) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_storable(entry, f"{key}[{index}]", where) for index, entry in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if type(value) in PLAIN_TYPES:
        return value
    raise CheckpointError(f"{where}: '{key}' is a {type(value).__name__}, not a plain value or a tensor")


def _fingerprint(value: object) -> object:
    """Return `value` with shape and dtype for tensors and text for plain values (NaN equals itself), to compare by."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, dict):
        return [(key, _fingerprint(entry)) for key, entry in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [_fingerprint(entry) for entry in value]
    return type(value), repr(value)
