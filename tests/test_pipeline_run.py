"""The command line as a person types it: two branches end to end, killed and taken up again.

Everything here runs `python -m chainrule.pipeline` in processes of their own, on the
quickstart pipeline at a size that takes seconds.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
SMALL = [
    "digits_tokenizer.steps=40",
    "digits_tokenizer.checkpoint_every=10",
    "digits_tokens.accept_collapsed=true",
    "digits_decoder.steps=60",
    "digits_decoder.checkpoint_every=20",
    "digits_decoder.validate_every=30",
    "digits_decoder.model.layers=1",
    "digits_decoder.model.width=32",
    "digits_samples.number=20",
    "code.source={kind: text, path: TEXT}",
    "code_tokenizer.tokenizer.vocabulary_size=512",
    "code_decoder.steps=40",
    "code_decoder.batch_size=4",
    "code_decoder.checkpoint_every=10",
    "code_decoder.validate_every=20",
    "code_decoder.model.context=32",
    "code_decoder.model.layers=1",
    "code_decoder.model.width=32",
    "code_decoder.model.heads=2",
    "code_samples.length=8",
]
# Differ between any two runs: clocks, speeds, and what the tracking store names.
CLOCKS = {"artifact.json"}


def command(verb: str, runs: Path, *more: str) -> list[str]:
    text = Path(__file__).parents[1] / "pipeline"
    overrides = [
        part for o in SMALL for part in ("--set", o.replace("TEXT", f"{text}, suffixes: [.py]"))
    ]
    return [
        sys.executable,
        *("-m", "chainrule.pipeline", verb, str(CONFIG), "--runs", str(runs)),
        *overrides,
        *more,
    ]


def run(runs: Path, *more: str, verb: str = "run") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(verb, runs, *more), capture_output=True, text=True, timeout=500, check=False
    )


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of a pipeline run that nothing disturbed."""
    runs = tmp_path_factory.mktemp("quiet")
    done = run(runs)
    assert done.returncode == 0, done.stderr
    return runs


