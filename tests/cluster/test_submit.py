"""`chainrule submit` and `status` on a real Slurm, with real stages at debug size."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = pytest.mark.cluster

PIPELINE = """
name: small
stages:
  text: {job: ingest, source: {kind: text, path: texts}, validation: 0.2, RESOURCES}
  words:
    job: train_tokenizer
    inputs: {data: text}
    tokenizer: {kind: sentencepiece, model: bpe, vocabulary_size: 300}
  check: {job: evaluate, inputs: {tokenizer: words, data: text}}
  other: {job: ingest, source: {kind: sklearn-digits}, validation: 0.15}
"""


class Lab:
    """A folder with a pipeline file, where chainrule talks to the test's Slurm."""

    def __init__(self, cluster: "Cluster", folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        for i in range(20):
            path = folder / "texts" / f"{i:02d}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"def number_{i}(x):\n    return x + {i}\n" * 20)
        self.write()

    def write(self, resources: str = "") -> None:
        text = PIPELINE.replace(", RESOURCES", f", resources: {resources}" if resources else "")
        (self.folder / "small.yaml").write_text(text)

    def chainrule(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "chainrule"), *arguments]
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.cluster.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def submit(self, *options: str) -> dict[str, str]:
        """The job of each stage that was queued now."""
        done = self.chainrule("submit", "small.yaml", *options)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stderr.splitlines() if line.startswith("queue ")]
        return {words[1]: words[words.index("job") + 1].rstrip(",") for words in lines}

    def status(self) -> dict[str, Any]:
        done = self.chainrule("status", "small.yaml", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["stages"]

    def states(self) -> dict[str, str]:
        return {name: row["state"] for name, row in self.status().items()}

    def queued(self) -> set[str]:
        """Ids of the jobs that Slurm will run or is running."""
        lines = self.cluster.slurm("squeue", "-h", "-o", "%A %T").splitlines()
        return {line.split()[0] for line in lines if "COMPLETING" not in line}

    def wait_for(self, jobs: dict[str, str]) -> dict[str, str]:
        """The state in which each job ended."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return {stage: self.cluster.wait_for(job, ended) for stage, job in jobs.items()}


@pytest.fixture
def lab(cluster: "Cluster", tmp_path: Path) -> Lab:
    return Lab(cluster, tmp_path)


def test_a_chain_runs_to_its_end_and_is_queued_once(lab: Lab) -> None:
    jobs = lab.submit()
    assert list(jobs) == ["text", "words", "check", "other"]
    assert lab.submit() == {}
    waiting = lab.status()["check"]
    assert waiting["state"] in ("waiting", "running")
    assert waiting["job_id"] == jobs["check"]
    assert set(lab.wait_for(jobs).values()) == {"COMPLETED"}
    assert set(lab.states().values()) == {"fresh"}
    assert lab.submit() == {}
    report = lab.folder / "runs" / "small" / "report.html"
    lab.cluster.wait_until(report.is_file, 60, "the report, written by a job of its own")
    manifest = json.loads((lab.folder / "runs/small/words/artifact.json").read_text())
    assert manifest["stage"] == "words"
    local = lab.chainrule("run", "small.yaml")
    assert "nothing to do" in local.stderr  # what jobs made is what a run here would have made


def test_what_hangs_on_a_failed_stage_is_cancelled_and_said(lab: Lab) -> None:
    hold = lab.cluster.slurm("sbatch", "--parsable", "-H", "-o/dev/null", "--wrap", "true").strip()
    lab.write("{time: '10'}")
    jobs = lab.submit("--profile", str(_after(lab, hold)))
    shutil.rmtree(lab.folder / "texts")
    lab.cluster.slurm("scontrol", "release", hold)
    ended = lab.wait_for(jobs)
    assert ended == {
        "text": "FAILED",
        "words": "CANCELLED",
        "check": "CANCELLED",
        "other": "COMPLETED",
    }
    (lab.folder / "texts").mkdir()  # status itself needs the sources to be there
    (lab.folder / "texts" / "a.txt").write_text("a")
    rows = lab.status()
    assert rows["other"]["state"] == "fresh"


def _after(lab: Lab, job: str) -> Path:
    """A profile whose ingests wait for `job`."""
    path = lab.folder / "held.yaml"
    path.write_text(f"jobs: {{ingest: {{options: ['--dependency=afterany:{job}']}}}}")
    return path


def test_cancel_in_the_middle_and_submit_again(lab: Lab) -> None:
    hold = lab.cluster.slurm("sbatch", "--parsable", "-H", "-o/dev/null", "--wrap", "true").strip()
    first = lab.submit("--profile", str(_after(lab, hold)))
    lab.cluster.slurm("scancel", first["words"])
    lab.cluster.slurm("scontrol", "release", hold)
    assert lab.wait_for(first)["check"] == "CANCELLED"
    rows = lab.status()
    assert rows["words"]["state"] == "cancelled"
    assert rows["check"]["state"] == "cancelled"
    assert "an input failed (words)" in rows["check"]["reason"]
    again = lab.submit()
    assert set(again) == {"words", "check"}
    assert set(lab.wait_for(again).values()) == {"COMPLETED"}
    assert set(lab.states().values()) == {"fresh"}


def test_settings_that_changed_while_a_stage_is_queued_are_refused(lab: Lab) -> None:
    hold = lab.cluster.slurm("sbatch", "--parsable", "-H", "-o/dev/null", "--wrap", "true").strip()
    jobs = lab.submit("--profile", str(_after(lab, hold)))
    done = lab.chainrule("submit", "small.yaml", "--set", "text.validation=0.3")
    assert done.returncode == 2
    assert f"as job {jobs['text']} under other settings" in done.stderr
    lab.cluster.slurm("scancel", hold, *jobs.values())


def test_a_refusal_is_slurms_own_with_the_line_and_leaves_nothing_queued(lab: Lab) -> None:
    (lab.folder / "p.yaml").write_text("jobs: {evaluate: {partition: nowhere}}")
    before = lab.queued()
    done = lab.chainrule("submit", "small.yaml", "--profile", "p.yaml")
    assert done.returncode == 2
    assert "invalid partition specified: nowhere" in done.stderr
    assert "--partition=nowhere" in done.stderr
    assert lab.queued() <= before


def test_a_runs_folder_that_the_node_does_not_see_is_said(lab: Lab) -> None:
    hold = lab.cluster.slurm("sbatch", "--parsable", "-H", "-o/dev/null", "--wrap", "true").strip()
    job = lab.submit("--profile", str(_after(lab, hold)), "--only", "other")["other"]
    slurm_folder = lab.folder / "runs" / "small" / ".slurm"
    (slurm_folder / "seen").unlink()
    lab.cluster.slurm("scontrol", "release", hold)
    assert lab.cluster.wait_for(job, ("FAILED", "COMPLETED")) == "FAILED"
    row = lab.status()["other"]
    assert row["state"] == "failed"
    said = "\n".join(row["log_tail"])
    assert f"does not see the runs folder {lab.folder / 'runs'}" in said


def test_a_log_that_the_node_cannot_write_is_said(lab: Lab) -> None:
    hold = lab.cluster.slurm("sbatch", "--parsable", "-H", "-o/dev/null", "--wrap", "true").strip()
    job = lab.submit("--profile", str(_after(lab, hold)), "--only", "other")["other"]
    slurm_folder = lab.folder / "runs" / "small" / ".slurm"
    slurm_folder.rename(slurm_folder.with_name("elsewhere"))
    lab.cluster.slurm("scontrol", "release", hold)
    assert lab.cluster.wait_for(job, ("FAILED", "COMPLETED")) == "FAILED"
    slurm_folder.with_name("elsewhere").rename(slurm_folder)
    assert "does not see the runs folder" in lab.status()["other"]["reason"]
