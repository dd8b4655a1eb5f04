"""Tracking against a real MLflow store (SQLite): nested runs, resuming, a store that is away."""

import json
import math
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from chainrule.pipeline import catalogue, pipeline_file, stage_run, tracking
from chainrule.pipeline.artifact import read_json
from chainrule.pipeline.config import Settings, runtime
from chainrule.pipeline.graph import Pipeline
from chainrule.pipeline.launch import discard_unfinished
from chainrule.pipeline.pipeline_file import load_pipeline
from chainrule.pipeline.stage import Stage, StageInterrupted
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


def test_what_a_kill_kept_from_the_store_is_sent_by_the_next_attempt(
    runs: Path, tmp_path: Path
) -> None:
    """38 of 60 steps were sent, a hole among them; the checkpoint is of step 50."""
    first = Tracker(runs, "digits", "decoder")
    for step in (*range(1, 20), *range(25, 44)):
        first.metrics(step, {"loss": 1 / step})
    first.metrics(20, {"validation_loss": 2.0})
    first.finish(None)

    log = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 1 / step, "fault": "none"} for step in range(1, 51)]
    lines[19]["validation_loss"] = 2.0
    lines[39]["validation_loss"] = "nan"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 51, "lo')
    again = Tracker(runs, "digits", "decoder", run_id=first.run_id, log=log)
    for step in range(45, 61):  # some are in the log by the time it is read, too
        again.metrics(step, {"loss": 1 / step})
    again.metrics(60, {"loss": 1 / 60, "best_step": 40})
    again.finish("FINISHED")

    store = tracking.client(runs)
    history = store.get_metric_history(first.run_id, "loss")
    assert sorted(metric.step for metric in history) == list(range(1, 61))
    assert all(metric.value == 1 / metric.step for metric in history)
    validated = store.get_metric_history(first.run_id, "validation_loss")
    assert sorted(metric.step for metric in validated) == [20, 40]
    assert math.isnan(max(validated, key=lambda metric: metric.step).value)
    assert set(store.get_run(first.run_id).data.metrics) == {"loss", "validation_loss", "best_step"}


def test_a_step_that_neither_the_store_nor_the_log_has_is_sent_when_it_is_made_again(
    runs: Path, tmp_path: Path
) -> None:
    first = Tracker(runs, "digits", "decoder")
    for step in (1, 2, 3, 6):
        first.metrics(step, {"loss": step})
    first.finish("KILLED")
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": step, "loss": step}) + "\n" for step in (1, 2, 3)))
    again = Tracker(runs, "digits", "decoder", run_id=first.run_id, log=log)
    for step in (4, 5, 6, 7, 5):
        again.metrics(step, {"loss": step})
    again.finish("FINISHED")
    history = tracking.client(runs).get_metric_history(first.run_id, "loss")
    assert sorted(metric.step for metric in history) == list(range(1, 8))


def test_a_long_log_goes_in_batches_to_a_store_that_has_none_of_it(
    runs: Path, tmp_path: Path
) -> None:
    """As after a kill before the store had given the run an id."""
    log = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0, "rate": 2.0}) for step in range(1, 1601)]
    log.write_text("\n".join(lines) + "\n")
    tracker = Tracker(runs, "digits", "decoder", log=log)
    tracker.finish("FINISHED")
    store = tracking.client(runs)
    for name in ("loss", "rate"):
        history = store.get_metric_history(tracker.run_id, name)
        assert sorted(metric.step for metric in history) == list(range(1, 1601))


class TrainConfig(Settings):
    rate: float = 0.1
    stop_at: int = runtime(0)


def train(config: TrainConfig, stage: Stage) -> None:
    """60 steps; each is a checkpoint."""
    log = stage.folder / "metrics.jsonl"
    done = len(log.read_text().splitlines()) if log.exists() else 0
    for step in range(done + 1, 61):
        validation = {"validation_loss": 2 / step} if step % 30 == 0 else {}
        stage.log(step, loss=1 / step, **validation)
        if step == config.stop_at:
            raise StageInterrupted("stopped")
    stage.summary |= {"validation_loss": 2 / 60, "parameters": 7, "kind": "small"}


