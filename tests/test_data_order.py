"""The global order: bijections, exact mixture weights, windows that lose and waste nothing."""

import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from chainrule.pipeline.data.order import Interleave, Permutation, permute, stream_key


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(-(2**40), 2**40), epoch=st.integers(0, 10**6))
def test_permutation_has_every_element_once(n: int, seed: int, epoch: int) -> None:
    order = Permutation(n, seed, epoch)[np.arange(n)]
    assert np.array_equal(np.sort(order), np.arange(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 10**12), seed=st.integers(0, 1000), data=st.data())
def test_permutation_is_random_access(n: int, seed: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=40)))
    order = Permutation(n, seed, 0)
    together = order[positions]
    assert [int(order[position]) for position in positions] == together.tolist()
    assert ((together >= 0) & (together < n)).all()
    assert len(set(together.tolist())) == len(set(positions.tolist()))


def test_permutations_of_epochs_and_seeds_differ_and_are_stable() -> None:
    orders = {
        (seed, epoch): tuple(Permutation(50, seed, epoch)[np.arange(50)])
        for seed in range(20)
        for epoch in range(20)
    }
    assert len(set(orders.values())) == 400
    # The order is a promise to ledgers and checkpoints that exist: it must not change.
    assert Permutation(10, 0, 0)[np.arange(10)].tolist() == GOLDEN_10
    assert Permutation(10**7, 3, 2)[np.array([0, 1, 9_999_999])].tolist() == GOLDEN_10M


GOLDEN_10 = [0, 3, 4, 2, 8, 5, 6, 9, 7, 1]
GOLDEN_10M = [9511219, 9693821, 8152191]


def test_permutation_looks_uniform() -> None:
    """Each element is as likely at each position: chi-square over 4,000 seeds, 5 x 5 cells."""
    counts = np.zeros((5, 5))
    for seed in range(4000):
        counts[np.arange(5), Permutation(5, seed, 1)[np.arange(5)]] += 1
    chi_square = ((counts - 800) ** 2 / 800).sum()
    assert chi_square < 39.25  # 16 degrees of freedom, p = 0.001
    # Neighbours do not stay neighbours.
    big = Permutation(100_000, 7, 0)[np.arange(100_000)]
    assert abs(np.corrcoef(big[:-1], big[1:])[0, 1]) < 0.015


def test_permutations_of_many_sizes_at_once() -> None:
    sizes = np.repeat([1, 2, 7, 100], [1, 2, 7, 100])
    places = np.concatenate([np.arange(n) for n in (1, 2, 7, 100)])
    found = permute(places, sizes, stream_key(5, 0, sizes))
    for n in (1, 2, 7, 100):
        assert np.array_equal(np.sort(found[sizes == n]), np.arange(n))


def test_resume_after_ten_million_costs_nothing() -> None:
    order = Permutation(10_000_000, 1, 3)
    tracemalloc.start()
    began = time.perf_counter()
    order[np.arange(9_999_000, 10_000_000)]
    took = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 1.0
    assert peak < 2_000_000


WEIGHTS = st.lists(st.integers(1, 999), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(counts=WEIGHTS, batch=st.integers(1, 64), start=st.integers(0, 10**9))
def test_mixture_weights_are_exact_over_any_thousand_batches(
    counts: list[int], batch: int, start: int
) -> None:
    """Weights with three decimals: exact counts over 1,000 batches of any size, from any start."""
    total = sum(counts)
    weights = [Fraction(round(1000 * count / total) or 1, 1000) for count in counts]
    weights[0] += 1 - sum(weights)
    if weights[0] <= 0:
        return
    interleave = Interleave([float(weight) for weight in weights])
    before, after = interleave.before(start), interleave.before(start + 1000 * batch)
    given_rows = [b - a for a, b in zip(before, after, strict=True)]
    assert given_rows == [weight * 1000 * batch for weight in weights]


@settings(max_examples=80, deadline=None)
@given(weights=st.lists(st.floats(0.01, 50), min_size=1, max_size=5), start=st.integers(0, 10**6))
def test_mixture_draws_are_consistent(weights: list[float], start: int) -> None:
    """Each set's draws are numbered without gaps, and agree with `before`."""
    interleave = Interleave(weights)
    sets, numbers = interleave.draws(start, start + 300)
    before = interleave.before(start)
    for k in range(len(weights)):
        of_set = numbers[sets == k]
        assert of_set.tolist() == list(range(before[k], before[k] + len(of_set)))
    counts = np.bincount(sets, minlength=len(weights))
    for kept, count in zip(interleave.weights, counts.tolist(), strict=True):
        assert abs(count - kept * 300) < len(weights)
    assert sum(interleave.weights) == 1
    for kept, weight in zip(interleave.weights, weights, strict=True):
        assert float(kept) == pytest.approx(weight / sum(weights), abs=1e-6)


@pytest.mark.parametrize("weights", [[], [0.0, 1.0], [-1.0, 2.0], [1e-9, 1.0]])
def test_mixture_refuses_weights_that_draw_nothing(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        Interleave(weights)
