"""The benchmarks time what they say: the same loss on both sides, every family's cursor."""

import math
from typing import Any

import pytest
import torch

from chainrule.pipeline import build
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


def _is_consistent(row: dict[str, Any]) -> None:
    assert row["ratio event"] == pytest.approx(row["event ms"] / row["cursor ms"])
    assert row["cursor/s"] == pytest.approx(2e3 / row["cursor ms"])
    assert row["event/s"] == pytest.approx(2e3 / row["event ms"])
    if row["known ms"] is None:
        assert row["ratio known"] is None
    else:
        assert row["ratio known"] == pytest.approx(row["known ms"] / row["cursor ms"])
    assert row["cache KB"] > 0


@pytest.mark.parametrize("family", bench.CURSORS)
def test_every_cursor_is_timed_at_its_length(family: str) -> None:
    (row,) = bench.cursor([family], sides=[4], evaluations=1, batch=2)
    assert row["elements"] == (48 if family == "pixelcnnpp" else 16)
    sequence = family in ("gpt2", "llama", "mistral", "falcon", "wavenet")
    assert (row["known ms"] is not None) == sequence
    _is_consistent(row)


def test_a_case_of_its_own_size_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = {name: math.prod(spec["event_shape"]) for name, spec in bench.CASES.items()}
    picture = 3 * 32 * 32
    assert lengths == {
        "wavenet-4000": 4000,
        "pixelcnnpp-32": picture,
        "pixelcnnpp-32-paper": picture,
    }
    monkeypatch.setitem(
        bench.CASES, "wavenet-4000", {"preset": "wavenet-debug", "event_shape": (40,)}
    )
    (row,) = bench.cursor(["wavenet-4000"], sides=[4, 8], evaluations=1, batch=2)
    assert (row["family"], row["elements"]) == ("wavenet-4000", 40)
    _is_consistent(row)


def test_the_naive_loops_evaluate_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole event at each place, and the elements before the place, while the walk waits."""
    asked: list[tuple[int, ...]] = []

    def evaluation(model: object, x: torch.Tensor) -> float:
        asked.append(tuple(x.shape))
        return 1.0

    monkeypatch.setattr(bench, "_evaluation", evaluation)
    model = build("wavenet-debug", event_shape=(16,)).eval()
    with torch.no_grad():
        cached, event, known = bench._walk(model, torch.zeros(3, 16, dtype=torch.long), 2)
    assert asked == [(3, 16), (3, 4), (3, 16), (3, 12)]
    assert (event, known) == (1.0, 1.0)
    assert 0 < cached < 1
