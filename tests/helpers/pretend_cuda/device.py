"""The simulated device: a tensor that reports `cuda:0`, the dispatch mode, and the patched `torch.cuda` module."""

from __future__ import annotations

import atexit
import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.helpers.pretend_cuda import rules
from tests.helpers.pretend_cuda.record import Record
from tests.helpers.pretend_cuda.rules import tensors_in

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
GIB = 1 << 30


class _State:
    """The open record and the generator of the device (one device per process)."""

    record = Record()
    rng = torch.Generator().manual_seed(0).get_state()
    pinned: ClassVar[set[int]] = set()  # storage addresses
    hooks: Any = None


class CudaTensor(torch.Tensor):
    """A tensor on `cuda:0`; `held` is the CPU tensor with its values."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> CudaTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CUDA
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"CudaTensor({self.held!r}, device='cuda:0')"

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        made = self.detach().clone()
        made = torch.nn.Parameter(made, self.requires_grad) if getattr(self, "_is_param", False) else made
        memo[id(self)] = made.requires_grad_(self.requires_grad)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a CUDA tensor is about to be pickled")


def _pin(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    if isinstance(self, CudaTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    made = self.clone()
    _State.pinned.add(made.untyped_storage().data_ptr())
    return made


def _is_pinned(self: torch.Tensor, device: Any = None) -> bool:
    return not isinstance(self, CudaTensor) and self.untyped_storage().data_ptr() in _State.pinned


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """Check an operator as CUDA does, count it, compute it on the CPU, and wrap the result."""
    record, name = _State.record, func._schema.name
    given = tensors_in((args, kwargs))
    on_device = any(isinstance(t, CudaTensor) for t in given)
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    place = record.place()
    if not on_device and target != "cuda":
        record.host[name, place] += 1
        return func(*args, **kwargs)
    if target == "meta":  # shapes only
        return func(*tree_map_only(CudaTensor, lambda t: t.held, args), **kwargs)
    copies = name in ("aten::_to_copy", "aten::copy_", "aten::_copy_from")
    if on_device and not copies:
        _check_same_device(func, name, args, given)
    if name.startswith("aten::_fused_"):
        _check_same_layout(func, args)
    _count(func, name, args, kwargs, target, place)
    cpu_args = tree_map_only(CudaTensor, lambda t: t.held, args)
    cpu_kwargs = tree_map_only(CudaTensor, lambda t: t.held, kwargs)
    if target == "cuda":
        cpu_kwargs["device"] = CPU
    if cpu_kwargs.pop("pin_memory", None):
        cpu_kwargs["pin_memory"] = False
    with _device_generator() if torch.Tag.nondeterministic_seeded in func.tags else nullcontext():
        out = rules.compute(func, name, cpu_args, cpu_kwargs)
    _watch_half(name, place, out)
    if target == "cpu" or (copies and name != "aten::_to_copy" and not isinstance(args[0], CudaTensor)):
        return args[0] if name == "aten::copy_" else out
    return _wrapped(func, args, kwargs, out)


def _count(func: Any, name: str, args: Any, kwargs: Any, target: str | None, place: str) -> None:
    record = _State.record
    record.ops[name, place] += 1
    launches = rules.count_launches(func, name, args)
    if launches:
        record.launches[name, place] += launches
    if name in ("aten::_to_copy", "aten::copy_", "aten::_copy_from"):
        _count_copy(name, args, kwargs, target, place)
    elif name in rules.WAITS or (name in rules.INDEXING and rules.indexes_by_mask(args)):
        by_mask = " by mask" if name in rules.INDEXING else ""
        record.waits[name.partition("::")[2] + by_mask, place] += 1


def _count_copy(name: str, args: Any, kwargs: Any, target: str | None, place: str) -> None:
    source = args[1] if name == "aten::copy_" else args[0]
    to_device = isinstance(args[0], CudaTensor) if name == "aten::copy_" else target != "cpu"
    if to_device == isinstance(source, CudaTensor):
        return
    non_blocking = kwargs.get("non_blocking", args[2] if name == "aten::copy_" and len(args) > 2 else False)
    way = "host to device" if to_device else "device to host"
    if not non_blocking:
        _State.record.waits[f"copy {way}", place] += 1
    elif to_device and not _is_pinned(source):
        _State.record.waits["copy host to device, not pinned", place] += 1
    _State.record.copies[f"{way}{', non-blocking' if non_blocking else ''}", place] += 1


def _check_same_device(func: Any, name: str, args: Any, given: list[torch.Tensor]) -> None:
    if name in rules.INDEXING and isinstance(args[0], CudaTensor):
        return  # CPU indices are copied to the device
    takes_scalars = torch.Tag.pointwise in func.tags or name in rules.TAKES_CPU_SCALARS
    if any(not isinstance(t, CudaTensor) and not (takes_scalars and t.dim() == 0) for t in given):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({func}: {[(tuple(t.shape), str(t.device)) for t in given]})"
        )


def _check_same_layout(func: Any, args: Any) -> None:
    """Raise if the tensor lists of a fused optimizer differ in dtype or memory layout, as CUDA does."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor) and a[0].dim()]
    for group in zip(*lists, strict=False):
        forms = {
            (t.shape, t.dtype, tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1)) for t in group
        }
        if len(forms) > 1:
            raise RuntimeError(f"{func}: params, grads and states must have same dtype, device, and layout: {forms}")


