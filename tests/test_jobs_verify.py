"""chainrule verify on real trainings: cut ledgers; one that is killed and goes on with other ranks
and workers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from chainrule.jobs import pretrain, verify
from chainrule.pipeline.artifact import ArtifactError
from chainrule.pipeline.data.ledger import RECORD

sys.path.insert(0, str(Path(__file__).parent))
from pretrain_ranks import stage_of, write_tokens

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


STEPS, ROWS = 12, 6
TINY = {"preset": "gpt2-debug", "layers": 1, "heads": 2, "width": 16, "context": 16}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training, as a pipeline's run leaves it."""
    top = tmp_path_factory.mktemp("trained")
    tokens = write_tokens(top / "text", "text")
    folder = top / "runs" / "proof" / "decoder"
    settings = {"model": TINY, "steps": STEPS, "batch_size": ROWS, "checkpoint_every": 5}
    pretrain.main(
        pretrain.Config.model_validate({**settings, "ledger": True}), stage_of(folder, [tokens])
    )
    (folder / "artifact.json").write_text("{}")
    (folder / "config.yaml").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "runs" / "proof" / "decoder")
    return tmp_path / "runs" / "proof" / "decoder"


def unfinished(folder: Path) -> Path:
    """The same before it was published."""
    (folder / "artifact.json").unlink()
    folder.rename(folder.with_name("decoder.partial"))
    return folder.with_name("decoder.partial")


def said(run: Path, good: bool) -> list[str]:
    lines: list[str] = []
    assert verify.main(run, lines.append) == good, lines
    return lines


def records_before(folder: Path, step: int) -> int:
    """Bytes of the ledger that steps < `step` (from 0) wrote."""
    records = np.fromfile(folder / "ledger" / "rank-0000.ledger", RECORD)
    return int((records["step"] < step).sum()) * RECORD.itemsize


def test_the_ledger_is_held_against_what_was_trained(copy: Path) -> None:
    *_, covered, sums = said(copy, True)
    assert covered.startswith(f"steps {STEPS} of {STEPS}, rows {STEPS * ROWS} of {STEPS * ROWS}, ")
    assert sums == "samples skipped 0, repeated 0"
    ranks = copy / "ledger" / "rank-0000.ledger"
    os.truncate(ranks, records_before(copy, 7))
    *_, covered, _ = said(copy, False)
    assert covered.startswith(f"steps 7 of {STEPS}, rows {7 * ROWS} of {STEPS * ROWS}, samples ")
    assert covered.endswith("; missing: 8-12")
    shutil.rmtree(copy / "checkpoints")  # the settings and the metrics know as well
    assert said(copy, False)[-2].endswith("; missing: 8-12")
    (copy / "config.yaml").unlink()
    assert said(copy, False)[-2].endswith("; missing: 8-12")
    os.truncate(ranks, 0)
    assert said(copy, False)[-2:] == [
        f"steps 0 of {STEPS}, rows 0, samples 0; missing: 1-12",
        "samples skipped 0, repeated 0",
    ]
    ranks.unlink()
    (line,) = said(copy, False)
    assert "rank-*.ledger are gone" in line


def test_half_a_step_and_a_step_twice_are_told(copy: Path) -> None:
    ranks = copy / "ledger" / "rank-0000.ledger"
    whole = ranks.read_bytes()
    ranks.write_bytes(whole[: -RECORD.itemsize * 3])
    assert said(copy, False)[-2].startswith(f"steps {STEPS} of {STEPS}, rows ")
    ranks.write_bytes(whole)
    (copy / "ledger" / "rank-0001.ledger").write_bytes(whole[: records_before(copy, 2)])
    assert said(copy, False)[-2].endswith("; twice: 1-2")


def test_the_end_of_an_unfinished_ledger_may_be_torn_but_not_what_was_saved(copy: Path) -> None:
    saved = copy / "checkpoints" / "step-00000012"
    shutil.rmtree(saved)  # the newest is of step 10
    partial = unfinished(copy)
    ranks = partial / "ledger" / "rank-0000.ledger"
    os.truncate(ranks, ranks.stat().st_size - 7)
    *_, covered, _ = said(copy, True)
    assert covered.startswith(f"steps 10 of 10, rows {10 * ROWS} of {10 * ROWS}, ")
    assert covered.endswith("; 2 more past the last checkpoint, to be made again")
    os.truncate(ranks, records_before(partial, 9))
    assert said(copy, False)[-2].endswith("; missing: 10")
    data = bytearray(ranks.read_bytes())
    data[100] ^= 1
    ranks.write_bytes(data)
    (line,) = said(copy, False)
    assert f"{ranks}: record 1 of" in line


def test_a_training_is_named_as_a_model_is(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parents[2])
    assert said(Path("proof/decoder"), True) == said(copy, True)
    with pytest.raises(ArtifactError, match="no such folder; did you mean 'proof/decoder'"):
        verify.main(Path("proof/decodr"))
    unfinished(copy)
    assert said(Path("proof/decoder"), True)


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
    assert lines[-2].startswith("steps 36 of 36, rows 864 of 864, samples ")
    assert found.returncode == 0
    assert any(line.startswith("images epoch 2:") for line in lines)
    assert any(line.startswith("text epoch 2:") for line in lines)

    ledger = tmp_path / "runs" / "proof" / "decoder" / "ledger" / "rank-0000.ledger"
    records = np.fromfile(ledger, RECORD)
    np.delete(records, slice(0, 30)).tofile(ledger)
    broken = subprocess.run(verify, cwd=tmp_path, capture_output=True, text=True)
    assert broken.returncode == 1
    assert broken.stdout.startswith("runs/proof/decoder/ledger/rank-0000.ledger: record 0 of ")
    assert broken.stdout.count("\n") == 1
    assert not broken.stderr
