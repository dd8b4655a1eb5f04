"""Speculative decoding: a cheap draft proposes, the model checks several elements at once.

    draft: d_1..d_g from q          the model: p_1..p_{g+1} from one call over d_1..d_g
    d_i is kept with probability min(1, p_i(d_i) / q_i(d_i)); at the first that is not, one is
    drawn from max(p_i - q_i, 0), normalised; when all are kept, one more from p_{g+1}

The result has the model's own distribution exactly, whatever the draft: Leviathan, Kalman &
Matias 2023, section 2.3 and appendix A; Chen et al. 2023, theorem 1. p and q are what is left
after temperature, filters, guidance and restrictions, so it holds for those too. Greedy
decoding (temperature 0) gives the elements of plain greedy decoding.

Every row of a batch goes at its own pace (ragged acceptance). The numbers that decide a row
depend on its seed and on positions; a number is used for one purpose at one position, and
whether it is used depends only on numbers of earlier positions, so the draws stay
independent. A row is therefore the same whatever rows stand beside it.

Legend: B rows, g drafted elements (gamma), W = g + 1 columns of a call, V tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from chainrule.pipeline.config import Settings
from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.sampling.drafts import Draft, Proposal
from chainrule.pipeline.sampling.filters import guide, invert
from chainrule.pipeline.sampling.rows import Rows, open_rows
from chainrule.pipeline.sampling.sampler import (
    PREFILL_COLUMNS,
    DiscreteDraws,
    Drawn,
    Plan,
    Rules,
    SamplingError,
    check,
    open_cursor,
    restrict,
)
from chainrule.pipeline.sampling.uniforms import LANE_ACCEPT, LANE_TOKEN, uniforms


class Gamma(Settings):
    """How many elements are drafted before the model is asked."""

    most: int = Field(4, ge=1, lt=PREFILL_COLUMNS, description="elements a draft, at most")
    adapt: bool = Field(
        True, description="fewer where the running acceptance says that fewer are faster"
    )
    cost: float | None = Field(
        None,
        ge=0,
        description="c: time of one draft step over one step of the model; default: the ratio of "
        "their parameters (a measured time would make the samples depend on the machine)",
    )


@dataclass
class Statistics:
    """What speculation did, over all rows."""

    rounds: int = 0
    """Calls of the model, counted for each row that was alive."""
    tested: int = 0
    """Drafted elements that were held against the model: up to the first refused one."""
    accepted: int = 0
    drawn: int = 0
    """Elements that came out."""
    windows: list[int] = field(default_factory=list)
    """gamma of each round and row."""

    def add(self, drafted: int, kept: int, refused: bool, drawn: int) -> None:
        """What one round did to one row."""
        self.rounds += 1
        self.tested += kept + refused
        self.accepted += kept
        self.drawn += drawn
        self.windows.append(drafted)

    def join(self, other: "Statistics") -> None:
        """Add what another batch's speculation did."""
        self.rounds += other.rounds
        self.tested += other.tested
        self.accepted += other.accepted
        self.drawn += other.drawn
        self.windows += other.windows

    @property
    def acceptance(self) -> float:
        """alpha: the share of tested elements that was kept."""
        return self.accepted / self.tested if self.tested else 0.0


def expected_speedup(acceptance: float, gamma: float, cost: float) -> float:
    """(1 - a^(g+1)) / ((1 - a)(g c + 1)): Leviathan et al. 2023, theorem 3.8."""
    if acceptance >= 1:
        return (gamma + 1) / (gamma * cost + 1)
    return (1 - acceptance ** (gamma + 1)) / ((1 - acceptance) * (gamma * cost + 1))


def best_gamma(acceptance: float, most: int, cost: float) -> int:
    """The gamma from 0 (no draft) to `most` with the best expected speed-up."""
    return max(range(most + 1), key=lambda g: expected_speedup(acceptance, g, cost))


