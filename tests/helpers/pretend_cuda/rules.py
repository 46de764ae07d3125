"""CUDA's rules by operator: what waits for the device, what launches kernels, what is computed in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
# The size or value of the result depends on data, so the host has to wait for it.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "torchvision::nms",
    "aten::_assert_async.msg",
    "aten::histc",
    "aten::repeat_interleave",
}
NO_LAUNCH = {
    "aten::empty",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::_local_scalar_dense",
    "aten::lift_fresh",
    "aten::resize_",
    "aten::_fused_sdp_choice",
    "aten::detach",
    "aten::alias",
    "aten::_unsafe_view",
}
VIA_FLOAT32 = {
    "aten::convolution",
    "aten::convolution_backward",
    "aten::mm",
    "aten::bmm",
    "aten::addmm",
    "aten::baddbmm",
    "aten::mean",
    "aten::sum",
}
KERNELS = {"aten::convolution_backward": 2, "aten::sort": 4, "aten::nonzero": 3, "aten::topk": 3, "torchvision::nms": 6}
# Multi-tensor kernels take this many tensors per launch, by the number of lists, and 320 blocks of 65536 elements.
TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
BLOCKS_PER_LAUNCH, BLOCK = 320, 65536
INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
TAKES_CPU_SCALARS = {"aten::where", "aten::masked_fill", "aten::masked_fill_", "aten::index_put_", "aten::fill_"}


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Return all tensors of nested arguments."""
    found: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, found.append, tree)
    return found


def indexes_by_mask(args: Any) -> bool:
    """Return whether an indexing operator needs the count of True values of a mask."""
    if not any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
        return False
    return not (len(args) > 2 and isinstance(args[2], torch.Tensor) and args[2].dim() == 0)  # a masked fill


def count_launches(func: Any, name: str, args: Any) -> int:
    """Estimate the kernels that CUDA launches for an operator."""
    returns = func._schema.returns
    view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    if view or name in NO_LAUNCH:
        return 0
    if name.startswith(("aten::_foreach_", "aten::_fused_", "aten::_amp_foreach")) and args and args[0]:
        return _multi_tensor_launches(name, args)
    return KERNELS.get(name, 1)


def _multi_tensor_launches(name: str, args: Any) -> int:
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor)]
    lists = [a for a in lists if any(t.dim() for t in a)] or lists
    out_of_place = not name.endswith("_") and "norm" not in name
    per_launch = TENSORS_PER_LAUNCH.get(len(lists) + out_of_place, 30)
    tensors = blocks = count = 0
    for t in lists[0]:
        tensors += 1
        for _ in range(max(-(-t.numel() // BLOCK), 1)):
            blocks += 1
            if blocks == BLOCKS_PER_LAUNCH:
                count, blocks, tensors = count + 1, 0, 1
        if tensors >= per_launch:
            count, blocks, tensors = count + 1, 0, 0
    return count + bool(blocks) + ("norm" in name)


def compute(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run an operator on the CPU with the precision that CUDA has."""
    special = SPECIAL.get(name)
    if special is not None:
        return special(func, args, kwargs)
    dtypes = {t.dtype for t in tensors_in((args, kwargs)) if t.is_floating_point()}
    narrow = next(iter(dtypes)) if len(dtypes) == 1 and dtypes & set(HALF) else None
    if name in VIA_FLOAT32 and narrow is not None:
        dtype = kwargs.get("dtype") or narrow
        wide = {**_widened(kwargs), **({"dtype": torch.float32} if "dtype" in kwargs else {})}
        return _narrowed(func(*_widened(args), **wide), dtype)
    try:
        return func(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as error:
        if narrow is None or not any(word in str(error) for word in ("Half", "not implemented", "BFloat16")):
            raise
        return _narrowed(func(*_widened(args), **_widened(kwargs)), narrow)


def _widened(tree: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t.float() if t.dtype in HALF else t, tree)


def _narrowed(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def _softmax(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim, half_to_float = args
    return func(x.float() if half_to_float else x, dim, False)


def _batch_norm(func: Any, args: Any, kwargs: Any) -> Any:
    x, *rest = args
    out, mean, invstd = aten.native_batch_norm(x.float(), *rest)
    return out.to(x.dtype), mean, invstd, torch.empty(0, dtype=torch.uint8)


def _batch_norm_backward(func: Any, args: Any, kwargs: Any) -> Any:
    x, grad, weight, mean, var, saved_mean, saved_invstd, eps, _ = args
    rest = (weight, mean, var, saved_mean, saved_invstd, True, eps, [True] * 3)
    grad_x, grad_weight, grad_bias = aten.native_batch_norm_backward(grad.float(), x.float(), *rest)
    return grad_x.to(x.dtype), grad_weight, grad_bias


def _norm_in_float32(func: Any, args: Any, kwargs: Any) -> Any:
    first = args[0]
    if first.dtype not in HALF:
        return func(*args, **kwargs)
    out = func(*_widened(args), **_widened(kwargs))
    return (out[0].to(first.dtype), *out[1:])


SPECIAL: dict[str, Callable[..., Any]] = {
    "aten::_softmax": _softmax,
    "aten::_log_softmax": _softmax,
    "aten::cudnn_batch_norm": _batch_norm,
    "aten::cudnn_batch_norm_backward": _batch_norm_backward,
    "aten::native_batch_norm": _norm_in_float32,
    "aten::native_layer_norm": _norm_in_float32,
    "aten::native_group_norm": _norm_in_float32,
    "aten::_fused_sdp_choice": lambda func, args, kwargs: 0,  # the math kernel
}
