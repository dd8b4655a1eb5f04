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
from chainrule.pipeline.models.native_train import addresses, is_exact_on_cpu

SOURCE = Path(__file__).with_suffix(".c")
LONGEST = 2048
"""Inputs up to which a block's scores stay in a core's cache; torch's kernel is faster beyond."""


@cache
def _library() -> Any:
    library: Any = native.load(SOURCE)
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, pointers in {"attention": 8, "attention_backward": 11}.items():
        function = getattr(library, name)
        function.argtypes = [number] * 6 + [pointer] * pointers
        function.restype = None
    library.scratch.argtypes = [number] * 2
    library.scratch.restype = number
    return library


def fits(q: Tensor, k: Tensor, dropout: float) -> bool:
    """Whether attention of q (B, H, T, d) and k (B, K, T, d) goes through C when training."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and dropout == 0
        and q.shape[3] % 16 == 0
        and q.shape[2] <= LONGEST
        and k.shape[0] * k.shape[1] >= torch.get_num_threads()  # each takes whole ones
        and is_exact_on_cpu(q)
        and _library() is not None
    )


class AttentionInC(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v, of q (B, H, T, d), k and v (B, K, T, d): query t of a row sees
    the keys first[t] to t, `first` (B, T) int64 never falling."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        first = first.contiguous()
        batch, heads, length, width = q.shape
        y = torch.empty(batch, length, heads, width).transpose(1, 2)
        logs = torch.empty(batch, heads, length)
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
        ctx.save_for_backward(q, k, v, first, logs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, first, logs = ctx.saved_tensors
        if gradient.stride(-1) != 1:
            gradient = gradient.contiguous()
        batch, heads, length, width = q.shape
        kv_heads = k.shape[1]
        together = torch.empty(batch, length, heads + 2 * kv_heads, width).transpose(1, 2)
        by_q, by_k, by_v = together.split([heads, kv_heads, kv_heads], dim=1)
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
        return by_q, by_k, by_v, None


def _room(length: int, width: int) -> tuple[int, Tensor]:
    threads = torch.get_num_threads()
    return threads, torch.empty(threads * _library().scratch(length, width))


def _strides(*tensors: Tensor) -> Any:
    """Of batch, head and time."""
    numbers = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    return (ctypes.c_int64 * len(numbers))(*numbers)
