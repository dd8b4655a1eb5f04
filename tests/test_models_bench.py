"""The benchmarks time what they say: the same loss on both sides, every family's cursor."""

import pytest

from chainrule.pipeline.models import bench

TINY = {"layers": 1, "heads": 2, "width": 16, "context": 8, "vocabulary_size": 11}


@pytest.mark.parametrize("family", bench.FAMILIES)
def test_both_sides_of_a_step_have_the_same_loss(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses after some steps: only the same weights, batch and optimiser keep them equal."""
    pytest.importorskip("transformers")
    monkeypatch.setitem(bench.SHAPES, "tiny", (3, TINY))
    losses: dict[int, list[float]] = {}

    def turns(*contestants: object, **_: object) -> tuple[float, float, float]:
        for i, run in enumerate(contestants[:2]):
            losses[i] = [run() for _ in range(3)]  # type: ignore[operator]
        return 1.0, 2.0, 2.0

    monkeypatch.setattr(bench, "_turns", turns)
    (row,) = bench.step([family], ["tiny"], ["float32"], rounds=1)
    assert row["ratio"] == 2.0
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][2] < losses[0][0]


def test_times_are_compared_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.0, 4.0, 4.0, 6.0, 6.0, 12.0, 12.0, 14.0, 14.0, 22.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench._turns(lambda: None, lambda: None, 3) == (2.0, 6.0, 3.0)


@pytest.mark.parametrize("family", bench.CURSORS)
def test_every_cursor_is_timed_at_its_length(family: str) -> None:
    (row,) = bench.cursor([family], sides=[4], evaluations=1)
    assert row["elements"] == (48 if family == "pixelcnnpp" else 16)
    assert row["ratio"] == pytest.approx(row["network ms"] / row["cursor ms"])
    assert row["cache KB"] > 0
