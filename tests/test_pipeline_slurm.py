"""What submits, fences and watches Slurm jobs, as far as it goes without a Slurm."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from chainrule.pipeline import pipeline_run, slurm, slurm_job
from chainrule.pipeline.artifact import StageLocked
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.fence import REPLACED, hold
from chainrule.pipeline.pipeline_file import load_pipeline
from chainrule.pipeline.pipeline_run import open_run
from chainrule.pipeline.slurm_log import exit_code, reason_of_restart
from chainrule.pipeline.slurm_status import log_tail
from chainrule.pipeline.stage import StageFailed
from chainrule.pipeline.status import is_settled, table
from chainrule.pipeline.submit import shell, submit

PIPELINE = """
name: small
stages:
  digits: {job: ingest, source: {kind: sklearn-digits}, validation: 0.15}
  tokenizer: {job: train_tokenizer, inputs: {data: digits}, tokenizer: {kind: pixels}}
  tokens: {job: pretokenize, inputs: {data: digits, tokenizer: tokenizer}}
"""


@pytest.fixture
def pipeline_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(PIPELINE)
    return path


def _options(line: list[str]) -> dict[str, str]:
    pairs = [word.removeprefix("--").partition("=") for word in line if word.startswith("--")]
    return {name: value for name, _, value in pairs}


def test_resources_stand_over_the_job_and_the_job_over_the_profile(pipeline_file: Path) -> None:
    profile = slurm.Profile.model_validate(
        {
            "partition": "batch",
            "time": "01:00:00",
            "gpu_type": "h100",
            "scratch": "/scratch",
            "jobs": {"pretokenize": {"time": "02:00:00", "cpus": 3}},
        }
    )
    overrides = [
        "tokens.resources.time='30'",
        "tokens.resources.gpus=2",
        "tokens.resources.nodes=4",
    ]
    decisions = submit(load_pipeline(pipeline_file, overrides), profile, dry_run=True)
    lines = {d.stage: _options(d.line or []) for d in decisions}
    assert lines["tokenizer"]["time"] == "01:00:00"
    assert "gres" not in lines["tokenizer"]
    tokens = lines["tokens"]
    assert (tokens["partition"], tokens["time"], tokens["cpus-per-task"]) == ("batch", "30", "3")
    assert (tokens["nodes"], tokens["ntasks-per-node"], tokens["gres"]) == ("4", "2", "gpu:h100:2")
    assert "CHAINRULE_SCRATCH=/scratch" in tokens["export"]
    for option in ("requeue", "open-mode", "kill-on-invalid-dep", "signal", "output", "chdir"):
        assert option in tokens


def test_stages_wait_for_the_jobs_of_their_inputs(pipeline_file: Path) -> None:
    decisions = submit(load_pipeline(pipeline_file), slurm.Profile(), dry_run=True)
    depends = [_options(d.line or []).get("dependency") for d in decisions]
    assert depends == [None, "afterok:${digits}", "afterok:${digits}:${tokenizer}"]
    assert not (
        pipeline_file.parent / "runs" / "small" / ".slurm"
    ).exists()  # a dry run leaves nothing


def test_dry_lines_are_shell(pipeline_file: Path) -> None:
    """Run as they are, with a stub for sbatch, they queue the chain with the right ids."""
    lines = [
        line
        for decision in submit(load_pipeline(pipeline_file), slurm.Profile(), dry_run=True)
        for line in shell(decision)
    ]
    stub = 'n=0\nsbatch() { echo "$@" >> seen; wc -l < seen | tr -d " "; }\n'
    subprocess.run(["bash", "-euc", stub + "\n".join(lines)], check=True)
    seen = [shlex.split(line) for line in Path("seen").read_text().splitlines()]
    assert [_options(words).get("dependency") for words in seen] == [
        None,
        "afterok:1",
        "afterok:1:2",
    ]


def test_an_array_is_cut_and_its_limit_is_of_all(pipeline_file: Path) -> None:
    overrides = ["tokens.resources.array=25", "tokens.resources.array_limit=4"]
    pipeline = load_pipeline(pipeline_file, overrides)
    tokens = submit(pipeline, slurm.Profile(array_size=10), dry_run=True)[-1]
    options = [_options(line) for line in tokens.arrays]
    assert [o["array"] for o in options] == ["0-9%4", "0-9%4", "0-4%4"]
    assert [o["dependency"].count("tokens_array") for o in options] == [0, 1, 1]
    offsets = [o["export"].split("CHAINRULE_PART_OFFSET=")[1] for o in options]
    assert offsets == ["0", "10", "20"]
    last = _options(tokens.line or [])
    assert last["dependency"] == "afterok:${tokens_array_0}:${tokens_array_1}:${tokens_array_2}"
    with pytest.raises(RequestError, match="cannot be cut into an array"):
        submit(
            load_pipeline(pipeline_file, ["digits.resources.array=2"]),
            slurm.Profile(),
            dry_run=True,
        )


def test_a_stage_whose_input_is_neither_fresh_nor_queued_is_refused(pipeline_file: Path) -> None:
    from chainrule.pipeline.launch import Selection

    pipeline = load_pipeline(pipeline_file)
    with pytest.raises(RequestError, match="needs 'digits', which is new"):
        submit(pipeline, slurm.Profile(), Selection(only=("tokens",)), dry_run=True)


def test_without_slurm_it_says_so(pipeline_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(pipeline_file.parent))
    with pytest.raises(RequestError, match="no Slurm on the path"):
        submit(load_pipeline(pipeline_file), slurm.Profile())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "unknown key 'partitoin'; did you mean 'partition'"),
        ("jobs: {pretrian: {cpus: 1}}", "unknown job 'pretrian'; did you mean 'pretrain'"),
        ("jobs: {pretrain: {tme: '1'}}", "unknown key 'jobs.pretrain.tme'; did you mean 'time'"),
        ("cpus: many", "'cpus'"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_profile_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=message) as caught:
        slurm.load_profile(str(path), ["pretrain", "sample"])
    assert str(path) in str(caught.value)


def test_the_shipped_profiles_are_valid() -> None:
    from chainrule.pipeline.catalogue import stage_jobs

    profiles = sorted((slurm.scripts_folder() / "profiles").glob("*.yaml"))
    assert profiles
    for path in profiles:
        assert slurm.load_profile(path.stem, stage_jobs()).jobs
    with pytest.raises(RequestError, match="no profile 'exmaple'.*did you mean 'example'"):
        slurm.load_profile("exmaple", stage_jobs())


def test_every_script_is_of_a_job_and_bash_accepts_it() -> None:
    from chainrule.pipeline.catalogue import stage_jobs

    folder = slurm.scripts_folder()
    assert {path.stem for path in folder.glob("*.sbatch")} <= {*stage_jobs(), "stage", "report"}
    for path in (*folder.glob("*.sbatch"), *folder.glob("*.sh")):
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_slurms_own_message_comes_with_the_line() -> None:
    with pytest.raises(RequestError, match="no such thing\n  from: sh -c"):
        slurm.call(["sh", "-c", "echo no such thing >&2; exit 1"])


# --- one writer a stage -------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from chainrule.pipeline.fence import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def _attempt(job: str, restart: int) -> dict[str, str]:
    own = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": str(restart)}
    return {**os.environ, **own}


def _holder(folder: Path, job: str, restart: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env=_attempt(job, restart),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_older_attempt_of_a_job_ends_when_a_newer_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stage"
    older = _holder(folder, "7", 0)
    assert older.stdout is not None
    assert older.stdout.readline() == "held\n"
    for name, value in _attempt("7", 1).items():
        monkeypatch.setenv(name, value)
    with hold(folder):
        assert older.wait(timeout=10) == REPLACED
        assert "attempt 7.0 was replaced by 7.1" in older.communicate()[1]
    assert not (tmp_path / ".locks" / "stage.fence").exists()  # left in order


def test_another_job_is_refused_and_replaces_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stage"
    holder = _holder(folder, "7", 0)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for name, value in _attempt("8", 1).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(StageLocked, match="is running"), hold(folder):
            pass
        assert (tmp_path / ".locks" / "stage.fence").read_text() == "7.0\n"
    finally:
        holder.kill()
        holder.communicate()


# --- hangs and restarts -------------------------------------------------------------------


def test_a_hang_writes_stacks_and_asks_for_a_requeue() -> None:
    program = """
