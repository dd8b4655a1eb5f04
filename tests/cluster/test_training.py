"""A training on two nodes of a real Slurm, disturbed in every way: the losses stay the same."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chainrule.pipeline import tracking

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = pytest.mark.cluster

PIPELINE = """
name: small
stages:
  digits: {job: ingest, source: {kind: sklearn-digits}, validation: 0.15}
  tokenizer: {job: train_tokenizer, inputs: {data: digits}, tokenizer: {kind: pixels}}
  tokens: {job: pretokenize, inputs: {data: digits, tokenizer: tokenizer}}
  decoder:
    job: pretrain
    inputs: {tokens: tokens}
    model: {preset: imagegpt-debug, layers: 2, width: 32, heads: 2}
    steps: 150
    batch_size: 8
    checkpoint_every: 10
    ledger: true
    resources: {nodes: 2, processes: 1}
  model: {job: handoff, inputs: {decoder: decoder, tokenizer: tokenizer}}
  samples: {job: sample, inputs: {model: model}, number: 4}
"""
PROFILE = "{cpus: 4, hang_after_s: 25, time: '10'}"


class Training:
    """One copy of the runs folder with its tokens made, in which the decoder is trained."""

    def __init__(self, cluster: "Cluster", folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.root = folder / "runs" / "small"
        (folder / "small.yaml").write_text(PIPELINE)
        (folder / "profile.yaml").write_text(PROFILE)

    def chainrule(self, *arguments: str) -> str:
        command = [str(Path(sys.executable).parent / "chainrule"), *arguments]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.cluster.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout + done.stderr

    def submit(self, *options: str) -> str:
        """The decoder's job."""
        said = self.chainrule("submit", "small.yaml", "--profile", "profile.yaml", *options)
        found = re.search(r"queue decoder .* job (\d+)", said)
        assert found is not None, said
        return found[1]

    def log(self, job: str) -> str:
        path = self.root / ".slurm" / f"decoder-{job}.log"
        return path.read_text() if path.exists() else ""

    def wait_for_checkpoint(self, job: str, step: int = 20) -> None:
        latest = self.root / "decoder.partial" / "checkpoints" / "latest"
        self.cluster.wait_until(
            lambda: latest.exists() and int(latest.read_text().split("-")[1]) >= step,
            120,
            f"a checkpoint of step {step}",
            lambda: self.log(job),
        )

    def ends(self, job: str) -> None:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert self.cluster.wait_for(job, ended, 240) == "COMPLETED", self.log(job)

    def losses(self) -> list[tuple[int, float]]:
        lines = (self.root / "decoder" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [(record["step"], record["loss"]) for record in records]

    def reasons(self) -> list[str | None]:
        """Why each attempt at the decoder was begun."""
        return [json.loads(line)["reason"] for line in attempts_in(self)]

    def tags(self) -> dict[str, str]:
        """The tags of the decoder's MLflow run."""
        manifest = json.loads((self.root / "decoder" / "artifact.json").read_text())
        store = tracking.client(self.root.parent)
        tags: dict[str, str] = store.get_run(manifest["mlflow"]["run_id"]).data.tags
        return tags

    def rank(self, rank: int) -> int:
        """The process of a rank, from srun's environment."""
        for pid in self.cluster.processes("chainrule", "stage", str(self.root.parent)):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if f"RANK={rank}".encode() in environment and b"python" in command.split(b"\0")[0]:
                return pid
        raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def tokens(cluster: "Cluster", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose pipeline has run as far as the tokens."""
    training = Training(cluster, tmp_path_factory.mktemp("tokens"))
    training.chainrule("run", "small.yaml", "--until", "tokens")
    return training.folder


def _copy(cluster: "Cluster", tokens: Path, folder: Path) -> Training:
    shutil.copytree(tokens / "runs", folder / "runs")
    return Training(cluster, folder)


@pytest.fixture(scope="module")
def quiet(
    cluster: "Cluster", tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[int, float]]:
    """The losses of a run on two nodes that nothing disturbs, followed to the chain's end."""
    training = _copy(cluster, tokens, tmp_path_factory.mktemp("quiet"))
    training.ends(training.submit())
    status = training.chainrule("status", "small.yaml", "--watch", "--json")
    stages = json.loads(status[status.rindex("\n{") if "\n{" in status else 0 :])["stages"]
    assert {stage["state"] for stage in stages.values()} == {"fresh"}
    losses = training.losses()
    assert [step for step, _ in losses] == list(range(1, 151))
    _is_one_pipeline_run(cluster, training)
    return losses


def _is_one_pipeline_run(cluster: "Cluster", training: Training) -> None:
    """The runs of the queued stages hang under one run, which the last job ends."""
    opened = json.loads((training.root / "pipeline.json").read_text())
    assert not opened["finished"]
    store = tracking.client(training.root.parent)
    cluster.wait_until(
        lambda: store.get_run(opened["mlflow_run_id"]).info.status == "FINISHED",
        60,
        "the end of the pipeline's run",
        lambda: "\n".join(p.read_text() for p in (training.root / ".slurm").glob("report-*.log")),
    )
    for stage in ("decoder", "model", "samples"):
        manifest = json.loads((training.root / stage / "artifact.json").read_text())
        tags = store.get_run(manifest["mlflow"]["run_id"]).data.tags
        assert tags["mlflow.parentRunId"] == opened["mlflow_run_id"], stage
        assert "slurm.restart_reason" not in tags
    pages = [file.path for file in store.list_artifacts(opened["mlflow_run_id"])]
    assert pages == ["report.html"]


@pytest.fixture
def training(
    cluster: "Cluster", tokens: Path, quiet: list[tuple[int, float]], tmp_path: Path
) -> Iterator[Training]:
    """A disturbed run: afterwards nothing was skipped or repeated, and the losses are equal."""
    training = _copy(cluster, tokens, tmp_path)
    yield training
    assert training.losses() == quiet
    said = training.chainrule("verify", str(training.root / "decoder"))
    assert re.search(r"skipped 0.*repeated 0", said), said


def test_two_nodes_are_two_ranks(training: Training) -> None:
    job = training.submit("--only", "decoder")
    training.ends(job)
    assert "on 127.0.0.[1-2]" in training.log(job)


def test_two_nodes_with_deepspeed(
    cluster: "Cluster", tokens: Path, quiet: list[tuple[int, float]], tmp_path: Path
) -> None:
    """ZeRO-1 over two nodes, preempted by hand in the middle: the losses of DDP."""
    training = _copy(cluster, tokens, tmp_path)
    job = training.submit("--only", "decoder", "--set", "decoder.engine={strategy: zero1}")
    training.wait_for_checkpoint(job)
    training.cluster.slurm("scontrol", "requeue", job)
    training.ends(job)
    assert training.cluster.job(job)["Restarts"] == "1"
    for (step, loss), (at, wanted) in zip(training.losses(), quiet, strict=True):
        assert step == at
        assert loss == pytest.approx(wanted, rel=1e-4)
    training.chainrule("verify", str(training.root / "decoder"))


def test_a_rank_is_killed(training: Training) -> None:
    job = training.submit("--only", "decoder")
    training.wait_for_checkpoint(job)
    os.kill(training.rank(1), signal.SIGKILL)
    training.ends(job)
    assert training.cluster.job(job)["Restarts"] == "1"
    assert training.reasons() == [None, "a rank was killed (signal 9)"]


def test_it_is_preempted(training: Training) -> None:
    job = training.submit("--only", "decoder")
    training.wait_for_checkpoint(job)
    urgent = training.cluster.slurm(
        *("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null"),
        *("--wrap", "srun true"),
    ).strip()
    training.cluster.wait_for(urgent, ("COMPLETED",), 60)
    training.ends(job)
    assert "is saved" in training.log(job)
    assert training.reasons() == [None, "preemption"]
    tags = training.tags()
    assert tags["slurm.job_id"] == job
    assert tags["slurm.restart_count"] == "1"
    assert tags["slurm.restart_reason"] == "preemption"
    assert re.fullmatch(rf"{job}\.1 on 127\S+: preemption", tags["slurm.restart_reasons"])


def test_it_is_requeued_by_hand(training: Training) -> None:
    job = training.submit("--only", "decoder")
    training.wait_for_checkpoint(job)
    training.cluster.slurm("scontrol", "requeue", job)
    training.cluster.wait_for(job, ("PENDING",), 30)
    row = json.loads(training.chainrule("status", "small.yaml", "--json"))["stages"]["decoder"]
    assert row["restart_reason"] == "requeue by hand"
    assert row["reason"] in (
        "to go on after: requeue by hand",
        f"job {job} on 127.0.0.[1-2], restarted after: requeue by hand",
    )
    training.ends(job)
    assert training.reasons() == [None, "requeue by hand"]


@pytest.mark.parametrize("node", ["127.0.0.2", "127.0.0.1"])  # the second runs the batch script
def test_a_node_dies_with_all_that_runs_on_it(training: Training, node: str) -> None:
    job = training.submit("--only", "decoder")
    training.wait_for_checkpoint(job)
    assert training.cluster.job(job)["BatchHost"] == "127.0.0.1"
    training.cluster.kill_node(node)
    training.cluster.wait_for(job, ("PENDING",), 60)
    training.cluster.start_node(node)
    training.ends(job)
    assert training.reasons() == [None, "node failure"]


def test_only_slurmd_dies_and_the_old_step_goes_on(
    cluster: "Cluster", tokens: Path, quiet: list[tuple[int, float]], tmp_path: Path
) -> None:
    training = _copy(cluster, tokens, tmp_path)
    job = training.submit("--only", "decoder", "--set", "decoder.resources.nodes=1")
    training.wait_for_checkpoint(job)
    old = training.rank(0)
    node = training.cluster.job(job)["NodeList"]
    os.kill(old, signal.SIGSTOP)  # held where it is until the job has begun elsewhere
    training.cluster.kill_node(node, only_slurmd=True)
    training.cluster.slurm(
        "scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost", check=False
    )
    training.cluster.wait_until(
        lambda: len(attempts_in(training)) == 2, 90, "a second attempt", lambda: training.log(job)
    )
    os.kill(old, signal.SIGCONT)
    try:
        training.ends(job)
    finally:  # else the tests that follow have one node
        training.cluster.start_node(node)
    log = training.root / ".locks" / "decoder.fence.log"
    assert f"attempt {job}.0 was replaced by {job}.1" in log.read_text()
    assert training.reasons() == [None, "node failure"]
    steps = [step for step, _ in training.losses()]
    assert steps == [step for step, _ in quiet]
    for (_, loss), (_, wanted) in zip(training.losses(), quiet, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-4)  # one rank instead of two
    training.chainrule("verify", str(training.root / "decoder"))


def attempts_in(training: Training) -> list[str]:
    path = training.root / ".slurm" / "decoder.attempts.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_it_hangs(training: Training) -> None:
    job = training.submit("--only", "decoder")
    training.wait_for_checkpoint(job)
    os.kill(training.rank(1), signal.SIGSTOP)
    training.ends(job)
    log = training.log(job)
    assert re.search(r"rank 0: no step for \d+ s; the stacks of its threads", log)
    assert "most recent call first" in log
    assert training.reasons() == [None, "hang"]


def test_it_is_cancelled_and_submitted_again(training: Training) -> None:
    job = training.submit("--only", "decoder")
    training.wait_for_checkpoint(job)
    training.cluster.slurm("scancel", job)
    assert training.cluster.wait_for(job, ("CANCELLED", "COMPLETED")) == "CANCELLED"
    again = training.submit("--only", "decoder")
    assert again != job
    training.ends(again)
    assert training.reasons() == [None, "submitted again"]
