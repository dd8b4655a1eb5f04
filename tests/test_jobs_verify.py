"""chainrule verify on a real training that is killed and goes on with other ranks and workers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from chainrule.pipeline.data.ledger import RECORD

PIPELINE = """
name: proof
stages:
  digits: {job: ingest, source: {kind: sklearn-digits}, validation: 0.9}
  pixels: {job: train_tokenizer, inputs: {data: digits}, tokenizer: {kind: pixels}}
  images: {job: pretokenize, inputs: {data: digits, tokenizer: pixels}}
  words: {job: ingest, source: {kind: text, path: TEXT, document: paragraph}, validation: 0.3}
  bytes: {job: train_tokenizer, inputs: {data: words}, tokenizer: {kind: bytes}}
  text: {job: pretokenize, inputs: {data: words, tokenizer: bytes}}
  decoder:
    job: pretrain
    inputs: {tokens: [images, text]}
    model: {preset: llama-debug, context: 64, layers: 1, width: 16, heads: 2, kv_heads: 1}
    mixture_weights: {images: 0.6, text: 0.4}
    steps: 36
    batch_size: 24
    checkpoint_every: 4
    ledger: true
"""


def command(folder: Path, *settings: str) -> list[str]:
    words = [str(Path(sys.executable).with_name("chainrule")), "run", str(folder / "p.yaml")]
    for setting in settings:
        words += ["--set", f"decoder.{setting}"]
    return words


def kill_at(step: int, folder: Path, *settings: str) -> None:
    """Run until `step` is in the ledger, then SIGKILL every process of the run."""
    record = folder / "runs" / "proof" / "decoder.partial" / "ledger" / "rank-0000.ledger"
    with open(folder / "log", "a") as log:
        process = subprocess.Popen(
            command(folder, *settings), cwd=folder, stderr=log, start_new_session=True
        )
    while True:
        assert process.poll() is None, (folder / "log").read_text()
        if record.exists():
            whole = record.stat().st_size // RECORD.itemsize
            steps = np.fromfile(record, RECORD, count=whole)["step"]
            if len(steps) and steps.max() >= step:
                break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_no_sample_is_skipped_or_repeated_however_training_was_disturbed(tmp_path: Path) -> None:
    """Killed in mid-epoch, 1 -> 2 -> 3 -> 1 processes, other workers, accumulation for ranks."""
    (tmp_path / "text").mkdir()
    paragraphs = [f"paragraph {i} " * (1 + i % 11) for i in range(120)]
    (tmp_path / "text" / "a.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "p.yaml").write_text(PIPELINE.replace("TEXT", str(tmp_path / "text")))
    kill_at(9, tmp_path)
    kill_at(17, tmp_path, "resources.processes=2", "engine.strategy=ddp", "workers=3")
    kill_at(26, tmp_path, "resources.processes=3", "engine.strategy=ddp", "workers=0")
    done = subprocess.run(
        command(tmp_path, "accumulate=4", "workers=2"), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    verify = [str(Path(sys.executable).with_name("chainrule")), "verify", "runs/proof/decoder"]
    found = subprocess.run(verify, cwd=tmp_path, capture_output=True, text=True)
    lines = found.stdout.splitlines()
    assert lines[-1] == "samples skipped 0, repeated 0"
    assert found.returncode == 0
    assert any(line.startswith("images epoch 2:") for line in lines)
    assert any(line.startswith("text epoch 2:") for line in lines)

    ledger = tmp_path / "runs" / "proof" / "decoder" / "ledger" / "rank-0000.ledger"
    records = np.fromfile(ledger, RECORD)
    np.delete(records, slice(0, 30)).tofile(ledger)
    broken = subprocess.run(verify, cwd=tmp_path, capture_output=True, text=True)
    assert broken.returncode == 1
    assert not broken.stdout.endswith("samples skipped 0, repeated 0\n")
