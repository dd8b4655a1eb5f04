"""pretokenize as an array on a real Slurm: cut at the site's limit, gathered by a last job."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = pytest.mark.cluster

PIPELINE = """
name: small
stages:
  digits: {job: ingest, source: {kind: sklearn-digits}, validation: 0.15, samples_per_shard: 200}
  tokenizer: {job: train_tokenizer, inputs: {data: digits}, tokenizer: {kind: pixels}}
  tokens: {job: pretokenize, inputs: {data: digits, tokenizer: tokenizer}, resources: RESOURCES}
"""


def test_an_array_past_the_sites_limit_leaves_what_one_job_leaves(
    cluster: "Cluster", tmp_path: Path
) -> None:
    chainrule = str(Path(sys.executable).parent / "chainrule")

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [chainrule, *arguments],
            cwd=tmp_path,
            env=cluster.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    (tmp_path / "small.yaml").write_text(PIPELINE.replace("RESOURCES", "{}"))
    call("run", "small.yaml", "--runs", "alone")
    alone = json.loads((tmp_path / "alone/small/tokens/artifact.json").read_text())

    resources = "{array: 7, array_limit: 2}"  # MaxArraySize of this Slurm is 5
    (tmp_path / "small.yaml").write_text(PIPELINE.replace("RESOURCES", resources))
    lines = call("submit", "small.yaml", "--dry-run")
    assert re.findall(r"--array=(\S+)", lines) == ["0-4%2", "0-1%2"]
    call("run", "small.yaml", "--until", "tokenizer")
    said = call("submit", "small.yaml")
    job = re.search(r"queue tokens .* job (\d+)", said)
    assert job is not None, said
    assert "queue" not in call("submit", "small.yaml")
    log = tmp_path / "runs/small/.slurm" / f"tokens-{job[1]}.log"
    ended = cluster.wait_for(job[1], ("COMPLETED", "FAILED", "CANCELLED"), 240)
    assert ended == "COMPLETED", log.read_text() if log.exists() else said
    arrays = json.loads((tmp_path / "runs/small/.slurm/tokens.json").read_text())["arrays"]
    assert len(arrays) == 2
    tasks = sorted(path.name for path in log.parent.glob("tokens-*_*.log"))
    assert len(tasks) == 7

    parted = json.loads((tmp_path / "runs/small/tokens/artifact.json").read_text())
    assert parted["fingerprint"] == alone["fingerprint"]

    def content(manifest: dict) -> dict[str, str]:
        files = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
        return {path: sha for path, sha in files.items() if path.startswith(("shard", "index"))}

    assert content(parted) == content(alone)
    assert len(content(alone)) > 7
