"""A decoder's block of training in C (native_block.c), with its gradient; float32 on a CPU.

The same numbers as `decoder.Block`, up to rounding. At the widths that a CPU trains, a step of
autograd for each of its parts costs a tenth of a step, and what one part writes has left the cache
when the next one reads it.

Legend: B batch, T inputs, D width, H heads, K key/value heads, d width of a head, F of the MLP.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chainrule.pipeline.models import native, native_attention
from chainrule.pipeline.models.kernels import Linear, RMSNorm
from chainrule.pipeline.models.native_train import ACTIVATIONS

SOURCE = Path(__file__).with_suffix(".c")


@dataclass(frozen=True)
class Shape:
    """What a block does, besides its weights."""

    heads: int
    kv_heads: int
    head_width: int
    activation: str
    """A function of native_train.c."""
    parallel: bool
    epsilon: float


MOST_WEIGHTS = 5 << 19
"""Weights up to which a block is faster as one: every chunk of rows reads them all, and they should
be in a cache."""


def fits(x: Tensor, shape: Shape) -> bool:
    """Whether a block of inputs x (B, T, D) may be taken as one: every thread has rows then."""
    batch, length, _ = x.shape
    return (
        native_attention.fits(x, length, shape.head_width, shape.kv_heads)
        and is_built()
        and batch * length >= _library().block_chunk() * torch.get_num_threads()
    )


def is_built() -> bool:
    return _library() is not None


def weights_of(
    x: Tensor, rope: Tensor | None, parts: Sequence[nn.Module | None], shape: Shape
) -> list[Tensor | None] | None:
    """Weight and bias of each of a block's norms and layers, in the order of `_PARTS`. None where
    any is not its plain self: others watch it (ZeRO 3 gathers its weights when it is called), have
    taken its place, or changed what it computes; and where sizes do not agree, which torch says."""
    found: list[Any] = []
    for part in parts:
        if part is None:
            found += [None, None]
            continue
        epsilon = getattr(part, "epsilon", getattr(part, "eps", shape.epsilon))
        if type(part) not in (Linear, RMSNorm, nn.LayerNorm) or native.is_watched(part):
            return None
        if epsilon != shape.epsilon:
            return None
        found += [part.weight, getattr(part, "bias", None)]
    norm, bias, qkv, _, output, _, mlp_norm, mlp_bias, up, _, down, _ = found
    given = [w for w in found if w is not None]
    width, inner = x.shape[2], shape.heads * shape.head_width
    wanted = [
        (norm, (width,)),
        (qkv, (inner + 2 * shape.kv_heads * shape.head_width, width)),
        (output, (width, inner)),
        (mlp_norm, (width,)),
        (up, (ACTIVATIONS[shape.activation] * down.shape[1], width)),
        (down, (width, down.shape[1])),
    ]
    layer_norm = isinstance(parts[0], nn.LayerNorm)
    agrees = (
        all(w is None or tuple(w.shape) == sizes for w, sizes in wanted)
        and all(map(native.is_read_by_c, given))
        and layer_norm == (bias is not None)
        and (mlp_norm is None or layer_norm == (mlp_bias is not None))
        and (rope is None or rope.shape[1] == x.shape[1])
        and sum(w.numel() for w in given) <= MOST_WEIGHTS
    )
    return found if agrees else None


_ACTIVATIONS = list(ACTIVATIONS)
"""In the order of the tables of native_block.c."""
_PARTS = ("norm", "qkv", "output", "mlp_norm", "up", "down")


class _Part(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "bias", "by_weight", "by_bias")]


_SIZES = (
    *("batch", "length", "width", "heads", "kv_heads", "head_width", "mlp_width", "hidden_width"),
    *("activation", "parallel", "threads"),
)
_SAVED = (
    *("normed", "together", "logs", "attended", "middle", "mlp_normed", "hidden", "active"),
    *("kept", "mlp_kept"),
)
_GRADIENTS = ("by_x", "by_middle", "by_attended", "by_together", "by_hidden", "by_mlp_normed")


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        ("epsilon", ctypes.c_double),
        *((name, _Part) for name in _PARTS),
        *((name, ctypes.c_void_p) for name in ("rope", "first", "x")),
        *((name, ctypes.c_void_p) for name in (*_SAVED, "y", "gradient", *_GRADIENTS)),
    ]


@cache
def _library() -> Any:
    return native.functions(
        SOURCE,
        {
            "block_forward": "pp",
            "block_backward": "pp",
            "block_room": "pn->n",
            "block_chunk": "->n",
        },
    )


class BlockInC(torch.autograd.Function):
    """x (B, T, D) to (B, T, D). `weights`: weight and bias (None without) of the norm of attention,
    the layers qkv and output, the norm of the MLP (None, None where it shares the other's), and
    the MLP's layers. `first` as `native_attention.attention` has it, `rope` (2, T, 1, d)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rope: Tensor | None,
        first: Tensor,
        shape: Shape,
        *weights: Tensor | None,
    ) -> Tensor:
        x = x.contiguous()
        rope = None if rope is None else rope.contiguous()
        block = _block(x, rope, first, shape, weights)
        saved = _allocate(x, block, _saved_sizes(block))
        y = torch.empty_like(x)
        block.y = y.data_ptr()
        _run(block, back=False)
        ctx.save_for_backward(x, rope, first, *weights, *saved)
        ctx.shape = shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, rope, first, *rest = ctx.saved_tensors
        weights, saved = rest[: 2 * len(_PARTS)], rest[2 * len(_PARTS) :]
        gradient = gradient.contiguous()
        block = _block(x, rope, first, ctx.shape, weights)
        _place(block, _saved_sizes(block), saved)
        work = _allocate(x, block, _gradient_sizes(block))
        by_x = torch.empty_like(x)
        wanted = ctx.needs_input_grad[-len(weights) :]
        by_weights = [
            torch.empty_like(weight) if needed else None
            for weight, needed in zip(weights, wanted, strict=True)
        ]
        block.gradient, block.by_x = native.addresses(gradient, by_x)
        for part, by_weight, by_bias in zip(_PARTS, by_weights[::2], by_weights[1::2], strict=True):
            at = getattr(block, part)
            at.by_weight, at.by_bias = native.addresses(by_weight, by_bias)
        _run(block, back=True)
        del work  # until now the block wrote into it
        return by_x, None, None, None, *by_weights


