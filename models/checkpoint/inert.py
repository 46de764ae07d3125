"""Loading of `torch.save` files as data: objects of unknown classes become inert stand-ins.

`torch.load(weights_only=True)` reads the file. Names that it does not allow by default are mapped to stand-in classes
that only record constructor arguments and state, so no class of the file is imported and none of its code runs.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from models.checkpoint.file_kinds import existing_file
from utils.errors import CheckpointError

# Classes of a pickled YOLOv5 model: one module below `models`, and one class in it.
MODULE_CLASSES = re.compile(r"(models|torch\.nn\.modules)\.[A-Za-z]\w*\.(?!__)[A-Za-z_]\w*", re.ASCII)
# Types of its training options and metrics.
VALUE_CLASSES = re.compile(
    r"numpy\.(dtype|ndarray|_?core\.multiarray\.(scalar|_reconstruct))|pathlib\.(_local\.)?(Posix|Windows)Path"
)
# Standard containers that a pickle fills item by item, which torch allows for plain lists and dictionaries only.
CONTAINERS: dict[str, type] = {"collections.deque": list, "collections.defaultdict": dict}
NUMPY_NUMBERS = re.compile(r"b1|[iu][1248]|f[248]", re.ASCII)
READ_ERRORS = (
    *(RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(ArithmeticError, MemoryError, struct.error, zipfile.BadZipFile),
)
LEGACY_PICKLES = 4  # magic number, protocol version, system, and then the object
PLAIN_TYPES = (type(None), bool, int, float, str, bytes)
MAX_SHARING = 4  # entries per storage on average: raw weights and averaged weights may share theirs
MAX_MODULES = 100_000  # the largest YOLOv5 has under 1,000
MAX_VALUES = 5_000_000  # plain values of the rest of a checkpoint
MAX_DEPTH = 64


class Inert:
    """Stand-in for an object whose class is never imported.

    Attributes:
        name: dotted name of the class (or function) in the file.
        args: arguments of its constructor in the file.
        state: attributes that the file sets; for most classes a dictionary.
    """

    name: ClassVar[str]
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: object) -> Inert:
        """Record `args`, whatever they are."""
        self = super().__new__(cls)
        self.args, self.state = args, {}
        return self

    def __setstate__(self, state: object) -> None:
        self.state = state

    def get(self, attribute: str) -> Any:  # noqa: ANN401 (whatever the file sets)
        """Return an attribute that the file sets, or None."""
        return self.state.get(attribute) if isinstance(self.state, dict) else None


class LoadedFile:
    """Content of a file and the conversion of its parts to plain values and tensors.

    Args:
        path: an existing file of `torch.save`, in the zip format or in the one before torch 1.6.
        strict: refuse names other than those of YOLOv5 models; otherwise every unknown object becomes an `Inert`.

    Attributes:
        value: the saved object.

    Raises:
        CheckpointError: the file is missing, damaged, or refused. Nothing of it was executed.
    """

    def __init__(self, path: Path, strict: bool = True) -> None:
        self.path = existing_file(path)
        self.room = MAX_SHARING * path.stat().st_size  # bytes of tensors that may be copied
        self.values = min(MAX_VALUES, 100 + path.stat().st_size)  # each takes a byte at least, unless lists are shared
        self.records: Counter[int] | None = None  # how many records of a zip file have each size
        self.storages: set[int] = set()  # addresses of those that were met
        with errors_of(path):
            zipped = zipfile.is_zipfile(path)
            if zipped:
                with zipfile.ZipFile(path) as archive:
                    self._check_records(archive)
            try:
                self.value = self._load(zipped, strict)
            except pickle.UnpicklingError as error:
                if not zipped and "persistent_load" in str(error):
                    self.refuse("a pickled module in the format of before torch 1.6; save it again with a later torch")
                reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
                self.refuse(reason[1][:160] if reason else _one_line(error))

    def _check_records(self, archive: zipfile.ZipFile) -> None:
        """Compare the checksum of every record, which torch does not do, and remember the sizes of tensors."""
        entries = archive.infolist()
        if sum(info.file_size for info in entries) > self.path.stat().st_size:
            raise CheckpointError(f"{self.path}: damaged: its records are longer than the file")
        damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{self.path}: damaged: the content of '{damaged}' does not match its checksum")
        self.records = Counter(info.file_size for info in entries if "/data/" in info.filename)

    def _load(self, zipped: bool, strict: bool) -> Any:  # noqa: ANN401 (whatever was saved)
        names = _unsafe_names(self.path, zipped)
        unknown = [name for name in names if not (MODULE_CLASSES.fullmatch(name) or VALUE_CLASSES.fullmatch(name))]
        if strict and unknown:
            self.refuse(f"global '{min(unknown)}'")
        with torch.serialization.safe_globals([(_stand_in(name), name) for name in names]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols
            # Mapped memory: a tensor whose size or offset exceeds the file is an error of torch, never other memory.
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipped)

    def refuse(self, reason: str) -> NoReturn:
        """Raise the CheckpointError for a file that contains more than a checkpoint does."""
        raise CheckpointError(
            f"{self.path}: refused, nothing of it was executed: {reason}; "
            "allowed are the classes of models.* and torch.nn.modules.*, tensors and plain values"
        )

    def tensor(self, value: Tensor) -> Tensor:
        """Return a copy of the same shape that shares no memory with the file or another tensor.

        Raises:
            CheckpointError: not an ordinary CPU tensor, or more values than there are in the file.
        """
        ordinary = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and value.is_cpu
        if not ordinary or value.is_quantized:
            self.refuse("a tensor of a special kind")
        self.room -= value.numel() * value.element_size()
        if self.room < 0:
            self.refuse("more numbers in its tensors than in the file")
        storage = value.untyped_storage()
        if value.numel() and self.records is not None and storage.data_ptr() not in self.storages:
            self.storages.add(storage.data_ptr())
            self.records[storage.nbytes()] -= 1  # every storage has a record of its own
            if self.records[storage.nbytes()] < 0:
                raise CheckpointError(f"{self.path}: damaged: a record of the file is not as long as its tensor")
        return value.detach().clone()

    def plain(self, value: object, keep_tensors: bool = False, depth: int = 0) -> Any:  # noqa: ANN401
        """Return `value` as numbers, strings, lists, tuples and dictionaries.

        Args:
            value: part of the saved object.
            keep_tensors: keep tensors as copies; otherwise they become lists.
            depth: nesting of the call itself.

        Raises:
            CheckpointError: the value contains itself or is absurdly large.
        """
        self.values -= 1
        if depth > MAX_DEPTH or self.values < 0:
            self.refuse("values nested too deeply, or too many of them")
        if isinstance(value, dict):
            if not all(type(key) in PLAIN_TYPES for key in value):
                self.refuse("a dictionary key that is not a plain value")
            return {key: self.plain(entry, keep_tensors, depth + 1) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self.plain(entry, keep_tensors, depth + 1) for entry in value]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, Tensor):
            tensor = self.tensor(value)
            return tensor if keep_tensors else tensor.tolist()
        if isinstance(value, (set, frozenset)):
            return sorted((self.plain(entry, False, depth + 1) for entry in value), key=str)
        if isinstance(value, Inert):
            return self._plain_object(value)
        return value if type(value) in PLAIN_TYPES else f"<{class_name(value)}>"

    def _plain_object(self, value: Inert) -> object:
        """Return the value of a path or a NumPy object, and the class name of anything else."""
        if value.name.endswith("Path"):
            text = "/".join(value.args)
            return text[1:] if text.startswith("//") else text  # the first part of an absolute path is its slash
        if value.name.endswith(".scalar"):
            kind, raw = value.args
            return self._numbers(kind, raw).item()
        if value.name.endswith("._reconstruct"):
            _, shape, kind, fortran, raw = value.state
            return self._numbers(kind, raw).reshape(shape, order="F" if fortran else "C").tolist()
        return f"<{value.name}>"

    def _numbers(self, kind: Inert, raw: bytes) -> np.ndarray:
        """Return the elements of an array from the pickled form of its dtype: ('f8', ...), state (3, '<', ...)."""
        if not NUMPY_NUMBERS.fullmatch(kind.args[0]):
            self.refuse(f"NumPy type {kind.args[0]!r}, not a plain number")
        order = ">" if kind.state and kind.state[1] == ">" else "<"
        return np.frombuffer(raw, np.dtype(kind.args[0]).newbyteorder(order))

    def module_state(self, module: Inert) -> dict[str, Tensor]:
        """Return the state dict of a pickled module: keys in module order, floating point as float32.

        Raises:
            CheckpointError: the tree contains itself, is absurdly large, or an entry is not a tensor.
        """
        state: dict[str, Tensor] = {}
        visited = 0

        def walk(holder: Inert, prefix: str, depth: int) -> None:
            nonlocal visited
            visited += 1
            # A module that contains another one twice doubles the tree at every level: limit its size too.
            if depth > MAX_DEPTH or visited > MAX_MODULES:
                self.refuse("modules nested too deeply, or too many of them")
            hidden = holder.get("_non_persistent_buffers_set") or set()
            for name, value in (*_items(holder, "_parameters"), *_items(holder, "_buffers")):
                if value is None or name in hidden:
                    continue
                if not isinstance(value, Tensor):
                    raise CheckpointError(f"{self.path}: '{prefix}{name}' is a {class_name(value)}, not a tensor")
                tensor = self.tensor(value)
                state[f"{prefix}{name}"] = tensor.float() if tensor.is_floating_point() else tensor
            for name, child in _items(holder, "_modules"):
                if isinstance(child, Inert):
                    walk(child, f"{prefix}{name}.", depth + 1)

        walk(module, "", 0)
        return state


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Raise a CheckpointError that names the file for every error that reading a damaged file may raise."""
    try:
        yield
    except CheckpointError:
        raise
    except READ_ERRORS as error:
        raise CheckpointError(f"{path}: cannot be read, damaged ({_one_line(error)})") from error


