"""Pipeline files: parsing, overrides, faults by file and line, order, fingerprints, states."""

import errno
import io
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from chainrule.pipeline import (
    artifact,
    catalogue,
    graph,
    launch,
    pipeline_file,
    pipeline_run,
    ranks,
    stage_run,
)
from chainrule.pipeline.config import RequestError, Settings, runtime
from chainrule.pipeline.graph import State
from chainrule.pipeline.launch import Selection
from chainrule.pipeline.pipeline_file import load_pipeline
from chainrule.pipeline.stage import DONE, FAILED, Input, Stage, StageFailed, StageInterrupted


class Inner(Settings):
    rate: float = 0.1
    names: list[str] = []


class SourceConfig(Settings):
    text: str = "x"
    inner: Inner = Inner()
    workers: int = runtime(1)


class JoinConfig(Settings):
    times: int = 1
    fail: bool = False
    raises: bool = False


def write(config: SourceConfig, stage: Stage) -> None:
    (stage.folder / "out.txt").write_text(config.text)
    stage.log(1, loss=config.inner.rate)
    stage.summary["size"] = len(config.text)


def join(config: JoinConfig, stage: Stage) -> None:
    attempts = stage.folder / "attempts.txt"
    attempts.write_text((attempts.read_text() if attempts.exists() else "") + "x")
    if config.fail and len(attempts.read_text()) == 1:
        raise StageFailed("the first attempt fails")
    if config.raises:
        raise ZeroDivisionError("nobody thought of it\nat all")
    texts = [found.path("out.txt").read_text() for found in stage.inputs["parts"]]
    (stage.folder / "out.txt").write_text("".join(texts) * config.times)


JOBS = {
    "write": SimpleNamespace(Config=SourceConfig, INPUTS={}, main=write),
    "join": SimpleNamespace(
        Config=JoinConfig, INPUTS={"parts": Input(jobs=("write", "join"), many=True)}, main=join
    ),
}


@pytest.fixture(autouse=True)
def jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small honest jobs in place of the real ones."""

    def job_module(name: str) -> SimpleNamespace:
        if name not in JOBS:
            raise RequestError(f"unknown job '{name}'{pipeline_file.nearest(name, list(JOBS))}")
        return JOBS[name]

    class Silent:
        run_id = "none"

        def __init__(self, *args: object, **kwargs: object) -> None: ...

        def __getattr__(self, name: str):
            return lambda *args: None

    monkeypatch.setattr(catalogue, "job_module", job_module)
    monkeypatch.setattr(pipeline_file, "job_module", job_module)
    monkeypatch.setattr(pipeline_run, "Tracker", Silent)
    monkeypatch.setattr(stage_run, "Tracker", Silent)


TEXT = """\
name: small
stages:
  c:
    job: join
    inputs: {parts: [a, b]}
  a:
    job: write
    text: one
    inner:
      rate: 1e-3
  b: {job: write, text: two}
  d: {job: join, inputs: {parts: c}, times: 2}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return path


def load(config: Path, *overrides: str) -> graph.Pipeline:
    return load_pipeline(config, list(overrides), config.parent / "runs")


def states(config: Path, *overrides: str) -> dict[str, str]:
    pipeline = load(config, *overrides)
    return {name: str(pipeline.state(name)[0]) for name in pipeline.stages}


def test_stages_come_in_an_order_that_can_be_run(config: Path) -> None:
    assert list(load(config).stages) == ["a", "b", "c", "d"]


def test_exponents_without_a_dot_are_numbers(config: Path) -> None:
    assert load(config).stages["a"].config.inner.rate == 1e-3


