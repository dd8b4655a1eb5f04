"""Shapes without memory: a forward pass of which nothing but what it would keep is computed.

For a GPU on torch's meta device; for a CPU on fake tensors, which are run through the CPU's own
operations, its autocast and its branches in our models.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def on_cpu(precision: str) -> Iterator[None]:
    """Tensors made inside, or moved there by `to_empty`, are of a CPU and have no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # a second of imports

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32")
    with FakeTensorMode(allow_non_fake_inputs=True), _NoValues(), autocast:
        yield


@contextlib.contextmanager
def on_gpu() -> Iterator[None]:
    with torch.device("meta"), _NoValues():
        yield


class _NoValues(TorchFunctionMode):
    """Checks of values find nothing wrong: there are no values."""

    def __torch_function__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.aminmax:
            return 0, 0
        if func is torch.randint and args[-1] == ():  # a number that the model will look at
            return 0
        if func is torch.bincount:
            return torch.zeros((kwargs or {})["minlength"], dtype=torch.long)
        return func(*args, **(kwargs or {}))


class Kept:
    """While inside: the tensors that autograd keeps for backward, the weights left out."""

    def __init__(self, *models: nn.Module) -> None:
        tensors = [t for m in models for t in (*m.parameters(), *m.buffers())]
        self._weights = {t.untyped_storage()._cdata for t in tensors}
        self._kept: dict[int, Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda t: t)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._kept[storage._cdata] = tensor
        return tensor

    def __enter__(self) -> "Kept":
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()

    def sizes(self) -> list[int]:
        """Bytes of each, once."""
        return [tensor.untyped_storage().nbytes() for tensor in self._kept.values()]


class FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel keeps it for backward."""

    def __torch_function__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("only shapes are run through here")
