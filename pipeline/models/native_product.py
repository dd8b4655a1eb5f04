"""Linear layers of training in C (native_product.c), with their gradients; float32 on a CPU.

At the widths that a CPU trains, MKL's and oneDNN's products take 1.1 to 1.4 times as long (on AMD's
processors), and a result's bits do not depend on how many threads there are.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chainrule.pipeline.models import native
from chainrule.pipeline.models.native import addresses, is_exact_on_cpu

SOURCE = Path(__file__).with_suffix(".c")


@cache
def _library() -> Any:
    return native.functions(SOURCE, {"product": "nnnn pnn pnn pppp", "scratch": "nnn->n"})


def ready(x: Tensor, weight: Tensor) -> bool:
    """Whether products of x and weight, and their gradients, may go through C."""
    whole = x.numel() > 0 and weight.dtype == torch.float32
    return whole and is_exact_on_cpu(x) and _library() is not None


def product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    """a (m, k) b (k, n) + bias (n) + added (m, n). a or its transpose is contiguous, as bias and
    added are; b has any strides."""
    (m, k), n = a.shape, b.shape[1]
    y, threads = torch.empty(m, n), torch.get_num_threads()
    work = torch.empty(_library().scratch(n, k, threads))
    _library().product(
        m,
        n,
        k,
        threads,
        a.data_ptr(),
        *a.stride(),
        b.data_ptr(),
        *b.stride(),
        *addresses(bias, added, y, work),
    )
    return y


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    """x (..., k) times weight (n, k) transposed, + bias + added (..., n)."""
    if added is not None:
        added = added.reshape(-1, len(weight))
    return product(x.reshape(-1, x.shape[-1]), weight.t(), bias, added).view(*x.shape[:-1], -1)


def linear_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """By x, by weight and by bias, where it `needs` to be known; all contiguous."""
    rows = gradient.view(-1, gradient.shape[-1])
    return (
        product(rows, weight).view_as(x) if needs[0] else None,
        product(rows.t(), x.view(-1, x.shape[-1])) if needs[1] else None,
        rows.sum(0) if needs[2] else None,
    )


class LinearInC(torch.autograd.Function):
    """x (..., k), weight (n, k), bias (n) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return linear_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.needs_input_grad)