import time
from chainrule.pipeline import heartbeat
heartbeat.STACKS_BEFORE_EXIT_S = 0.1
heartbeat.watch(0.5, 75)
def stuck_in_a_collective():
    time.sleep(60)
for _ in range(5):
    heartbeat.beat()
    time.sleep(0.2)
stuck_in_a_collective()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 75
    assert "no step for" in done.stderr
    assert "stuck_in_a_collective" in done.stderr


def test_restarts_without_progress_are_bounded(
    pipeline_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(pipeline_file)
    monkeypatch.setenv(slurm_job.RESTARTS_VARIABLE, "2")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_STEP_ID", "0")

    def restart(count: int) -> None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))
        slurm_job.note_attempt(pipeline, "tokens")

    restart(0)
    restart(1)
    shard = pipeline.root / "tokens.partial" / "shard-000000.tar"
    shard.parent.mkdir(parents=True)
    shard.touch()
    restart(2)  # it got further: the count begins anew
    restart(3)
    with pytest.raises(StageFailed, match="2 restarts brought it no further than 1 files"):
        restart(4)
    assert [a["restart"] for a in slurm_job.attempts_of(pipeline, "tokens")] == [0, 1, 2, 3, 4]


def test_a_node_that_does_not_see_the_runs_folder_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        slurm_job.SEEN_VARIABLE, str(tmp_path / "runs" / "small" / ".slurm" / "seen")
    )
    with pytest.raises(RequestError, match="does not see the runs folder .*/runs"):
        slurm_job.require_seen()


