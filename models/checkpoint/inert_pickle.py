"""A pickle reader that cannot execute anything: the opcodes are run by hand, and there is no opcode that calls.

A pickle is a program. The ordinary reader looks names up, calls them, and sets attributes, so a hostile file runs
any code it likes. Here a name stays a name (`Global`), and the opcodes that would call something look it up in a
closed table of constructors that build plain values and descriptions: `Holder` for an object of a class (its
attributes, nothing of its class), `TensorRef` for a tensor (where its numbers lie; the container's reader gets them
later). A name outside of the table is an error that gives the name. `pickletools.genops` of the standard library
does the decoding.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO, NoReturn

import numpy as np
import torch

from utils.errors import CheckpointError

# torch.save writes the class of a storage as the name of its element type.
STORAGE_DTYPES: dict[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
# One file below `models`, and one class in it: no deeper path can be spelt, so no attribute chain either.
CLASS_NAMES = re.compile(r"(models|torch\.nn\.modules)\.[A-Za-z]\w*\.(?!__)[A-Za-z_]\w*", re.ASCII)
NUMBER_CODES = re.compile(r"b1|[iu][1248]|f[248]", re.ASCII)
MAX_DIMENSIONS = 16


@dataclass(frozen=True)
class Global:
    """A name in the file (`torch.nn.modules.conv.Conv2d`); it is never looked up."""

    name: str

    @property
    def is_class(self) -> bool:
        """Whether it names a class of the model, of which objects become `Holder`."""
        return CLASS_NAMES.fullmatch(self.name) is not None


@dataclass(eq=False)
class Holder:
    """An object of a class that is not there: the name of the class and the attributes that the file gives it."""

    origin: str
    state: dict[str, object] = field(default_factory=dict)

    def part(self, name: str) -> dict[str, object]:
        """The dictionary under attribute `name` (`_modules`, `_parameters`, `_buffers`); empty when there is none."""
        value = self.state.get(name)
        return value if isinstance(value, dict) else {}


@dataclass(frozen=True, eq=False)
class StorageRef:
    """A block of `numel` numbers, kept in the container under `key`."""

    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A view into a storage; offset, size and stride count elements and were checked to lie within it."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class NumberType:
    """A NumPy type: plain numbers only, so that decoding is a copy of bytes."""

    code: str
    order: str = "<"

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return np.dtype(("|" if self.code.endswith("1") else self.order) + self.code)


@dataclass(eq=False)
class ArrayRef:
    """A NumPy array; `values` are nested lists once its BUILD opcode was read."""

    values: object = None


class Refused(Exception):
    """Raised inside the machine; `read` turns it into a CheckpointError with the file's name."""


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Refused(reason)


def _is_size(value: object) -> bool:
    return type(value) is tuple and len(value) <= MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in value)


def _key(value: object) -> object:
    """A dictionary key or set member: flat plain values only (hashing a deep tuple overflows the C stack)."""
    parts = value if type(value) is tuple else (value,)
    plain = all(part is None or type(part) in (str, int, float, bool, bytes) for part in parts)
    _require(plain, f"a {type(value).__name__} is used as a dictionary key or set member")
    return value


def _tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> TensorRef:
    if not isinstance(storage, StorageRef) or not (type(offset) is int and offset >= 0):
        raise Refused("a tensor without a storage or with a wrong offset")
    if not (_is_size(size) and _is_size(stride) and len(size) == len(stride)):  # type: ignore[arg-type]
        raise Refused("a tensor with a wrong size or stride")
    view = TensorRef(storage, offset, size, stride)  # type: ignore[arg-type]
    count = 1
    for n in view.size:
        count *= n
    last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
    inside = count == 0 or (last < storage.numel and count <= storage.numel)
    _require(inside, f"a tensor of size {view.size} reaches outside its storage of {storage.numel} elements")
    return view


def _parameter(data: object, *_: object) -> TensorRef:
    if not isinstance(data, TensorRef):
        raise Refused("a parameter without a tensor")
    return data


def _ordered_dict(pairs: object = ()) -> dict[object, object]:
    result: dict[object, object] = {}
    _require(type(pairs) in (list, tuple), "an OrderedDict that is not made from pairs")
    for pair in pairs:  # type: ignore[attr-defined]
        _require(type(pair) in (list, tuple) and len(pair) == 2, "an OrderedDict that is not made from pairs")
        result[_key(pair[0])] = pair[1]
    return result


def _set(items: object = ()) -> set[object]:
    _require(type(items) in (list, tuple), "a set that is not made from a list")
    return {_key(item) for item in items}  # type: ignore[attr-defined]


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused("_codecs.encode with anything but latin1 text")
    return text.encode("latin1")


def _path(*parts: object) -> str:
    if not all(type(part) is str for part in parts):
        raise Refused("a path that is not made from text")
    text = "/".join(str(part) for part in parts)
    return text[1:] if text.startswith("//") else text  # the first part of an absolute path is its slash