def _wrapped(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Return results as device tensors; an argument that was written to is returned as the same object."""
    written: dict[int, CudaTensor] = {}
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.kwarg_only else args[position : position + 1]
            for t in tensors_in(value):
                if isinstance(t, CudaTensor):
                    written[id(t.held)] = t
                    if t.shape != t.held.shape or t.stride() != t.held.stride():
                        raise NotImplementedError(f"{func}: changes the shape of a tensor in place")
    return tree_map_only(torch.Tensor, lambda t: written[id(t)] if id(t) in written else CudaTensor(t), out)


def _watch_half(name: str, place: str, out: Any) -> None:
    record = _State.record
    for t in tensors_in(out):
        if t.dtype == torch.float16 and t.numel() and name not in rules.NO_LAUNCH:
            peak = float(t.abs().max())
            if not peak < float("inf"):
                record.not_finite[name, place] += 1
            elif peak > record.peaks.get((name, place), 0):
                record.peaks[name, place] = peak


@contextmanager
def _device_generator() -> Iterator[None]:
    outside = torch.get_rng_state()
    torch.default_generator.set_state(_State.rng)
    try:
        yield
    finally:
        _State.rng = torch.get_rng_state()
        torch.default_generator.set_state(outside)


class _Mode(TorchDispatchMode):
    """Catches operators that make device tensors from CPU tensors or from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Stream:
    """A stream or event of a device that does everything at once."""

    device, cuda_stream = CUDA, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None: ...

    def record(self, *args: Any) -> None: ...

    wait_event = wait_stream = wait = record

    def synchronize(self, *args: Any) -> None:
        _State.record.waits["synchronize", _State.record.place()] += 1

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0


def _set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    _State.rng = state.clone()


def _seed(seed: int) -> None:
    _State.rng = torch.Generator().manual_seed(seed).get_state()


PROPERTIES = SimpleNamespace(name="pretended", total_memory=80 * GIB, major=9, minor=0, multi_processor_count=132)
PATCHES: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "is_initialized": lambda: True,
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_name": lambda device=None: "pretended",
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda *a, **k: True,
    "get_device_properties": lambda device=None: PROPERTIES,
    "mem_get_info": lambda device=None: (70 * GIB, 80 * GIB),
    "empty_cache": lambda: None,
    "max_memory_allocated": lambda device=None: GIB,
    "max_memory_reserved": lambda device=None: GIB,
    "memory_allocated": lambda device=None: GIB,
    "memory_reserved": lambda device=None: GIB,
    "reset_peak_memory_stats": lambda device=None: None,
    "is_current_stream_capturing": lambda: False,
    "synchronize": lambda device=None: Stream().synchronize(),
    "Stream": Stream,
    "Event": Stream,
    "stream": lambda stream: nullcontext(),
    "current_stream": lambda device=None: Stream(),
    "get_rng_state": lambda device=None: _State.rng.clone(),
    "set_rng_state": _set_rng_state,
    "manual_seed_all": _seed,
    "manual_seed": _seed,
}


