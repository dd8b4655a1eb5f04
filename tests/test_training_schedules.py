"""Learning rate and batch size, step by step."""

import math

import pytest

from chainrule.pipeline.training.schedules import BatchRamp, ScheduleSettings


def factors(steps: int, **settings: object) -> list[float]:
    schedule = ScheduleSettings.model_validate(settings)
    return [schedule.factor(step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_ends_at_one():
    found = factors(20, name="constant", warmup=4)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(found[4:]) == {1.0}


def test_cosine_falls_from_one_to_the_floor():
    found = factors(101, name="cosine", warmup=0, floor=0.1)
    assert found[0] == 1.0
    assert found[50] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 50 / 101)))
    assert found == sorted(found, reverse=True)
    assert ScheduleSettings(name="cosine", floor=0.1).factor(101, 101) == pytest.approx(0.1)


def test_linear_is_a_line():
    found = factors(10, name="linear", floor=0.0)
    assert found == pytest.approx([1 - i / 10 for i in range(10)])


def test_wsd_is_flat_and_decays_at_the_end():
    found = factors(100, name="wsd", warmup=10, decay=0.2, floor=0.0)
    assert set(found[9:80]) == {1.0}
    assert found[90] == pytest.approx(0.5)
    assert found[99] == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_a_warm_up_longer_than_the_run_is_no_error(name):
    assert factors(5, name=name, warmup=10)[-1] == 0.5


def test_a_ramp_grows_in_whole_increments_to_the_full_batch():
    ramp = BatchRamp(start=8, steps=100, increment=8)
    sizes = [ramp.batch_size(step, 64) for step in range(120)]
    assert sizes[0] == 8
    assert sizes == sorted(sizes)
    assert all(size % 8 == 0 for size in sizes)
    assert set(sizes[100:]) == {64}
    assert set(sizes) == {8, 16, 24, 32, 40, 48, 56, 64}


def test_a_ramp_from_no_multiple_is_refused():
    with pytest.raises(ValueError, match="no multiple of increment"):
        BatchRamp(start=6, steps=10, increment=4)
