"""Certificates: speculation changes the speed and nothing else.

Greedy output is plain greedy output, token by token; sampled output follows the model's exact
distribution, for drafts that are good, never right, always right, or adversarially wrong.
"""

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from chainrule.pipeline import build
from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.models.kv_cache import DecoderCursor
from chainrule.pipeline.models.ragged import RaggedCursor
from chainrule.pipeline.sampling.drafts import (
    Draft,
    ModelDraft,
    NgramDraft,
    Proposal,
    Restrict,
    first_layers,
)
from chainrule.pipeline.sampling.filters import Filters, Guidance, guide
from chainrule.pipeline.sampling.rows import SeparateRows, SharedRows, open_rows
from chainrule.pipeline.sampling.sampler import (
    PREFILL_COLUMNS,
    Plan,
    Rules,
    SamplingError,
    draw,
    pack_prompts,
)
from chainrule.pipeline.sampling.speculative import (
    Gamma,
    best_gamma,
    expected_speedup,
    speculate,
)
from chainrule.pipeline.sampling.uniforms import sample_seeds

FIXED = Gamma(most=3, adapt=False)


def decoder(
    context: int, vocabulary: int, seed: int = 0, family: str = "llama", **settings: object
) -> Autoregressive:
    """A tiny decoder of random weights, made uneven enough that its samples differ."""
    model = build(
        {
            "family": family,
            "vocabulary_size": vocabulary,
            "context": context,
            "layers": 2,
            "heads": 2,
            "width": 8,
            "mlp_width": 16,
            **settings,
        },
        seed=seed,
    ).eval()
    model.requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head" in name or "embedding" in name or name == "start":
                parameter.mul_(12)
    return model


def plan(n: int, length: int, seed: int = 0, **kwargs: object) -> Plan:
    return Plan(sample_seeds(seed, np.arange(n)), np.full(n, length), **kwargs)  # type: ignore[arg-type]


class Stub(Draft):
    """Proposes what a function of the settled elements says, stating q or no choice."""

    def __init__(self, choose, stated: Tensor | None = None) -> None:
        self.choose, self.stated = choose, stated

    def open(
        self, seeds: np.ndarray, columns: int, size: int, cond: Tensor | None, restrict: Restrict
    ) -> None:
        self.size = size

    def propose(self, settled: Sequence[Sequence[int]], want: Sequence[int]) -> Proposal:
        tokens = [
            self.choose(row, list(known), n)
            for row, (known, n) in enumerate(zip(settled, want, strict=True))
        ]
        return Proposal(tokens, None)


def constant(token: int) -> Stub:
    return Stub(lambda row, known, n: [token] * n)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mistral"])
@pytest.mark.parametrize("rows", [1, 5])
def test_greedy_equals_plain_greedy(family: str, rows: int) -> None:
    model = decoder(40, 20, family=family, **({"window": 7} if family == "mistral" else {}))
    drafts: list[Draft] = [
        ModelDraft(decoder(40, 20, seed=1, family=family)),
        ModelDraft(first_layers(model, 1)),
        NgramDraft(),
        constant(3),
    ]
    prompts = [[row, row + 1, 7] for row in range(rows)]
    known, given = pack_prompts(prompts)
    rules = Rules(Filters(temperature=0))
    plain = draw(model, plan(rows, 40, known=known, given=given), rules)
    for draft in drafts:
        for gamma in (FIXED, Gamma(most=6)):
            whole = plan(rows, 40, known=known, given=given)
            drawn, _ = speculate(model, draft, whole, rules, gamma)
            torch.testing.assert_close(drawn.x, plain.x, rtol=0, atol=0)
            np.testing.assert_allclose(drawn.log_likelihood, plain.log_likelihood, rtol=1e-5)


