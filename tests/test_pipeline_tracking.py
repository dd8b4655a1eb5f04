"""Tracking against a real MLflow store (SQLite): nested runs, resuming, a store that is away."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from chainrule.pipeline import tracking
from chainrule.pipeline.tracking import Tracker

pytestmark = pytest.mark.slow  # MLflow makes its database: some seconds


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def test_a_resumed_run_repeats_no_step(runs: Path, tmp_path: Path) -> None:
    parent = Tracker(runs, "digits", "digits")
    given: list[str] = []
    first = Tracker(runs, "digits", "decoder", parent_id="parent", on_run_id=given.append)
    first.parameters({"width": 128, "text": "x" * 9000})
    for step in range(1, 6):
        first.metrics(step, {"loss": 1 / step})
    picture = tmp_path / "sheet.png"
    picture.write_bytes(b"png")
    first.file(picture)
    first.finish("KILLED")
    parent.finish("KILLED")
    assert given == [first.run_id]

    again = Tracker(runs, "digits", "decoder", run_id=first.run_id)
    again.parameters({"width": 256, "depth": 2})  # MLflow refuses to change a parameter
    for step in range(4, 9):  # the checkpoint was at step 3
        again.metrics(step, {"loss": 1 / step})
    again.finish("FINISHED")

    store = tracking.client(runs)
    history = store.get_metric_history(first.run_id, "loss")
    assert sorted(metric.step for metric in history) == list(range(1, 9))
    run = store.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["width"] == "128"
    assert run.data.params["depth"] == "2"
    assert run.data.tags["now.width"] == "256"
    assert run.data.tags["mlflow.parentRunId"] == "parent"
    assert [file.path for file in store.list_artifacts(first.run_id)] == ["sheet.png"]
    assert store.get_run(parent.run_id).info.status == "KILLED"


def test_a_name_that_mlflow_refuses_takes_nothing_with_it(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(runs, "digits", "scoreboard")
    names = [
        "loss",
        "PPMd (order 6).joined",
        "class.b c (1)",
        "a//b",
        "../up",
        "größe.日本",
        "n" * 300,
    ]
    tracker.metrics(1, {name: 1.0 for name in names})
    tracker.finish("FINISHED")
    assert "MLflow" not in capsys.readouterr().err
    run = tracking.client(runs).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert len(run.data.metrics) == len(names)
    assert {"loss", "PPMd _order 6_.joined", "class.b c _1_", "größe.日本"} <= set(run.data.metrics)


def test_a_store_that_is_away_neither_stops_nor_slows(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(tracking, "FINISH_WITHIN_S", 3.0)
    tracker = Tracker(runs, "digits", "decoder")
    began = time.perf_counter()
    for step in range(1000):
        tracker.metrics(step, {"loss": 1.0})
    assert time.perf_counter() - began < 1.0
    tracker.finish("FINISHED")
    assert time.perf_counter() - began < 30
    said = capsys.readouterr().err
    assert said.count("MLflow at http://127.0.0.1:9") == 1
    assert "goes on without it" in said


def test_a_store_whose_maker_was_killed_is_made_by_the_next(tmp_path: Path) -> None:
    """MLflow cannot go on with a half-made one: `table spans already exists`."""
    program = (
        "import sys; from pathlib import Path; from chainrule.pipeline.tracking import Tracker\n"
        "Tracker(Path(sys.argv[1]), 'digits', 'decoder').finish('FINISHED')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    while not (making := list(tmp_path.glob(".mlflow.db.*.tmp"))) or not making[0].stat().st_size:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "mlflow.db").exists()

    tracker = Tracker(tmp_path, "digits", "decoder")
    tracker.finish("FINISHED")
    assert tracking.client(tmp_path).get_run(tracker.run_id).info.status == "FINISHED"
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"mlflow.db", ".mlflow.lock", "mlflow-artifacts"}