class _Pace:
    """A row's gamma from its own running acceptance.

    With gamma 0 nothing is learned, so every 16th round drafts one element all the same.
    """

    MEMORY = 0.9
    """Weight of the past when one more element was tested."""
    RETRY_EVERY = 16

    def __init__(self, gamma: Gamma, cost: float) -> None:
        self.gamma, self.cost = gamma, cost
        self.acceptance = 0.8
        """Where it starts: optimistic, so that a good draft is used from the first round."""
        self.idle = 0

    def next(self) -> int:
        if not self.gamma.adapt:
            return self.gamma.most
        best = best_gamma(self.acceptance, self.gamma.most, self.cost)
        self.idle = self.idle + 1 if best == 0 else 0
        if self.idle == self.RETRY_EVERY:
            self.idle = 0
            return 1
        return best

    def learn(self, accepted: int, refused: bool) -> None:
        for kept in [1.0] * accepted + [0.0] * refused:
            self.acceptance = self.MEMORY * self.acceptance + (1 - self.MEMORY) * kept


@torch.no_grad()
def speculate(
    model: Autoregressive, draft: Draft, plan: Plan, rules: Rules, gamma: Gamma
) -> tuple[Drawn, Statistics]:
    """All rows of a plan, to their ends, with the model's distribution.

    Raises SamplingError for elements given elsewhere than at the beginning, and for densities.
    """
    check(model, plan, rules)
    run = _Run(model, draft, plan, rules, gamma)
    run.read_prompts()
    while run.alive.any():
        run.round()
    return run.result(), run.statistics


@torch.no_grad()
def speculated(
    model: Autoregressive, draft: Draft, plan: Plan, rules: Rules, gamma: Gamma
) -> Iterator[list[int]]:
    """The elements of a plan of one row as rounds settle them, without its prompt."""
    check(model, plan, rules)
    run = _Run(model, draft, plan, rules, gamma)
    run.read_prompts()
    shown = run.prompt_lengths[0]
    while True:
        yield run.settled[0][shown:]
        shown = len(run.settled[0])
        if not run.alive.any():
            return
        run.round()


