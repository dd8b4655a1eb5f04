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
    return native.functions(SOURCE, {"product": "nnnn pnn pnn ppp", "product_room": "nnn->n"})


def ready(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a linear layer of x, and its gradients, may go through C."""
    given = (weight,) if bias is None else (weight, bias)
    return (
        x.numel() > 0
        and all(w.dtype == torch.float32 and w.device.type == "cpu" for w in given)
        and (bias is None or bias.is_contiguous())
        and is_exact_on_cpu(x)
        and _library() is not None
    )


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (m, k) b (k, n) + bias (n). a or its transpose is contiguous; b has any strides."""
    (m, k), n = a.shape, b.shape[1]
    y, threads = a.new_empty(m, n), torch.get_num_threads()
    room = native.room(_library().product_room(n, k, threads))
    _library().product(
        m,
        n,
        k,
        threads,
        a.data_ptr(),
        *a.stride(),
        b.data_ptr(),
        *b.stride(),
        *addresses(bias, y, room),
    )
    return y


class LinearInC(torch.autograd.Function):
    """x (..., k) times weight (n, k) transposed, + bias (n) where there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return product(x.view(-1, x.shape[-1]), weight.t(), bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad
        rows = gradient.contiguous().view(-1, len(weight))
        return (
            product(rows, weight).view_as(x) if by_x else None,
            product(rows.t(), x.view(-1, x.shape[-1])) if by_weight else None,
            rows.sum(0) if by_bias else None,
        )