OTHERS: dict[str, dict[str, object]] = {
    "wavenet": {"preset": "wavenet-debug", "event_shape": (14,), "vocabulary_size": 5},
    "gated-pixelcnn": {
        "preset": "gated-pixelcnn-debug",
        "event_shape": (4, 4),
        "vocabulary_size": 5,
    },
    "made": {"preset": "made-debug", "event_shape": (4, 4), "vocabulary_size": 5},
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", OTHERS)
def test_greedy_equals_plain_greedy_with_a_cursor_a_row(family: str, rows: int) -> None:
    def uneven(seed: int) -> Autoregressive:
        model = build(OTHERS[family], seed=seed).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter += 0.8 * torch.randn(parameter.shape, generator=generator)
        return model

    model = uneven(0)
    length = torch.Size(model.event_shape).numel()
    assert isinstance(open_rows(model, rows), SeparateRows)
    known, given = pack_prompts([[row, 2] for row in range(rows)])
    whole = plan(rows, length, known=known, given=given)
    rules = Rules(Filters(temperature=0))
    plain = draw(model, whole, rules)
    assert len(plain.x[:, 2:].unique()) > 1
    for draft in (ModelDraft(uneven(1)), NgramDraft(), constant(3), ModelDraft(model)):
        drawn, _ = speculate(model, draft, whole, rules, FIXED)
        torch.testing.assert_close(drawn.x, plain.x, rtol=0, atol=0)
        np.testing.assert_allclose(drawn.log_likelihood, plain.log_likelihood, rtol=1e-4)


@pytest.mark.parametrize("in_c", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_with_a_window_going_back_costs_nothing(
    rows: int, in_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, a draft that is never right: every round is fed once, whatever the ring holds."""
    if not in_c:
        monkeypatch.setenv("CHAINRULE_NATIVE", "0")
    model = decoder(300, 11, family="mistral", window=16)
    prompts = [[row] * (1 + 90 * row) for row in range(rows)]
    known, given = pack_prompts(prompts)
    rules = Rules(Filters(temperature=0))
    whole = plan(rows, 300, known=known, given=given)
    plain = draw(model, whole, rules)
    wrong = Stub(lambda row, held, n: ((plain.x[row, len(held) : len(held) + n] + 1) % 11).tolist())
    fed = []

    def counted(feed):  # type: ignore[no-untyped-def]
        def noted(self, first, end):  # type: ignore[no-untyped-def]
            found = feed(self, first, end)
            fed.append(found.shape[1])
            return found

        return noted

    for cursor in (DecoderCursor, RaggedCursor):
        monkeypatch.setattr(cursor, "_feed", counted(cursor._feed))
    drawn, statistics = speculate(model, wrong, whole, rules, FIXED)
    torch.testing.assert_close(drawn.x, plain.x, rtol=0, atol=0)
    np.testing.assert_allclose(drawn.log_likelihood, plain.log_likelihood, rtol=1e-5)
    assert statistics.accepted == 0
    longest = max(len(prompt) for prompt in prompts)
    # Two starts, the prompts, and a round of four for each of the longest row's elements.
    assert sum(fed) <= 2 + longest + 4 * 300
    good, _ = speculate(model, ModelDraft(first_layers(model, 1)), whole, rules, Gamma(most=6))
    torch.testing.assert_close(good.x, plain.x, rtol=0, atol=0)


def exact_pmf(
    model: Autoregressive, size: int, length: int, rules: Rules, label: int | None = None
) -> dict[tuple, float]:
    """The probability of every sequence under model and rules, from plain conditionals."""
    from chainrule.pipeline.sampling.sampler import log_probs_of, restrict

    space = torch.tensor(list(itertools.product(range(size), repeat=length)))
    if label is None:
        log_probs = log_probs_of(model.conditionals(space))
    else:
        own, free = (
            log_probs_of(model.conditionals(space, torch.full((len(space),), cond)))
            for cond in (label, -1)
        )
        log_probs = guide(own, free, rules.guidance.at(torch.arange(length), length))
    log_probs = restrict(log_probs, rules, None)
    nats = log_probs.gather(-1, space.unsqueeze(-1)).squeeze(-1).double().sum(1)
    return dict(zip(map(tuple, space.tolist()), nats.exp().tolist(), strict=True))


def chi_square(x: Tensor, expected: dict[tuple, float]) -> tuple[float, int]:
    """Pearson's statistic of sequences, and its degrees of freedom.

    Sequences expected fewer than 5 times are counted together; one that cannot be is a fault.
    """
    n = len(x)
    keys, counts = torch.unique(x, dim=0, return_counts=True)
    found = dict(zip(map(tuple, keys.tolist()), counts.tolist(), strict=True))
    assert all(expected[key] > 0 for key in found)
    rare = [key for key, p in expected.items() if 0 < p * n < 5]
    cells = [(found.get(k, 0), p * n) for k, p in expected.items() if p * n >= 5]
    if rare:
        cells.append((sum(found.get(k, 0) for k in rare), n * sum(expected[k] for k in rare)))
    assert sum(e for _, e in cells) == pytest.approx(n)
    return sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1


def assert_distributed(x: Tensor, expected: dict[tuple, float]) -> None:
    statistic, freedom = chi_square(x, expected)
    # Wilson-Hilferty: the cube root is nearly normal. 3.5 deviations: P = 0.0002.
    z = (statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))
    assert z / np.sqrt(2 / (9 * freedom)) < 3.5


FILTERS = {
    "plain": Filters(),
    "temperature": Filters(temperature=0.6),
    "top_k": Filters(top_k=2),
    "top_p": Filters(temperature=1.3, top_p=0.8),
    "min_p": Filters(min_p=0.2),
}


@pytest.mark.parametrize("filters", FILTERS)
def test_samples_follow_the_exact_distribution(filters: str) -> None:
    model, rules = decoder(5, 3), Rules(FILTERS[filters])
    draft = ModelDraft(decoder(5, 3, seed=1))
    drawn, statistics = speculate(model, draft, plan(8_000, 5), rules, FIXED)
    assert 0 < statistics.acceptance < 1
    assert_distributed(drawn.x, exact_pmf(model, 3, 5, rules))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("filters", ["plain", "temperature", "top_p"])
def test_guided_samples_follow_the_exact_distribution(filters: str, schedule: str) -> None:
    settings = {"classes": 3, "class_dropout": 0.1}
    model = decoder(4, 3, **settings)  # type: ignore[arg-type]
    draft = ModelDraft(decoder(4, 3, seed=1, **settings))  # type: ignore[arg-type]
    guidance = Guidance(scale=4, schedule=schedule)
    rules = Rules(FILTERS[filters], guidance)
    cond = torch.full((8_000,), 1)
    drawn, statistics = speculate(model, draft, plan(8_000, 4, cond=cond), rules, FIXED)
    assert 0 < statistics.acceptance < 1
    exact = exact_pmf(model, 3, 4, rules, label=1)
    assert_distributed(drawn.x, exact)
    # Without guidance, or with all of it from the first element on, the test would notice.
    other = Rules(FILTERS[filters], Guidance(scale=1 if schedule == "constant" else 4))
    wrong, _ = speculate(model, draft, plan(8_000, 4, cond=cond), other, FIXED)
    with pytest.raises(AssertionError):
        assert_distributed(wrong.x, exact)


def adversary(model: Autoregressive) -> Stub:
    """Always the element that the model thinks least probable: the worst that can be proposed."""

    @functools.cache
    def worst(known: tuple[int, ...]) -> int:
        x = torch.tensor([[*known, 0]])
        return int(model.conditionals(x).pmf()[0, -1].argmin())

    def choose(row: int, known: list[int], n: int) -> list[int]:
        drafted: list[int] = []
        for _ in range(n):
            drafted.append(worst((*known, *drafted)))
        return drafted

    return Stub(choose)


def draft_for(model: Autoregressive, name: str) -> Draft:
    drafts: dict[str, Draft] = {
        "model": ModelDraft(decoder(5, 3, seed=1)),
        "early exit": ModelDraft(first_layers(model, 1)),
        "n-gram": NgramDraft(longest=2),
        "constant": constant(1),
        "adversary": adversary(model),
    }
    return drafts[name]


@pytest.mark.parametrize("name", ["early exit", "n-gram", "constant"])
def test_every_draft_leaves_the_distribution_as_it_is(name: str) -> None:
    model = decoder(5, 3)
    gamma = Gamma(most=3, cost=0.0)
    drawn, _ = speculate(model, draft_for(model, name), plan(8_000, 5), Rules(), gamma)
    assert_distributed(drawn.x, exact_pmf(model, 3, 5, Rules()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "adversary"])
def test_100_000_sequences(name: str) -> None:
    model = decoder(5, 3)
    gamma = Gamma(most=3, cost=0.0)
    drawn, _ = speculate(model, draft_for(model, name), plan(100_000, 5), Rules(), gamma)
    assert_distributed(drawn.x, exact_pmf(model, 3, 5, Rules()))


def test_a_wrong_rule_is_caught_by_the_same_test() -> None:
    """The certificate has teeth: keeping every drafted element is noticed at once."""
    model, draft = decoder(5, 3), decoder(5, 3, seed=1)
    drawn = draw(draft, plan(8_000, 5), Rules())
    with pytest.raises(AssertionError):
        assert_distributed(drawn.x, exact_pmf(model, 3, 5, Rules()))


def test_a_draft_that_is_never_accepted() -> None:
    model = decoder(12, 4)
    # Token 0 is not allowed, so it has no probability under the rules.
    rules = Rules(allowed=torch.tensor([False, True, True, True]))
    drawn, statistics = speculate(model, constant(0), plan(6, 12), rules, FIXED)
    assert statistics.accepted == 0
    assert statistics.acceptance == 0
    assert statistics.rounds == 6 * 11
    assert not (drawn.x == 0).any()


def test_a_draft_that_is_always_accepted() -> None:
    model = decoder(13, 8)
    plain = draw(model, plan(6, 13), Rules(Filters(temperature=0)))
    oracle = Stub(lambda row, known, n: plain.x[row, len(known) : len(known) + n].tolist())
    drawn, statistics = speculate(model, oracle, plan(6, 13), Rules(Filters(temperature=0)), FIXED)
    assert statistics.acceptance == 1
    assert statistics.rounds == 6 * 3  # 1 element, then 3 rounds of 4
    torch.testing.assert_close(drawn.x, plain.x)


def test_a_model_drafting_for_itself_is_always_accepted() -> None:
    model = decoder(13, 8)
    _, statistics = speculate(model, ModelDraft(model), plan(6, 13), Rules(), FIXED)
    assert statistics.acceptance > 0.99


def test_acceptance_is_one_minus_the_total_variation_distance() -> None:
    model, draft = decoder(2, 6), decoder(2, 6, seed=1)
    n = 10_000
    _, statistics = speculate(
        model, ModelDraft(draft), plan(100, 2), Rules(), Gamma(most=1, adapt=False)
    )
    assert statistics.rounds == 100
    assert statistics.tested == 0  # one element is left after the first: nothing to draft
    model, draft = decoder(3, 6), decoder(3, 6, seed=1)
    drawn, statistics = speculate(
        model, ModelDraft(draft), plan(n, 3), Rules(), Gamma(most=1, adapt=False)
    )
    p = model.conditionals(drawn.x).pmf()[:, 1]
    q = draft.conditionals(drawn.x).pmf()[:, 1]
    overlap = float(torch.minimum(p, q).sum(1).mean())
    assert statistics.acceptance == pytest.approx(overlap, abs=0.02)


def test_a_row_is_the_same_whatever_stands_beside_it() -> None:
    model, draft = decoder(24, 9), decoder(24, 9, seed=1)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(9, (n,), generator=generator).tolist() for n in (0, 1, 5, 9)]
    lengths = np.array([24, 12, 20, 24])
    seeds = sample_seeds(0, np.arange(4))
    known, given = pack_prompts(prompts)
    rules = Rules(end=(4,))
    gamma = Gamma(most=4)
    whole = Plan(seeds, lengths, known=known, given=given)
    together, _ = speculate(model, ModelDraft(draft), whole, rules, gamma)
    for row in range(4):
        known, given = pack_prompts([prompts[row]])
        alone = Plan(seeds[row : row + 1], lengths[row : row + 1], known=known, given=given)
        drawn, _ = speculate(model, ModelDraft(draft), alone, rules, gamma)
        n = together.lengths[row]
        assert drawn.lengths[0] == n
        torch.testing.assert_close(drawn.x[0, :n], together.x[row, :n], rtol=0, atol=0)
        x = drawn.x[0, :n].tolist()
        assert x[: len(prompts[row])] == prompts[row]
        assert 4 not in x[len(prompts[row]) : -1]
        padded = torch.zeros(1, 24, dtype=torch.long)
        padded[0, :n] = drawn.x[0, :n]
        expected = float(model.log_prob(padded)[0, :n].detach().sum())
        assert together.log_likelihood[row] == pytest.approx(expected, rel=1e-4)


def test_long_prompts() -> None:
    length = 2 * PREFILL_COLUMNS + 30
    model, draft = decoder(length, 7), decoder(length, 7, seed=1)
    generator = torch.Generator().manual_seed(0)
    counts = (2 * PREFILL_COLUMNS + 1, 3, PREFILL_COLUMNS)
    prompts = [torch.randint(7, (n,), generator=generator).tolist() for n in counts]
    known, given = pack_prompts(prompts)
    rules = Rules(Filters(temperature=0))

    def whole() -> Plan:
        return Plan(
            sample_seeds(0, np.arange(3)), np.array([n + 20 for n in counts]), None, known, given
        )

    plain = draw(model, whole(), rules)
    drawn, _ = speculate(model, ModelDraft(draft), whole(), rules, Gamma())
    torch.testing.assert_close(drawn.x, plain.x)
    np.testing.assert_allclose(drawn.log_likelihood, plain.log_likelihood, rtol=1e-5)


def test_guidance_with_classes() -> None:
    settings = {"family": "imagegpt", "classes": 3, "class_dropout": 0.1, "event_shape": (4, 4)}
    model = decoder(16, 6, **settings)  # type: ignore[arg-type]
    draft = decoder(16, 6, seed=1, **settings)  # type: ignore[arg-type]
    cond = torch.tensor([0, 1, 2, 0])
    rules = Rules(Filters(temperature=0), Guidance(scale=2.5, schedule="cosine"))
    plain = draw(model, plan(4, 16, cond=cond), rules)
    drawn, _ = speculate(model, ModelDraft(draft), plan(4, 16, cond=cond), rules, FIXED)
    torch.testing.assert_close(drawn.x, plain.x)


def test_repetition_penalty_sees_the_drafted_elements() -> None:
    model, draft = decoder(30, 9), decoder(30, 9, seed=1)
    rules = Rules(Filters(temperature=0, repetition_penalty=1.5))
    plain = draw(model, plan(3, 30), rules)
    drawn, _ = speculate(model, ModelDraft(draft), plan(3, 30), rules, FIXED)
    torch.testing.assert_close(drawn.x, plain.x)


def test_rows_of_one_cursor_equal_rows_of_their_own() -> None:
    model = decoder(12, 7)
    shared, separate = open_rows(model, 3), SeparateRows(model, 3, None)
    assert isinstance(shared, SharedRows)
    rounds: list[tuple[list[list[int]], list[int]]] = [
        ([[1, 2, 3], [4], []], [2, 0, 0]),
        ([[5], [1, 1, 1, 1, 1, 1, 1], [6, 6]], [0, 3, 1]),
        # Near the end of the event the padding goes to the left.
        ([[2] * 9, [0], [1]], [1, 1, 0]),
        ([[3], [2, 5, 1], []], [0, 0, 2]),
    ]
    for new, forget in rounds:
        one, other = shared.feed(new), separate.feed(new)
        for row, tokens in enumerate(new):
            torch.testing.assert_close(
                one[row, : len(tokens)], other[row, : len(tokens)], rtol=1e-4, atol=1e-5
            )
        shared.rewind(forget)
        separate.rewind(forget)
        assert shared.fed == separate.fed


def test_the_formula_and_the_best_gamma() -> None:
    # Leviathan et al. 2023, table 1: alpha 0.8, gamma 5, c 0: 1 - 0.8^6 over 0.2 = 3.69
    assert expected_speedup(0.8, 5, 0.0) == pytest.approx(3.689, abs=1e-3)
    assert expected_speedup(1.0, 4, 0.25) == pytest.approx(2.5)
    assert best_gamma(0.0, 5, 0.1) == 0
    assert best_gamma(0.95, 5, 0.01) == 5
    assert 1 <= best_gamma(0.6, 10, 0.1) < 10


def test_a_hopeless_draft_is_asked_less_and_less() -> None:
    model = decoder(200, 4)
    rules = Rules(allowed=torch.tensor([False, True, True, True]))
    _, fixed = speculate(model, constant(0), plan(1, 200), rules, Gamma(most=4, adapt=False))
    _, adapted = speculate(model, constant(0), plan(1, 200), rules, Gamma(most=4))
    assert sum(fixed.windows) > 700
    assert sum(adapted.windows) < 90
    assert max(adapted.windows[-40:]) <= 1


def test_ngrams_continue_what_was_seen() -> None:
    draft = NgramDraft(longest=3, corpus=[[9, 8, 7, 6]])
    draft.open(np.zeros(2), 20, 10, None, lambda log_probs, so_far: log_probs)
    first = draft.propose([[1, 2, 3, 1, 2], [5, 9, 8]], [2, 4])
    assert first.tokens == [[3, 1], [7, 6]]
    second = draft.propose([[1, 2, 3, 1, 2, 4, 1, 2], [5, 9, 8, 0]], [3, 4])
    assert second.tokens == [[4, 1, 2], []]


def test_what_cannot_be_is_refused() -> None:
    model = decoder(12, 4)
    known, given = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[True, False, True]])
    with pytest.raises(SamplingError, match="further on"):
        speculate(model, NgramDraft(), plan(1, 12, known=known, given=given), Rules(), FIXED)
    with pytest.raises(SamplingError, match="knows 5 tokens, the model 4"):
        speculate(model, ModelDraft(decoder(12, 5)), plan(1, 12), Rules(), FIXED)
    with pytest.raises(SamplingError, match="draft: 12 elements are asked of a model of 8"):
        speculate(model, ModelDraft(decoder(8, 4)), plan(1, 12), Rules(), FIXED)
    with pytest.raises(ValueError, match="early exit"):
        first_layers(model, 2)
