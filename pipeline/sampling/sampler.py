"""Drawing from any model through its cursor, one element after another.

    seeds (B,) -> uniforms (B, T)      a number for each element of each sample, uniforms.py
    cursor.next -> log-probabilities   guided, restricted, filtered, filters.py
    inverse of their sum at u -> x_t   then cursor.advance(x_t)

Prompts of different lengths need no padding: every row stands at the same position, and a
row that still has prompt at it is given that element instead of a drawn one.

What "the same sample" means: the numbers that decide a draw depend on the sample's seed and
the position alone. A Transformer's steps in C round alike in any company, in every dtype, so
that its samples are identical bit for bit however many are drawn together. Elsewhere the
probabilities come from batched kernels whose last bits may depend on the batch's shape: for a
fixed number of rows a sample is the same whatever the other rows are; for another number it
differs, in float32, only where a rounding of 1e-7 moves an edge of the distribution function
across a number. In 16 bits that happens in every few samples, so that there the number of rows
is part of what identifies a store (jobs/sample.py).

Legend: B rows, T elements of an event in generation order, V tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chainrule.pipeline.config import RequestError
from chainrule.pipeline.models import native
from chainrule.pipeline.models.contract import Autoregressive, Conditional, Cursor
from chainrule.pipeline.models.decoder import Decoder
from chainrule.pipeline.models.heads import Categorical
from chainrule.pipeline.models.kv_cache import SPARE, DecoderCursor
from chainrule.pipeline.sampling.densities import draw_density
from chainrule.pipeline.sampling.filters import Filters, Guidance, apply, guide, invert
from chainrule.pipeline.sampling.uniforms import LANE_COMPONENT, LANE_TOKEN, uniforms

PREFILL_COLUMNS = 64
"""Elements of a prompt fed at once. A constant: chunks of another size round differently."""


class SamplingError(RequestError):
    """A request for samples that the model cannot answer."""


@dataclass
class Plan:
    """What a batch of samples is to be: B rows of up to T elements."""

    seeds: np.ndarray
    """(B,) int64, one a sample."""
    lengths: np.ndarray
    """(B,) elements of each row, prompt included."""
    cond: Tensor | None = None
    """(B,) class of each row."""
    known: Tensor | None = None
    """(B, k) elements given from outside, in generation order: prompts, halves of pictures."""
    given: Tensor | None = None
    """(B, k) bool: where `known` holds. Elements that are free before a given one are drawn
    from what precedes them only: in-painting is exact for a prefix in generation order."""

    @property
    def rows(self) -> int:
        return len(self.seeds)

    @property
    def columns(self) -> int:
        return int(self.lengths.max())

    @property
    def common_prefix(self) -> int:
        """Elements that every row is given before the first one that any row must draw."""
        if self.given is None:
            return 0
        drawn = ~self.given.all(dim=0)
        return int(drawn.nonzero()[0]) if bool(drawn.any()) else self.given.shape[1]


@dataclass
class Rules:
    """How elements are drawn; the same for every row."""

    filters: Filters = Filters()  # noqa: RUF009 (frozen)
    guidance: Guidance = Guidance()  # noqa: RUF009 (frozen)
    allowed: Tensor | None = None
    """(V,) bool: tokens that may be drawn at all, None for every one."""
    end: tuple[int, ...] = ()
    """Tokens that end a sample; the token itself is the sample's last."""
    finished: Callable[[int, Sequence[int]], bool] | None = None
    """Asked after each drawn token with (row, tokens drawn so far); True ends the row."""


@dataclass
class Step:
    """One element of every row."""

    position: int
    x: Tensor
    """(B,) elements, on the model's device; meaningless where not `active`."""
    log_prob: Tensor
    """(B,) float64 nats under the model itself: no temperature, filter or guidance."""
    active: np.ndarray
    """(B,) bool: rows that this element belongs to."""


@dataclass
class Drawn:
    """Finished samples, on the CPU."""

    x: Tensor
    """(B, T) elements in generation order; 0 after a row's end."""
    lengths: np.ndarray
    """(B,) elements of each row, prompt and end token included."""
    log_likelihood: np.ndarray
    """(B,) float64, nats of all elements of the row given its class, prompt included."""