def losses(stage: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


def contents(stage: Path) -> dict[str, str]:
    """sha256 of each file, without those that hold clocks."""
    manifest = json.loads((stage / "artifact.json").read_text())
    return {f["path"]: f["sha256"] for f in manifest["files"] if f["path"] != "metrics.jsonl"}


@pytest.mark.slow
def test_the_whole_pipeline_ends_with_every_artifact(quiet: Path) -> None:
    root = quiet / "quickstart"
    stages = json.loads(run(quiet, "--json", verb="status").stdout)["stages"]
    assert {row["state"] for row in stages.values()} == {"fresh"}
    assert len(stages) == 14
    for file in (
        "digits/shard-000000.tar",
        "digits_tokenizer/weights.safetensors",
        "digits_tokens/index.json",
        "digits_decoder/checkpoints/latest",
        "digits_model/weights.safetensors",
        "digits_model/tokenizer/card.json",
        "digits_samples/samples.zarr",
        "digits_samples/sheet.png",
        "digits_evaluation/evaluation.json",
        "code_tokenizer/sentencepiece.model",
        "code_samples/text/00000.txt",
        "code_evaluation/evaluation.json",
        "report.html",
    ):
        assert (root / file).exists(), file


@pytest.mark.slow
def test_lineage_is_written_from_end_to_end(quiet: Path) -> None:
    root = quiet / "quickstart"

    def card(stage: str) -> dict:
        return json.loads((root / stage / "card.json").read_text())

    index = json.loads((root / "digits_tokens" / "index.json").read_text())
    assert index["tokenizer"]["fingerprint"] == card("digits_tokenizer")["fingerprint"]
    assert card("digits_model")["tokenizer"]["fingerprint"] == index["tokenizer"]["fingerprint"]
    tokens = json.loads((root / "digits_tokens" / "artifact.json").read_text())["fingerprint"]
    assert card("digits_model")["lineage"]["tokens"] in (tokens, [tokens])


@pytest.mark.slow
def test_a_second_run_does_nothing_and_says_so_quickly(quiet: Path) -> None:
    before = os.times()
    again = run(quiet)
    assert again.returncode == 0
    assert "nothing to do, 14 stages are fresh" in again.stderr
    after = os.times()
    # Of processor time: what the machine does besides is not this command's.
    spent = after.children_user + after.children_system
    assert spent - before.children_user - before.children_system < 10


@pytest.mark.slow
def test_a_new_learning_rate_redoes_the_decoder_and_what_hangs_on_it(quiet: Path) -> None:
    dry = run(quiet, "--dry-run", "--set", "digits_decoder.optimizer.learning_rate=5e-4")
    redone = {line.split()[1] for line in dry.stderr.splitlines() if line.startswith("run ")}
    assert redone == {"digits_decoder", "digits_model", "digits_samples", "digits_evaluation"}


def kill_when(process: subprocess.Popen, ready: Path, after: float) -> bool:
    """SIGKILL to the whole process group once `ready` exists and `after` more seconds passed."""
    until = time.monotonic() + 300
    while not ready.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(after)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_with_the_same_contents(quiet: Path, tmp_path: Path) -> None:
    """SIGKILL soon after each stage began; the same command; the artifacts of a quiet run."""
    root = tmp_path / "quickstart"
    stages = list(json.loads(run(quiet, "--json", verb="status").stdout)["stages"])
    killed = 0
    for number, stage in enumerate(stages):
        process = subprocess.Popen(
            command("run", tmp_path),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        ready = root / f"{stage}.partial" / "attempt.json"
        killed += kill_when(process, ready, after=0.05 * (number % 4))
        process.wait()
    last = run(tmp_path)
    assert last.returncode == 0, last.stderr
    assert killed >= len(stages) // 2
    for stage in stages:
        expected, found = contents(quiet / "quickstart" / stage), contents(root / stage)
        assert found.keys() == expected.keys(), stage
        assert [k for k in found if found[k] != expected[k]] == [], stage
    for stage in ("digits_tokenizer", "digits_decoder", "code_decoder"):
        assert losses(root / stage) == losses(quiet / "quickstart" / stage)


@pytest.mark.slow
def test_killed_in_mid_training_the_losses_are_the_same(quiet: Path, tmp_path: Path) -> None:
    """SIGKILL after the first checkpoint of the decoder, then the same command."""
    more = ("--until", "digits_decoder")
    process = subprocess.Popen(
        command("run", tmp_path, *more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    stage = tmp_path / "quickstart" / "digits_decoder"
    assert kill_when(process, Path(f"{stage}.partial") / "checkpoints" / "latest", after=0.02)
    assert not stage.exists()
    again = run(tmp_path, *more)
    assert again.returncode == 0, again.stderr
    assert losses(stage) == losses(quiet / "quickstart" / "digits_decoder")
    steps = [
        json.loads(line)["step"] for line in (stage / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(steps) == len(set(steps))
    expected = contents(quiet / "quickstart" / "digits_decoder")
    assert contents(stage) == expected


@pytest.mark.slow
def test_a_second_run_on_a_running_stage_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "one.yaml"
    config.write_text(
        "stages:\n  digits: {job: ingest, source: {kind: sklearn-digits}, samples_per_shard: 10}\n"
    )
    arguments = [sys.executable, "-m", "chainrule.pipeline", "run", str(config)]
    arguments += ["--runs", str(tmp_path / "runs")]
    first = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        folder = tmp_path / "runs" / "one" / "digits.partial"
        until = time.monotonic() + 60
        while not (folder / "attempt.json").exists() and time.monotonic() < until:
            time.sleep(0.005)
        second = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert "stage 'digits' is running: process" in second.stderr
        assert len(second.stderr.strip().splitlines()) <= 2
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    # the lock died with its holder
    third = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert third.returncode == 0, third.stderr


def test_wrong_requests_exit_2_with_a_line_or_two(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    config = tmp_path / "c.yaml"
    for text, words in (
        ("stages:\n  a: {job: ingest, sorce: {}}", "c.yaml:2: stage 'a': unknown key 'sorce'"),
        (f"stages:\n  a: {{job: ingest, source: {{kind: image-folder, path: {empty}}}}}", "empty"),
        ("stages:\n  a: {job: ingest, source: {kind: text, path: nope.txt}}", "nope.txt"),
        ("stages:\n  b: {job: pretokenize, inputs: {data: a, tokenizer: t}}", "is no stage"),
    ):
        config.write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "chainrule.pipeline", "run", str(config)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) <= 2
        assert "Traceback" not in done.stderr
