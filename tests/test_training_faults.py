"""Faults of learning: what counts as one, the log of them, going back."""

import json

from chainrule.pipeline.training.faults import FaultMonitor, FaultSettings


def accept(monitor: FaultMonitor, losses: list[float]) -> None:
    for loss in losses:
        assert monitor.judge_loss(loss) is None
        monitor.accept(loss)


def test_what_is_not_finite_is_a_fault_from_the_first_step_on():
    monitor = FaultMonitor(FaultSettings())
    assert monitor.judge_loss(float("nan")) == "loss is nan"
    assert monitor.judge_loss(float("inf")) == "loss is inf"


def test_a_spike_stands_out_of_the_recent_losses():
    monitor = FaultMonitor(FaultSettings(spike_sigma=4, window=10))
    assert monitor.judge_loss(100.0) is None  # too few losses to judge by
    accept(monitor, [2.0, 2.1] * 5)
    assert monitor.judge_loss(2.2) is None
    assert "sigma above the last 10" in (monitor.judge_loss(2.5) or "")


def test_a_flat_loss_does_not_make_every_wiggle_a_spike():
    monitor = FaultMonitor(FaultSettings(spike_sigma=6, window=5))
    accept(monitor, [1.0] * 5)
    assert monitor.judge_loss(1.05) is None
    assert monitor.judge_loss(1.07) is not None


def test_spikes_can_be_allowed():
    monitor = FaultMonitor(FaultSettings(spike_sigma=None, window=2))
    accept(monitor, [1.0, 1.0, 1e6])


def test_faults_in_a_row_lead_back_and_too_many_to_the_end(tmp_path):
    path = tmp_path / "faults.jsonl"
    monitor = FaultMonitor(FaultSettings(consecutive=2, rollbacks=1), path)
    good = monitor.state()
    for attempt in range(2):
        monitor.skip(5, "loss is nan", [[1, 2]])
        assert not monitor.must_roll_back
        monitor.accept(1.0)
        monitor.skip(6, "loss is nan", [[3]])
        monitor.skip(7, "loss is nan", [[4]])
        assert monitor.must_roll_back
        monitor.roll_back(7, good)
        assert monitor.exhausted == (attempt == 1)
    assert monitor.skipped == 6
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 8
    assert lines[0] == {"step": 5, "skipped": "loss is nan", "ids": [[1, 2]]}
    assert lines[3] == {"step": 7, "rolled_back": 1}


def test_an_overflow_now_and_then_is_no_fault_and_many_in_a_row_are(tmp_path):
    path = tmp_path / "faults.jsonl"
    monitor = FaultMonitor(FaultSettings(overflows=3, consecutive=2), path)
    for step in range(1, 21):  # a scale that grows overflows again and again
        assert monitor.overflow(step, 2.0**16, [[step]]) is None
        assert monitor.overflow(step, 2.0**15, [[step]]) is None
        monitor.accept(1.0)
    assert (monitor.overflows, monitor.skipped) == (40, 0)
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {"step": 1, "overflow_at_scale": 2.0**16, "ids": [[1]]}
    for scale in (2.0**16, 2.0**15):
        assert monitor.overflow(21, scale, []) is None
    again = FaultMonitor(FaultSettings(overflows=3, consecutive=2), path)
    again.restore(json.loads(json.dumps(monitor.state())))
    for step in (23, 24):
        reason = again.overflow(step, 2.0**14, [])
        assert reason == f"gradient is not finite for {step - 20} steps in a row, loss scale 16384"
        again.skip(step, reason, [])
    assert again.must_roll_back
    again.roll_back(24, monitor.state())
    assert again.overflow(25, 2.0**16, []) is None


def test_what_was_logged_after_a_checkpoint_is_dropped_on_resume(tmp_path):
    path = tmp_path / "faults.jsonl"
    monitor = FaultMonitor(FaultSettings(), path)
    monitor.skip(1, "loss is nan", [])
    saved = json.loads(json.dumps(monitor.state()))
    monitor.skip(2, "loss is nan", [])
    again = FaultMonitor(FaultSettings(), path)
    again.restore(saved)
    assert again.state() == saved
    assert len(path.read_text().splitlines()) == 1
    again.rewind(0)
    assert not path.exists()