def unavailable() -> str:
    """Return why the device cannot be simulated here, or an empty string."""
    if torch.cuda.is_available():
        return "a real CUDA device is available"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    try:
        _install_hooks()
    except (AttributeError, OSError, RuntimeError) as error:
        return f"this PyTorch does not allow it: {error}"
    return ""


def _install_hooks() -> None:
    """Make autograd believe that the device has a context.

    Autograd asks a device guard for streams, for which PyTorch has a stand-in, and the CUDA hooks whether a primary
    context exists: entry 4 of the virtual table of AcceleratorHooksInterface, after two destructors, isBuilt and
    isAvailable.
    """
    if _State.hooks is not None:
        return
    torch._C._ensureCUDADeviceGuardSet()
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
    library._ZN2at6detail12getCUDAHooksEv.restype = ctypes.c_void_p
    address = library._ZN2at6detail12getCUDAHooksEv()
    hooks = ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p))
    table = (ctypes.c_void_p * 80)(*(ctypes.c_void_p * 80).from_address(hooks[0]))
    flag = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
    if (flag(table[2])(address), flag(table[3])(address)) != (True, False):
        raise RuntimeError("the layout of its CUDA hooks is unknown")
    has_context = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda hooks, index: True)
    table[4] = ctypes.cast(has_context, ctypes.c_void_p).value
    atexit.register(hooks.__setitem__, 0, hooks[0])
    hooks[0] = ctypes.addressof(table)
    _State.hooks = table, has_context


@contextmanager
def pretend_cuda(record: Record | None = None, dirty: bool = False) -> Iterator[Record]:
    """Provide one CUDA device inside the block.

    Args:
        record: continue counting into this record.
        dirty: fill uninitialized memory with NaN, as uninitialized memory of a GPU may hold anything.

    Raises:
        RuntimeError: this PyTorch does not allow it; see `unavailable`.
    """
    reason = unavailable()
    if reason:
        raise RuntimeError(reason)
    _State.record = record or Record()
    with ExitStack() as stack:
        for name, value in PATCHES.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        _patch_tensors(stack)
        if dirty:
            stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
            torch.use_deterministic_algorithms(True)  # fills uninitialized memory
        for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
            stack.callback(setattr, backend, "allow_tf32", backend.allow_tf32)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_Mode())
        yield _State.record


def _patch_tensors(stack: ExitStack) -> None:
    """Patch pinning, the accelerator interface, multi-tensor optimizers and module conversion."""
    patches = [
        (torch.Tensor, "pin_memory", _pin),
        (torch.Tensor, "is_pinned", _is_pinned),
        (torch.Tensor, "record_stream", lambda self, stream: None),
        (torch.accelerator, "is_available", lambda: True),
        (torch.accelerator, "current_accelerator", lambda *a, **k: CUDA),
        (torch.accelerator, "current_device_index", lambda: 0),
        (torch.accelerator, "set_device_index", lambda device: None),
    ]
    patches += [
        (module, "_foreach_supported_types", [*module._foreach_supported_types, CudaTensor])
        for module in (optimizer, _foreach_utils)
    ]
    for owner, name, value in patches:
        stack.enter_context(mock.patch.object(owner, name, value))
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
