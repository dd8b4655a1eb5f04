"""Causal attention of training in C (native_attention.c), with its gradients; float32 on a CPU.

torch's kernel has blocks made for long sequences; at the lengths that a CPU trains, half its time
goes to scores that nobody sees and to copies.
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
LONGEST = 2048
"""Inputs up to which a block's scores stay in a core's cache; torch's kernel is faster beyond."""


@cache
def _library() -> Any:
    return native.functions(
        SOURCE,
        {
            "attention": "nnnnnn p pppppp p",
            "attention_backward": "nnnnnn p ppppppppp p",
            "attention_room": "nn->n",
        },
    )


def suits(length: int, width: int) -> bool:
    """Whether the C is for so many inputs and heads so wide."""
    return width % 16 == 0 and length <= LONGEST


def fits(x: Tensor, length: int, width: int, kv_heads: int) -> bool:
    """Whether attention goes through C when training: of what is like x (B, ...), so many inputs,
    heads so wide, so many heads of keys."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and suits(length, width)
        and len(x) * kv_heads >= torch.get_num_threads()  # each takes whole ones
        and is_exact_on_cpu(x)
        and _library() is not None
    )


def attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v, (B, H, T, d), and the logarithms of its sums, (B, H, T).

    q (B, H, T, d), k and v (B, K, T, d), the last of stride 1; query t of a row sees the keys
    first[t] to t, `first` (B, T) int64, contiguous, never falling.
    """
    batch, heads, length, width = q.shape
    y = q.new_empty(batch, length, heads, width).transpose(1, 2)
    logs = q.new_empty(batch, heads, length)
    threads, room = _room(length, width)
    _library().attention(
        batch,
        heads,
        k.shape[1],
        length,
        width,
        threads,
        _strides(q, k, v, y),
        *addresses(q, k, v, first, y, logs, room),
    )
    return y, logs


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, logs: Tensor, gradient: Tensor
) -> Tensor:
    """The gradients by q, k and v side by side: (B, T, H + 2K, d), contiguous."""
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    together = q.new_empty(batch, length, heads + 2 * kv_heads, width)
    by_q, by_k, by_v = split(together, heads, kv_heads)
    threads, room = _room(length, width)
    _library().attention_backward(
        batch,
        heads,
        kv_heads,
        length,
        width,
        threads,
        _strides(q, k, v, gradient, by_q, by_k, by_v),
        *addresses(q, k, v, first, logs, gradient, by_q, by_k, by_v, room),
    )
    return together


def split(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """(B, T, H + 2K, d) as q (B, H, T, d), k and v (B, K, T, d)."""
    return qkv.transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)


class AttentionInC(torch.autograd.Function):
    """`attention` with its gradients, of tensors with any strides."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        y, logs = attention(q, k, v, first)
        ctx.save_for_backward(q, k, v, first, logs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, first, logs = ctx.saved_tensors
        if gradient.stride(-1) != 1:
            gradient = gradient.contiguous()
        together = attention_backward(q, k, v, first, logs, gradient)
        by_q, by_k, by_v = split(together, q.shape[1], k.shape[1])
        return by_q, by_k, by_v, None


def _room(length: int, width: int) -> tuple[int, Tensor]:
    threads = torch.get_num_threads()
    return threads, native.room(threads * _library().attention_room(length, width))


def _strides(*tensors: Tensor) -> Any:
    """Of batch, head and time."""
    numbers = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    return (ctypes.c_int64 * len(numbers))(*numbers)
