"""Official YOLOv5 checkpoints: pickled module objects, read as data.

Two containers of torch.save are understood: the zip of torch >= 1.6 and the flat file before it. The pickle in them
goes through `models.checkpoint.inert_pickle`; what comes out is a tree of `Holder`s, from which the state dict, the
YAML and the names are taken. No class of the file is looked up, no module is built, and every number is bounds-checked.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from models.checkpoint.inert_pickle import (
    ArrayRef,
    Global,
    Holder,
    Machine,
    NumberType,
    StorageRef,
    TensorRef,
    read,
    refuse,
    storage_reference,
)
from utils.errors import CheckpointError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of every file that torch.save wrote before its zip format
DETECTION_CLASSES = ("models.yolo.DetectionModel", "models.yolo.Model")
MAX_MODULES = 100_000  # the largest YOLOv5 has under 1,000
MAX_VALUES = 5_000_000  # plain values of the rest of a checkpoint
MAX_DEPTH = 64


class Tensors:
    """Turns `TensorRef` into tensors; each storage is read once, and all together are no longer than the file."""

    def __init__(self, where: str, load: Callable[[StorageRef, int], bytes], limit: int) -> None:
        self.where = where
        self.load = load
        self.limit = self.room = limit
        self.storages: dict[str, tuple[StorageRef, Tensor]] = {}

    def get(self, view: TensorRef) -> Tensor:
        """A contiguous tensor of its own (its changes reach no other tensor), in the type it was stored in."""
        return torch.as_strided(self._storage(view.storage), view.size, view.stride, view.offset).clone(
            memory_format=torch.contiguous_format
        )

    def _storage(self, wanted: StorageRef) -> Tensor:
        known = self.storages.get(wanted.key)
        if known is None:
            known = (wanted, self._read(wanted))
            self.storages[wanted.key] = known
        if (known[0].dtype, known[0].numel) != (wanted.dtype, wanted.numel):
            refuse(self.where, f"storage {wanted.key} with two different types or sizes")
        return known[1]

    def _read(self, wanted: StorageRef) -> Tensor:
        length = wanted.numel * wanted.dtype.itemsize
        self.room -= length
        if self.room < 0:
            refuse(self.where, f"storage {wanted.key} of {length} bytes, more than the file is long")
        if length == 0:
            return torch.empty(0, dtype=wanted.dtype)
        raw = self.load(wanted, length)
        if len(raw) != length:
            raise CheckpointError(f"{self.where}: damaged: storage {wanted.key} has {len(raw)} of {length} bytes")
        if wanted.dtype is torch.bool:
            return torch.from_numpy(np.frombuffer(raw, np.uint8) != 0)
        return torch.frombuffer(bytearray(raw), dtype=wanted.dtype)


def read_pickled(path: Path, strict: bool = True) -> tuple[object, Tensors]:
    """Read a file of torch.save without executing it.

    Args:
        path: the file.
        strict: see `Machine`.

    Returns:
        The saved object (plain values, `Holder`, `TensorRef`, ...) and the reader of its tensors.

    Raises:
        CheckpointError: neither container, damaged, or a name in it that no YOLOv5 checkpoint needs.
    """
    if zipfile.is_zipfile(path):
        return _read_zip(path, strict)
    with open(path, "rb") as stream:
        return _read_flat(stream, str(path), path.stat().st_size, strict)


def _read_zip(path: Path, strict: bool) -> tuple[object, Tensors]:
    where = str(path)
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise CheckpointError(f"{where}: a zip archive with {len(pickles)} data.pkl in it, not a checkpoint")
        folder = pickles[0][: -len("data.pkl")]
        if f"{folder}byteorder" in archive.namelist() and _record(archive, f"{folder}byteorder", where) != b"little":
            raise CheckpointError(f"{where}: written on a big-endian machine, which is not supported")
        value = read(Machine(storage_reference, strict), io.BytesIO(_record(archive, pickles[0], where)), where)

    def load(storage: StorageRef, length: int) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return _record(archive, f"{folder}data/{storage.key}", where, length)

    return value, Tensors(where, load, path.stat().st_size)


def _record(archive: zipfile.ZipFile, name: str, where: str, length: int | None = None) -> bytes:
    """The bytes of one record; torch.save compresses nothing, so a record is never longer than the file."""
    try:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{where}: damaged: record {name} is compressed, which torch.save never does")
        if length is not None and info.file_size != length:
            raise CheckpointError(f"{where}: damaged: record {name} has {info.file_size} bytes, expected {length}")
        return archive.read(info)
    except (KeyError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{where}: damaged: record {name} cannot be read ({error})") from error


def _read_flat(stream: BinaryIO, where: str, size: int, strict: bool) -> tuple[object, Tensors]:
    """The format before torch 1.6: magic number, version, machine, object, list of storages; then their bytes."""
    machine = Machine(storage_reference, strict)
    if read(machine, stream, where) != LEGACY_MAGIC:
        raise CheckpointError(f"{where}: not a checkpoint: a pickle that torch.save did not write")
    _, system, value, keys = (read(machine, stream, where) for _ in range(4))
    if not isinstance(system, dict) or system.get("little_endian") is not True or type(keys) is not list:
        raise CheckpointError(f"{where}: a file of an old torch version on a machine that is not supported")
    places: dict[str, int] = {}
    used = _storages(value)
    for key in keys:
        header = stream.read(8)
        if str(key) not in used or len(header) != 8:
            raise CheckpointError(f"{where}: damaged: storage {key} is missing, or belongs to nothing")
        places[str(key)] = stream.tell()
        stream.seek(struct.unpack("<q", header)[0] * used[str(key)].dtype.itemsize, 1)

    def load(storage: StorageRef, length: int) -> bytes:
        if storage.key not in places:
            raise CheckpointError(f"{where}: damaged: storage {storage.key} is missing")
        with open(where, "rb") as source:
            source.seek(places[storage.key])
            return source.read(length)

    return value, Tensors(where, load, size)


def _storages(value: object) -> dict[str, StorageRef]:
    """Every storage that something in `value` refers to, by key."""
    found: dict[str, StorageRef] = {}
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, TensorRef):
            found[item.storage.key] = item.storage
        elif isinstance(item, StorageRef):
            found[item.key] = item
        elif isinstance(item, Holder):
            waiting.append(item.state)
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)
    return found


def module_state(module: Holder, tensors: Tensors) -> dict[str, Tensor]:
    """The state dict of a pickled module: keys in module order, floating point as float32.

    Raises:
        CheckpointError: the tree contains itself, is absurdly large, or an entry is no tensor.
    """
    where, state = tensors.where, dict[str, Tensor]()
    visited, elements = 0, 0

    def walk(holder: Holder, prefix: str, depth: int) -> None:
        nonlocal visited, elements
        visited += 1
        # A module that holds another twice doubles the tree at every level: bound its size, not only its depth.
        if depth > MAX_DEPTH or visited > MAX_MODULES:
            refuse(where, "modules nested too deeply, or too many of them")
        hidden = holder.state.get("_non_persistent_buffers_set") or ()
        entries = {**holder.part("_parameters"), **holder.part("_buffers")}
        for name, value in entries.items():
            if value is None or (isinstance(hidden, (set, list, tuple)) and name in hidden):
                continue
            if not isinstance(value, TensorRef):
                raise CheckpointError(f"{where}: '{prefix}{name}' is a {_word(value)}, not a tensor")
            tensor = tensors.get(value)
            elements += tensor.numel()
            if elements > tensors.limit:
                refuse(where, "more numbers in its modules than the file is long")
            state[f"{prefix}{name}"] = tensor.float() if tensor.is_floating_point() else tensor
        for name, child in holder.part("_modules").items():
            if isinstance(child, Holder):
                walk(child, f"{prefix}{name}.", depth + 1)

    walk(module, "", 0)
    return state


def plain(value: object, tensors: Tensors, keep_tensors: bool = False) -> object:
    """`value` as numbers, texts, lists, tuples and dictionaries; with `keep_tensors` also tensors, else lists of them.

    Raises:
        CheckpointError: the value contains itself or is absurdly large.
    """
    left = MAX_VALUES

    def convert(item: object, depth: int) -> object:
        nonlocal left
        left -= 1
        if depth > MAX_DEPTH or left < 0:
            refuse(tensors.where, "values nested too deeply, or too many of them")
        if isinstance(item, dict):
            return {key: convert(entry, depth + 1) for key, entry in item.items()}
        if isinstance(item, list):
            return [convert(entry, depth + 1) for entry in item]
        if isinstance(item, tuple):
            return tuple(convert(entry, depth + 1) for entry in item)
        if isinstance(item, (set, frozenset)):
            return sorted(item, key=str)
        if isinstance(item, ArrayRef):
            return item.values
        if isinstance(item, TensorRef):
            tensor = tensors.get(item)
            left -= tensor.numel()
            return tensor if keep_tensors else tensor.tolist()
        if isinstance(item, (Holder, Global, StorageRef, NumberType)):
            return f"<{_word(item)}>"
        return item

    return convert(value, 0)


def _word(value: object) -> str:
    if isinstance(value, Holder):
        return value.origin
    return value.name if isinstance(value, Global) else type(value).__name__


def detection_module(value: object, where: str) -> Holder:
    """The pickled detection model in `value`: 'ema' if there is one, else 'model', else `value` itself.

    Raises:
        CheckpointError: says what is there instead.
    """
    found = value
    if isinstance(value, dict):
        found = value.get("ema") if value.get("ema") is not None else value.get("model")
    if not isinstance(found, Holder):
        keys = ", ".join(sorted(map(str, value))[:8]) if isinstance(value, dict) else _word(value)
        raise CheckpointError(f"{where}: no pickled model in it under 'ema' or 'model' (found: {keys})")
    if found.origin not in DETECTION_CLASSES:
        raise CheckpointError(f"{where}: holds a {found.origin}; only {' and '.join(DETECTION_CLASSES)} are detectors")
    if not isinstance(found.state.get("yaml"), dict):
        raise CheckpointError(f"{where}: the pickled model has no 'yaml', so it cannot be rebuilt")
    return found