@pytest.mark.parametrize(
    ("override", "expected"),
    [("a.inner.rate=0.5", 0.5), ("stages.a.inner.rate=2e-4", 2e-4)],
)
def test_override_reaches_the_setting(config: Path, override: str, expected: float) -> None:
    assert load(config, override).stages["a"].config.inner.rate == expected


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("a.inner.rate=fast", "valid number"),
        ("a.inner={rte: 1}", "unknown key 'inner.rte'"),
        ("a.txt=one", "unknown key 'txt'"),
        ("d.inputs.parts=cc", "no stage"),
        ("nme=small", "no stage 'nme'"),
    ],
)
def test_a_fault_of_an_override_names_it(config: Path, override: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        load(config, "b.text=three", override)
    assert str(caught.value).startswith(f"--set {override}: ")
    config.write_text(TEXT.replace("rate:", "rte:"))
    with pytest.raises(RequestError, match=r"small.yaml:10: .*unknown key 'inner.rte'"):
        load(config, "a.inner.names=[]")
    config.write_text(TEXT.replace("[a, b]", "{}"))
    with pytest.raises(RequestError, match="small.yaml:5 with --set c.inputs.parts.x=a: .*stage"):
        load(config, "a.text=three", "c.inputs.parts.x=a")


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        (("rate: 1e-3", "rte: 1e-3"), 10, "unknown key 'inner.rte'; did you mean 'rate'?|rate"),
        (("rate: 1e-3", "rate: fast"), 10, "valid number"),
        (("    text: one", "    txt: one"), 8, "unknown key 'txt'; did you mean 'text'?"),
        (("job: write, text: two", "job: wrote, text: two"), 11, "did you mean 'write'?"),
        (("parts: c", "parts: cc"), 12, "no stage"),
        (("parts: c", "part: c"), 12, "did you mean 'parts'?"),
        (("inputs: {parts: c}, ", ""), 12, "input 'parts' is missing"),
        (("name: small", "nme: small"), 1, "did you mean 'name'?"),
        (("parts: [a, b]", "parts: [a, d]"), None, "cycle: c → d → c"),
        (("text: two}", "text: two"), None, "not valid YAML"),
        (("    text: one", "    text: one\n    text: two"), 9, "given twice"),
    ],
)
def test_a_fault_names_file_line_key_and_remedy(
    config: Path, change: tuple[str, str], line: int | None, words: str
) -> None:
    assert change[0] in TEXT
    config.write_text(TEXT.replace(*change))
    with pytest.raises(RequestError) as caught:
        load(config)
    message = str(caught.value)
    assert message.startswith(f"{config}:{line}:" if line else f"{config}:")
    assert any(word in message for word in words.split("|"))
    assert len(message.splitlines()) <= 2


@pytest.mark.parametrize("override", ["a.inner.rate", "q.x=1", "a.nothing=1", "a.text.x=1"])
def test_a_wrong_override_is_refused(config: Path, override: str) -> None:
    with pytest.raises(RequestError):
        load(config, override)


def test_settings_that_change_nothing_leave_the_fingerprint_alone(config: Path) -> None:
    before = load(config)
    assert load(config, "a.workers=7").fingerprint("d") == before.fingerprint("d")
    assert load(config, "a.resources.processes=2").fingerprint("d") == before.fingerprint("d")
    assert load(config, "a.text=other").fingerprint("d") != before.fingerprint("d")


