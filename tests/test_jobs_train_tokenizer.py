"""train_tokenizer: what it leaves, and that a run cut anywhere ends like one that was not."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from chainrule.jobs import ingest, tokenizer_trainer, train_tokenizer
from chainrule.jobs.tokenizer_trainer import Trainer
from chainrule.pipeline.artifact import Artifact
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.data.image_batches import ImageBatches
from chainrule.pipeline.data.reader import Shards
from chainrule.pipeline.pipeline_file import load_pipeline
from chainrule.pipeline.stage import Stage, StageFailed, StageInterrupted
from chainrule.pipeline.training.checkpoints import CheckpointWriter
from chainrule.tokenizers import interface
from chainrule.tokenizers.interface import load

TINY = {
    "kind": "vqvae",
    "downsampling": 2,
    "codebook_size": 16,
    "hidden": 8,
    "dim": 4,
    "residual_layers": 1,
    "residual_width": 4,
}
RUN = {
    "tokenizer": TINY,
    "steps": 12,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "log_every": 1,
    "checkpoint_every": 5,
    "validate_every": 6,
}


def ingested(folder: Path, **settings: Any) -> Artifact:
    config = ingest.Config.model_validate(settings)
    stage = Stage(name="data", pipeline="test", job="ingest", folder=folder, fingerprint="f")
    ingest.main(config, stage)
    return Artifact.bare(folder)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("digits")
    return ingested(folder, source={"kind": "sklearn-digits"}, validation=0.15)


def stage_of(folder: Path, data: Artifact, **changes: Any) -> Stage:
    return Stage(
        name="tokenizer",
        pipeline="test",
        job="train_tokenizer",
        folder=folder,
        fingerprint="t",
        inputs={"data": [data]},
        **changes,
    )


def run(folder: Path, data: Artifact, **settings: Any) -> Stage:
    stage = stage_of(folder, data)
    train_tokenizer.main(train_tokenizer.Config.model_validate({**RUN, **settings}), stage)
    return stage


def fixed(folder: Path, data: Artifact, settings: dict[str, Any]) -> Stage:
    stage = stage_of(folder, data)
    train_tokenizer.main(train_tokenizer.Config.model_validate({"tokenizer": settings}), stage)
    return stage


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def quiet(digits: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("quiet")
    run(folder, digits)
    return folder


def test_what_a_learned_tokenizer_leaves(quiet: Path, digits: Artifact) -> None:
    assert sorted(contents(quiet)) == [
        "card.json",
        "metrics.jsonl",
        "reconstructions.png",
        "weights.safetensors",
    ]
    tokenizer = interface.load(quiet)
    card = tokenizer.card()
    assert card["grid"] == [4, 4]
    health = card["health"]
    assert health["images"] == 270
    assert health["tokens"] == 270 * 16
    assert 0 < health["codebook_usage"] <= 1
    lines = [json.loads(line) for line in (quiet / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    known = {"loss", "reconstruction", "commitment", "psnr", "codebook_usage"}
    assert known | {"codebook_perplexity", "learning_rate"} < steps[0].keys()
    [validated] = [line for line in lines if "validation_psnr" in line]
    assert validated["step"] == 6
    assert steps[-1]["reconstruction"] < steps[0]["reconstruction"]
    with Image.open(quiet / "reconstructions.png") as picture:
        assert picture.size == (16 * 66, 3 * 66)


def test_levels_of_a_residual_codebook_are_logged_apart_and_resumed(
    digits: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"tokenizer": {**TINY, "quantizer": {"kind": "residual"}}, "log_every": 4}
    run(tmp_path / "quiet", digits, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "watch", lambda self, step, psnr: 1 // (7 - step))
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "cut", digits, **settings)
    run(tmp_path / "cut", digits, **settings)  # from step 5, in the middle of a window
    assert contents(tmp_path / "cut") == contents(tmp_path / "quiet")
    lines = map(json.loads, (tmp_path / "quiet" / "metrics.jsonl").read_text().splitlines())
    for line in (line for line in lines if "loss" in line):
        levels = [line[f"codebook_usage_level_{level}"] for level in (1, 2)]
        assert line["codebook_usage"] == min(levels)
        assert line["codebook_perplexity_level_2"] <= 16


@pytest.mark.parametrize("cut", [0, 3, 5, 7, 11])
def test_a_run_cut_at_any_step_ends_like_the_quiet_one(
    cut: int, quiet: Path, digits: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer.step

    def cut_step(self: Trainer, step: int, images: np.ndarray) -> dict[str, float]:
        if step == cut + 1:
            raise MemoryError
        return whole(self, step, images)

    monkeypatch.setattr(Trainer, "step", cut_step)
    with pytest.raises(MemoryError):
        run(tmp_path, digits)
    monkeypatch.setattr(Trainer, "step", whole)
    stage = run(tmp_path, digits)
    assert contents(tmp_path) == contents(quiet)
    assert stage.summary["codebook_size"] == 16


def test_a_run_cut_at_its_very_end_is_not_begun_again(
    quiet: Path, digits: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "forget", lambda stage: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            run(tmp_path, digits)
    assert (tmp_path / "checkpoints").is_dir()
    monkeypatch.setattr(Trainer, "__init__", None)  # nothing is trained any more
    stage = run(tmp_path, digits)
    assert contents(tmp_path) == contents(quiet)
    assert stage.summary["psnr"] == interface.load(quiet).card()["health"]["psnr"]


def test_a_signal_saves_and_asks_to_be_run_again(
    quiet: Path, digits: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer.step

    def signalled(self: Trainer, step: int, images: np.ndarray) -> dict[str, float]:
        if step == 8:
            os.kill(os.getpid(), signal.SIGUSR1)
        return whole(self, step, images)

    monkeypatch.setattr(Trainer, "step", signalled)
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(StageInterrupted, match="saved at step 8"):
        run(tmp_path, digits)
    assert signal.getsignal(signal.SIGUSR1) == before
    monkeypatch.setattr(Trainer, "step", whole)
    resumed: list[int] = []
    original = Trainer.resume
    monkeypatch.setattr(
        Trainer, "resume", lambda self: resumed.append(original(self)) or resumed[0]
    )
    run(tmp_path, digits)
    assert resumed == [8]
    assert contents(tmp_path) == contents(quiet)


def test_a_stop_at_a_step_that_was_just_saved_does_not_save_it_again(
    quiet: Path, digits: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, saved = Trainer.step, []
    write = CheckpointWriter.save

    def signalled(self: Trainer, step: int, images: np.ndarray) -> dict[str, float]:
        if step == 10:  # a multiple of checkpoint_every
            os.kill(os.getpid(), signal.SIGUSR1)
        return whole(self, step, images)

    def counted(self: CheckpointWriter, step: int, *arguments: Any, **more: Any) -> None:
        saved.append(step)
        write(self, step, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", signalled)
        patch.setattr(CheckpointWriter, "save", counted)
        with pytest.raises(StageInterrupted, match="saved at step 10"):
            run(tmp_path, digits)
    assert saved == [5, 10]
    run(tmp_path, digits)
    assert contents(tmp_path) == contents(quiet)


def test_a_damaged_checkpoint_is_passed_over(
    quiet: Path, digits: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "watch", lambda self, step, psnr: 1 // (11 - step))
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, digits)
    newest = tmp_path / "checkpoints" / "step-00000010" / "state-00000.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    run(tmp_path, digits)
    assert contents(tmp_path) == contents(quiet)


def test_another_seed_trains_another_tokenizer(
    quiet: Path, digits: Artifact, tmp_path: Path
) -> None:
    run(tmp_path, digits, seed=1)
    assert interface.load(tmp_path).fingerprint != interface.load(quiet).fingerprint


def test_a_loss_that_is_not_finite_stops_the_stage(digits: Artifact, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="loss (nan|inf) at step .*lower learning_rate"):
        run(tmp_path, digits, learning_rate=1e18, schedule={"name": "constant"})
    assert not (tmp_path / "card.json").exists()


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...]) -> None:
    """Images of which some steps' pixels are not numbers."""
    whole = tokenizer_trainer.to_pixels
    seen: list[int] = []
    step = Trainer.step

    def watched(self: Trainer, number: int, images: np.ndarray) -> dict[str, float]:
        seen.append(number)
        return step(self, number, images)

    def spoilt(images: np.ndarray) -> torch.Tensor:
        x = whole(images)
        return x * torch.nan if seen and seen[-1] in steps else x

    monkeypatch.setattr(Trainer, "step", watched)
    monkeypatch.setattr(tokenizer_trainer, "to_pixels", spoilt)