def _number_type(code: object, *_: object) -> NumberType:
    if type(code) is not str or not NUMBER_CODES.fullmatch(code):
        raise Refused(f"NumPy type {code!r}; plain numbers only")
    return NumberType(code)


def _decode(kind: object, raw: object) -> np.ndarray:
    if not isinstance(kind, NumberType) or type(raw) is not bytes or len(raw) % kind.dtype.itemsize:
        raise Refused("a NumPy value whose bytes do not fit its type")
    return np.frombuffer(raw, kind.dtype)


def _scalar(kind: object, raw: object) -> object:
    values = _decode(kind, raw)
    _require(values.size == 1, "a NumPy scalar with other than one value")
    return values[0].item()


def _array(kind: object, *_: object) -> ArrayRef:
    _require(kind == Global("numpy.ndarray"), "a NumPy array of another class")
    return ArrayRef()


CONSTRUCTORS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "_codecs.encode": _encode,
    "numpy.dtype": _number_type,
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    **{f"{home}.{kind}Path": _path for home in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")},
}
BARE_NAMES = {"numpy.ndarray", *STORAGE_DTYPES}
PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
FRESH: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}


class Machine:
    """Runs one pickle after the other from a stream; the objects it returns are plain values and the classes above.

    Args:
        persistent: turns a persistent id into an object.
        strict: refuse names outside the table. Otherwise what they make becomes a `Holder` too, and what is put into it
            is dropped: for files of which only the tensors are wanted. Nothing is looked up or called either way.
    """

    def __init__(self, persistent: Callable[[tuple[object, ...]], object], strict: bool = True) -> None:
        self.persistent = persistent
        self.strict = strict
        self.stack: list[object] = []
        self.marked: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def run(self, stream: BinaryIO) -> object:
        """Read the pickle that begins at the stream's position, and leave the stream behind its end."""
        self.stack, self.marked, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name in PUSHED:
                self.stack.append(argument)
            elif name in FRESH:
                self.stack.append(FRESH[name]())
            elif name not in ("PROTO", "FRAME", "STOP"):
                action = OPERATIONS.get(name)
                if action is None:
                    raise Refused(f"pickle instruction {name}")
                action(self, argument)
        return self.stack.pop()

    def above_mark(self) -> list[object]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self, _: object) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop(self, _: object) -> None:
        self.stack = self.stack[:-1] if self.stack else self.marked.pop()

    def pop_mark(self, _: object) -> None:
        self.above_mark()

    def duplicate(self, _: object) -> None:
        self.stack.append(self.stack[-1])

    def put(self, index: object) -> None:
        self.memo[int(index) if index is not None else len(self.memo)] = self.stack[-1]  # type: ignore[call-overload]

    def get(self, index: object) -> None:
        self.stack.append(self.memo[int(index)])  # type: ignore[call-overload]

    def make_tuple(self, _: object) -> None:
        items = self.above_mark()
        self.stack.append(tuple(items))

    def make_list(self, _: object) -> None:
        items = self.above_mark()
        self.stack.append(items)

    def make_dict(self, _: object) -> None:
        items = self.above_mark()
        self.stack.append({})
        self.set_items(items)

    def append_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif not self.drops(target):
            raise Refused(f"a {type(target).__name__} is appended to")

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if self.drops(target):
            return
        if type(target) is not dict or len(items) % 2:
            raise Refused(f"items are set in a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def append(self, _: object) -> None:
        self.append_items([self.stack.pop()])

    def appends(self, _: object) -> None:
        self.append_items(self.above_mark())

    def setitem(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def setitems(self, _: object) -> None:
        self.set_items(self.above_mark())

    def additems(self, _: object) -> None:
        items, target = self.above_mark(), self.stack[-1]
        if type(target) is set:
            target.update(_key(item) for item in items)
        elif not self.drops(target):
            raise Refused(f"members are added to a {type(target).__name__}")

    def drops(self, target: object) -> bool:
        return not self.strict and isinstance(target, Holder)

    def frozenset(self, _: object) -> None:
        items = self.above_mark()
        self.stack.append(frozenset(_key(item) for item in items))

    def global_name(self, argument: object) -> None:
        module, _, name = str(argument).partition(" ")
        self.push_global(module, name)

    def stack_global(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        _require(type(name) is str and type(module) is str, "a global whose name is not text")
        self.push_global(str(module), str(name))

    def push_global(self, module: str, name: str) -> None:
        found = Global(f"{module}.{name}")
        # A dotted second part is an attribute chain (`conv` + `os.system`), whatever the whole spells.
        known = "." not in name and (found.name in CONSTRUCTORS or found.name in BARE_NAMES or found.is_class)
        _require(known or not self.strict, f"global '{found.name}'")
        self.stack.append(found)

    def new_object(self, _: object) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, Global) or (self.strict and not (kind.is_class and arguments == ())):
            raise Refused(f"a new object of {kind.name if isinstance(kind, Global) else type(kind).__name__}")
        self.stack.append(Holder(kind.name))

    def reduce(self, _: object) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if isinstance(kind, Global) and kind.name in CONSTRUCTORS and type(arguments) is tuple:
            self.stack.append(CONSTRUCTORS[kind.name](*arguments))
        elif isinstance(kind, Global) and not self.strict:
            self.stack.append(Holder(kind.name))
        else:
            raise Refused(f"a call of {kind.name if isinstance(kind, Global) else type(kind).__name__}")

    def build(self, _: object) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if self.drops(target):
            return
        if isinstance(target, Holder):
            if type(state) is not dict or not all(type(key) is str for key in state):
                raise Refused(f"the state of a {target.origin} is no dictionary of attributes")
            target.state = state
        elif isinstance(target, NumberType):
            self.build_number_type(target, state)
        elif isinstance(target, ArrayRef):
            self.build_array(target, state)
        elif type(target) is not dict:  # an OrderedDict's attributes (the `_metadata` of a state dict) carry nothing
            raise Refused(f"the state of a {type(target).__name__} is set")

    @staticmethod
    def build_number_type(target: NumberType, state: object) -> None:
        if type(state) is not tuple or len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(state[2:5]):
            raise Refused("a NumPy type with fields")
        target.order = state[1]

    @staticmethod
    def build_array(target: ArrayRef, state: object) -> None:
        if type(state) is not tuple or len(state) != 5 or not _is_size(state[1]):
            raise Refused("a NumPy array without a shape")
        target.values = _decode(state[2], state[4]).reshape(state[1], order="F" if state[3] else "C").tolist()

    def persistent_id(self, _: object) -> None:
        reference = self.stack.pop()
        if type(reference) is not tuple:
            raise Refused("a persistent id that is no tuple")
        self.stack.append(self.persistent(reference))


def _tuple_of(count: int) -> Callable[[Machine, object], None]:
    def operation(machine: Machine, _: object) -> None:
        _require(len(machine.stack) >= count, "an empty stack")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return operation


OPERATIONS: dict[str, Callable[[Machine, object], None]] = {
    "MARK": Machine.mark,
    "POP": Machine.pop,
    "POP_MARK": Machine.pop_mark,
    "DUP": Machine.duplicate,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine.get),
    "TUPLE": Machine.make_tuple,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "LIST": Machine.make_list,
    "DICT": Machine.make_dict,
    "APPEND": Machine.append,
    "APPENDS": Machine.appends,
    "SETITEM": Machine.setitem,
    "SETITEMS": Machine.setitems,
    "ADDITEMS": Machine.additems,
    "FROZENSET": Machine.frozenset,
    "GLOBAL": Machine.global_name,
    "STACK_GLOBAL": Machine.stack_global,
    "NEWOBJ": Machine.new_object,
    "REDUCE": Machine.reduce,
    "BUILD": Machine.build,
    "BINPERSID": Machine.persistent_id,
}


def storage_reference(reference: tuple[object, ...]) -> StorageRef | Global:
    """What a persistent id of torch.save stands for: a storage, or (before torch 1.6) the class of a container."""
    if len(reference) == 4 and reference[0] == "module" and isinstance(reference[1], Global) and reference[1].is_class:
        return reference[1]  # the two texts after it are the class's source code: unread
    views = reference[5:]
    if len(reference) not in (5, 6) or reference[0] != "storage" or any(view is not None for view in views):
        raise Refused("a persistent id that is no storage")
    kind, key, numel = reference[1], reference[2], reference[4]
    if not isinstance(kind, Global) or kind.name not in STORAGE_DTYPES or type(numel) is not int or numel < 0:
        raise Refused("a storage with a wrong type or size")
    if type(key) is not str or not re.fullmatch(r"[0-9]{1,20}", key):  # it becomes the name of a record
        raise Refused(f"a storage called {key!r:.40}")
    return StorageRef(STORAGE_DTYPES[kind.name], key, numel)


def read(machine: Machine, stream: BinaryIO, where: str) -> object:
    """Run the next pickle of `stream`.

    Args:
        machine: from `Machine(storage_reference)`.
        stream: positioned at a pickle; is left behind its STOP.
        where: the file's name, for the message.

    Raises:
        CheckpointError: the pickle is broken, or names something outside the table; nothing of it was executed.
    """
    try:
        return machine.run(stream)
    except Refused as reason:
        refuse(where, str(reason))
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise CheckpointError(f"{where}: broken pickle ({type(error).__name__}: {error})") from error


def refuse(where: str, reason: str) -> NoReturn:
    """Raise the CheckpointError for a file that holds more than a checkpoint does."""
    raise CheckpointError(
        f"{where}: refused (nothing of it was executed): the file holds {reason}; "
        "allowed are the classes of models.* and torch.nn.modules.*, tensors and plain values"
    )