# --- status -------------------------------------------------------------------------------


def test_the_table_shows_jobs_and_the_end_of_a_failed_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("=== job 3, attempt 0\none\ntwo\n\nthree\nerror: no memory\n=== job 3: exit 1\n")
    failed = {
        **{"stage": "tokens", "job": "pretokenize", "state": "failed", "reason": "no memory"},
        **{"job_id": "3", "nodes": "n1", "restarts": 2, "seconds": 1.5},
        "log_tail": log_tail(log),
    }
    waiting = {"stage": "decoder", "job": "pretrain", "state": "waiting", "reason": "for tokens"}
    lines = table([failed, waiting]).splitlines()
    assert lines[0].split() == [
        "stage",
        "job",
        "state",
        "slurm",
        "nodes",
        "time",
        "restarts",
        "why",
    ]
    assert lines[2:6] == ["    | one", "    | two", "    | three", "    | error: no memory"][-4:]
    assert not is_settled([failed, waiting])
    assert is_settled([failed])


# --- why a job was restarted --------------------------------------------------------------

BEGUN = "=== job 7, attempt {} on n[1-2] at 2026-11-24T13:22:23Z: chainrule stage x.yaml decoder\n"
BY_SLURM = "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-24T13:22:26 DUE TO {} ***\n"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (BY_SLURM.format("JOB REQUEUE"), "requeue by hand"),
        (BY_SLURM.format("NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS"), "node failure"),
        (BY_SLURM.format("PREEMPTION"), "preemption"),
        ("a loss, and then nothing more\n", "node failure"),
        ("=== job 7: exit 75, requeued at T: time limit\n", "time limit"),
        ("=== job 7: exit 75, requeued at T: preemption\n", "preemption"),
        ("=== job 7: exit 137, requeued at T: exit\n", "a rank was killed (signal 9)"),
        ("=== job 7: exit 75, requeued at T: exit\n", "the ranks were told to stop"),
        (
            "rank 1: no step for 25 s; the stacks of its threads:\n"
            "=== job 7: exit 75, requeued at T: exit\n" + BY_SLURM.format("JOB REQUEUE"),
            "hang",
        ),
        (
            "srun: error: n1: task 0: Out Of Memory\n=== job 7: exit 137, requeued at T: exit\n",
            "out of memory",
        ),
    ],
)
def test_the_log_of_a_job_tells_why_it_was_restarted(
    tmp_path: Path, said: str, reason: str
) -> None:
    log = tmp_path / "decoder-7.log"
    log.write_text(BEGUN.format(0) + said + BEGUN.format(1) + "and so on\n")
    assert reason_of_restart(log, 0) == reason
    assert reason_of_restart(log, 1) == "node failure"  # of an attempt that is no more
    assert reason_of_restart(log, 2) is None
    assert reason_of_restart(tmp_path / "none", 0) is None
    assert exit_code(log) is None
    log.write_text(log.read_text() + "=== job 7: exit 1 at T\n")
    assert exit_code(log) == 1


