"""What turns a model's next-element distribution into the one that is drawn from.

In this order: guidance, repetition penalty, temperature, top-k, top-p, min-p. Each works on
log-probabilities in nats over the last dimension and returns them normalised; a token that
is cut has -inf. Legend: B rows, V tokens.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from chainrule.pipeline.config import Settings


class Filters(Settings):
    """How a distribution is sharpened and cut. The defaults leave it as it is."""

    temperature: float = Field(1.0, ge=0, allow_inf_nan=False, description="0 is greedy")
    top_k: int | None = Field(None, ge=1, description="keep the k most probable tokens")
    top_p: float | None = Field(
        None, gt=0, le=1, description="keep the smallest set with this mass (the nucleus)"
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="keep tokens of at least this share of the mode's probability"
    )
    repetition_penalty: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="above 1: what was said before is less likely"
    )

    @property
    def identity(self) -> bool:
        """Whether the filters leave every distribution as it is."""
        return self == type(self)()


class Guidance(Settings):
    """Classifier-free guidance: Ho & Salimans 2022, equation 6, for logits.

    log p = log p(x | unconditional) + scale * (log p(x | class) - log p(x | unconditional)),
    normalised; scale 1 is the conditional model itself and costs nothing.
    """

    scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="linear, cosine: rise from 1 at the first element to `scale` at the last",
    )

    def at(self, positions: Tensor, length: int) -> Tensor:
        """The scale at elements, `length` in all; float32, of the shape of `positions`."""
        progress = positions.float() / max(length - 1, 1)
        if self.schedule == "constant":
            progress = torch.ones_like(progress)
        elif self.schedule == "cosine":
            progress = (1 - torch.cos(math.pi * progress)) / 2
        return 1 + (self.scale - 1) * progress


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Guided log-probabilities from two normalised ones, (..., V); `scale` (...)."""
    scale = scale.unsqueeze(-1)
    guided = unconditional + scale * (conditional - unconditional)
    # A token that either side rules out (-inf) has no defined difference: it stays out.
    out = torch.isneginf(conditional) | torch.isneginf(unconditional)
    return torch.log_softmax(guided.masked_fill(out, -torch.inf), dim=-1)


def penalise_repetition(log_probs: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens of `seen` (B, V) bool less likely: p becomes p**penalty, normalised.

    Keskar et al. 2019 (CTRL), section 4.1, divides positive and multiplies negative logits,
    which depends on the logits' arbitrary offset. On log-probabilities, never positive, the
    same rule is one multiplication and means the same for every model.
    """
    return torch.log_softmax(torch.where(seen, log_probs * penalty, log_probs), dim=-1)


def keep_top_k(log_probs: Tensor, k: int) -> Tensor:
    """The k most probable tokens (Fan, Lewis & Dauphin 2018); ties with the k-th stay."""
    if k >= log_probs.shape[-1]:
        return log_probs
    threshold = log_probs.topk(k, dim=-1).values[..., -1:]
    return log_probs.masked_fill(log_probs < threshold, -torch.inf)


def keep_top_p(log_probs: Tensor, p: float) -> Tensor:
    """The nucleus: the fewest tokens whose mass reaches p (Holtzman et al. 2020, section 3.1)."""
    ordered, index = torch.sort(log_probs, dim=-1, descending=True, stable=True)
    probs = ordered.double().exp()
    before = probs.cumsum(dim=-1) - probs
    cut = before >= p
    cut[..., 0] = False
    return log_probs.masked_fill(torch.zeros_like(cut).scatter(-1, index, cut), -torch.inf)


def keep_min_p(log_probs: Tensor, share: float) -> Tensor:
    """Tokens at least `share` as probable as the mode (Nguyen et al. 2024, section 3)."""
    if share == 0:
        return log_probs
    threshold = log_probs.amax(dim=-1, keepdim=True) + math.log(share)
    return log_probs.masked_fill(log_probs < threshold, -torch.inf)


def apply(log_probs: Tensor, filters: Filters, seen: Tensor | None = None) -> Tensor:
    """The distribution drawn from: normalised log-probabilities, of the shape given.

    `seen` (..., V) bool marks the tokens of the sample so far; only the repetition penalty
    reads it. Temperature 0 puts all mass on the first of the most probable tokens.
    """
    if filters.repetition_penalty != 1:
        if seen is None:
            raise ValueError("a repetition penalty needs the tokens seen so far")
        log_probs = penalise_repetition(log_probs, seen, filters.repetition_penalty)
    if filters.temperature == 0:
        mode = log_probs.argmax(dim=-1, keepdim=True)
        return torch.full_like(log_probs, -torch.inf).scatter(-1, mode, 0.0)
    if filters.temperature != 1:
        log_probs = torch.log_softmax(log_probs / filters.temperature, dim=-1)
    if filters.top_k is not None:
        log_probs = torch.log_softmax(keep_top_k(log_probs, filters.top_k), dim=-1)
    if filters.top_p is not None and filters.top_p < 1:
        log_probs = torch.log_softmax(keep_top_p(log_probs, filters.top_p), dim=-1)
    if filters.min_p is not None:
        log_probs = torch.log_softmax(keep_min_p(log_probs, filters.min_p), dim=-1)
    return log_probs


def invert(log_probs: Tensor, u: Tensor) -> Tensor:
    """The token at which the distribution function passes u: (..., V), (...) -> (...) int64.

    Sums run in float64 in the order of the vocabulary, row by row, so the answer does not
    depend on the other rows. A token of probability 0 is never drawn.
    """
    cumulative = log_probs.double().exp().cumsum(dim=-1)
    target = u.double().unsqueeze(-1) * cumulative[..., -1:]
    token = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # u < 1, so target < total but for rounding; the last token with mass catches that.
    last = (cumulative < cumulative[..., -1:]).sum(dim=-1)
    return torch.minimum(token, last)