@pytest.mark.parametrize("kind", ["ema", "straight-through", "residual"])
def test_a_step_without_a_finite_loss_changes_nothing_and_is_counted(
    kind: str, digits: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"tokenizer": {**TINY, "quantizer": {"kind": kind, "revive_after": 1}}, "ema": 0.9}
    shards = Shards.open(digits.folder)
    images = ImageBatches(shards, 16, 0)
    config = train_tokenizer.Config.model_validate({**RUN, **settings})
    poisoned(monkeypatch, (3,))
    with Trainer(config, stage_of(tmp_path, digits), images, 1.0) as trainer:
        trainer.resume()
        for step in (1, 2):
            trainer.step(step, images.batch(step - 1))
        assert trainer.average is not None
        held = [*trainer.model.state_dict().values(), *trainer.average.tensors, trainer.counts]
        before = [tensor.clone() for tensor in held]
        figures = trainer.step(3, images.batch(2))
        held = [*trainer.model.state_dict().values(), *trainer.average.tensors, trainer.counts]
        assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
        assert math.isnan(figures["loss"])
        assert figures["skipped_steps"] == 1
        assert math.isfinite(trainer.step(4, images.batch(3))["loss"])
        assert trainer.in_a_row == 0


@pytest.mark.slow
def test_a_vqgan_with_a_spoilt_step_goes_on_and_resumes(
    digits: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, (4, 5, 8))  # the discriminator starts at 4, a checkpoint is made at 5
    stage = run(tmp_path / "quiet", digits, **GAN)
    assert stage.summary["skipped_steps"] == 3
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "watch", lambda self, step, psnr: 1 // (7 - step))
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "cut", digits, **GAN)
    run(tmp_path / "cut", digits, **GAN)
    assert contents(tmp_path / "cut") == contents(tmp_path / "quiet")


