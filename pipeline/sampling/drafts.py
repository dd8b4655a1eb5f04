"""Drafts: what proposes elements for speculative decoding.

    ModelDraft    a smaller model (see the `distill` job), or the model's own first layers
    NgramDraft    what followed the same last elements before, in the sample or its prompt

A draft may propose anything: the model's check keeps the distribution exact. A good one is
right often and costs little.

Legend: B rows, g drafted elements, V tokens.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from chainrule.pipeline.config import Settings
from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.models.inputs import is_conditioned
from chainrule.pipeline.sampling.filters import invert
from chainrule.pipeline.sampling.rows import Rows, open_rows
from chainrule.pipeline.sampling.sampler import PREFILL_COLUMNS, SamplingError
from chainrule.pipeline.sampling.uniforms import LANE_DRAFT, uniforms

Restrict = Callable[[Tensor, Sequence[Sequence[int]]], Tensor]
"""(log-probabilities (B, V), elements so far) -> what the rules leave of them, (B, V)."""


@dataclass
class Proposal:
    tokens: list[list[int]]
    """Drafted elements of each row; as many as wanted or fewer."""
    log_probs: Tensor | None
    """(B, g, V) distribution that each was drawn from; None where there was no choice."""


class Draft(ABC):
    """Proposes elements for the rows of one `speculate` call."""

    @abstractmethod
    def open(
        self, seeds: np.ndarray, columns: int, size: int, cond: Tensor | None, restrict: Restrict
    ) -> None:
        """Get ready for rows of these seeds (B,), up to `columns` elements of `size` values."""

    def cost(self, model: Autoregressive) -> float:
        """About what a drafted element costs, in steps of the model.

        Not nothing even where it is looked up: the model's call gets one column wider.
        """
        return 0.05

    @abstractmethod
    def propose(self, settled: Sequence[Sequence[int]], want: Sequence[int]) -> Proposal:
        """Up to `want[b]` elements after the settled ones of row b."""


class ModelDraft(Draft):
    """A model with the same elements, drawn from by the rules of the sampler.

    Filtering the draft as the model is filtered keeps it close to what it must match.
    """

    def __init__(self, model: Autoregressive) -> None:
        self.source = model

    def open(
        self, seeds: np.ndarray, columns: int, size: int, cond: Tensor | None, restrict: Restrict
    ) -> None:
        self.device = next(self.source.parameters()).device
        self.restrict = restrict
        if torch.Size(self.source.event_shape).numel() < columns:
            try:
                self.source = self.source.lengthened(columns)
            except ValueError as error:
                raise SamplingError(f"draft: {error}; take another, or shorten samples") from None
        self.u = uniforms(seeds[:, None], np.arange(columns), LANE_DRAFT)
        self.size = size
        conditioned = is_conditioned(self.source.config)
        self.rows: Rows = open_rows(self.source, len(seeds), cond if conditioned else None)
        self.confirmed = [0] * len(seeds)

    def propose(self, settled: Sequence[Sequence[int]], want: Sequence[int]) -> Proposal:
        steps = max(want, default=0)
        drafted: list[list[int]] = [[] for _ in settled]
        if steps == 0:
            return Proposal(drafted, None)
        self._forget_refused(settled)
        new = [
            list(tokens[len(fed) :]) if n else []
            for tokens, fed, n in zip(settled, self.rows.fed, want, strict=True)
        ]
        while max(len(tokens) for tokens in new) > PREFILL_COLUMNS:
            # Each row keeps its last element for the call whose answer is asked for.
            parts = [tokens[:-1][:PREFILL_COLUMNS] for tokens in new]
            self.rows.feed(parts)
            new = [tokens[len(part) :] for tokens, part in zip(new, parts, strict=True)]
        chosen: list[Tensor] = []
        for step in range(steps):
            log_probs = self.rows.feed(new)
            if log_probs.shape[-1] != self.size:
                raise SamplingError(
                    f"draft: knows {log_probs.shape[-1]} tokens, the model {self.size}"
                )
            last = torch.tensor([max(len(tokens) - 1, 0) for tokens in new])
            log_probs = log_probs[torch.arange(len(new)), last]
            so_far = [[*s, *d] for s, d in zip(settled, drafted, strict=True)]
            log_q = self.restrict(log_probs, so_far)
            at = [min(len(tokens), self.u.shape[1] - 1) for tokens in so_far]
            u = torch.from_numpy(self.u[np.arange(len(at)), at]).to(log_q.device)
            x = invert(log_q, u).tolist()
            chosen.append(log_q)
            new = []
            for row, n in enumerate(want):
                if step < n:
                    drafted[row].append(x[row])
                new.append([x[row]] if step + 1 < n else [])
        self.confirmed = [len(tokens) for tokens in settled]
        return Proposal(drafted, torch.stack(chosen, dim=1))

    def cost(self, model: Autoregressive) -> float:
        """The ratio of parameters, which is what a step reads."""
        counts = [sum(p.numel() for p in m.parameters()) for m in (self.source, model)]
        return counts[0] / max(counts[1], 1) + super().cost(model)

    def _forget_refused(self, settled: Sequence[Sequence[int]]) -> None:
        """Take back what was fed beyond what became of it; the last settled is fed anew."""
        counts = []
        for tokens, fed, sure in zip(settled, self.rows.fed, self.confirmed, strict=True):
            same = min(sure, len(fed))
            while same < min(len(fed), len(tokens)) and fed[same] == tokens[same]:
                same += 1
            same = min(same, len(tokens) - 1)
            counts.append(max(len(fed) - same, 0))
        self.rows.rewind(counts)


class NgramDraft(Draft):
    """What followed the same last elements, at their latest earlier occurrence.

    The context is matched as long as possible, from `longest` elements down to `shortest`;
    `corpus` are sequences searched when the sample itself holds no match. Prompt lookup
    decoding (Saxena 2023); LLMA (Yang et al. 2023, section 3).
    """

    def __init__(
        self, longest: int = 4, shortest: int = 1, corpus: Sequence[Sequence[int]] = ()
    ) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest {shortest} and longest {longest}: 1 <= shortest <= longest")
        self.longest, self.shortest = longest, shortest
        self.corpus: dict[tuple[int, ...], tuple[int, int]] = {}
        self.texts = [list(text) for text in corpus]
        for number, text in enumerate(self.texts):
            self._index(self.corpus, text, 0, number)

    def open(
        self, seeds: np.ndarray, columns: int, size: int, cond: Tensor | None, restrict: Restrict
    ) -> None:
        self.own: list[dict[tuple[int, ...], tuple[int, int]]] = [{} for _ in seeds]
        self.indexed = [0] * len(seeds)

    def _index(
        self,
        index: dict[tuple[int, ...], tuple[int, int]],
        text: Sequence[int],
        start: int,
        number: int = 0,
    ) -> None:
        """Enter the contexts that end before elements start.. of `text`."""
        for at in range(max(start, 1), len(text)):
            for n in range(self.shortest, min(self.longest, at) + 1):
                index[tuple(text[at - n : at])] = (number, at)

    def propose(self, settled: Sequence[Sequence[int]], want: Sequence[int]) -> Proposal:
        drafted: list[list[int]] = []
        for row, (tokens, n) in enumerate(zip(settled, want, strict=True)):
            if n == 0:
                drafted.append([])
                continue
            self._index(self.own[row], tokens, self.indexed[row])
            self.indexed[row] = len(tokens)
            drafted.append(self._continue(row, tokens, n))
        return Proposal(drafted, None)

    def _continue(self, row: int, tokens: Sequence[int], n: int) -> list[int]:
        for length in range(min(self.longest, len(tokens)), self.shortest - 1, -1):
            context = tuple(tokens[len(tokens) - length :])
            if context in self.own[row]:
                _, at = self.own[row][context]
                return list(tokens[at : at + n])
            if context in self.corpus:
                number, at = self.corpus[context]
                return list(self.texts[number][at : at + n])
        return []


class ModelDraftSettings(Settings):
    """The model of the stage's `draft` input."""

    kind: Literal["model"] = "model"