def class_name(value: object) -> str:
    """Return the class of `value`, or what a stand-in stands for."""
    return value.name if isinstance(value, Inert) else type(value).__name__


def contents(value: object) -> str:
    """Return the first keys of a mapping, or the class of anything else, for a message."""
    if not isinstance(value, dict):
        return class_name(value)
    keys = [str(key) if isinstance(key, (str, int)) else type(key).__name__ for key in list(value)[:7]]
    return f"keys {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''}"


def _items(holder: Inert, attribute: str) -> list[tuple[str, Any]]:
    part = holder.get(attribute)
    return [(name, value) for name, value in part.items() if isinstance(name, str)] if isinstance(part, dict) else []


def _stand_in(name: str) -> type:
    """Return the class that takes the place of `name` while a file is loaded."""
    kind = CONTAINERS.get(name)
    if kind is None:
        return type("StandIn", (Inert,), {"name": name})
    return type("Container", (), {"__new__": lambda *_: kind()})


def _unsafe_names(path: Path, zipped: bool) -> list[str]:
    """Return the names in the file that torch does not allow by default; reads the pickle without running it."""
    if zipped:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with path.open("rb") as stream:
        for _ in range(LEGACY_PICKLES):
            start = stream.tell()
            for _ in pickletools.genops(stream):
                pass
        end = stream.tell()
        stream.seek(start)
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:  # the container that torch's function takes
            archive.writestr("archive/data.pkl", stream.read(end - start))
            archive.writestr("archive/version", "3\n")
    content.seek(0)
    return torch.serialization.get_unsafe_globals_in_checkpoint(content)


def _one_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
