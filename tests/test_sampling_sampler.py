"""The sampler through the contract's cursor, on a table of bigrams whose law is known exactly."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chainrule.pipeline.models.contract import Autoregressive, Conditional, Cursor
from chainrule.pipeline.sampling.filters import Filters, Guidance
from chainrule.pipeline.sampling.sampler import (
    PREFILL_COLUMNS,
    Plan,
    Rules,
    SamplingError,
    draw,
    pack_prompts,
    steps,
)
from chainrule.pipeline.sampling.uniforms import sample_seeds


class Table(Conditional):
    def __init__(self, logits: Tensor) -> None:
        self.log_probs = torch.log_softmax(logits, -1)
        self.shape = logits.shape[:-1]

    def log_prob(self, x: Tensor) -> Tensor:
        return self.log_probs.gather(-1, x.unsqueeze(-1)).squeeze(-1)

    def sample(self, generator=None, temperature=1.0, top_k=None, top_p=None) -> Tensor:
        flat = self.log_probs.reshape(-1, self.log_probs.shape[-1]).exp()
        return torch.multinomial(flat, 1, generator=generator).reshape(self.shape)

    def pmf(self) -> Tensor:
        return self.log_probs.exp()


class Bigrams(Autoregressive):
    """p(x_t | x_{t-1}, class): a table (classes + 1, V + 1, V), the last class unconditional."""

    def __init__(self, size: int = 5, length: int = 6, classes: int = 0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.event_shape = (length,)
        self.size, self.classes = size, classes
        self.config = SimpleNamespace(vocabulary_size=size)
        table = torch.randn(classes + 1, size + 1, size, generator=generator)
        self.table = nn.Parameter(table, requires_grad=False)

    def rows(self, before: Tensor, cond: Tensor | None) -> Table:
        if cond is None:
            cond = torch.full(before.shape[:1], -1)
        cond = cond % (self.classes + 1)
        return Table(self.table[cond.unsqueeze(1).expand_as(before), before])

    def conditionals(self, x: Tensor, cond: Tensor | None = None) -> Table:
        start = torch.full_like(x[:, :1], self.size)
        return self.rows(torch.cat([start, x[:, :-1]], 1), cond)

    def cursor(self, batch: int, cond: Tensor | None = None) -> "BigramCursor":
        return BigramCursor(self, batch, cond)


class BigramCursor(Cursor):
    def __init__(self, model: Bigrams, batch: int, cond: Tensor | None) -> None:
        self.model, self.cond = model, cond
        self.x = torch.full((batch, 1), model.size)

    @property
    def position(self) -> int:
        return self.x.shape[1] - 1

    @property
    def next(self) -> Table:
        return Table(self.model.rows(self.x[:, -1:], self.cond).log_probs[:, 0])

    def advance(self, x: Tensor) -> Table:
        length = self.model.event_shape[0]
        if self.position + x.shape[1] > length:
            raise ValueError("past the end of the event")
        self.x = torch.cat([self.x, x], 1)
        follow = x if self.position < length else x[:, :-1]
        return self.model.rows(follow, self.cond)

    def rewind(self, n: int) -> None:
        self.x = self.x[:, : self.x.shape[1] - n]

    @property
    def nbytes(self) -> int:
        return self.x.nbytes


def plan(n: int, length: int, seed: int = 0, **kwargs: object) -> Plan:
    return Plan(sample_seeds(seed, np.arange(n)), np.full(n, length), **kwargs)  # type: ignore[arg-type]


def exact_pmf(model: Bigrams, length: int) -> dict[tuple[int, ...], float]:
    """Probability of every sequence of `length`."""
    space = torch.tensor(list(itertools.product(range(model.size), repeat=length)))
    p = model.log_prob(space).sum(1).exp().double()
    return dict(zip(map(tuple, space.tolist()), p.tolist(), strict=True))


def test_samples_follow_the_exact_distribution() -> None:
    model, n = Bigrams(size=3, length=4), 40_000
    drawn = draw(model, plan(n, 4), Rules())
    expected = exact_pmf(model, 4)
    counts = {key: 0 for key in expected}
    for row in drawn.x.tolist():
        counts[tuple(row)] += 1
    chi_square = sum((counts[k] - n * p) ** 2 / (n * p) for k, p in expected.items())
    assert chi_square < 130  # 80 degrees of freedom: P < 0.0004


def test_log_likelihood_is_the_models_own_whatever_the_filters() -> None:
    model = Bigrams(length=6)
    rules = Rules(Filters(temperature=0.6, top_k=3, top_p=0.9))
    drawn = draw(model, plan(50, 6), rules)
    expected = model.log_prob(drawn.x).double().sum(1)
    np.testing.assert_allclose(drawn.log_likelihood, expected.numpy(), rtol=1e-6)


def test_the_same_sample_whatever_the_batch() -> None:
    model = Bigrams(length=12)
    filters = Rules(Filters(temperature=0.8, top_p=0.9, repetition_penalty=1.2))
    seeds = sample_seeds(0, np.arange(32))
    whole = draw(model, Plan(seeds, np.full(32, 12)), filters)
    for size in (1, 5, 16):
        for start in range(0, 32, size):
            part = seeds[start : start + size]
            drawn = draw(model, Plan(part, np.full(len(part), 12)), filters)
            torch.testing.assert_close(drawn.x, whole.x[start : start + size], rtol=0, atol=0)


def test_greedy_is_the_mode_of_each_conditional() -> None:
    model = Bigrams(length=6)
    drawn = draw(model, plan(3, 6), Rules(Filters(temperature=0)))
    x = drawn.x
    modes = model.conditionals(x).pmf().argmax(-1)
    torch.testing.assert_close(x, modes)


def test_prompts_of_different_lengths_equal_each_alone() -> None:
    model = Bigrams(size=5, length=PREFILL_COLUMNS + 40)
    generator = torch.Generator().manual_seed(1)
    lengths = [0, 1, 7, PREFILL_COLUMNS, PREFILL_COLUMNS + 9]
    prompts = [torch.randint(5, (n,), generator=generator).tolist() for n in lengths]
    seeds = sample_seeds(0, np.arange(5))

    def together(rows: slice) -> tuple[Tensor, np.ndarray, np.ndarray]:
        known, given = pack_prompts(prompts[rows])
        ends = np.array([n + 20 for n in lengths[rows]])
        drawn = draw(model, Plan(seeds[rows], ends, known=known, given=given), Rules())
        return drawn.x, drawn.lengths, drawn.log_likelihood

    x, ends, nats = together(slice(0, 5))
    assert ends.tolist() == [n + 20 for n in lengths]
    for row, prompt in enumerate(prompts):
        assert x[row, : len(prompt)].tolist() == prompt
        assert not x[row, ends[row] :].any()
        alone, _, alone_nats = together(slice(row, row + 1))
        torch.testing.assert_close(alone[0], x[row, : ends[row]], rtol=0, atol=0)
        assert nats[row] == pytest.approx(alone_nats[0])
        expected = model.log_prob(alone).sum()
        assert nats[row] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("prefix", [5, 6])
def test_a_prompt_up_to_the_last_element(prefix: int) -> None:
    model = Bigrams(length=6)
    x = torch.tensor([[0, 1, 2, 3, 4, 0]])
    known, given = x[:, :prefix], torch.ones(1, prefix, dtype=torch.bool)
    drawn = draw(model, plan(1, 6, known=known, given=given), Rules())
    assert drawn.x[0, :prefix].tolist() == x[0, :prefix].tolist()
    assert drawn.log_likelihood[0] == pytest.approx(float(model.log_prob(drawn.x).sum()))


def test_elements_given_in_the_middle_stay() -> None:
    model = Bigrams(length=6)
    known = torch.tensor([[0, 0, 3, 0, 4]] * 40)
    given = torch.tensor([[False, False, True, False, True]] * 40)
    drawn = draw(model, plan(40, 6, known=known, given=given), Rules())
    assert (drawn.x[:, 2] == 3).all()
    assert (drawn.x[:, 4] == 4).all()
    assert drawn.x[:, 0].unique().numel() > 1


def test_end_tokens_end_a_row() -> None:
    model = Bigrams(size=4, length=30)
    drawn = draw(model, plan(20, 30), Rules(end=(2,)))
    free = draw(model, plan(20, 30), Rules())
    assert len(set(drawn.lengths)) > 1
    for row, length in enumerate(drawn.lengths):
        said = drawn.x[row, :length].tolist()
        assert 2 not in said[:-1]
        assert said[-1] == 2 or length == 30
        assert said == free.x[row, :length].tolist()
        assert not drawn.x[row, length:].any()
        part = model.log_prob(free.x[row : row + 1])[0, :length].sum()
        assert drawn.log_likelihood[row] == pytest.approx(float(part), rel=1e-5)


def test_an_end_token_inside_a_prompt_ends_nothing() -> None:
    model = Bigrams(size=4, length=8)
    known, given = pack_prompts([[2, 2, 1], [1]])
    drawn = draw(model, plan(2, 8, known=known, given=given), Rules(end=(2,)))
    assert drawn.lengths[0] > 3


def test_a_predicate_ends_a_row() -> None:
    model = Bigrams(size=4, length=10)
    rules = Rules(finished=lambda row, drawn: len(drawn) == row + 1)
    drawn = draw(model, plan(3, 10), rules)
    assert drawn.lengths.tolist() == [1, 2, 3]


def test_allowed_tokens_only() -> None:
    model = Bigrams(size=5, length=6)
    allowed = torch.tensor([True, False, True, False, False])
    drawn = draw(model, plan(60, 6), Rules(allowed=allowed))
    assert drawn.x.unique().tolist() == [0, 2]
    expected = model.log_prob(drawn.x).double().sum(1)
    np.testing.assert_allclose(drawn.log_likelihood, expected.numpy(), rtol=1e-6)


def test_guidance_of_scale_0_is_the_unconditional_model_and_1_the_conditional() -> None:
    model = Bigrams(length=6, classes=3)
    cond = torch.arange(3).repeat(10)
    plain = draw(model, plan(30, 6, cond=cond), Rules())
    none = draw(model, plan(30, 6, cond=torch.full_like(cond, -1)), Rules())
    zero = draw(model, plan(30, 6, cond=cond), Rules(guidance=Guidance(scale=0)))
    near = draw(model, plan(30, 6, cond=cond), Rules(guidance=Guidance(scale=1 + 1e-9)))
    torch.testing.assert_close(zero.x, none.x)
    torch.testing.assert_close(near.x, plain.x)
    expected = model.log_prob(zero.x, cond).double().sum(1)
    np.testing.assert_allclose(zero.log_likelihood, expected.numpy(), rtol=1e-6)


def test_stronger_guidance_makes_the_class_more_certain() -> None:
    model = Bigrams(length=6, classes=2, seed=4)
    cond = torch.zeros(400, dtype=torch.long)

    def evidence(scale: float) -> float:
        x = draw(model, plan(400, 6, cond=cond), Rules(guidance=Guidance(scale=scale))).x
        gain = model.log_prob(x, cond) - model.log_prob(x, cond - 1)
        return float(gain.sum(1).mean())

    assert evidence(0.0) < evidence(1.0) < evidence(3.0)


def test_steps_come_one_by_one() -> None:
    model = Bigrams(length=6)
    first = next(steps(model, plan(2, 6), Rules()))
    assert first.position == 0
    assert first.active.all()


def test_what_cannot_be_is_refused() -> None:
    model = Bigrams(size=5, length=6)
    with pytest.raises(SamplingError, match=r"length: 7 .* model of 6"):
        draw(model, plan(1, 7), Rules())
    with pytest.raises(SamplingError, match="guidance"):
        draw(model, plan(1, 6), Rules(guidance=Guidance(scale=2)))
    known, given = pack_prompts([[1, 5]])
    with pytest.raises(SamplingError, match=r"token 5 at position 1 .* \[0, 5\)"):
        draw(model, plan(1, 6, known=known, given=given), Rules())