def pack_prompts(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths as (`known`, `given`), (B, longest) each."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    known = torch.zeros(len(prompts), longest, dtype=torch.long)
    given = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        known[row, : len(prompt)] = torch.as_tensor(list(prompt), dtype=torch.long)
        given[row, : len(prompt)] = True
    return known, given


def log_probs_of(conditional: Conditional) -> Tensor:
    """Normalised float32 log-probabilities (*shape, V) of a discrete conditional.

    Through its logits where it has them: a probability below 1e-38 is 0 as a float32, and a
    strong temperature or guidance may want it.
    """
    if isinstance(conditional, Categorical):
        return conditional.log_probs()
    return conditional.pmf().float().log()


@torch.no_grad()
def draw(model: Autoregressive, plan: Plan, rules: Rules) -> Drawn:
    """All rows of a plan, to their ends."""
    found = list(steps(model, plan, rules))  # fetched at the end: a GPU need not wait for each
    active = np.stack([step.active for step in found], axis=1)
    nats = torch.stack([step.log_prob for step in found], dim=1).cpu().numpy()
    lengths = active.sum(axis=1)
    x = torch.stack([step.x for step in found], dim=1).cpu()
    x = torch.nn.functional.pad(x, (0, plan.columns - x.shape[1]))
    beyond = torch.arange(plan.columns) >= torch.as_tensor(lengths).unsqueeze(1)
    return Drawn(x.masked_fill(beyond, 0), lengths, np.where(active, nats, 0.0).sum(axis=1))


@torch.no_grad()
def steps(model: Autoregressive, plan: Plan, rules: Rules) -> Iterator[Step]:
    """The elements of a plan as they come, prompts included. The model must be in eval mode."""
    check(model, plan, rules)
    device = next(model.parameters()).device
    columns = plan.columns
    guided = rules.guidance.scale != 1
    known, given = _on(plan, device)
    cursor = _open(model, plan, guided, device)
    draws = _draws(cursor.next, plan, rules, device)
    if known is not None and given is not None:
        draws.check_known(known, given)
    ends = plan.lengths.copy()

    prefix = min(plan.common_prefix, columns)
    for start in range(0, prefix, PREFILL_COLUMNS):
        assert known is not None
        chunk = known[:, start : min(start + PREFILL_COLUMNS, prefix)]
        log_prob = _advance(cursor, chunk, guided, torch.Size(model.event_shape).numel())
        for offset in range(chunk.shape[1]):
            draws.note(chunk[:, offset])
            position = start + offset
            yield Step(position, chunk[:, offset], log_prob[:, offset], position < ends)

    end = torch.as_tensor(rules.end, device=device)
    said: list[list[int]] = [[] for _ in range(plan.rows)]
    for position in range(prefix, columns):
        conditional = cursor.next
        x = draws.at(position, conditional)
        drawn = position < ends
        if known is not None and given is not None and position < known.shape[1]:
            x = torch.where(given[:, position], known[:, position], x)
            drawn = drawn & ~given[:, position].cpu().numpy()
        draws.note(x)
        log_prob = conditional.log_prob(_both(x, guided))[: plan.rows].double()
        yield Step(position, x, log_prob, position < ends)

        if rules.end:
            ends[torch.isin(x, end).cpu().numpy() & drawn] = position + 1
        if rules.finished is not None:
            for row in np.flatnonzero(drawn):
                said[row].append(int(x[row]))
                if rules.finished(int(row), said[row]):
                    ends[row] = position + 1
        if (ends <= position + 1).all():
            return
        cursor.advance(_both(x, guided).unsqueeze(1))


def restrict(log_probs: Tensor, rules: Rules, seen: Tensor | None) -> Tensor:
    """What the rules leave of log-probabilities (..., V): allowed tokens, then filters."""
    if rules.allowed is not None:
        out = ~rules.allowed.to(log_probs.device)
        log_probs = torch.log_softmax(log_probs.masked_fill(out, -torch.inf), dim=-1)
    return apply(log_probs, rules.filters, seen)


class DiscreteDraws:
    """Elements drawn from probability mass functions, guided, restricted and filtered."""

    def __init__(self, size: int, plan: Plan, rules: Rules, device: torch.device) -> None:
        self.size, self.rules, self.columns = size, rules, plan.columns
        self.u = _uniforms(plan, LANE_TOKEN, device)
        self.seen: Tensor | None = None
        if rules.filters.repetition_penalty != 1:
            self.seen = torch.zeros(plan.rows, size, dtype=torch.bool, device=device)
        self._greedy = rules.filters.temperature == 0
        self._restricted = (
            rules.allowed is not None
            or self.seen is not None
            or not (self._greedy or rules.filters.identity)
        )

    def at(self, position: int, conditional: Conditional) -> Tensor:
        """An element of each row, (B,) int64; guided, `conditional` is of both halves, (2B,)."""
        log_probs = log_probs_of(conditional)
        if self.rules.guidance.scale != 1:
            at = torch.full((len(log_probs) // 2,), position, device=log_probs.device)
            own, unconditional = log_probs.chunk(2)
            log_probs = guide(own, unconditional, self.rules.guidance.at(at, self.columns))
        if self._restricted:
            log_probs = restrict(log_probs, self.rules, self.seen)
        return log_probs.argmax(dim=-1) if self._greedy else invert(log_probs, self.u[:, position])

    def note(self, x: Tensor) -> None:
        """Remember elements (B,) that the samples now hold."""
        if self.seen is not None:
            self.seen.scatter_(1, x.unsqueeze(1), True)

    def check_known(self, known: Tensor, given: Tensor) -> None:
        wrong = given & ((known < 0) | (known >= self.size))
        if bool(wrong.any()):
            row, position = (int(i) for i in wrong.nonzero()[0])
            raise SamplingError(
                f"prompt of sample {row}: token {int(known[row, position])} at position "
                f"{position} lies outside the model's vocabulary [0, {self.size})"
            )


class DensityDraws:
    """Elements drawn from densities; only the temperature applies to them."""

    def __init__(self, plan: Plan, rules: Rules, device: torch.device) -> None:
        filters, self.temperature = rules.filters, rules.filters.temperature
        if filters != Filters(temperature=self.temperature):
            raise SamplingError(
                "top_k, top_p, min_p and repetition_penalty cut discrete distributions; "
                "this model's elements are real numbers: only temperature applies"
            )
        if rules.guidance.scale != 1:
            raise SamplingError("guidance: not for a density; leave it at 1")
        self.u = _uniforms(plan, LANE_TOKEN, device)
        self.u_component = _uniforms(plan, LANE_COMPONENT, device)

    def at(self, position: int, conditional: Conditional) -> Tensor:
        """An element of each row, (B,) float."""
        return draw_density(
            conditional, self.u[:, position], self.u_component[:, position], self.temperature
        )

    def note(self, x: Tensor) -> None:
        """Nothing drawn depends on what was said before, but through the model."""

    def check_known(self, known: Tensor, given: Tensor) -> None:
        if bool((given & ~torch.isfinite(known)).any()):
            raise SamplingError("prompt: an element is not a finite number")


def _draws(
    first: Conditional, plan: Plan, rules: Rules, device: torch.device
) -> DiscreteDraws | DensityDraws:
    try:
        size = first.pmf().shape[-1]
    except TypeError:
        return DensityDraws(plan, rules, device)
    return DiscreteDraws(size, plan, rules, device)


def _uniforms(plan: Plan, lane: int, device: torch.device) -> Tensor:
    """The numbers of every element of a plan, (B, T) float64."""
    positions = np.arange(plan.columns)
    return torch.from_numpy(uniforms(plan.seeds[:, None], positions, lane)).to(device)


def _on(plan: Plan, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    if plan.known is None or plan.given is None:
        return None, None
    return plan.known.to(device), plan.given.to(device)


def _both(x: Tensor, guided: bool) -> Tensor:
    """Rows for the conditional and the unconditional half of a guided batch."""
    return torch.cat([x, x]) if guided else x


@native.allowed()
def open_cursor(model: Autoregressive, batch: int, cond: Tensor | None = None) -> Cursor:
    """A cursor to draw with: in C where it can be, and quick to go back where there is a window."""
    if isinstance(model, Decoder):
        return model.cursor(batch, cond, spare=SPARE)
    return model.cursor(batch, cond)


def same_in_any_batch(model: Autoregressive) -> bool:
    """Whether not a bit of a sample depends on how many rows are drawn together."""
    cursor = open_cursor(model, 1)
    return isinstance(cursor, DecoderCursor) and cursor.in_c


def _open(model: Autoregressive, plan: Plan, guided: bool, device: torch.device) -> Cursor:
    if plan.cond is None:
        return open_cursor(model, plan.rows)
    cond = plan.cond.to(device)
    if guided:
        return open_cursor(model, 2 * plan.rows, torch.cat([cond, torch.full_like(cond, -1)]))
    return open_cursor(model, plan.rows, cond)


def _advance(cursor: Cursor, chunk: Tensor, guided: bool, event: int) -> Tensor:
    """Feed given elements (B, k) and return their own nats, (B, k) float64."""
    first = cursor.next
    following = cursor.advance(_both(chunk, guided))
    full = _both(chunk, guided)
    nats = [first.log_prob(full[:, 0]).unsqueeze(1)]
    # What follows the last element is not asked here; its slot is filled with any element.
    k = chunk.shape[1]
    if cursor.position < event:
        shifted = torch.cat([full[:, 1:], full[:, -1:]], dim=1)
        nats.append(following.log_prob(shifted)[:, : k - 1])
    elif k > 1:
        nats.append(following.log_prob(full[:, 1:]))
    return torch.cat(nats, dim=1)[: chunk.shape[0]].double()


def check(model: Autoregressive, plan: Plan, rules: Rules) -> None:
    """Refuse what the model cannot answer; SamplingError names what and the remedy."""
    event = torch.Size(model.event_shape).numel()
    if plan.lengths.min() < 1:
        raise SamplingError("length: a sample has at least one element")
    if plan.columns > event:
        raise SamplingError(
            f"length: {plan.columns} elements (prompt included) asked of a model of {event}; "
            f"shorten the prompt or `length` to {event} together"
        )
    if rules.guidance.scale != 1 and plan.cond is None:
        raise SamplingError(
            "guidance: needs a class for every sample; set `classes`, or leave guidance at 1"
        )
