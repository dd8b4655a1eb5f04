"""Operations that torch has, where it is slow on a CPU: what each says, in fewer passes.

Norm, rotation and SwiGLU have their gradients written out, in about half the passes over
memory that autograd makes of the plain expressions: at the sizes that a CPU trains, those are
as dear as the matrix products between them; where native.py has a compiler, each is one pass
in C. In bf16 products with few rows go through better kernels of torch's own than the one it
takes. Under `torch.compile` everything is the plain expression, which it fuses itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chainrule.pipeline.models import native, native_product
from chainrule.pipeline.models.native_train import (
    ActivationInC,
    RMSNormInC,
    SplitHeadsInC,
    ready,
)


class RMSNorm(nn.Module):
    """Root mean square layer normalisation (Zhang & Sennrich 2019, equation 4)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        # torch has one kernel for it without a gradient, and on a GPU with one, too.
        if x.device.type == "cpu" and _by_hand():
            by = RMSNormInC if ready(x) and native.is_read_by_c(self.weight) else _RMSNorm
            y: Tensor = by.apply(x, self.weight, self.epsilon)
            return y
        return _rms_norm(x, self.weight, self.epsilon)


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_().to(x.dtype)
        ctx.save_for_backward(x, scale, weight)
        ctx.epsilon = epsilon
        return torch.mul(x, scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = partial(_rms_norm, epsilon=ctx.epsilon)
            by_x, by_weight = _differentiable(plain, (x, weight), ctx, gradient)
            return by_x, by_weight, None
        normed = x * scale
        product = gradient * normed
        by_weight = product.flatten(0, -2).sum(0)
        along = (product.flatten(0, -2) @ weight.to(product.dtype).unsqueeze(1)).view(scale.shape)
        along.div_(-x.shape[-1])
        by_x = torch.mul(gradient, weight).addcmul_(normed, along).mul_(scale)
        return by_x, by_weight, None


def split_heads(
    qkv: Tensor, rope: Tensor | None, heads: int, kv_heads: int, head_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, (heads + 2 kv_heads) d) to q, k, v (B, T, its heads, d); q and k are turned."""
    if rope is not None and _by_hand() and ready(qkv):
        q, k, v = SplitHeadsInC.apply(qkv, rope, heads, kv_heads)
        return q, k, v
    qkv = qkv.unflatten(-1, (-1, head_width))
    if rope is None:
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    else:
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=2)
        q, k = rotate(qk, rope).split([heads, kv_heads], dim=2)
    return q, k, v


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn x (B, T, heads, d) by the angles of its positions.

    `rope` (2, T, 1, d) holds the cosines twice, then minus and plus the sines: the pair
    (x_i, x_{i+d/2}) is turned by angle i (Su et al. 2021, equation 34).
    """
    if _by_hand():
        y: Tensor = _Rotation.apply(x, rope)
        return y
    return _turn(x, rope, 1)


def _turn(x: Tensor, rope: Tensor, direction: int) -> Tensor:
    half = x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], dim=-1)
    if torch.compiler.is_compiling():
        return x * rope[0] + swapped * rope[1]
    return torch.mul(x, rope[0]).addcmul_(swapped, rope[1], value=direction)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rope: Tensor) -> Tensor:
        ctx.save_for_backward(rope)
        return _turn(x, rope, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rope,) = ctx.saved_tensors
        return _turn(gradient, rope, -1), None  # linear: differentiable as it stands


def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up of (..., 2F), the gate in the first half (Shazeer 2020, equation 6)."""
    if _by_hand():
        y: Tensor
        if ready(gate_and_up):
            y = ActivationInC.apply(gate_and_up, "swiglu")
        else:
            y = _SwiGLU.apply(gate_and_up)
        return y
    return _swiglu(gate_and_up)


def _swiglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        opened = F.silu(gate)
        ctx.save_for_backward(gate_and_up, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        gate_and_up, opened = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(_swiglu, (gate_and_up,), ctx, gradient)[0]
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        by_gate, by_up = result.chunk(2, dim=-1)
        torch.mul(gradient, opened, out=by_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=by_gate)
        return result


def gelu(x: Tensor) -> Tensor:
    """Hendrycks & Gimpel 2016, equation 1: x times the normal distribution function."""
    if _by_hand() and ready(x):
        y: Tensor = ActivationInC.apply(x, "gelu")
        return y
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """The same by a tangent, section 2: GPT-2's."""
    if _by_hand() and ready(x):
        y: Tensor = ActivationInC.apply(x, "gelu_tanh")
        return y
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): Hendrycks & Gimpel 2016, section 2, as ImageGPT has it."""
    if _by_hand():
        y: Tensor = ActivationInC.apply(x, "quick_gelu") if ready(x) else _QuickGELU.apply(x)
        return y
    return _quick_gelu(x)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class _QuickGELU(torch.autograd.Function):
    """silu(1.702 x) / 1.702, whose derivative is that of silu at 1.702 x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(1.702 * x).div_(1.702)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(_quick_gelu, (x,), ctx, gradient)[0]
        by_x: Tensor = torch.ops.aten.silu_backward(gradient, 1.702 * x)
        return by_x


class Linear(nn.Linear):
    """nn.Linear; on a CPU, training in float32 goes through products in C, and in bf16 a few
    rows (a step of generation) through those that are 1.5 to 2 times as fast at it."""

    FEW_ROWS = 32

    def forward(self, x: Tensor) -> Tensor:
        if _by_hand() and native_product.ready(x, self.weight, self.bias):
            y: Tensor = native_product.LinearInC.apply(x, self.weight, self.bias)
            return y
        rows = x.numel() // self.in_features
        if (
            x.dtype != torch.bfloat16
            or self.weight.dtype != torch.bfloat16  # autocast
            or not 1 <= rows <= self.FEW_ROWS
            or x.device.type != "cpu"
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return super().forward(x)
        if rows == 1:
            y = torch.mv(self.weight, x.reshape(-1))
        else:
            y = torch.mm(self.weight, x.reshape(rows, -1).t().contiguous()).t().contiguous()
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)


def _differentiable(
    plain: Callable[..., Tensor], given: tuple[Tensor, ...], ctx: Any, gradient: Tensor
) -> list[Tensor | None]:
    """Gradients by the first of a function's inputs that can be differentiated again
    (`create_graph`): autograd's own, of the plain expression."""
    # Views: of the inputs themselves, a gradient would also go through what one was made of.
    given = tuple(x.view_as(x) for x in given)
    wanted = [x for x, needed in zip(given, ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(plain(*given), wanted, gradient, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[: len(given)]]


def _by_hand() -> bool:
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not native.is_transformed()
    )
