"""`chainrule status` of jobs that the controller has forgotten: by sacct, else by own record."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from chainrule.pipeline import slurm

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = pytest.mark.cluster

PIPELINE = """
name: small
stages:
  text: {job: ingest, source: {kind: text, path: texts}, validation: 0.2}
  words:
    job: train_tokenizer
    inputs: {data: text}
    tokenizer: {kind: sentencepiece, model: bpe, vocabulary_size: 300}
  other: {job: ingest, source: {kind: sklearn-digits}, validation: 0.15}
"""


def test_ended_jobs_are_known_by_accounting_or_by_their_own_record(
    accounted_cluster: "Cluster", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = accounted_cluster
    (tmp_path / "texts").mkdir()
    (tmp_path / "small.yaml").write_text(PIPELINE)
    (tmp_path / "texts" / "a.txt").write_text("some words to read\n" * 50)
    environment = dict(cluster.env)

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(Path(sys.executable).parent / "chainrule"), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done

    hold = cluster.slurm("sbatch", "--parsable", "-H", "-o/dev/null", "--wrap", "true").strip()
    options = f"['--dependency=afterany:{hold}']"
    (tmp_path / "held.yaml").write_text(f"jobs: {{ingest: {{options: {options}}}}}")
    queued = call("submit", "small.yaml", "--profile", "held.yaml").stderr
    jobs = {
        words[1]: words[words.index("job") + 1].rstrip(",")
        for words in (line.split() for line in queued.splitlines() if line.startswith("queue "))
    }
    shutil.rmtree(tmp_path / "texts")
    cluster.slurm("scontrol", "release", hold)
    array = cluster.slurm(
        *("sbatch", "--parsable", "--array=0-2", "-o", "/dev/null"),
        *("--wrap", "exit $((SLURM_ARRAY_TASK_ID == 1))"),
    ).strip()
    again = cluster.slurm(
        "sbatch", "--parsable", "--requeue", "-o", "/dev/null", "--wrap", "sleep 4"
    ).strip()
    cluster.wait_for(again, ("RUNNING",), 30)
    cluster.slurm("scontrol", "requeue", again)
    known = [*jobs.values(), array, again]

    def forgotten() -> bool:
        said = cluster.slurm("squeue", "-h", "-t", "all", "-o", "%F", check=False)
        return not set(known) & set(said.split())

    cluster.wait_until(forgotten, 240, "jobs that the controller has forgotten")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some words to read\n" * 50)

    def status() -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = json.loads(call("status", "small.yaml", "--json").stdout)
        return rows["stages"]

    rows = status()
    assert rows["other"]["state"] == "fresh"
    assert rows["other"]["job_state"] == "completed"
    assert rows["text"]["state"] == "failed"
    assert rows["text"]["job_state"] == "failed"
    assert any("texts" in line for line in rows["text"]["log_tail"])
    assert rows["words"]["state"] == "cancelled"
    assert rows["words"]["reason"] == "could not start any more: an input failed (text)"

    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    found = slurm.jobs_of([array, again, jobs["words"]])
    assert dict(found[array].tasks) == {"COMPLETED": 2, "FAILED": 1}
    assert found[array].failed_task == f"{array}_1"
    assert (found[array].state, found[array].exit_code) == ("FAILED", "1:0")
    assert (found[again].state, found[again].restarts) == ("COMPLETED", 1)
    assert found[jobs["words"]].nodes == ""

    # a client without accounting: sacct refuses, and the stage's own record has to do
    conf = cluster.conf.read_text().replace("_storage/slurmdbd", "_storage/none")
    (tmp_path / "slurm.conf").write_text(conf)
    environment["SLURM_CONF"] = str(tmp_path / "slurm.conf")
    rows = status()
    assert rows["other"]["state"] == "fresh"
    assert rows["text"]["state"] == "failed"
    assert rows["text"]["job_id"] == jobs["text"]
    assert rows["text"]["reason"] == f"job {jobs['text']} is gone from Slurm; exit 2"
    assert any("texts" in line for line in rows["text"]["log_tail"])
    assert rows["words"]["state"] == "cancelled"
    assert rows["words"]["reason"] == f"job {jobs['words']} is gone from Slurm and never started"
