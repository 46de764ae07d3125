"""Checkpoints: ours and official YOLOv5 ones are read without executing anything; ours are written whole or not at all.

Our file is a dictionary of plain values and tensors, which `torch.load(weights_only=True)` reads: `format`
(`detector-1`), `spec`, `names`, `stride`, `state`, `epoch`, `metadata`, `train`. `state` are the weights to use (the
averaged ones), in float32. `train` is what a resumed run needs; a finished run has none. An official file is a pickled
module: see `models.checkpoint.official`.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from models.checkpoint.file_kinds import existing_file
from models.checkpoint.inert_pickle import TensorRef
from models.checkpoint.official import DETECTION_CLASSES, Tensors, detection_module, module_state, plain, read_pickled
from models.checkpoint.state_dict import LoadReport, load_state, shorten
from models.transfer import transfer_rows
from utils.errors import CheckpointError, SpecError
from utils.files import atomic_path

if TYPE_CHECKING:
    from models.yolo import DetectionModel

__all__ = [
    "FORMAT",
    "Checkpoint",
    "LoadReport",
    "load_detector",
    "load_state",
    "read_checkpoint",
    "read_state_dict",
    "spec_without_weights",
    "transfer_weights",
    "write_checkpoint",
]

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
# What torch.load raises on damaged files, besides the refusal to execute (UnpicklingError).
READ_ERRORS = (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError)
WRAPPED_STATES = ("state_dict", "model", "model_state", "model_state_dict", "state_dict_ema", "state")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        path: the file.
        source: 'own' or 'official'.
        spec: the model as a plain mapping, ready for `DetectionModel(spec)`; names no weights to fetch.
        state: the weights to use, float32, in module order.
        names: class index -> name.
        stride: input pixels per cell of each level.
        epoch: last finished epoch, from 0; -1 for a finished run.
        metadata: plain values about the run (options, hyper-parameters, date ...).
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
        CheckpointError: one line: not there, damaged, another kind of file, or a pickle that names anything that is no
            part of a YOLOv5 model.
    """
    path = existing_file(Path(path))
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return _read_official(path)
    except READ_ERRORS as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({_one_line(error)})") from error
    return _own(path, loaded)


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> DetectionModel:
    """Build the detector that a checkpoint holds.

    Args:
        path: our file or an official one.
        device: where the model goes.

    Returns:
        The model in evaluation mode, float32, with the names of the file.

    Raises:
        CheckpointError: as `read_checkpoint`; or the weights do not fit the model described beside them.
    """
    from models.yolo import DetectionModel  # which imports the backbones, and they this module

    checkpoint = read_checkpoint(path)
    try:
        model = DetectionModel(deepcopy(checkpoint.spec))
    except SpecError as error:
        reasons = "; ".join(str(error).splitlines())
        raise CheckpointError(f"{path}: the model described in it cannot be built: {reasons}") from error
    # A published model whose BatchNorms were folded has none left in its keys.
    folded = not any(key.endswith("running_mean") for key in checkpoint.state)
    if folded and any(key.endswith("running_mean") for key in model.state_dict()):
        model.eval().fuse()
    _load_exactly(model, checkpoint)
    model.names = dict(checkpoint.names)
    return model.float().eval().to(device)