@pytest.fixture
def load(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pipeline]:
    """A pipeline of that one stage, with settings."""
    module = SimpleNamespace(Config=TrainConfig, INPUTS={}, main=train)
    for room in (catalogue, pipeline_file):
        monkeypatch.setattr(room, "job_module", lambda name: module)
    path = tmp_path / "p.yaml"
    path.write_text(f"name: {tmp_path.name}\nstages: {{decoder: {{job: train}}}}\n")
    return lambda *settings: load_pipeline(path, [f"decoder.{s}" for s in settings], runs)


def test_a_stage_that_was_killed_before_its_steps_were_sent(load: Callable[..., Pipeline]) -> None:
    """The store ends with each step once, and with the summary at the last of them."""
    pipeline = load("stop_at=40")
    with pytest.raises(StageInterrupted):
        stage_run.run_here(pipeline, "decoder")
    run_id = read_json(pipeline.root / "decoder.partial" / "attempt.json")["mlflow_run_id"]
    with sqlite3.connect(pipeline.runs / "mlflow.db") as store:  # as if a kill had come twice
        lost = "(step BETWEEN 10 AND 19 OR step > 30)"
        store.execute(f"DELETE FROM metrics WHERE run_uuid = ? AND {lost}", (run_id,))
    stage_run.run_here(load(), "decoder")
    client = tracking.client(pipeline.runs)

    def steps(name: str) -> list[int]:
        return sorted(metric.step for metric in client.get_metric_history(run_id, name))

    assert steps("loss") == list(range(1, 61))
    assert steps("validation_loss") == [30, 60]
    assert steps("parameters") == [60]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_the_run_of_work_under_other_settings_is_ended(load: Callable[..., Pipeline]) -> None:
    pipeline = load("stop_at=3")
    with pytest.raises(StageInterrupted):
        stage_run.run_here(pipeline, "decoder")
    earlier = read_json(pipeline.root / "decoder.partial" / "attempt.json")["mlflow_run_id"]
    store = tracking.client(pipeline.runs)
    store.update_run(earlier, status="RUNNING")  # as a kill leaves it
    stage_run.run_here(load("rate=0.2"), "decoder")
    assert store.get_run(earlier).info.status == "KILLED"
    store.update_run(earlier, status="RUNNING")
    attempt = pipeline.root / "decoder.partial" / "attempt.json"
    for text, status in (("{cut", "RUNNING"), (f'{{"mlflow_run_id": "{earlier}"}}', "KILLED")):
        attempt.parent.mkdir()
        attempt.write_text(text)
        discard_unfinished(pipeline.root / "decoder")  # run --force
        assert not attempt.parent.exists()
        assert store.get_run(earlier).info.status == status
    manifest = read_json(pipeline.root / "decoder" / "artifact.json")
    assert manifest["mlflow"]["run_id"] != earlier
    assert store.get_run(manifest["mlflow"]["run_id"]).info.status == "FINISHED"


def test_a_run_that_cannot_be_ended_is_let_be(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Tracker(runs, "digits", "decoder")
    ended.finish("FAILED")
    tracking.end_abandoned(runs, ended.run_id)
    assert tracking.client(runs).get_run(ended.run_id).info.status == "FAILED"
    tracking.end_abandoned(runs, None)
    tracking.end_abandoned(runs, "0" * 32)
    tracking.end_abandoned(tmp_path, "0" * 32)
    assert not list(tmp_path.iterdir())  # no store is made for it
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    began = time.perf_counter()
    tracking.end_abandoned(runs, ended.run_id)
    assert time.perf_counter() - began < 2 * tracking.GIVE_UP_WITHIN_S


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
