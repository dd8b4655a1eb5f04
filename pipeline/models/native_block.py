"""A decoder's block of training as one function with its gradient written out; float32 on a CPU.

The same numbers as `decoder.Block`, from the same kernels. At the widths that a CPU trains, a step
of autograd for each of its parts is as dear as a twentieth of the products, and sums and splits
pass over memory that a gradient written at its place does not touch.

Legend: B batch, T inputs, D width, H heads, K key/value heads, d width of a head, F of the MLP.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chainrule.pipeline.models import native_attention, native_product, native_train
from chainrule.pipeline.models.kernels import Linear, RMSNorm
from chainrule.pipeline.models.native_product import linear, linear_backward


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


def fits(x: Tensor, shape: Shape) -> bool:
    """Whether a block of inputs x (B, T, D) may be taken as one."""
    whole = native_attention.fits(x, x.shape[1], shape.head_width, shape.kv_heads)
    return whole and native_train.ready(x) and native_product.ready(x, x)


def weights_of(parts: list[nn.Module | None]) -> list[Tensor | None] | None:
    """Weight and bias of each of a block's norms and layers; None where any is not its plain
    self: others watch it (ZeRO 3 gathers its weights when it is called) or have taken its place."""
    found: list[Tensor | None] = []
    for part in parts:
        if part is None:
            found += [None, None]
        elif type(part) not in (Linear, RMSNorm, nn.LayerNorm) or is_watched(part):
            return None
        else:
            found += [part.weight, getattr(part, "bias", None)]  # type: ignore[list-item]
    return found


def is_watched(module: nn.Module) -> bool:
    """Whether something is to be called when it is, or when its gradient is known."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks)


class BlockByHand(torch.autograd.Function):
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
        norm, qkv_layer, output, mlp_norm, up, down = _pairs(weights)
        normed, kept = _norm(x, norm, shape.epsilon)
        qkv = linear(normed, *qkv_layer)
        if rope is None:
            whole = qkv.view(*qkv.shape[:2], -1, shape.head_width)
            q, k, v = native_attention.split(whole, shape.heads, shape.kv_heads)
        else:
            rope = rope.contiguous()
            parts = native_train.split_heads(qkv, rope, shape.heads, shape.kv_heads)
            q, k, v = (part.transpose(1, 2) for part in parts)
        y, logs = native_attention.attention(q, k, v, first)
        y = y.transpose(1, 2).flatten(2)
        middle = linear(y, *output, x)
        if mlp_norm[0] is None:
            mlp_normed, mlp_kept = normed, kept
        else:
            mlp_normed, mlp_kept = _norm(x if shape.parallel else middle, mlp_norm, shape.epsilon)
        hidden = linear(mlp_normed, *up)
        active = native_train.activation(hidden, shape.activation)
        ctx.save_for_backward(
            x, rope, first, q, k, v, logs, y, normed, middle, mlp_normed, hidden, active, *kept,
            *mlp_kept, *weights,
        )  # fmt: skip
        ctx.shape, ctx.kept = shape, len(kept)
        return linear(active, *down, middle)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, rope, first, q, k, v, logs, y, normed, middle, mlp_normed, hidden, active, *rest = (
            ctx.saved_tensors
        )
        shape = ctx.shape
        kept, mlp_kept = rest[: ctx.kept], rest[ctx.kept : 2 * ctx.kept]
        norm, qkv_layer, output, mlp_norm, up, down = _pairs(rest[2 * ctx.kept :])
        gradient = gradient.contiguous()

        by_active, *by_down = _backward_of(gradient, active, down)
        by_hidden = native_train.activation_backward(by_active, hidden, shape.activation)
        by_normed, *by_up = _backward_of(by_hidden, mlp_normed, up)
        by_mlp_norm: list[Tensor | None] = [None, None]
        by_middle = gradient
        if mlp_norm[0] is not None:
            before = x if shape.parallel else middle
            added, *by_mlp_norm = _norm_backward(by_normed, before, mlp_norm, mlp_kept)
            by_middle = added.add_(gradient)
        # Falcon's parallel block: what goes to x by the MLP does not go through attention.
        by_sum = gradient if shape.parallel else by_middle
        by_y, *by_output = _backward_of(by_sum, y, output)
        by_y = by_y.view(*by_y.shape[:2], shape.heads, shape.head_width).transpose(1, 2)
        together = native_attention.attention_backward(q, k, v, first, logs, by_y)
        if rope is not None:
            sizes = [shape.heads, shape.kv_heads, shape.kv_heads]
            by_q, by_k, by_v = together.split(sizes, dim=2)
            native_train.join_heads(by_q, by_k, by_v, rope, together)
        attended, *by_qkv = _backward_of(together.flatten(2), normed, qkv_layer)
        if mlp_norm[0] is None:
            attended.add_(by_normed)
        by_x, *by_norm = _norm_backward(attended, x, norm, kept)
        by_x.add_(by_middle)
        return by_x, None, None, None, *by_norm, *by_qkv, *by_output, *by_mlp_norm, *by_up, *by_down


Pair = tuple[Tensor, Tensor | None]


def _pairs(weights: tuple[Tensor | None, ...]) -> list[Any]:
    return list(zip(weights[::2], weights[1::2], strict=True))


def _norm(x: Tensor, of: Pair, epsilon: float) -> tuple[Tensor, list[Tensor]]:
    """RMSNorm without a bias, LayerNorm with one; what its gradient needs to know of each row."""
    weight, bias = of
    if bias is None:
        y, scale = native_train.rms_norm(x, weight, epsilon)
        return y, [scale]
    y, mean, inverse = torch.native_layer_norm(x, weight.shape, weight, bias, epsilon)
    return y, [mean, inverse]


def _norm_backward(
    gradient: Tensor, x: Tensor, of: Pair, kept: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """By x, weight and bias."""
    weight, bias = of
    if bias is None:
        return *native_train.rms_norm_backward(gradient, x, weight, *kept), None
    by: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
        gradient, x, weight.shape, *kept, weight, bias, [True, True, True]
    )
    return by


def _backward_of(gradient: Tensor, x: Tensor, layer: Pair) -> tuple[Tensor, Tensor, Tensor | None]:
    """By x (..., n); by the weight (m, n), and by the bias."""
    weight, bias = layer
    by: Any = linear_backward(gradient, x, weight, (True, True, bias is not None))
    return by