class LayersDraftSettings(Settings):
    """The model's own first layers."""

    kind: Literal["layers"] = "layers"
    layers: int = Field(ge=1)


class NgramDraftSettings(Settings):
    """What followed the same last elements before."""

    kind: Literal["ngram"] = "ngram"
    longest: int = Field(4, ge=1)
    shortest: int = Field(1, ge=1)
    corpus: int = Field(
        0,
        ge=0,
        description="elements of the `tokens` input's training split that are searched as well",
    )

    @model_validator(mode="after")
    def _in_order(self) -> "NgramDraftSettings":
        if self.shortest > self.longest:
            raise ValueError(f"shortest ({self.shortest}) is more than longest ({self.longest})")
        return self


DraftSettings = Annotated[
    ModelDraftSettings | LayersDraftSettings | NgramDraftSettings, Field(discriminator="kind")
]


def make_draft(
    settings: ModelDraftSettings | LayersDraftSettings | NgramDraftSettings,
    model: Autoregressive,
    given: Autoregressive | None,
    corpus: Sequence[Sequence[int]] = (),
) -> Draft:
    """The draft that settings ask for; `given` is the model of the `draft` input, `corpus` what
    an n-gram draft looks through besides the sample itself."""
    if isinstance(settings, NgramDraftSettings):
        return NgramDraft(settings.longest, settings.shortest, corpus)
    if isinstance(settings, LayersDraftSettings):
        try:
            return ModelDraft(first_layers(model, settings.layers))
        except ValueError as error:
            raise SamplingError(f"draft: {error}") from None
    if given is None:
        raise SamplingError("draft: kind 'model' takes a draft model as the input `draft`")
    return ModelDraft(given)


def first_layers(model: Autoregressive, layers: int) -> Autoregressive:
    """The model's own first `layers` as a draft: the same weights, an earlier exit.

    For decoders (anything with `blocks` and `config.layers`); ValueError for others. Drafting
    by early exit: Elhoushi et al. 2024 (LayerSkip), section 4.3, without its training recipe.
    """
    blocks = getattr(model, "blocks", None)
    if blocks is None or not 1 <= layers < len(blocks):
        raise ValueError(
            f"layers is {layers}: an early exit needs a decoder of more layers than that"
        )
    shallow = copy.copy(model)
    shallow._modules = dict(model._modules)
    shallow._modules["blocks"] = torch.nn.ModuleList(list(blocks)[:layers])
    shallow.config = model.config.model_copy(update={"layers": layers})
    return shallow
