"""Attention: who sees whom, by which kernel.

    torch's   scaled_dot_product_attention; on a GPU with plain causality that is the flash kernel
    flex      FlexAttention, on a GPU where a window or documents limit what is seen: blocks that
              nobody sees are skipped (Dong et al. 2024)
    written   three products, in bf16 on a CPU when training: there the backward pass of torch's
              kernel is 2 to 7 times slower than they are (contexts of 256 and 64)
    in C      in float32 on a CPU when training, where there is a compiler (native_attention.py)
    grouped   in a cursor's steps: one query or few; no key is repeated for the heads that share it

Legend: B batch, T elements, H heads, K key/value heads, d width of a head.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chainrule.pipeline.models import native_attention

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q_BHTd, k_BKTd, v_BKTd) -> BHTd: attention over what the caller lets be seen."""


class FullAttention:
    """Attention of all inputs at once: each sees itself and those before it, of its document
    (`documents` (B, T) integers) and no further back than `window`. An `Attend`; masks are made
    once, when the first layer asks."""

    def __init__(
        self,
        length: int,
        window: int | None,
        documents: Tensor | None,
        dropout: float,
        device: torch.device,
    ) -> None:
        self.length, self.window, self.documents = length, window, documents
        self.dropout, self.device = dropout, device
        self.limited = documents is not None or (window is not None and window < length)
        self._made_mask: Tensor | None = None
        self._first: Tensor | None = None
        self._bias: Tensor | None = None
        self._blocks: Any = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.limited and flex_fits(q, self.dropout):
            if self._blocks is None:
                self._blocks = visible_blocks(self.length, self.window, self.documents, self.device)
            return flex_attention(q, k, v, self._blocks)
        if attention_is_written_out(q):
            if self._bias is None:
                self._bias = attention_bias(q, self._mask())
            return written_out_attention(q, k, v, self._bias, self.dropout)
        if self.dropout == 0 and native_attention.fits(q, q.shape[2], q.shape[3], k.shape[1]):
            y: Tensor = native_attention.AttentionInC.apply(q, k, v, self.first(len(q)))
            return y
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self._mask(),
            is_causal=not self.limited,
            dropout_p=self.dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    def first(self, batch: int) -> Tensor:
        """The first input that each may look at, (B, T): it sees from there to itself."""
        if self._first is None:
            self._first = first_seen(batch, self.length, self.window, self.documents, self.device)
        return self._first

    def _mask(self) -> Tensor | None:
        if self._made_mask is None and self.limited:
            self._made_mask = visible(self.length, self.window, self.documents, self.device)
        return self._made_mask


def visible(
    length: int, window: int | None, documents: Tensor | None, device: torch.device
) -> Tensor:
    """Which input may look at which: (T, T) or (B, 1, T, T) bool."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    if documents is not None:
        mask = mask & (documents.unsqueeze(2) == documents.unsqueeze(1))
        mask = mask.unsqueeze(1)
    return mask


def first_seen(
    batch: int, length: int, window: int | None, documents: Tensor | None, device: torch.device
) -> Tensor:
    """`visible` as the first input that each may look at, (B, T): it sees from there to itself."""
    steps = torch.arange(length, device=device).expand(batch, -1)
    first = torch.zeros(batch, length, dtype=torch.long, device=device)
    if documents is not None:
        new = documents[:, 1:] != documents[:, :-1]
        first[:, 1:] = torch.where(new, steps[:, 1:], 0).cummax(dim=1).values
    return (first if window is None else first.maximum(steps - window + 1)).contiguous()


FLEX_LEAST_WIDTH = 16
"""FlexAttention's kernels want heads at least this wide, and a power of two."""


def flex_fits(q: Tensor, dropout: float) -> bool:
    """FlexAttention has a fused kernel with gradients on GPUs only, and no dropout. A model
    that is being compiled keeps to masks: whether a mask of blocks can be made within is a
    matter of torch's version. CHAINRULE_FLEX=0 does without."""
    width = q.shape[-1]
    return (
        q.is_cuda
        and dropout == 0
        and width >= FLEX_LEAST_WIDTH
        and width & (width - 1) == 0
        and not torch.compiler.is_compiling()
        and os.environ.get("CHAINRULE_FLEX") != "0"
    )


def visible_blocks(
    length: int, window: int | None, documents: Tensor | None, device: torch.device
) -> Any:
    """`visible` as FlexAttention's BlockMask: it says which blocks of 128 x 128 have anything
    to be seen in, and the rule within them."""
    if documents is None:
        return _blocks_of_a_window(length, window, device)
    numbers = documents

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (numbers[batch, query] == numbers[batch, key])
        return seen if window is None else seen & (query - key < window)

    return _make_blocks(sees, len(documents), length, device)


@lru_cache(maxsize=16)
def _blocks_of_a_window(length: int, window: int | None, device: torch.device) -> Any:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        return seen if window is None else seen & (query - key < window)

    return _make_blocks(sees, None, length, device)


def _make_blocks(
    sees: Callable[..., Tensor], batch: int | None, length: int, device: torch.device
) -> Any:
    make = _compiled("create_block_mask") if device.type == "cuda" else _flex("create_block_mask")
    return make(sees, batch, None, length, length, device=str(device))


def flex_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> Tensor:
    """q (B, H, T, d), k and v (B, K, T, d) under a BlockMask; compiled once a shape on a GPU,
    elsewhere torch's reference of it (values only)."""
    run = _compiled("flex_attention") if q.is_cuda else _flex("flex_attention")
    y: Tensor = run(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
    return y


def _flex(name: str) -> Any:
    from torch.nn.attention import flex_attention as module  # slow to import

    return getattr(module, name)


@lru_cache(maxsize=2)
def _compiled(name: str) -> Any:
    """Fused, no dense mask or score is ever made."""
    return torch.compile(_flex(name))


def attention_is_written_out(q: Tensor) -> bool:
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def attention_bias(q: Tensor, mask: Tensor | None) -> Tensor:
    """0 where an input may look, -inf where not: (B or 1, 1, T, T) of the dtype of `q`."""
    length = q.shape[2]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
    return bias.masked_fill_(~mask, -torch.inf)


def written_out_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v; q (B, H, T, d), k and v (B, K, T, d)."""
    batch, heads, length, width = q.shape
    if k.shape[1] != heads:
        k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    q, k, v = (t.reshape(batch * heads, length, width) for t in (q, k, v))
    bias = bias.expand(batch, heads, length, length).reshape(-1, length, length)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=width**-0.5)
    weights = torch.softmax(scores, dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return (weights @ v).view(batch, heads, length, width)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with H/K queries to a key, without repeating the keys.

    q (B, H, t, d), k and v (B, K, n, d), mask (t, n) or (B, 1, t, n) bool, None only where t is 1
    and sees all.
    """
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    if length == 1 and heads != kv_heads:
        # All see the same: the queries of a key's group are as good as a sequence.
        q = q.reshape(batch, kv_heads, heads // kv_heads, width)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.reshape(batch, heads, length, width)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads != kv_heads)