def test_run_does_what_is_not_fresh_and_nothing_else(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(states(config).values()) == {"new"}
    assert launch.run_pipeline(load(config), Selection()) == 0
    assert (load(config).folder("d") / "out.txt").read_text() == "onetwoonetwo"
    assert set(states(config).values()) == {"fresh"}
    capsys.readouterr()
    assert launch.run_pipeline(load(config), Selection()) == 0
    assert "nothing to do, 4 stages are fresh" in capsys.readouterr().err
    changed = states(config, "b.text=zwei")
    assert changed == {"a": "fresh", "b": "stale", "c": "stale", "d": "stale"}
    assert "text: two → zwei" in load(config, "b.text=zwei").state("b")[1]
    assert "input parts" in load(config, "b.text=zwei").state("d")[1]
    launch.run_pipeline(load(config, "b.text=zwei"), Selection())
    assert (load(config).folder("d") / "out.txt").read_text() == "onezweionezwei"
    assert not list(load(config).root.glob("*.replaced"))


def test_artifact_says_where_it_came_from(config: Path) -> None:
    launch.run_pipeline(load(config), Selection())
    found = artifact.Artifact.open(load(config).folder("c"))
    assert [entry["stage"] for entry in found.manifest["inputs"]["parts"]] == ["a", "b"]
    assert {entry["path"] for entry in found.manifest["files"]} == {
        "attempts.txt",
        "config.yaml",
        "metrics.jsonl",
        "out.txt",
    }
    stored = yaml.safe_load(found.path("config.yaml").read_text())
    assert stored["job"] == "join"
    found.verify()


def test_a_failed_stage_is_taken_up_where_it_stopped(config: Path) -> None:
    with pytest.raises(StageFailed):
        launch.run_pipeline(load(config, "c.fail=true"), Selection())
    found = states(config, "c.fail=true")
    assert found == {"a": "fresh", "b": "fresh", "c": "failed", "d": "new"}
    assert load(config, "c.fail=true").state("c")[1] == "the first attempt fails"
    assert not load(config).folder("c").exists()
    launch.run_pipeline(load(config, "c.fail=true"), Selection())
    assert (load(config).folder("c") / "attempts.txt").read_text() == "xx"
    assert states(config, "c.fail=true")["d"] == "fresh"


def test_a_failure_ends_what_hangs_on_it_and_with_keep_going_no_more(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(TEXT + "  e: {job: write, text: three}\n")
    with pytest.raises(StageFailed):
        launch.run_pipeline(load(config, "c.fail=true"), Selection())
    assert states(config, "c.fail=true")["e"] == "new"
    shutil.rmtree(load(config).root / "c.partial")
    pipeline = load(config, "c.fail=true")
    assert launch.run_pipeline(pipeline, Selection(), keep_going=True) == FAILED
    found = states(config, "c.fail=true")
    assert (found["c"], found["d"], found["e"]) == ("failed", "new", "fresh")
    said = capsys.readouterr().err
    assert "not done: c: the first attempt fails" in said
    assert "not done: d: needs c" in said
    assert launch.run_pipeline(load(config, "c.fail=true"), Selection(), keep_going=True) == DONE


def test_keep_going_goes_on_past_what_no_job_foresaw(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text(TEXT + "  e: {job: write, text: three}\n")
    pipeline = load(config, "c.raises=true")
    assert launch.run_pipeline(pipeline, Selection(), keep_going=True) == FAILED
    found = states(config, "c.raises=true")
    assert (found["c"], found["d"], found["e"]) == ("failed", "new", "fresh")
    fault = "ZeroDivisionError: nobody thought of it"
    assert load(config, "c.raises=true").state("c")[1] == fault
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert f"not done: c: {fault}\nnot done: d: needs c" in said
    with pytest.raises(ZeroDivisionError):
        launch.run_pipeline(load(config, "c.raises=true"), Selection())
    for end in (KeyboardInterrupt, StageInterrupted("saved"), RequestError("wrong")):

        def stop(*_: object, end: BaseException | type[BaseException] = end) -> None:
            raise end

        monkeypatch.setattr(launch, "run_here", stop)
        with pytest.raises(end if isinstance(end, type) else type(end)):
            launch.run_pipeline(load(config, "c.raises=true"), Selection(), keep_going=True)


def test_unfinished_work_under_other_settings_is_put_aside(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StageFailed):
        launch.run_pipeline(load(config, "c.fail=true"), Selection())
    assert "under other settings" in load(config).state("c")[1]
    assert load(config).state("d")[1] == "never run"
    launch.run_pipeline(load(config), Selection())
    assert (load(config).folder("c") / "attempts.txt").read_text() == "x"

    # Asked for again, it goes on where it was.
    assert load(config, "c.fail=true").state("c")[0] is State.UNFINISHED
    launch.run_pipeline(load(config, "c.fail=true"), Selection())
    assert (load(config).folder("c") / "attempts.txt").read_text() == "xx"
    assert not list(load(config).root.glob("*.aside-*"))
    said = capsys.readouterr().err
    assert "unfinished work under other settings is put aside: c.aside-" in said
    assert "goes on with what was put aside for these settings" in said


def test_one_unfinished_work_is_kept_aside(config: Path) -> None:
    asked = [("c.fail=true", f"c.times={times}") for times in (1, 2, 3)]
    for settings in asked:
        with pytest.raises(StageFailed):
            launch.run_pipeline(load(config, *settings), Selection())
    pipelines = [load(config, *settings) for settings in asked]
    aside = artifact.asides(pipelines[0].folder("c"))
    assert aside == [artifact.aside_folder(pipelines[1].folder("c"), pipelines[1].fingerprint("c"))]
    # The two change places.
    launch.run_pipeline(load(config, *asked[1]), Selection(until=("c",)))
    assert load(config, *asked[2]).state("c")[0] is State.UNFINISHED
    with pytest.raises(StageFailed):
        launch.run_pipeline(load(config, *asked[2]), Selection(until=("c",), force=("c",)))
    assert not artifact.asides(pipelines[0].folder("c"))  # begun anew is begun anew


def test_a_stage_stands_though_its_raw_data_are_gone(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    raw = tmp_path / "raw.txt"
    raw.write_text("raw")

    def source_files(settings: SourceConfig) -> list[Path]:
        if not raw.is_file():
            raise RequestError(f"{raw}: no such file")
        return [raw]

    monkeypatch.setattr(JOBS["write"], "source_files", source_files, raising=False)
    launch.run_pipeline(load(config), Selection())
    raw.unlink()
    assert set(states(config, "a.workers=3").values()) == {"fresh"}
    assert "raw data are gone" in load(config).state("a")[1]
    assert launch.run_pipeline(load(config), Selection(only=("d",), force=("d",))) == 0
    with pytest.raises(RequestError, match=r"stage 'a': .*raw.txt: no such file"):
        states(config, "a.text=other")


def test_what_changes_no_result_is_no_reason_to_be_stale(config: Path) -> None:
    launch.run_pipeline(load(config), Selection())
    _, why = load(config, "b.text=zwei", "b.workers=5").state("b")
    assert why == "text: two → zwei"


class InnerOfThen(Settings):
    rate: float = 0.1


class ConfigOfThen(Settings):
    """What SourceConfig was before Inner got a list."""

    inner: InnerOfThen = InnerOfThen()
    text: str = "x"
    workers: int = 1  # thought to change the result


def test_a_setting_that_the_program_got_since_makes_nothing_stale(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as then:
        then.setattr(JOBS["write"], "Config", ConfigOfThen)
        launch.run_pipeline(load(config), Selection())
        before = load(config).fingerprint("a")
    assert load(config).fingerprint("a") == before
    assert set(states(config).values()) == {"fresh"}
    assert set(states(config, "a.workers=4").values()) == {"fresh"}
    for asked, why in (
        ("a.inner.names=[z]", "inner.names: not given → ['z']"),
        ("a.inner.rate=0.3", "inner.rate: 0.001 → 0.3"),
    ):
        assert load(config, asked).state("a") == (State.STALE, why)
        assert states(config, asked)["d"] == "stale"

    # Done again, it still is what the stages after it were made of.
    assert launch.run_pipeline(load(config), Selection(only=("a",), force=("a",))) == 0
    assert set(states(config).values()) == {"fresh"}


def test_a_default_that_changed_is_a_change(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text(TEXT.replace("    text: one\n", ""))
    with monkeypatch.context() as then:
        then.setattr(JOBS["write"], "Config", ConfigOfThen)
        launch.run_pipeline(load(config), Selection())

    class ConfigOfNow(SourceConfig):
        text: str = "y"

    monkeypatch.setattr(JOBS["write"], "Config", ConfigOfNow)
    assert load(config).state("a") == (State.STALE, "text: x → y")


def test_a_setting_that_is_gone_was_asked_for(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ConfigBefore(SourceConfig):
        shape: int = 3

    with monkeypatch.context() as then:
        then.setattr(JOBS["write"], "Config", ConfigBefore)
        launch.run_pipeline(load(config), Selection())
    assert load(config).state("a") == (State.STALE, "shape: 3 → not given")


def test_what_an_earlier_program_began_goes_on(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class JoinThen(Settings):
        fail: bool = False

    config.write_text(TEXT.replace(", times: 2", ""))
    with monkeypatch.context() as then:
        then.setattr(JOBS["join"], "Config", JoinThen)
        with pytest.raises(StageFailed):
            launch.run_pipeline(load(config, "c.fail=true"), Selection())
    launch.run_pipeline(load(config, "c.fail=true"), Selection())
    assert (load(config).folder("c") / "attempts.txt").read_text() == "xx"  # not begun anew
    assert set(states(config, "c.fail=true").values()) == {"fresh"}


def test_ranks_started_without_a_common_word_are_refused(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(stage_run.ATTEMPT_VARIABLE, raising=False)
    for rank in range(2):
        with pytest.raises(RequestError, match=f"rank {rank} of 2: CHAINRULE_ATTEMPT is not set"):
            stage_run.run_here(load(config), "a", stage_run.Rank(rank, 2))
    assert not (load(config).root / "a.partial").exists()


def test_the_rank_that_was_killed_is_named_and_not_those_that_missed_it(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.2)
sys.exit(1)
"""
    monkeypatch.setattr(ranks, "stage_command", lambda *_: [sys.executable, "-c", script])
    asked = load(config, "a.resources.processes=3")
    with pytest.raises(StageFailed, match="rank 1 was killed by SIGKILL.*goes on from there"):
        ranks.run_ranks(asked, "a")


def test_selection(config: Path) -> None:
    pipeline = load(config)
    assert Selection(only=("b",)).stages(pipeline) == ["b"]
    assert Selection(start=("b",)).stages(pipeline) == ["b", "c", "d"]
    assert Selection(until=("c",)).stages(pipeline) == ["a", "b", "c"]
    assert Selection(start=("b",), until=("c",)).stages(pipeline) == ["b", "c"]
    with pytest.raises(RequestError, match="no stage 'e'"):
        Selection(force=("e",)).stages(pipeline)
    with pytest.raises(RequestError, match="needs 'c', which is new"):
        launch.decide(pipeline, Selection(only=("d",)))


def test_force_does_a_fresh_stage_again(config: Path) -> None:
    launch.run_pipeline(load(config), Selection())
    before = artifact.Artifact.open(load(config).folder("b")).manifest["end"]
    launch.run_pipeline(load(config), Selection(force=("b",)))
    assert artifact.Artifact.open(load(config).folder("b")).manifest["end"] > before
    assert set(states(config).values()) == {"fresh"}


def test_an_altered_artifact_is_named(config: Path) -> None:
    launch.run_pipeline(load(config), Selection())
    out = load(config).folder("a") / "out.txt"
    out.write_text("eno")
    with pytest.raises(artifact.ArtifactError, match="altered"):
        artifact.Artifact.open(out.parent).verify()
    out.write_text("longer")
    with pytest.raises(artifact.ArtifactError, match="6 bytes, artifact.json says 3"):
        artifact.Artifact.open(out.parent)


def test_a_publication_cut_between_its_renames_is_finished(config: Path) -> None:
    launch.run_pipeline(load(config), Selection())
    folder = load(config).folder("a")
    # killed after the old folder was moved away, before the new one took its place
    partial = artifact.partial_folder(folder)
    folder.rename(partial)
    artifact.recover(folder)
    assert states(config)["a"] == "fresh"
    assert not partial.exists()
    # killed after the new one took its place, before the old one was removed
    replaced = folder.with_name("a.replaced")
    replaced.mkdir()
    artifact.recover(folder)
    assert not replaced.exists()


def test_metrics_are_whole_lines_and_each_step_once(tmp_path: Path) -> None:
    def stage() -> Stage:
        return Stage("s", "p", "write", tmp_path, "f")

    first = stage()
    for step in range(1, 6):
        first.log(step, loss=1.0 / step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    again = stage()
    again.rewind_log(3)
    again.log(4, loss=0.25)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [yaml.safe_load(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_state_values_are_the_designs() -> None:
    assert {"fresh", "stale", "unfinished", "running", "failed"} <= {str(s) for s in State}


def test_a_lock_is_seen_by_whoever_may_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "small" / "a"
    assert not artifact.is_locked(folder)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from chainrule.pipeline import artifact\n"
            "with artifact.lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    input()",
            str(folder),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None

    def only_read(path: Path, mode: str = "r") -> object:
        if mode != "r":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return io.open(path)  # noqa: UP020

    monkeypatch.setattr(artifact, "open", only_read, raising=False)
    assert holder.stdout.readline() == b"held\n"
    assert artifact.is_locked(folder)
    holder.communicate(b"\n", timeout=60)
    assert artifact.lock_path(folder).is_file()
    assert not artifact.is_locked(folder)


def test_a_look_makes_no_folder_and_needs_none(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes of source files are kept by `run`; one who looks writes where he can."""
    raw = tmp_path / "raw.txt"
    raw.write_text("raw")
    monkeypatch.setitem(
        JOBS, "write", SimpleNamespace(**vars(JOBS["write"]), source_files=lambda config: [raw])
    )
    assert states(config)["a"] == "new"
    launch.decide(load(config), Selection())
    assert not (tmp_path / "runs").exists()
    assert launch.run_pipeline(load(config), Selection()) == DONE
    kept = tmp_path / "runs" / "small" / ".sources"
    assert sorted(path.name for path in kept.iterdir()) == ["a.json", "b.json"]
    shutil.rmtree(kept)
    kept.write_text("in the way: nothing can be kept there")
    assert states(config)["a"] == "fresh"