def _load_exactly(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Load every entry; all that does not fit goes into one message."""
    report = load_state(model, checkpoint.state, partial=True, where=str(checkpoint.path))
    wrong = [f"missing '{key}'" for key in report.missing]
    wrong += [f"'{key}' has shape {list(found)}, needs {list(wanted)}" for key, found, wanted in report.mismatched]
    wrong += [f"unknown '{key}'" for key, _ in report.unexpected]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path}: {len(wrong)} weights do not fit the model described in it: {shorten(wrong, 8)}"
        )


def write_checkpoint(path: str | Path, mapping: Mapping[str, Any]) -> Path:
    """Write a checkpoint of ours: whole or not at all, and readable with `weights_only=True` (it is read back).

    Args:
        path: final file; a file of that name is replaced only by a whole one.
        mapping: `spec`, `names`, `stride`, `state`, and what else is wanted (`epoch`, `metadata`, `train`). NumPy
            scalars become numbers, paths text, `state` float32; `spec` names no weights to fetch any more.

    Raises:
        CheckpointError: a key is missing, or a value is neither plain nor a tensor (names its key); a full disk.
    """
    lacking = [key for key in REQUIRED if key not in mapping]
    if lacking:
        raise CheckpointError(f"{path}: a checkpoint needs {', '.join(REQUIRED)}; '{lacking[0]}' was not given")
    values = {key: _storable(value, key, str(path)) for key, value in mapping.items()}
    values |= {"format": FORMAT, "spec": spec_without_weights(values["spec"]), "state": _float32(values["state"])}
    with atomic_path(path) as temporary:
        try:
            torch.save(values, temporary)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as either
            free = shutil.disk_usage(temporary.parent).free / 2**20
            kept = "; the earlier file is as it was" if Path(path).is_file() else ""
            raise CheckpointError(f"{path}: cannot be written ({free:.0f} MiB are free on its disk){kept}") from error
        written = torch.load(temporary, map_location="cpu", weights_only=True)
        difference = _difference(values, written, "")
        if difference:
            raise CheckpointError(f"{path}: '{difference}' was not stored as it was given; nothing was written")
    return Path(path)


def transfer_weights(
    model: DetectionModel, checkpoint: Checkpoint, exclude: Sequence[str] = ("anchor",), partial: bool = False
) -> LoadReport:
    """Start `model` from the weights of another run (`--weights` with `--cfg`, or with another number of classes).

    Rows are matched by meaning, never by their number or by a shape that happens to be equal: see `models.transfer`. Of
    a head with another number of classes nothing is taken, as in YOLOv5.

    Args:
        model: changed in place.
        checkpoint: from `read_checkpoint`.
        exclude: entries whose key contains one of these texts keep their values.
        partial: take what agrees row by row, however little it is.

    Raises:
        CheckpointError: the two networks have too little in common, unless `partial`.
    """
    return transfer_rows(
        model, checkpoint.spec, checkpoint.state, exclude=exclude, partial=partial, where=str(checkpoint.path)
    )


def spec_without_weights(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a model mapping whose backbone rows ask for no pretrained weights.

    A model that is rebuilt from a checkpoint gets its weights from there; fetching others first would need a network.
    Of a backbone's arguments `weights: ...`, `pretrained: ...`, `pretrained` and `True` go.
    """
    plain_spec = deepcopy(dict(spec))
    for section in ("backbone", "head"):
        if isinstance(plain_spec.get(section), (list, tuple)):
            plain_spec[section] = [_row_without_weights(row) for row in plain_spec[section]]
    return plain_spec


def _row_without_weights(row: Any) -> Any:
    from models.backbones import is_backbone_name  # which may import this module

    if not isinstance(row, (list, tuple)) or len(row) != 4 or not is_backbone_name(str(row[2])):
        return row
    if isinstance(row[3], Mapping):
        return [*row[:3], _without_weights(row[3])]
    if not isinstance(row[3], (list, tuple)):
        return row
    return [*row[:3], [_without_weights(value) for value in row[3] if value is not True and value != "pretrained"]]


def _without_weights(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: entry for key, entry in value.items() if key not in ("weights", "pretrained", "partial_weights")}


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a published weights file: a state dict, as it is or under `state_dict`, `model`, `model_state` ...

    Returns:
        Key -> tensor on the CPU, as stored; other entries of the file are left out.

    Raises:
        CheckpointError: not there, damaged, or not a file of weights. What else the file holds (options, a pickled
            module) is never executed.
    """
    path = existing_file(Path(path))
    tensors: Tensors | None = None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # options of the run, say, as an object
        loaded, tensors = read_pickled(path, strict=False)
    except READ_ERRORS as error:
        raise CheckpointError(f"{path}: cannot be read as a file of weights ({_one_line(error)})") from error
    found = _state_in(loaded)
    if not found:
        raise CheckpointError(
            f"{path}: no weights in it (found: {_contents(loaded)}); "
            "a state dict is needed: torch.save(model.state_dict(), path)"
        )
    return {key: tensors.get(value) if tensors else value for key, value in found.items()}


def _state_in(loaded: object) -> dict[str, Any]:
    """The tensors (or what stands for them) of a state dict, however it is wrapped; empty when there are none."""
    if not isinstance(loaded, Mapping):
        return {}
    entries = {str(key): value for key, value in loaded.items() if isinstance(value, (Tensor, TensorRef))}
    if entries:
        return entries
    return next((inner for key in WRAPPED_STATES if (inner := _state_in(loaded.get(key)))), {})


def _own(path: Path, loaded: object) -> Checkpoint:
    """Check a file that holds plain values and tensors only."""
    if not isinstance(loaded, dict) or loaded.get("format") != FORMAT:
        if isinstance(loaded, dict) and str(loaded.get("format", "")).startswith("detector-"):
            raise CheckpointError(f"{path}: written by another version: format {loaded['format']!r}, not {FORMAT!r}")
        entries = list(_state_in(loaded))
        if entries:
            raise CheckpointError(
                f"{path}: a bare state dict ({len(entries)} tensors: {shorten(entries, 2)}) without a model; "
                "weights of a backbone go into its row of the model YAML as 'weights: <path>'"
            )
        raise CheckpointError(f"{path}: not a checkpoint of a detector (found: {_contents(loaded)})")
    for key, allowed in OWN_TYPES.items():
        if (key in loaded or key in REQUIRED) and not isinstance(loaded.get(key), allowed):
            found = type(loaded[key]).__name__ if key in loaded else "nothing"
            raise CheckpointError(f"{path}: '{key}' is {found}; {allowed[0].__name__} is needed")
    if not all(isinstance(value, Tensor) for value in loaded["state"].values()):
        raise CheckpointError(f"{path}: 'state' holds values that are no tensors")
    return Checkpoint(
        path=path,
        source="own",
        spec=spec_without_weights(loaded["spec"]),
        state=_float32(loaded["state"]),
        names=_class_names(loaded["names"], path),
        stride=_strides(loaded["stride"], path),
        epoch=int(loaded.get("epoch", -1)),
        metadata=loaded.get("metadata") or {},
        train=loaded.get("train"),
    )


def _read_official(path: Path) -> Checkpoint:
    value, tensors = read_pickled(path)
    module = detection_module(value, str(path))
    attributes = {key: plain(module.state.get(key), tensors) for key in ("yaml", "names", "stride", "hyp")}
    spec = spec_without_weights(attributes["yaml"])  # type: ignore[arg-type]
    # Heads of before 2021 keep pixel anchors beside the grid anchors; they follow from anchors and strides.
    state = {key: t for key, t in module_state(module, tensors).items() if not key.endswith(".anchor_grid")}
    if not state:
        raise CheckpointError(f"{path}: the pickled {DETECTION_CLASSES[0]} has no weights")
    whole = value if isinstance(value, dict) else {}
    about = {key: plain(whole.get(key), tensors) for key in ("opt", "git", "date", "wandb_id", "best_fitness")}
    epoch = whole.get("epoch")
    return Checkpoint(
        path=path,
        source="official",
        spec=spec,
        state=state,
        names=_class_names(attributes["names"] or _numbered(spec), path),
        stride=_strides(attributes["stride"] or [32.0], path),
        epoch=epoch if isinstance(epoch, int) else -1,
        metadata={"hyp": attributes["hyp"], **about},
        train=_official_train(whole, about, attributes["hyp"], tensors),
    )


def _official_train(
    whole: Mapping[object, object], about: Mapping[str, object], hyp: object, tensors: Tensors
) -> dict[str, Any] | None:
    """The training state of an unfinished official run; None when it was stripped."""
    model = whole.get("model")
    if not isinstance(whole.get("optimizer"), dict) or model is None:
        return None
    fitness: Any = about["best_fitness"] or [0.0]
    return {
        "model": module_state(detection_module({"model": model}, tensors.where), tensors),
        "optimizer": plain(whole["optimizer"], tensors, keep_tensors=True),
        "updates": plain(whole.get("updates"), tensors),
        "best_fitness": float(np.ravel(fitness)[0]),
        "opt": about["opt"],
        "hyp": hyp,
    }


def _class_names(names: object, path: Path) -> dict[int, str]:
    """Names by class index, from a list or a dictionary."""
    pairs = list(names.items() if isinstance(names, dict) else enumerate(names if isinstance(names, list) else ()))
    if not pairs or sorted(map(str, dict(pairs))) != sorted(map(str, range(len(pairs)))):
        raise CheckpointError(f"{path}: 'names' must name the classes 0..n-1, found {str(names)[:80]}")
    return {int(index): str(name) for index, name in sorted(pairs, key=lambda pair: int(pair[0]))}


def _strides(values: object, path: Path) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, (int, float)) and v > 0 for v in values):
        raise CheckpointError(f"{path}: 'stride' must be a list of positive numbers, found {str(values)[:80]}")
    return tuple(float(value) for value in values)


def _numbered(spec: Mapping[str, Any]) -> list[str]:
    return [f"class{index}" for index in range(spec["nc"])] if isinstance(spec.get("nc"), int) else []


def _float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _storable(value: Any, key: str, where: str) -> Any:
    """`value` as plain values and tensors; CheckpointError with the key of what is neither."""
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
            raise CheckpointError(f"{where}: '{key}' has a key of type {type(wrong[0]).__name__}; use text or numbers")
        return {name: _storable(entry, f"{key}.{name}", where) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_storable(entry, f"{key}[{index}]", where) for index, entry in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    kinds: tuple[Callable[..., Any], ...] = (bool, int, float, str, bytes)
    exact = next((kind for kind in kinds if type(value) is kind), None)
    if value is None or exact is not None:
        return value
    raise CheckpointError(f"{where}: '{key}' is a {type(value).__name__}; a checkpoint holds plain values and tensors")


def _difference(given: Any, found: Any, key: str) -> str:
    """The key of the first value that was stored differently, else an empty text. Of tensors type and shape count."""
    if isinstance(given, Tensor):
        same = isinstance(found, Tensor) and found.shape == given.shape and found.dtype == given.dtype
        return "" if same else key
    if isinstance(given, dict):
        if not isinstance(found, dict) or list(given) != list(found):
            return key
        return next((d for name in given if (d := _difference(given[name], found[name], f"{key}.{name}"))), "")
    if isinstance(given, (list, tuple)):
        if type(found) is not type(given) or len(found) != len(given):
            return key
        return next((d for i, v in enumerate(given) if (d := _difference(v, found[i], f"{key}[{i}]"))), "")
    same_value = type(found) is type(given) and (found == given or given != given)
    return "" if same_value else key


def _contents(loaded: object) -> str:
    return f"keys {shorten([str(key) for key in loaded], 6)}" if isinstance(loaded, Mapping) else type(loaded).__name__


def _one_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