def test_a_later_attempt_notes_why_and_tells_mlflow(
    pipeline_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(pipeline_file)
    log = pipeline_file.parent / "log"
    log.write_text(BEGUN.format(0) + "=== job 7: exit 75, requeued at T: time limit\n")
    for name, value in _attempt("7", 0).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("CHAINRULE_LOG", str(log))
    slurm_job.note_attempt(pipeline, "tokens")
    assert "slurm.restart_reason" not in slurm_job.tags(pipeline, "tokens")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_PROCID", "1")
    slurm_job.note_attempt(pipeline, "tokens")  # another rank of the same attempt: no line
    monkeypatch.setenv("SLURM_PROCID", "0")
    slurm_job.note_attempt(pipeline, "tokens")
    assert [a["reason"] for a in slurm_job.attempts_of(pipeline, "tokens")] == [None, "time limit"]
    assert slurm_job.tags(pipeline, "tokens") == {
        "slurm.job_id": "7",
        "slurm.job_nodelist": "n[1-2]",
        "slurm.restart_count": "1",
        "slurm.restart_reason": "time limit",
        "slurm.restart_reasons": "7.1 on n[1-2]: time limit",
    }


def test_a_job_after_a_failed_one_says_what_failed(
    pipeline_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(pipeline_file)
    for job in ("7", "8"):
        for name, value in _attempt(job, 0).items():
            monkeypatch.setenv(name, value)
        slurm_job.note_attempt(pipeline, "digits")
        partial = pipeline.root / "digits.partial"
        partial.mkdir(parents=True, exist_ok=True)
        attempt = {"fingerprint": pipeline.fingerprint("digits"), "failed": {"error": "no disk"}}
        (partial / "attempt.json").write_text(json.dumps(attempt))
    reasons = [a["reason"] for a in slurm_job.attempts_of(pipeline, "digits")]
    assert reasons == [None, "submitted again after: no disk"]


# --- what Slurm says ----------------------------------------------------------------------

SACCT = """\
2|REQUEUED|None|127.0.0.1|00:00:00|0:0
3|CANCELLED by 0|JobHeldUser|None assigned|00:00:00|0:0
4|CANCELLED|None|None assigned|00:00:00|0:0
1_0|COMPLETED|None|127.0.0.1|00:00:00|0:0
1_1|FAILED|None|127.0.0.1|00:00:01|1:0
1_2|COMPLETED|None|127.0.0.1|00:00:02|0:0
5_0|RUNNING|None|127.0.0.1|00:00:26|0:0
5_[1-3%1]|PENDING|None|None assigned|00:00:00|0:0
2|COMPLETED|BeginTime|127.0.0.1|00:00:04|0:0
"""
"""What sacct of Slurm 22.05.8 printed for such jobs (tests/cluster/test_accounting.py)."""


def _commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Programs of these names and shell texts, before all others on the path."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_jobs_that_only_the_accounting_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "said").write_text(SACCT)
    unknown = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    sacct = f'echo "$@" > {tmp_path}/asked; cat {tmp_path}/said'
    _commands(tmp_path / "bin", monkeypatch, squeue=unknown, sacct=sacct)
    found = slurm.jobs_of(["1", "2", "3", "4", "5"])
    asked = (tmp_path / "asked").read_text().split()
    assert asked[-1] == "JobID,State,Reason,NodeList,Elapsed,ExitCode"  # 22.05 has these
    assert "-D" in asked
    assert (found["2"].state, found["2"].restarts, found["2"].alive) == ("COMPLETED", 1, False)
    assert (found["3"].state, found["3"].reason) == ("CANCELLED", "JobHeldUser")
    assert (found["4"].state, found["4"].reason) == ("CANCELLED", "Dependency")
    assert (found["1"].state, found["1"].failed_task) == ("FAILED", "1_1")
    assert found["1"].exit_code == "1:0"
    assert dict(found["1"].tasks) == {"COMPLETED": 2, "FAILED": 1}
    assert found["5"].alive
    assert found["5"].nodes == "127.0.0.1"

    off = "echo 'Slurm accounting storage is disabled' >&2; exit 1"
    _commands(tmp_path / "bin", monkeypatch, squeue=unknown, sacct=off)
    assert slurm.jobs_of(["1", "2"]) == {}


# --- submitting, with stubs for Slurm -----------------------------------------------------


def test_names_with_hyphens_make_shell_variables(pipeline_file: Path) -> None:
    text = PIPELINE.replace("digits:", "1-digits:").replace("data: digits", "data: 1-digits")
    pipeline_file.write_text(text)
    decisions = submit(load_pipeline(pipeline_file), slurm.Profile(), dry_run=True)
    lines = [line for decision in decisions for line in shell(decision)]
    stub = 'sbatch() { echo "$@" >> seen; wc -l < seen | tr -d " "; }\n'
    subprocess.run(["bash", "-euc", stub + "\n".join(lines)], check=True)
    seen = [shlex.split(line) for line in Path("seen").read_text().splitlines()]
    assert [_options(words).get("dependency") for words in seen][1:] == ["afterok:1", "afterok:1:2"]


@pytest.mark.slow
def test_a_forced_stage_begins_anew_under_one_open_run(
    pipeline_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chainrule.pipeline.launch import Selection

    # However slow the store is made here: another test is of one that does not answer.
    monkeypatch.setattr(pipeline_run, "OPENED_WITHIN_S", 120.0)
    folder = pipeline_file.parent
    sbatch = f'echo "$@" >> {folder}/queued; wc -l < {folder}/queued'
    _commands(folder / "bin", monkeypatch, sbatch=sbatch, squeue="exit 0", sacct="exit 1")
    pipeline = load_pipeline(pipeline_file)
    partial = pipeline.root / "digits.partial"
    partial.mkdir(parents=True)
    (partial / "old").touch()
    selection = Selection(only=("digits",), force=("digits",))
    submit(pipeline, slurm.Profile(), selection, dry_run=True)
    assert (partial / "old").exists()
    [decision] = submit(pipeline, slurm.Profile(), selection)
    assert decision.reason == "asked for by --force"
    assert not partial.exists()
    run = open_run(pipeline)
    assert run is not None
    lines = (folder / "queued").read_text().splitlines()
    assert len(lines) == 2  # the stage, and the report that ends the run
    assert "report.sbatch" in lines[1]
    submit(pipeline, slurm.Profile(), selection)
    assert open_run(pipeline) == run  # the same, until it is ended


@pytest.mark.slow
def test_a_forced_stage_that_is_requeued_is_not_taken_for_done(pipeline_file: Path) -> None:
    from chainrule.pipeline.stage_run import run_here

    pipeline = load_pipeline(pipeline_file)
    run_here(pipeline, "digits")
    assert slurm_job.is_published(pipeline, "digits")
    partial = pipeline.root / "digits.partial"
    partial.mkdir()
    attempt = {"fingerprint": pipeline.fingerprint("digits")}
    (partial / "attempt.json").write_text(json.dumps(attempt))
    assert not slurm_job.is_published(pipeline, "digits")
