"""Arrays on a real Slurm: cut at the site's limit, gathered by a last job."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = pytest.mark.cluster

DATA = """
name: small
stages:
  digits: {job: ingest, source: {kind: sklearn-digits}, validation: 0.15, samples_per_shard: 200}
  tokenizer: {job: train_tokenizer, inputs: {data: digits}, tokenizer: {kind: pixels}}
"""
TOKENS = "  tokens: {job: pretokenize, inputs: {data: digits, tokenizer: tokenizer}, RESOURCES}\n"
SAMPLES = """
  tokens: {job: pretokenize, inputs: {data: digits, tokenizer: tokenizer}}
  decoder:
    job: pretrain
    inputs: {tokens: tokens}
    model: {preset: imagegpt-debug, layers: 1, width: 16, heads: 2}
    steps: 3
    batch_size: 8
  model: {job: handoff, inputs: {decoder: decoder, tokenizer: tokenizer}}
  samples:
    {job: sample, inputs: {model: model}, number: 45, samples_per_shard: 3, batch_size: 2,
     RESOURCES}
"""


class Arrays:
    """A pipeline whose last stage is made here by one process, and there by an array."""

    def __init__(self, cluster: "Cluster", folder: Path, stages: str, stage: str) -> None:
        self.cluster, self.folder, self.stages, self.stage = cluster, folder, stages, stage

    def write(self, resources: str) -> None:
        text = DATA + self.stages.replace("RESOURCES", f"resources: {resources}")
        (self.folder / "small.yaml").write_text(text)

    def call(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(Path(sys.executable).parent / "chainrule"), *arguments],
            cwd=self.folder,
            env=self.cluster.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def alone(self) -> dict[str, Any]:
        """The manifest that one process leaves; the inputs are copied for the array."""
        self.write("{}")
        self.call("run", "small.yaml", "--runs", "alone")
        self.call("run", "small.yaml", "--until", self.before())
        return self.manifest("alone")

    def before(self) -> str:
        return "tokenizer" if self.stage == "tokens" else "model"

    def manifest(self, runs: str) -> dict[str, Any]:
        path = self.folder / runs / "small" / self.stage / "artifact.json"
        manifest: dict[str, Any] = json.loads(path.read_text())
        return manifest

    def status(self) -> dict[str, Any]:
        rows: dict[str, Any] = json.loads(self.call("status", "small.yaml", "--json"))["stages"]
        return rows[self.stage]

    def record(self) -> dict[str, Any]:
        path = self.folder / "runs/small/.slurm" / f"{self.stage}.json"
        record: dict[str, Any] = json.loads(path.read_text())
        return record

    def submit(self, fails: bool = False) -> str:
        """The number of the job, which a second submit leaves alone. One that `fails` may have
        done so before that second submit, which is right to queue it again."""
        said = self.call("submit", "small.yaml")
        job = re.search(rf"queue {self.stage} .* job (\d+)", said)
        assert job is not None, said
        assert fails or "queue" not in self.call("submit", "small.yaml")
        return job[1]

    def ends(self, job: str, wanted: str = "COMPLETED") -> None:
        ended = self.cluster.wait_for(job, ("COMPLETED", "FAILED", "CANCELLED"), 300)
        folder = self.folder / "runs/small/.slurm"
        assert ended == wanted, "\n".join(p.read_text() for p in folder.glob("*.log"))


def content(manifest: dict[str, Any], *begins: str) -> dict[str, str]:
    files = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    return {path: sha for path, sha in files.items() if path.startswith(begins)}


def test_an_array_past_the_sites_limit_leaves_what_one_job_leaves(
    cluster: "Cluster", tmp_path: Path
) -> None:
    arrays = Arrays(cluster, tmp_path, TOKENS, "tokens")
    alone = arrays.alone()
    arrays.write("{array: 7, array_limit: 2}")  # MaxArraySize of this Slurm is 5
    lines = arrays.call("submit", "small.yaml", "--dry-run")
    assert re.findall(r"--array=(\S+)", lines) == ["0-4%2", "0-1%2"]
    job = arrays.submit()
    arrays.ends(job)
    assert len(arrays.record()["arrays"]) == 2
    tasks = sorted(path.name for path in (tmp_path / "runs/small/.slurm").glob("tokens-*_*.log"))
    assert len(tasks) == 7
    parted = arrays.manifest("runs")
    assert parted["fingerprint"] == alone["fingerprint"]
    wanted = content(alone, "shard", "index")
    assert content(parted, "shard", "index") == wanted
    assert len(wanted) > 7


def test_samples_are_drawn_by_an_array_of_two_ranks_a_task(
    cluster: "Cluster", tmp_path: Path
) -> None:
    """15 shards over 6 tasks of 2 ranks, 2 tasks at once; one task is requeued in the middle."""
    arrays = Arrays(cluster, tmp_path, SAMPLES, "samples")
    alone = arrays.alone()
    arrays.write("{array: 6, array_limit: 2, processes: 2}")
    job = arrays.submit()
    first = arrays.record()["arrays"][0]
    cluster.wait_for(f"{first}_0", ("RUNNING",), 60)
    cluster.slurm("scontrol", "requeue", f"{first}_0")
    row = arrays.status()
    assert row["state"] in ("running", "waiting")
    if row["state"] == "running":
        assert re.fullmatch(r"\d of 6 parts done, \d running", row["reason"])
    arrays.ends(job)
    row = arrays.status()
    assert row["state"] == "fresh"
    assert row["restarts"] == 1
    parted = arrays.manifest("runs")
    assert parted["fingerprint"] == alone["fingerprint"]
    wanted = content(alone, "samples", "sheet")
    assert content(parted, "samples", "sheet") == wanted
    assert len([path for path in wanted if "/tokens/c/" in path]) == 15
    assert parted["metrics"]["nats_per_element"] == alone["metrics"]["nats_per_element"]


def test_a_part_that_fails_is_named_and_nothing_is_gathered(
    cluster: "Cluster", tmp_path: Path
) -> None:
    arrays = Arrays(cluster, tmp_path, TOKENS, "tokens")
    arrays.write("{array: 3}")
    arrays.call("run", "small.yaml", "--until", "tokenizer")
    shard = tmp_path / "runs/small/digits/shard-000001.tar"  # of part 1
    whole = shard.read_bytes()
    shard.write_bytes(whole[:2000] + bytes(200) + whole[2200:])
    job = arrays.submit(fails=True)
    arrays.ends(job, "CANCELLED")
    row = arrays.status()
    assert row["state"] == "failed", row
    array = arrays.record()["arrays"][0]
    assert row["reason"] == f"part {array}_1: failed, exit 1:0"
    assert "shard-000001.tar" in "\n".join(row["log_tail"])
    shard.write_bytes(whole)
    arrays.ends(arrays.submit())
    assert arrays.status()["state"] == "fresh"
