"""Filters against their definitions, written out by hand or by brute force."""

import math

import pydantic
import pytest
import torch

from chainrule.pipeline.sampling.filters import (
    Filters,
    Guidance,
    apply,
    guide,
    invert,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
)


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def kept(log_probs: torch.Tensor) -> list[int]:
    return torch.isfinite(log_probs[0]).nonzero().squeeze(1).tolist()


def test_top_k_keeps_the_k_most_probable() -> None:
    assert kept(keep_top_k(log(0.1, 0.4, 0.2, 0.3), 2)) == [1, 3]
    assert kept(keep_top_k(log(0.1, 0.4, 0.2, 0.3), 9)) == [0, 1, 2, 3]


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    p = log(0.1, 0.4, 0.2, 0.3)
    assert kept(keep_top_p(p, 0.39)) == [1]
    assert kept(keep_top_p(p, 0.41)) == [1, 3]
    assert kept(keep_top_p(p, 0.89)) == [1, 2, 3]
    assert kept(keep_top_p(p, 1e-9)) == [1]


def test_top_p_against_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        p = torch.softmax(3 * torch.randn(1, 12, generator=generator), -1)
        mass = 0.05 + 0.9 * float(torch.rand((), generator=generator))
        order = p[0].argsort(descending=True).tolist()
        expected, total = [], 0.0
        while total < mass:
            expected.append(order[len(expected)])
            total += float(p[0, expected[-1]])
        assert kept(keep_top_p(p.log(), mass)) == sorted(expected)


def test_min_p_is_relative_to_the_mode() -> None:
    assert kept(keep_min_p(log(0.05, 0.5, 0.15, 0.3), 0.29)) == [1, 2, 3]
    assert kept(keep_min_p(log(0.05, 0.5, 0.15, 0.3), 0.0)) == [0, 1, 2, 3]
    assert kept(keep_min_p(log(0.05, 0.5, 0.15, 0.3), 1.0)) == [1]


def test_temperature() -> None:
    p = log(0.2, 0.8)
    halved = apply(p, Filters(temperature=0.5)).exp()
    torch.testing.assert_close(halved, torch.tensor([[0.04, 0.64]]) / 0.68)
    assert apply(p, Filters(temperature=0)).exp().tolist() == [[0.0, 1.0]]
    tie = log(0.4, 0.4, 0.2)
    assert apply(tie, Filters(temperature=0)).exp().tolist() == [[1.0, 0.0, 0.0]]


def test_repetition_penalty_raises_the_probability_to_a_power() -> None:
    seen = torch.tensor([[True, False, False]])
    found = penalise_repetition(log(0.5, 0.3, 0.2), seen, 2.0).exp()
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.3, 0.2]]) / 0.75)
    with pytest.raises(ValueError, match="seen"):
        apply(log(0.5, 0.5), Filters(repetition_penalty=1.2))


def test_every_combination_is_normalised() -> None:
    torch.manual_seed(0)
    p = torch.log_softmax(2 * torch.randn(5, 30), -1)
    seen = torch.rand(5, 30) < 0.3
    for filters in (
        Filters(),
        Filters(temperature=0.7, top_k=7, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
        Filters(top_k=1),
        Filters(top_p=0.01),
    ):
        torch.testing.assert_close(apply(p, filters, seen).exp().sum(-1), torch.ones(5))


def test_guidance() -> None:
    c, u = log(0.7, 0.2, 0.1), log(0.2, 0.3, 0.5)
    torch.testing.assert_close(guide(c, u, torch.tensor([1.0])), c)
    torch.testing.assert_close(guide(c, u, torch.tensor([0.0])), u)
    expected = c.exp() ** 2 / u.exp()
    torch.testing.assert_close(guide(c, u, torch.tensor([2.0])).exp(), expected / expected.sum())
    assert kept(guide(log(0.5, 0.5, 0.0), log(0.2, 0.0, 0.8), torch.tensor([3.0]))) == [0]


def test_guidance_schedules() -> None:
    positions = torch.arange(11)
    assert Guidance(scale=4).at(positions, 11).tolist() == [4.0] * 11
    for schedule in ("linear", "cosine"):
        scales = Guidance(scale=4, schedule=schedule).at(positions, 11)
        torch.testing.assert_close(scales[[0, 5, 10]], torch.tensor([1.0, 2.5, 4.0]))
        assert bool((scales.diff() > 0).all())


def test_inverse_of_the_distribution_function() -> None:
    p = log(0.25, 0.0, 0.5, 0.25)
    for u, token in [(1e-12, 0), (0.2499, 0), (0.2501, 2), (0.7499, 2), (0.7501, 3)]:
        assert invert(p, torch.tensor([u], dtype=torch.float64)).item() == token
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert invert(log(0.5, 0.5, 0.0), almost_one).item() == 1
    assert invert(log(0.1, 0.9, 0.0), torch.ones(1, dtype=torch.float64)).item() == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", 0),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_nonsense_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(pydantic.ValidationError, match=field):
        Filters(**{field: value})
