"""Kernels of training in C (native_train.c), with their gradients; float32 on a CPU.

`ready` says whether they may be used; the callers are in kernels.py, where torch's way stands
beside them.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chainrule.pipeline.models import native

SOURCE = Path(__file__).with_suffix(".c")
PARTS = 16
"""Blocks of rows that a gradient is summed in: fixed, so that threads do not change it."""


@cache
def _library() -> Any:
    library: Any = native.load(SOURCE)
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    counts = {
        # numbers, then pointers (an epsilon between them)
        "swiglu": (3, 2),
        "swiglu_backward": (3, 3),
        "gelu": (3, 2),
        "gelu_backward": (3, 3),
        "gelu_tanh": (3, 2),
        "gelu_tanh_backward": (3, 3),
        "quick_gelu": (3, 2),
        "quick_gelu_backward": (3, 3),
        "rms_norm_backward": (4, 6),
        "split_heads": (6, 5),
        "join_heads": (6, 6),
    }
    for name, (numbers, pointers) in counts.items():
        function = getattr(library, name)
        function.argtypes = [number] * numbers + [pointer] * pointers
        function.restype = None
    library.rms_norm.argtypes = [number] * 3 + [ctypes.c_double] + [pointer] * 4
    library.rms_norm.restype = None
    return library


def ready(x: Tensor) -> bool:
    """Whether gradients of `x` may go through C."""
    return is_exact_on_cpu(x) and _library() is not None


def is_exact_on_cpu(x: Tensor) -> bool:
    """Float32 on a CPU, not to be cast, where roundings other than torch's are allowed."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and native.is_allowed()
        and not torch.is_autocast_enabled("cpu")
    )


class RMSNormInC(torch.autograd.Function):
    """x (..., n), weight (n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        n = x.shape[-1]
        y, scale = torch.empty_like(x), torch.empty(x.numel() // n)
        _library().rms_norm(
            len(scale), n, torch.get_num_threads(), epsilon, *addresses(x, weight, scale, y)
        )
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        gradient = gradient.contiguous()
        n = x.shape[-1]
        by_x, by_weight = torch.empty_like(x), torch.empty(PARTS + 1, n)
        _library().rms_norm_backward(
            len(scale),
            n,
            torch.get_num_threads(),
            PARTS,
            *addresses(gradient, x, weight, scale, by_x, by_weight),
        )
        return by_x, by_weight[0], None


class ActivationInC(torch.autograd.Function):
    """x (..., parts * n) to (..., n), by the C function `name` and its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, parts: int) -> Tensor:
        x = x.contiguous()
        n = x.shape[-1] // parts
        y = torch.empty(*x.shape[:-1], n)
        getattr(_library(), name)(y.numel() // n, n, torch.get_num_threads(), *addresses(x, y))
        ctx.save_for_backward(x)
        ctx.name = name
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        n = gradient.shape[-1]
        by_x = torch.empty_like(x)
        function = getattr(_library(), f"{ctx.name}_backward")
        function(gradient.numel() // n, n, torch.get_num_threads(), *addresses(gradient, x, by_x))
        return by_x, None, None


class SplitHeadsInC(torch.autograd.Function):
    """qkv (B, T, (H + 2K) d) to q (B, T, H, d), k and v (B, T, K, d); q and k turned by `rope`
    (2, T, 1, d)."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, rope: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv, rope = qkv.contiguous(), rope.contiguous()
        batch, length, _ = qkv.shape
        width = rope.shape[-1]
        q = torch.empty(batch, length, heads, width)
        k, v = (torch.empty(batch, length, kv_heads, width) for _ in range(2))
        sizes = (batch, length, heads, kv_heads, width)
        _library().split_heads(*sizes, torch.get_num_threads(), *addresses(rope, qkv, q, k, v))
        ctx.save_for_backward(rope)
        ctx.sizes = sizes
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None, None, None]:
        (rope,) = ctx.saved_tensors
        batch, length, heads, kv_heads, width = ctx.sizes
        q, k, v = (g if g.stride(-1) == 1 else g.contiguous() for g in (q, k, v))
        strides = (ctypes.c_int64 * 9)(*(s for g in (q, k, v) for s in g.stride()[:3]))
        result = torch.empty(batch, length, (heads + 2 * kv_heads) * width)
        _library().join_heads(
            *ctx.sizes,
            torch.get_num_threads(),
            *addresses(rope, q, k, v),
            strides,
            *addresses(result),
        )
        return result, None, None, None


def addresses(*tensors: Tensor) -> list[int]:
    """Where the numbers of each tensor are."""
    return [tensor.data_ptr() for tensor in tensors]
