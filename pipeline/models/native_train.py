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
from chainrule.pipeline.models.native import addresses, is_exact_on_cpu

SOURCE = Path(__file__).with_suffix(".c")
PARTS = 16
"""Blocks of rows that a gradient is summed in: fixed, so that threads do not change it."""

ACTIVATIONS = {"swiglu": 2, "gelu": 1, "gelu_tanh": 1, "quick_gelu": 1}
"""How many numbers each reads for one that it writes."""


@cache
def _library() -> Any:
    activation, backward = "nnn pp", "nnn ppp"
    return native.functions(
        SOURCE,
        {
            **{name: activation for name in ACTIVATIONS},
            **{f"{name}_backward": backward for name in ACTIVATIONS},
            "rms_norm": "nnnd pppp",
            "rms_norm_backward": "nnnn pppppp",
            "split_heads": "nnnnnn ppppp",
            "join_heads": "nnnnnn pppppp",
        },
    )


def ready(x: Tensor) -> bool:
    """Whether gradients of `x` may go through C."""
    return is_exact_on_cpu(x) and _library() is not None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x (..., n) normed, and the factor of each row. All are contiguous, here and below."""
    n = x.shape[-1]
    y, scale = torch.empty_like(x), x.new_empty(x.numel() // n)
    _library().rms_norm(
        len(scale), n, torch.get_num_threads(), epsilon, *addresses(x, weight, scale, y)
    )
    return y, scale


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """By x and by weight."""
    n = x.shape[-1]
    by_x, by_weight = torch.empty_like(x), x.new_empty(PARTS + 1, n)
    _library().rms_norm_backward(
        len(scale),
        n,
        torch.get_num_threads(),
        PARTS,
        *addresses(gradient, x, weight, scale, by_x, by_weight),
    )
    return by_x, by_weight[0]


def activation(x: Tensor, name: str) -> Tensor:
    """x (..., parts * n) to (..., n) by the C function of that name."""
    n = x.shape[-1] // ACTIVATIONS[name]
    y = x.new_empty(*x.shape[:-1], n)
    getattr(_library(), name)(y.numel() // n, n, torch.get_num_threads(), *addresses(x, y))
    return y


def activation_backward(gradient: Tensor, x: Tensor, name: str) -> Tensor:
    n = gradient.shape[-1]
    by_x = torch.empty_like(x)
    function = getattr(_library(), f"{name}_backward")
    function(gradient.numel() // n, n, torch.get_num_threads(), *addresses(gradient, x, by_x))
    return by_x


def split_heads(
    qkv: Tensor, rope: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, T, (H + 2K) d) to q (B, T, H, d), k and v (B, T, K, d); q and k turned by `rope`
    (2, T, 1, d)."""
    batch, length, _ = qkv.shape
    width = rope.shape[-1]
    q = qkv.new_empty(batch, length, heads, width)
    k, v = (qkv.new_empty(batch, length, kv_heads, width) for _ in range(2))
    sizes = (batch, length, heads, kv_heads, width)
    _library().split_heads(*sizes, torch.get_num_threads(), *addresses(rope, qkv, q, k, v))
    return q, k, v


def join_heads(q: Tensor, k: Tensor, v: Tensor, rope: Tensor, to: Tensor) -> None:
    """Write gradients by the three (B, T, its heads, d) into that by qkv, of the same size in all.
    Strided, and they may stand there already."""
    batch, length, heads, width = q.shape
    strides = (ctypes.c_int64 * 9)(*(s for g in (q, k, v) for s in g.stride()[:3]))
    _library().join_heads(
        batch,
        length,
        heads,
        k.shape[2],
        width,
        torch.get_num_threads(),
        *addresses(rope, q, k, v),
        strides,
        *addresses(to),
    )


class RMSNormInC(torch.autograd.Function):
    """x (..., n), weight (n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        y, scale = rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return *rms_norm_backward(gradient.contiguous(), *ctx.saved_tensors), None


class ActivationInC(torch.autograd.Function):
    """x (..., parts * n) to (..., n), by the C function `name` and its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.name = name
        return activation(x, name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return activation_backward(gradient.contiguous(), x, ctx.name), None


class SplitHeadsInC(torch.autograd.Function):
    """`split_heads` with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, rope: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv, rope = qkv.contiguous(), rope.contiguous()
        ctx.save_for_backward(rope)
        ctx.shape = qkv.shape
        return split_heads(qkv, rope, heads, kv_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None, None, None]:
        (rope,) = ctx.saved_tensors
        q, k, v = (g if g.stride(-1) == 1 else g.contiguous() for g in (q, k, v))
        result = rope.new_empty(ctx.shape)
        join_heads(q, k, v, rope, result)
        return result, None, None, None
