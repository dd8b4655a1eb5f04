"""Packing: every token once, nothing cut that could stay whole, under 1 % of padding."""

import time

import numpy as np
from hypothesis import given, settings, strategies as st

from chainrule.pipeline.data.packing import Packing, first_fit_decreasing
from chainrule.pipeline.data.rows import PackedRows

LENGTHS = st.lists(st.integers(0, 300), min_size=1, max_size=200).filter(any)


def consumed(packing: Packing, lengths: np.ndarray, epoch: int, shuffle: bool) -> np.ndarray:
    """How often each token of each document is in a window; checks what a window may hold."""
    rows, documents, starts, stops = packing.pieces(np.arange(packing.windows), 3, epoch, shuffle)
    assert (np.diff(rows) >= 0).all()
    assert (stops > starts).all()
    filled = np.bincount(rows, stops - starts, minlength=packing.windows)
    assert (filled > 0).all()
    assert (filled <= packing.context).all()
    first_token = np.concatenate([[0], np.cumsum(lengths)])
    counts = np.zeros(first_token[-1], np.int64)
    for document, start, stop in zip(documents, starts, stops, strict=True):
        assert stop <= lengths[document]
        counts[first_token[document] + start : first_token[document] + stop] += 1
    return counts


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, context=st.integers(1, 64), epoch=st.integers(0, 3), shuffle=st.booleans())
def test_every_token_is_in_exactly_one_window(
    lengths: list[int], context: int, epoch: int, shuffle: bool
) -> None:
    array = np.array(lengths, np.int64)
    packing = Packing(array, context)
    assert (consumed(packing, array, epoch, shuffle) == 1).all()


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, context=st.integers(1, 64))
def test_padding_is_below_one_percent_and_a_window(lengths: list[int], context: int) -> None:
    array = np.array(lengths, np.int64)
    packing = Packing(array, context)
    padding = packing.windows * context - int(array.sum())
    assert padding <= 0.01 * array.sum() + context


def test_lengths_that_do_not_fit_each_other_are_cut_rather_than_padded() -> None:
    packing = Packing(np.full(3000, 60), 100)
    assert 0 < packing.waste < 0.01


def test_documents_that_fit_stay_whole() -> None:
    """Lengths that pack: no document of at most T tokens is in two windows."""
    lengths = np.random.default_rng(0).integers(1, 257, 20_000)
    packing = Packing(lengths, 256)
    _, documents, starts, stops = packing.pieces(np.arange(packing.windows), 0, 0)
    assert packing.waste < 0.01
    assert np.array_equal(np.sort(documents), np.arange(20_000))
    assert (starts == 0).all()
    assert np.array_equal(stops, lengths[documents])


def test_long_documents_are_cut_at_multiples_of_the_context() -> None:
    packing = Packing(np.array([1000, 24]), 100)
    _, documents, starts, stops = packing.pieces(np.arange(packing.windows), 0, 0)
    long = documents == 0
    assert sorted(starts[long].tolist()) == list(range(0, 1000, 100))
    assert (stops[long] - starts[long] == 100).all()


def test_later_epochs_cut_long_documents_elsewhere_and_leave_short_ones_whole() -> None:
    packing = Packing(np.array([1000, 24, 130, 30]), 100)
    cuts = []
    for epoch in range(4):
        _, documents, starts, stops = packing.pieces(np.arange(packing.windows), 0, epoch)
        for short, length in ((1, 24), (3, 30)):
            assert starts[documents == short].tolist() == [0]
            assert stops[documents == short].tolist() == [length]
        cuts.append(frozenset(starts[documents == 0].tolist()) - {0})
    assert cuts[0] == set(range(100, 1000, 100))
    assert len(set(cuts)) == 4
    again = packing.pieces(np.arange(packing.windows), 0, 3)[2]
    assert np.array_equal(again, starts)


def test_epochs_pair_documents_differently_in_as_many_windows() -> None:
    lengths = np.random.default_rng(1).integers(1, 100, 500)
    rows = PackedRows(lengths, 128, seed=4)
    first, again, second = (rows.pieces(epoch, np.arange(len(rows))) for epoch in (0, 0, 1))
    assert np.array_equal(first.sample, again.sample)
    assert not np.array_equal(first.sample, second.sample)
    partners = [
        {frozenset(e.sample[e.row == row].tolist()) for row in range(len(rows))}
        for e in (first, second)
    ]
    assert len(partners[0] & partners[1]) < len(rows) / 4


def test_a_window_asked_for_alone_is_the_same() -> None:
    lengths = np.random.default_rng(2).integers(1, 400, 300)
    rows = PackedRows(lengths, 96, seed=9)
    all_rows = rows.pieces(5, np.arange(len(rows)))
    for number in range(0, len(rows), 7):
        alone = rows.pieces(5, np.array([number]))
        here = all_rows.row == number
        assert alone.sample.tolist() == all_rows.sample[here].tolist()
        assert alone.start.tolist() == all_rows.start[here].tolist()


@settings(max_examples=100, deadline=None)
@given(items=st.lists(st.integers(1, 19), max_size=60))
def test_first_fit_decreasing_is_first_fit_decreasing(items: list[int]) -> None:
    """Against the textbook's algorithm, item by item."""
    bins: list[list[int]] = []
    for item in sorted(items, reverse=True):
        for bin_ in bins:
            if sum(bin_) + item <= 20:
                bin_.append(item)
                break
        else:
            bins.append([item])
    patterns = first_fit_decreasing(np.bincount(items, minlength=21), 20)
    found = [
        [length for length, times in pattern for _ in range(times)]
        for pattern, uses in patterns
        for _ in range(uses)
    ]
    assert sorted(found) == sorted(bins)


def test_ten_million_documents_pack_and_resume_in_two_seconds() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 10_000_000).astype(np.int64) + 1
    began = time.thread_time()
    rows = PackedRows(lengths, 2048, seed=1)
    last = rows.pieces(0, np.arange(len(rows) - 64, len(rows)))
    took = time.thread_time() - began
    assert rows.waste < 0.01
    assert len(np.unique(last.row)) == 64
    assert took < 2.0  # seconds of processor time: others may use the core meanwhile