def _block(x: Tensor, rope: Tensor | None, first: Tensor, shape: Shape, weights: Any) -> _Block:
    batch, length, width = x.shape
    up, down = weights[2 * _PARTS.index("up")], weights[2 * _PARTS.index("down")]
    rope_at, first_at, x_at = native.addresses(rope, first, x)
    pairs = zip(*(iter(native.addresses(*weights)),) * 2, strict=True)
    return _Block(
        batch=batch,
        length=length,
        width=width,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_width=shape.head_width,
        mlp_width=down.shape[1],
        hidden_width=len(up),
        activation=_ACTIVATIONS.index(shape.activation),
        parallel=shape.parallel,
        threads=torch.get_num_threads(),
        epsilon=shape.epsilon,
        rope=rope_at,
        first=first_at,
        x=x_at,
        **{name: _Part(*pair) for name, pair in zip(_PARTS, pairs, strict=True)},
    )


def _saved_sizes(block: _Block) -> dict[str, int]:
    """Floats of each tensor that the way back needs."""
    rows, inner = block.batch * block.length, block.heads * block.head_width
    own_norm = block.mlp_norm.weight is not None
    return {
        "normed": rows * block.width,
        "together": rows * (inner + 2 * block.kv_heads * block.head_width),
        "logs": rows * block.heads,
        "attended": rows * inner,
        "middle": rows * block.width,
        "mlp_normed": rows * block.width * own_norm,
        "hidden": rows * block.hidden_width,
        "active": rows * block.mlp_width,
        "kept": 2 * rows,
        "mlp_kept": 2 * rows * own_norm,
    }


def _gradient_sizes(block: _Block) -> dict[str, int]:
    saved, own_norm = _saved_sizes(block), block.mlp_norm.weight is not None
    return {
        "by_middle": saved["middle"] * own_norm,
        "by_attended": saved["attended"],
        "by_together": saved["together"],
        "by_hidden": saved["hidden"],
        "by_mlp_normed": saved["normed"] * (not own_norm),
    }


def _allocate(like: Tensor, block: _Block, sizes: dict[str, int]) -> list[Tensor]:
    """A tensor each: in one, they would be so large that malloc gave them back to the kernel."""
    tensors = [like.new_empty(size) for size in sizes.values()]
    _place(block, sizes, tensors)
    return tensors


def _place(block: _Block, sizes: dict[str, int], tensors: list[Tensor]) -> None:
    for name, tensor in zip(sizes, tensors, strict=True):
        setattr(block, name, tensor.data_ptr())
    if block.mlp_norm.weight is None:
        block.mlp_normed = block.normed


def _run(block: _Block, back: bool) -> None:
    library, at = _library(), ctypes.addressof(block)
    room = native.room(library.block_room(at, back))
    (library.block_backward if back else library.block_forward)(at, room.data_ptr())