class _Run:
    """The state of `speculate`: settled elements of each row, and where the model stands.

    The model has been fed everything settled but the last element of each row (`pending`).
    """

    def __init__(
        self, model: Autoregressive, draft: Draft, plan: Plan, rules: Rules, gamma: Gamma
    ) -> None:
        self.plan, self.rules, self.draft = plan, rules, draft
        self.device = next(model.parameters()).device
        self.guided = rules.guidance.scale != 1
        self.settled = _prompts(plan)
        self.prompt_lengths = [len(tokens) for tokens in self.settled]
        self.lengths = [int(n) for n in plan.lengths]
        self.alive = np.array(
            [n < end for n, end in zip(self.prompt_lengths, self.lengths, strict=True)]
        )
        self.log_likelihood = np.zeros(plan.rows)
        cost = gamma.cost if gamma.cost is not None else draft.cost(model)
        self.paces = [_Pace(gamma, cost) for _ in range(plan.rows)]
        self.statistics = Statistics()
        positions = np.arange(plan.columns)
        seeds = plan.seeds[:, None]
        self.u_token = torch.from_numpy(uniforms(seeds, positions, LANE_TOKEN)).to(self.device)
        self.u_accept = torch.from_numpy(uniforms(seeds, positions, LANE_ACCEPT)).to(self.device)

        cond = None if plan.cond is None else plan.cond.to(self.device)
        rows = plan.rows
        if self.guided:
            assert cond is not None
            rows, cond = 2 * rows, torch.cat([cond, torch.full_like(cond, -1)])
        first = open_cursor(model, rows, cond).next
        try:
            self.size = first.pmf().shape[-1]
        except TypeError:
            raise SamplingError("speculative decoding is for discrete elements") from None
        # The first element comes from the model alone: nothing is pending before it.
        draws = DiscreteDraws(self.size, plan, rules, self.device)
        draws.check_known(*_known(plan, self.device))
        x = draws.at(0, first)
        own = first.log_prob(torch.cat([x, x]) if self.guided else x)[: plan.rows]
        prompted = torch.tensor([tokens[0] if tokens else 0 for tokens in self.settled])
        prompted = prompted.to(self.device)
        given = first.log_prob(torch.cat([prompted, prompted]) if self.guided else prompted)
        for row in range(plan.rows):
            if self.settled[row]:
                self.log_likelihood[row] = float(given[row])
            else:
                self.log_likelihood[row] = float(own[row])
                found = [int(x[row])]
                self._until(row, found)
                self.settled[row].extend(found)
                self.statistics.drawn += 1
                self._end_if_full(row)
        self.model: Rows = open_rows(model, rows, cond)
        draft.open(
            plan.seeds,
            plan.columns,
            self.size,
            None if plan.cond is None else plan.cond.to(self.device),
            self._restrict_draft,
        )

    def read_prompts(self) -> None:
        """Feed the prompts, but for the last element of each."""
        longest = max(len(tokens) for tokens in self.settled) - 1
        for start in range(0, longest, PREFILL_COLUMNS):
            new = [tokens[:-1][start : start + PREFILL_COLUMNS] for tokens in self.settled]
            own = self._feed(new)[: self.plan.rows]
            for row, tokens in enumerate(new):
                following = self.settled[row][start + 1 : start + 1 + len(tokens)]
                nats = own[row, torch.arange(len(tokens)), following]
                self.log_likelihood[row] += float(nats.double().sum())

    def round(self) -> None:
        """One call of the model over what the draft proposes for every row."""
        want = [
            min(pace.next(), end - len(tokens) - 1) if alive else 0
            for pace, end, tokens, alive in zip(
                self.paces, self.lengths, self.settled, self.alive, strict=True
            )
        ]
        proposal = self.draft.propose(self.settled, want)
        new = [
            [tokens[-1], *drafted] if alive else []
            for tokens, drafted, alive in zip(
                self.settled, proposal.tokens, self.alive, strict=True
            )
        ]
        log_probs = self._feed(new)
        own = log_probs[: self.plan.rows]
        target = self.distribution(log_probs, proposal.tokens)
        kept, following = self._decide(target, proposal)
        nats = self._nats(own, proposal, kept, following)
        forget = [0] * self.plan.rows
        for row in np.flatnonzero(self.alive):
            drafted = proposal.tokens[row]
            found = [*drafted[: kept[row]], following[row]]
            found = found[: self._until(int(row), found)]
            self.log_likelihood[row] += nats[row, : len(found)].sum()
            self.settled[row].extend(found)
            refused = kept[row] < len(drafted)
            self.paces[row].learn(kept[row], refused)
            self.statistics.add(len(drafted), kept[row], refused, len(found))
            # Fed: everything but the last settled element.
            forget[row] = len(self.model.fed[row]) - (len(self.settled[row]) - 1)
            self._end_if_full(int(row))
        self.model.rewind(forget * 2 if self.guided else forget)

    @staticmethod
    def _nats(
        own: Tensor, proposal: Proposal, kept: Sequence[int], following: Sequence[int]
    ) -> np.ndarray:
        """The model's own nats of each row's new elements, (B, W) float64."""
        width = own.shape[1]
        found = [
            [*drafted[:k], last, *([0] * (width - k - 1))]
            for drafted, k, last in zip(proposal.tokens, kept, following, strict=True)
        ]
        index = torch.tensor(found, device=own.device).unsqueeze(-1)
        return own.gather(-1, index).squeeze(-1).double().cpu().numpy()

    def _decide(self, target: Tensor, proposal: Proposal) -> tuple[list[int], list[int]]:
        """Of each row, how many drafted elements are kept, and the element after them.

        `target` (B, W, V) are log-probabilities of what may be drawn at each column.
        """
        rows = torch.arange(len(target), device=self.device)
        counts = torch.tensor([len(tokens) for tokens in proposal.tokens], device=self.device)
        first = torch.tensor([len(tokens) for tokens in self.settled], device=self.device)
        widest = int(counts.max())
        kept = torch.zeros_like(counts)
        if widest:
            padded = [[*tokens, *([0] * (widest - len(tokens)))] for tokens in proposal.tokens]
            drafted = torch.tensor(padded, device=self.device).unsqueeze(-1)
            p = target[:, :widest].gather(-1, drafted).squeeze(-1).double().exp()
            q = torch.ones_like(p)
            if proposal.log_probs is not None:
                q = proposal.log_probs[:, :widest].gather(-1, drafted).squeeze(-1).double().exp()
            columns = torch.arange(widest, device=self.device)
            at = (first.unsqueeze(1) + columns).clamp(max=self.plan.columns - 1)
            accept = (self.u_accept.gather(1, at) * q < p) & (columns < counts.unsqueeze(1))
            kept = accept.cumprod(dim=1).sum(dim=1)
        probs = target[rows, kept].double().exp()
        if widest:
            refused = (kept < counts).unsqueeze(-1)
            at = kept.clamp(max=widest - 1)
            if proposal.log_probs is None:
                draft = torch.zeros_like(probs).scatter_(1, drafted[rows, at], 1.0)
            else:
                draft = proposal.log_probs[rows, at].double().exp()
            rest = (probs - draft).clamp(min=0)
            # p and q equal but for rounding, refused by a hair: p itself is right.
            refused = refused & (rest.sum(dim=-1, keepdim=True) > 0)
            probs = torch.where(refused, rest, probs)
        at = (first + kept).clamp(max=self.plan.columns - 1).unsqueeze(1)
        following = invert(probs.log(), self.u_token.gather(1, at).squeeze(1))
        return kept.tolist(), following.tolist()

    def distribution(self, log_probs: Tensor, drafted: Sequence[Sequence[int]]) -> Tensor:
        """What is drawn from at each column, (B, W, V): guided, restricted, filtered.

        Column i of a row stands after its settled elements and the first i drafted ones.
        """
        width = log_probs.shape[1]
        if self.guided:
            own, unconditional = log_probs.chunk(2)
            first = torch.tensor([[len(tokens)] for tokens in self.settled], device=self.device)
            positions = first + torch.arange(width, device=self.device)
            log_probs = guide(
                own, unconditional, self.rules.guidance.at(positions, self.plan.columns)
            )
        seen = None
        if self.rules.filters.repetition_penalty != 1:
            seen = torch.zeros(log_probs.shape, dtype=torch.bool, device=self.device)
            for row, tokens in enumerate(self.settled):
                seen[row, :, list(tokens)] = True
                for i, token in enumerate(drafted[row]):
                    seen[row, i + 1 :, token] = True
        return restrict(log_probs, self.rules, seen)

    def _restrict_draft(self, log_probs: Tensor, so_far: Sequence[Sequence[int]]) -> Tensor:
        seen = None
        if self.rules.filters.repetition_penalty != 1:
            seen = torch.zeros(log_probs.shape, dtype=torch.bool, device=log_probs.device)
            for row, tokens in enumerate(so_far):
                seen[row, list(tokens)] = True
        return restrict(log_probs, self.rules, seen)

    def _feed(self, new: Sequence[Sequence[int]]) -> Tensor:
        return self.model.feed([*new, *new] if self.guided else new)

    def _until(self, row: int, found: Sequence[int]) -> int:
        """How many of a row's new elements belong to it: up to the first that ends it."""
        drawn = self.settled[row][self.prompt_lengths[row] :]
        for i, token in enumerate(found):
            drawn.append(token)
            ended = token in self.rules.end
            if self.rules.finished is not None:
                ended = ended or self.rules.finished(row, drawn)
            if ended:
                self.alive[row] = False
                return i + 1
        return len(found)

    def _end_if_full(self, row: int) -> None:
        if len(self.settled[row]) >= self.lengths[row]:
            self.alive[row] = False

    def result(self) -> Drawn:
        columns = self.plan.columns
        x = torch.tensor([[*tokens, *([0] * (columns - len(tokens)))] for tokens in self.settled])
        lengths = np.array([len(tokens) for tokens in self.settled])
        return Drawn(x, lengths, self.log_likelihood)


def _prompts(plan: Plan) -> list[list[int]]:
    if plan.known is None or plan.given is None:
        return [[] for _ in range(plan.rows)]
    counts = plan.given.sum(dim=1)
    reach = plan.given.cumprod(dim=1).sum(dim=1)
    if not torch.equal(counts, reach):
        raise SamplingError(
            "speculative decoding continues prompts; elements given further on need plain decoding"
        )
    return [row[:n].tolist() for row, n in zip(plan.known, counts.tolist(), strict=True)]


def _known(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    if plan.known is None or plan.given is None:
        return (
            torch.zeros(plan.rows, 0, dtype=torch.long, device=device),
            torch.zeros(plan.rows, 0, dtype=torch.bool, device=device),
        )
    return plan.known.to(device), plan.given.to(device)