def test_a_discriminator_without_a_finite_gradient_makes_no_step(
    digits: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageBatches(Shards.open(digits.folder), 16, 0)
    config = train_tokenizer.Config.model_validate({**RUN, **GAN})
    with Trainer(config, stage_of(tmp_path, digits), images, 1.0) as trainer:
        adversary = trainer.adversary
        assert adversary is not None
        trainer.resume()
        before = {name: t.clone() for name, t in adversary.state_dict().items()}
        learn = adversary.learn
        monkeypatch.setattr(
            adversary, "learn", lambda real, fake, parts: learn(real * torch.nan, fake, parts)
        )
        trainer.step(5, images.batch(4))
        assert trainer.skipped == trainer.in_a_row == 1
        assert all(torch.equal(t, before[name]) for name, t in adversary.state_dict().items())


def test_too_many_spoilt_steps_in_a_row_stop_the_stage_by_name(
    digits: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, (2, 3, 5, 6, 7))
    message = "loss nan at step 7, in 3 steps in a row; lower learning_rate 0.002, set clip"
    with pytest.raises(StageFailed, match=message):
        run(tmp_path, digits, consecutive_faults=3)


def test_both_networks_gradients_are_clipped(
    digits: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageBatches(Shards.open(digits.folder), 16, 0)
    for clip in (1e-3, None):
        config = train_tokenizer.Config.model_validate({**RUN, **GAN, "clip": clip})
        with Trainer(config, stage_of(tmp_path / str(clip), digits), images, 1.0) as trainer:
            assert trainer.adversary is not None
            trainer.resume()
            trainer.step(5, images.batch(4))
            for parameters in (trainer.parameters, trainer.adversary.discriminator.parameters()):
                gradients = [p.grad for p in parameters if p.grad is not None]
                norm = float(torch.nn.utils.get_total_norm(gradients))
                assert norm == pytest.approx(clip, rel=1e-3) if clip is not None else norm > 0.01


def test_micro_batches_give_the_gradient_of_the_whole(digits: Artifact, tmp_path: Path) -> None:
    """With a quantizer that keeps no statistics, and no dropout, nothing but rounding differs."""
    images = ImageBatches(Shards.open(digits.folder), 16, 0)
    gan = {**GAN, "tokenizer": {**GAN["tokenizer"], "dropout": 0.0, "codebook_size": 64}}  # type: ignore[dict-item]
    gan["tokenizer"]["quantizer"] = {"kind": "fsq"}
    gan["adversarial"] = {"start": 0, "ramp": 1, "layers": 1, "channels": 8, "adaptive": False}
    gradients = []
    for accumulate in (1, 4):
        config = train_tokenizer.Config.model_validate({**RUN, **gan, "accumulate": accumulate})
        with Trainer(config, stage_of(tmp_path, digits), images, 1.0) as trainer:
            assert trainer.adversary is not None
            figures = trainer.step(1, images.batch(0))
            networks = [trainer.model, trainer.adversary.discriminator]
            gradients.append([p.grad for n in networks for p in n.parameters()])
            assert int(trainer.counts.sum()) == 16 * 16
            gradients[-1].append(torch.tensor(figures["loss"]))
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)
    with pytest.raises(
        StageFailed, match="batch_size 16 does not divide by 1 ranks x accumulate 3"
    ):
        run(tmp_path / "three", digits, accumulate=3)


RANK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_jobs_train_tokenizer import RUN, stage_of
from chainrule.jobs import train_tokenizer
from chainrule.pipeline.artifact import Artifact
import os
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
stage = stage_of(Path(sys.argv[3]), Artifact.bare(sys.argv[2]), rank=rank, world_size=world)
train_tokenizer.main(train_tokenizer.Config.model_validate(RUN), stage)
"""


@pytest.mark.slow
def test_two_ranks_train_what_one_trains(quiet: Path, digits: Artifact, tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    arguments = [str(Path(__file__).parent), str(digits.folder), str(tmp_path)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, *arguments], env={**shared, "RANK": str(r)})
        for r in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert sorted(contents(tmp_path)) == sorted(contents(quiet))
    for one, two in zip(_losses(quiet), _losses(tmp_path), strict=True):
        assert two == pytest.approx(one, rel=1e-3)


def test_ranks_share_the_validation_split_in_whole_batches(
    digits: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Shards.open(digits.folder)
    for most in (None, 200):
        beats: list[int] = []
        monkeypatch.setattr(train_tokenizer, "beat", lambda seen=beats: seen.append(1))
        alone = list(train_tokenizer.validation(shards, most=most))
        parts = [
            list(train_tokenizer.validation(shards, most=most, rank=rank, world_size=3))
            for rank in range(3)
        ]
        assert sum(map(len, alone)) == (270 if most is None else 200)
        for number, batch in enumerate(alone):
            assert np.array_equal(parts[number % 3][number // 3], batch)
        assert sum(map(len, parts)) == len(alone)
        assert len(beats) >= len(alone) + sum(len(part) for part in parts) - 4  # a tail has none
    classes = {shards.read("validation", i).meta["label"] for i in shards.spread("validation", 200)}  # type: ignore[union-attr]
    assert len(classes) == 10


MEASURED = """
import json, sys
import torch.distributed as dist
from chainrule.jobs.train_tokenizer import measured
from chainrule.pipeline.data.image_batches import ImageBatches
from chainrule.pipeline.data.reader import Shards
from chainrule.tokenizers import interface
from chainrule.tokenizers.interface import load

rank, store, tokenizer, data, out = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
found = [
    measured(interface.load(tokenizer), Shards.open(data), most, rank, 2) for most in (None, 100)
]
if rank == 0:
    open(out, "w").write(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_measure_what_one_measures(quiet: Path, digits: Artifact, tmp_path: Path) -> None:
    paths = [tmp_path / "store", quiet, digits.folder, tmp_path / "found.json"]
    arguments = [str(path) for path in paths]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", MEASURED, str(rank), *arguments], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    shards, tokenizer = Shards.open(digits.folder), interface.load(quiet)
    found = json.loads((tmp_path / "found.json").read_text())
    for most, shared in zip((None, 100), found, strict=True):
        alone = train_tokenizer.measured(tokenizer, shards, most)
        assert shared.pop("psnr") == pytest.approx(alone.pop("psnr"), rel=1e-12)
        assert shared == alone


def _losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_killed_and_started_again_from_the_command_line(tmp_path: Path) -> None:
    """SIGKILL in the middle; the losses and the weights are those of a run left alone."""
    pipeline = {
        "name": "p",
        "stages": {
            "data": {"job": "ingest", "source": {"kind": "sklearn-digits"}, "validation": 0.15},
            "tokenizer": {
                "job": "train_tokenizer",
                "inputs": {"data": "data"},
                **RUN,
                "steps": 150,
                "log_every": 20,
                "checkpoint_every": 20,
                "validate_every": 1000,
            },
        },
    }
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps(pipeline))  # YAML holds JSON
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(runs: str) -> list[str]:
        tail = ["run", str(path), "--runs", str(tmp_path / runs)]
        return [sys.executable, "-m", "chainrule.pipeline", *tail]

    def start(runs: str) -> subprocess.Popen:
        return subprocess.Popen(command(runs), env=environment, stderr=subprocess.DEVNULL)

    assert start("quiet").wait() == 0
    partial = tmp_path / "killed" / "p" / "tokenizer.partial"
    process = start("killed")
    while not list(partial.glob("checkpoints/step-*")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert partial.is_dir()
    assert start("killed").wait() == 0
    quiet, killed = (tmp_path / runs / "p" / "tokenizer" for runs in ("quiet", "killed"))
    for name in ("weights.safetensors", "card.json", "metrics.jsonl", "reconstructions.png"):
        assert (quiet / name).read_bytes() == (killed / name).read_bytes(), name
    assert json.loads((killed / "artifact.json").read_text())["attempts"] == 2


def test_fitted_and_fixed_kinds(digits: Artifact, tmp_path: Path) -> None:
    stage = fixed(tmp_path / "palette", digits, {"kind": "palette", "colours": 8})
    assert interface.load(tmp_path / "palette").card()["health"]["codebook_size"] == 8
    assert stage.summary["vocabulary_size"] == 8
    fixed(tmp_path / "pixels", digits, {"kind": "pixels", "levels": 17})
    tokenizer = interface.load(tmp_path / "pixels")
    image = (np.arange(17) * 255 / 16).round().astype(np.uint8)[None, :, None]
    assert np.array_equal(tokenizer.decode(tokenizer.encode([image]))[0], image)


def test_text_kinds_learn_from_a_sample_drawn_by_the_seed(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i:02d}.txt").write_text(f"document {i} says: {f'word{i % 5} ' * 20}\n")
    data = ingested(tmp_path / "data", source={"kind": "text", "path": str(texts)}, validation=0.2)
    settings = {
        "kind": "sentencepiece",
        "vocabulary_size": 300,
        "sample_bytes": 3000,
        "character_coverage": 1.0,
    }
    stage = fixed(tmp_path / "bpe", data, settings)
    assert stage.summary["exact"] == 1.0
    assert stage.summary["bytes_per_token"] > 2
    assert stage.summary["documents"] == 8
    for kind, size in (("bytes", 258), ("characters", None)):
        stage = fixed(tmp_path / kind, data, {"kind": kind})
        assert stage.summary["exact"] == 1.0
        assert size in (None, stage.summary["vocabulary_size"])
    with pytest.raises(StageFailed, match="cannot learn 9999 pieces"):
        fixed(tmp_path / "large", data, {**settings, "vocabulary_size": 9999})
    with pytest.raises(StageFailed, match="holds text; a tokenizer of kind pixels is for image"):
        fixed(tmp_path / "wrong", data, {"kind": "pixels"})


def test_pictures_of_several_sizes_want_a_crop(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i, (h, w) in enumerate([(12, 12), (12, 16), (16, 12), (10, 14)] * 4):
        pixels = generator.integers(0, 256, (h, w, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    source = {"kind": "image-folder", "path": str(folder)}
    data = ingested(tmp_path / "data", source=source, validation=0.25)
    with pytest.raises(RequestError, match="in one batch; set crop, or size in ingest"):
        run(tmp_path / "whole", data, steps=2, batch_size=8)
    run(tmp_path / "crop", data, steps=2, batch_size=8, crop=8, flip=True)
    card = interface.load(tmp_path / "crop").card()
    assert card["resolution"] == [8, 8]
    assert card["health"]["images"] == 4
    with pytest.raises(RequestError, match="smaller than crop 64"):
        run(tmp_path / "large", data, steps=2, batch_size=8, crop=64)


def pictures(folder: Path, shapes: list[tuple[int, ...]], **settings: Any) -> Artifact:
    """An image folder of random pictures of these shapes, ingested."""
    (folder / "pictures").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i, shape in enumerate(shapes):
        pixels = generator.integers(0, 256, shape).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i:02d}.png")
    source = {"kind": "image-folder", "path": str(folder / "pictures"), **settings}
    return ingested(folder / "data", source=source, validation=0.25)


@pytest.mark.parametrize("side", [32, 80])  # stored raw, and as PNG
def test_a_validation_picture_that_cannot_be_encoded_stops_before_the_first_step(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(side, side, 3), (side + 8, side, 3), (side + 16, side, 3)] * 16
    data = pictures(tmp_path, shapes)
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("a step was made"))
    message = f"split 'validation', picture .*{side + 8}x{side}: not divisible by the downsampling"
    with pytest.raises(StageFailed, match=message):
        run(tmp_path / "out", data, tokenizer={**TINY, "downsampling": 16}, crop=side // 16 * 16)


def test_a_downsampling_that_the_pictures_do_not_divide_by_is_named(tmp_path: Path) -> None:
    data = pictures(tmp_path, [(32, 32, 3)] * 8)
    with pytest.raises(StageFailed, match="32x32: not divisible by the downsampling 64"):
        run(tmp_path / "out", data, tokenizer={**TINY, "downsampling": 64})


def test_grey_and_colour_in_one_batch_want_channels(tmp_path: Path) -> None:
    data = pictures(tmp_path, [(32, 32, 3), (32, 32)] * 8, channels=None)
    with pytest.raises(RequestError, match="in one batch; set channels in ingest"):
        run(tmp_path / "out", data, crop=16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": {"kind": "bytes"}, "steps": 5}, "'steps' has no meaning .* bytes"),
        ({"tokenizer": TINY, "crop": 7}, "crop 7 is not divisible by downsampling 2"),
        ({"tokenizer": {"kind": "vqvaes"}}, "vqvae"),
        ({"tokenizer": {**TINY, "hiden": 4}}, "hiden"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        train_tokenizer.Config.model_validate(settings)


GAN = {
    **RUN,
    "tokenizer": {
        "kind": "vqgan",
        "downsampling": 2,
        "codebook_size": 16,
        "dim": 4,
        "channels": 8,
        "residual_blocks": 1,
        "dropout": 0.1,
    },
    "adversarial": {"start": 3, "ramp": 4, "layers": 1, "channels": 8, "lecam": 0.01},
    "perceptual": {"kind": "multiscale"},
    "pixel_loss": "l1",
    "ema": 0.9,
}


@pytest.fixture(scope="module")
def quiet_gan(digits: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quiet-gan")
    run(folder, digits, **GAN)
    return folder


@pytest.mark.parametrize("cut", [2, 6, 11])
def test_a_vqgan_cut_before_in_and_after_the_start_ends_the_same(
    cut: int, quiet_gan: Path, digits: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer.step

    def cut_step(self: Trainer, step: int, images: np.ndarray) -> dict[str, float]:
        if step == cut + 1:
            raise MemoryError
        return whole(self, step, images)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", cut_step)
        with pytest.raises(MemoryError):
            run(tmp_path / "cut", digits, **GAN)
    run(tmp_path / "cut", digits, **GAN)
    assert contents(tmp_path / "cut") == contents(quiet_gan)
    text = (quiet_gan / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    assert ["discriminator_loss" in line for line in lines] == [False] * 3 + [True] * 9
    assert all(line["adversarial_weight"] > 0 for line in lines[3:])
    assert interface.load(quiet_gan).kind == "vqgan"


def test_bfloat16_trains_close_to_float32(
    quiet_gan: Path, digits: Artifact, tmp_path: Path
) -> None:
    run(tmp_path, digits, **{**GAN, "precision": "bf16"})
    # later on the two networks carry the roundings far apart
    for exact, rounded in zip(_losses(quiet_gan)[:8], _losses(tmp_path)[:8], strict=True):
        assert rounded == pytest.approx(exact, rel=0.05)
    assert _losses(tmp_path) != _losses(quiet_gan)


def test_a_start_that_wrecks_the_picture_stops_the_stage(digits: Artifact, tmp_path: Path) -> None:
    wrecking = {
        **RUN,
        "steps": 400,
        "learning_rate": 5e-3,
        "schedule": {"name": "constant"},
        "log_every": 50,
        "validate_every": 1000,
        "checkpoint_every": 1000,
        "adversarial": {
            "start": 120,
            "ramp": 1,
            "weight": 1000.0,
            "adaptive": False,
            "layers": 1,
            "largest_drop": 1.0,
        },
    }
    with pytest.raises(StageFailed, match=r"collapsed after the discriminator's start \(step 120"):
        run(tmp_path, digits, **wrecking)
    assert not (tmp_path / "card.json").exists()


def test_adversarial_is_the_default_of_vqgan_alone() -> None:
    vqgan = {"tokenizer": {"kind": "vqgan"}, "steps": 20_000}
    assert train_tokenizer.Config.model_validate(vqgan).adversarial is not None
    without = {**vqgan, "adversarial": None}
    assert train_tokenizer.Config.model_validate(without).adversarial is None
    assert train_tokenizer.Config.model_validate({"tokenizer": TINY}).adversarial is None
    with pytest.raises(ValidationError, match="would never start"):
        train_tokenizer.Config.model_validate({**vqgan, "steps": 5000})


@pytest.mark.parametrize(
    "settings",
    [{"kind": "characters"}, {"kind": "sentencepiece", "vocabulary_size": 300}],
    ids=["characters", "sentencepiece"],
)
def test_a_tokenizer_of_text_learns_from_several_sets(tmp_path: Path, settings: Any) -> None:
    sets = []
    for name, words in (("prose", "it was a dark night "), ("code", "def f(x): return x_ ")):
        (tmp_path / f"{name}.txt").write_text("\n".join(words * (i % 5 + 1) for i in range(60)))
        source = {"kind": "text", "path": str(tmp_path / f"{name}.txt"), "document": "line"}
        sets.append(ingested(tmp_path / name, source=source))
    stage = Stage("words", "test", "train_tokenizer", tmp_path / "out", "t", {"data": sets})
    train_tokenizer.main(train_tokenizer.Config.model_validate({"tokenizer": settings}), stage)
    tokenizer = load(tmp_path / "out")
    for text in ("it was a dark night", "def f(x): return x_"):
        [tokens] = tokenizer.encode([text])
        assert tokenizer.decode([tokens]) == [text]
        assert len(tokens) <= len(text)
    assert stage.summary["documents"] == 12
    assert stage.summary["exact"] == 1.0


def test_other_tokenizers_learn_from_one_set(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(
        "name: two\nstages:\n"
        "  a: {job: ingest, source: {kind: sklearn-digits}}\n"
        "  b: {job: ingest, source: {kind: sklearn-digits}, seed: 1}\n"
        "  t: {job: train_tokenizer, inputs: {data: [a, b]}, tokenizer: {kind: pixels}}\n"
    )
    pipeline = load_pipeline(path, runs=tmp_path)
    with pytest.raises(RequestError, match="kind pixels learns from one set"):
        pipeline.check(["t"])


DIGITS = "{job: ingest, source: {kind: sklearn-digits}}"
TITLED = "{job: ingest, source: {kind: sklearn-digits}, caption_templates: ['{class}']}"


@pytest.mark.parametrize(
    ("data", "stages", "said"),
    [
        (DIGITS, {"t": "mulaw"}, "'t': .* 'd' holds image; a tokenizer of kind mulaw is for audio"),
        (DIGITS, {"t": "bytes"}, "holds image; a tokenizer of kind bytes is for text"),
        (TITLED, {"t": "bytes"}, None),
        (TITLED, {"t": "mulaw"}, "holds image; a tokenizer of kind mulaw"),
        (
            "{job: ingest, source: {kind: python-stdlib}}",
            {"t": "palette"},
            "holds text; a tokenizer of kind palette is for image",
        ),
    ],
)
def test_a_tokenizer_of_another_modality_is_refused_before_anything_runs(
    tmp_path: Path, data: str, stages: dict[str, str], said: str | None
) -> None:
    lines = [f"  d: {data}"] + [
        f"  {name}: {{job: train_tokenizer, inputs: {{data: d}}, tokenizer: {{kind: {kind}}}}}"
        for name, kind in stages.items()
    ]
    path = tmp_path / "wrong.yaml"
    path.write_text("\n".join(["name: wrong", "stages:", *lines]) + "\n")
    pipeline = load_pipeline(path, runs=tmp_path)
    if said is None:
        pipeline.check(list(stages))
        return
    with pytest.raises(RequestError, match=said):
        pipeline.check(list(stages))
