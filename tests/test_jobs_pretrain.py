"""pretrain: it learns, resumes bit for bit after any kill, and never learns from a fault."""

import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from chainrule.jobs import pretrain, verify
from chainrule.pipeline.artifact import ArtifactError, LineageError, read_json, sha256_file
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.data.reader import ShardError
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.pipeline_file import load_pipeline
from chainrule.pipeline.stage import REQUEUE, Stage, StageFailed, StageInterrupted
from chainrule.pipeline.training.checkpoints import Checkpoint, newest, steps_in
from chainrule.pipeline.training.engine import Engine
from chainrule.pipeline.training.objective import Objective
from chainrule.pipeline.training.validation import Validation

sys.path.insert(0, str(Path(__file__).parent))
import pretrain_ranks as ranks
from pretrain_ranks import stage_of

TINY = {"preset": "gpt2-debug", "layers": 1, "heads": 2, "width": 16, "context": 16}
BASE: dict[str, Any] = {
    "model": TINY,
    "steps": 40,
    "batch_size": 12,
    "optimizer": {"learning_rate": 1e-2},
    "schedule": {"warmup": 5},
    "checkpoint_every": 5,
    "validate_every": 10,
    "ema": 0.9,
    "ledger": True,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ranks.write_tokens(tmp_path_factory.mktemp("data") / "text", "text")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ranks.write_tokens(tmp_path_factory.mktemp("data") / "images", "image")


def run(folder: Path, tokens: list[Path], **changes: Any) -> Stage:
    stage = stage_of(folder, tokens)
    pretrain.main(pretrain.Config.model_validate({**BASE, **changes}), stage)
    return stage


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The run that the killed ones are held against."""
    folder = tmp_path_factory.mktemp("whole") / "decoder"
    assert ranks.finish_all(ranks.start(folder, [text], BASE)) == [0]
    return folder


def same_end(folder: Path, other: Path) -> None:
    """The same losses at every step, the same weights and moments, byte for byte."""
    assert ranks.losses_of(folder) == ranks.losses_of(other)
    ends = [newest(path / "checkpoints") for path in (folder, other)]
    assert ends[0] is not None
    assert ends[1] is not None
    for file in sorted(set(ends[0].index.values())):
        assert sha256_file(ends[0].folder / file) == sha256_file(ends[1].folder / file)
    assert ends[0].state == ends[1].state


@pytest.mark.slow
@pytest.mark.parametrize("validation", [2, 4])
@pytest.mark.parametrize("how", ["signal", "kill"])
def test_a_validation_that_was_cut_off_is_made_again(
    validation, how, text, uninterrupted, tmp_path, monkeypatch
):
    """The second of four (step 20), or the last: with a signal, and killed without one."""
    calls = []
    losses = Validation.losses

    def cut(self, engine, objective, batches=None, go_on=None):
        calls.append(1)
        if len(calls) == validation:
            if how == "kill":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, engine, objective, batches, go_on)

    monkeypatch.setattr(Validation, "losses", cut)
    ended = KeyboardInterrupt if how == "kill" else StageInterrupted
    with pytest.raises(ended, match=None if how == "kill" else "in a validation; step"):
        run(tmp_path / "decoder", [text], engine={"asynchronous_checkpoints": False})
    step = 10 * validation
    before = newest(tmp_path / "decoder" / "checkpoints")
    assert before is not None
    assert before.step == (step if how == "signal" or step == 40 else step - 5)
    monkeypatch.undo()
    trained = []
    update = Engine.update
    monkeypatch.setattr(Engine, "update", lambda *a: trained.append(1) or update(*a))
    run(tmp_path / "decoder", [text])
    assert len(trained) == 40 - before.step
    same_end(tmp_path / "decoder", uninterrupted)
    lines = (tmp_path / "decoder" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["step"] for line in found] == list(range(1, 41))
    validated = [line["step"] for line in found if "validation_loss" in line]
    assert validated == [10, 20, 30, 40]


def no_sample_lost(folder: Path) -> None:
    lines: list[str] = []
    assert verify.main(folder, lines.append), lines
    assert lines[-1] == "samples skipped 0, repeated 0"


def test_it_learns_and_says_what_it_came_to(uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["validation_loss"] < 0.8 * summary["unigram_loss"]
    assert summary["ema_validation_loss"] < summary["unigram_loss"]
    assert summary["tokens_seen"] > 0.9 * 40 * 12 * 16
    assert summary["skipped_steps"] == 0
    lines = [json.loads(x) for x in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert [line["step"] for line in lines if "validation_loss" in line] == [10, 20, 30, 40]
    for name in ("learning_rate", "tokens_per_second", "peak_share", "data_stall", "memory_gb"):
        assert all(line[name] >= 0 for line in lines)
    assert sum("checkpoint_s" in line for line in lines) == 7
    shares = [line["checkpoint_share"] for line in lines if "checkpoint_s" in line]
    assert len(shares) == 7
    assert all(0 < share < 1 for share in shares)
    assert lines[0]["learning_rate"] == pytest.approx(2e-3)
    assert steps_in(uninterrupted / "checkpoints")[-1] == 40
    no_sample_lost(uninterrupted)


def test_the_description_holds_what_the_tokens_settle(uninterrupted):
    found = read_json(uninterrupted / "model.json")
    assert found["model"]["vocabulary_size"] == 34
    assert found["model"]["bos"] == 32
    assert found["modality"] == "text"
    assert found["tokenizers"] == [
        {"kind": "test", "fingerprint": "of-text", "modality": "text", "ids": None}
    ]


def kill_often(
    folder: Path, tokens: list[Path], config: dict[str, Any], kills: int, number: int = 1
) -> None:
    """Kill every rank `kills` times at random instants spread over the run, then let it end."""
    generator = random.Random(kills)
    steps = config["steps"]
    done = 0
    for attempt in range(kills):
        at = (attempt + 1) * (steps - 2) // kills
        started = ranks.start(folder, tokens, config, number)
        done += ranks.signal_when(
            started,
            lambda at=at: ranks.steps_logged(folder) >= at,
            signal.SIGKILL,
            generator.random() * 0.03,
        )
        ranks.finish_all(started)
    assert done >= kills - 2  # one aimed at the last steps may come too late
    assert ranks.finish_all(ranks.start(folder, tokens, config, number)) == [0] * number


@pytest.mark.slow
def test_killed_three_times_it_ends_the_same(tmp_path, text, uninterrupted):
    kill_often(tmp_path / "decoder", [text], BASE, 3)
    same_end(tmp_path / "decoder", uninterrupted)
    no_sample_lost(tmp_path / "decoder")


@pytest.mark.slow
def test_killed_twenty_times_it_ends_the_same(tmp_path, text, uninterrupted):
    kill_often(tmp_path / "decoder", [text], BASE, 20)
    same_end(tmp_path / "decoder", uninterrupted)
    no_sample_lost(tmp_path / "decoder")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_two_ranks_killed_end_the_same(tmp_path, text, uninterrupted, strategy):
    config = {**BASE, "steps": 20, "engine": {"strategy": strategy}}
    whole = tmp_path / "whole"
    assert ranks.finish_all(ranks.start(whole, [text], config, 2)) == [0, 0]
    kills = 8 if strategy == "ddp" else 4
    kill_often(tmp_path / "decoder", [text], config, kills, 2)
    same_end(tmp_path / "decoder", whole)
    no_sample_lost(tmp_path / "decoder")


def test_a_signal_saves_and_asks_for_more(tmp_path, text, uninterrupted):
    folder = tmp_path / "decoder"
    for number, at in ((signal.SIGTERM, 7), (signal.SIGUSR1, 17), (signal.SIGINT, 27)):
        started = ranks.start(folder, [text], BASE)
        assert ranks.signal_when(started, lambda at=at: ranks.steps_logged(folder) >= at, number)
        assert ranks.finish_all(started) == [REQUEUE]
        found = newest(folder / "checkpoints")
        assert found is not None
        assert found.step == ranks.steps_logged(folder)
    assert ranks.finish_all(ranks.start(folder, [text], BASE)) == [0]
    assert ranks.losses_of(folder) == ranks.losses_of(uninterrupted)


@pytest.mark.slow
def test_other_numbers_of_ranks_see_the_same_samples(tmp_path, text, uninterrupted):
    """1 → 2 → 3 → 1 ranks, then accumulation and more loader threads, in one run."""
    folder = tmp_path / "decoder"
    plan: list[tuple[int, int, dict[str, Any]]] = [
        (8, 1, {}),
        (16, 2, {}),
        (24, 3, {}),
        (32, 1, {"accumulate": 4, "workers": 3}),
    ]
    for until, number, changes in plan:
        config = {**BASE, **changes, "schedule": {"warmup": 5}}
        started = ranks.start(folder, [text], config, number)
        assert ranks.signal_when(
            started, lambda until=until: ranks.steps_logged(folder) >= until, signal.SIGTERM
        )
        assert ranks.finish_all(started) == [REQUEUE] * number
    assert ranks.finish_all(ranks.start(folder, [text], BASE, 1)) == [0]
    ours, theirs = ranks.losses_of(folder), ranks.losses_of(uninterrupted)
    assert [x[0] for x in ours] == [x[0] for x in theirs]
    assert [x[1] for x in ours] == pytest.approx([x[1] for x in theirs], rel=1e-4)
    no_sample_lost(folder)


def test_the_ledger_is_on_the_disk_before_the_checkpoint(tmp_path, text, monkeypatch):
    """What a checkpoint stands on outlives a loss of power."""
    synced: list[str] = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    run(tmp_path / "decoder", [text], steps=10)
    ledgers = [at for at, name in enumerate(synced) if name == "rank-0000.ledger"]
    pointers = [at for at, name in enumerate(synced) if name.startswith(".latest.")]
    assert len(pointers) == 2  # steps 5 and 10
    # The first checkpoint may still be being written when the second one's ledger is synced.
    assert ledgers[0] < pointers[0]
    assert ledgers[1] < pointers[1]


@pytest.mark.slow
def test_another_strategy_goes_on_within_a_ten_thousandth(tmp_path, text, uninterrupted):
    """zero1 → zero3 → one process, the last for the 20 steps and more after the second change."""
    folder = tmp_path / "decoder"
    for until, strategy in ((6, "zero1"), (13, "zero3")):
        config = {**BASE, "engine": {"strategy": strategy}}
        started = ranks.start(folder, [text], config, 2)
        assert ranks.signal_when(
            started, lambda until=until: ranks.steps_logged(folder) >= until, signal.SIGTERM
        )
        assert ranks.finish_all(started) == [REQUEUE] * 2
    assert 13 <= ranks.steps_logged(folder) <= 20
    assert ranks.finish_all(ranks.start(folder, [text], BASE)) == [0]
    ours, theirs = ranks.losses_of(folder), ranks.losses_of(uninterrupted)
    assert [x[0] for x in ours] == [x[0] for x in theirs]
    for column in (1, 2):  # loss and gradient norm
        found = [x[column] for x in ours]
        assert found == pytest.approx([x[column] for x in theirs], rel=1e-4)
    ends = [newest(path / "checkpoints") for path in (folder, uninterrupted)]
    for kind in ("exp_avg", "exp_avg_sq", "ema"):
        of_ours, of_theirs = (dict(end.tensors(kind)) for end in ends if end is not None)
        assert of_ours.keys() == of_theirs.keys()
        for name, value in of_ours.items():
            wanted = of_theirs[name]
            if name.endswith("qkv.bias"):  # that of the keys has no gradient but rounding
                width = TINY["width"]
                value[width : 2 * width] = wanted[width : 2 * width] = 0
            assert (value - wanted).norm() <= 1e-4 * wanted.norm(), (kind, name)
    no_sample_lost(folder)


# --- in this process ---------------------------------------------------------------------


def test_classes_and_grid_come_from_the_tokens(tmp_path, images):
    stage = run(
        tmp_path / "decoder",
        [images],
        model={"preset": "imagegpt-debug", "layers": 1, "width": 16, "heads": 2},
        steps=10,
    )
    found = read_json(stage.folder / "model.json")
    assert found["model"]["event_shape"] == [2, 3]
    assert found["model"]["classes"] == 4
    assert found["classes"] == ["0", "1", "2", "3"]
    assert found["grid"] == [2, 3]


def test_a_mixture_of_two_token_spaces(tmp_path, text, images):
    stage = run(
        tmp_path / "decoder", [text, images], steps=6, mixture_weights={"text": 2, "images": 1}
    )
    found = read_json(stage.folder / "model.json")
    assert found["modality"] == "mixed"
    assert found["model"]["vocabulary_size"] >= 34 + 8
    assert {entry["modality"] for entry in found["tokenizers"]} == {"text", "image"}
    assert {"validation_loss", "validation_loss.text", "validation_loss.images"} <= set(
        stage.summary
    )
    no_sample_lost(stage.folder)


def test_a_batch_ramp_and_a_penalty_on_log_z(tmp_path, text):
    stage = run(
        tmp_path / "decoder",
        [text],
        steps=12,
        batch_ramp={"start": 4, "increment": 4, "steps": 8},
        z_loss=1e-2,
        optimizer={"name": "muon", "learning_rate": 1e-2},
    )
    assert stage.summary["tokens_seen"] < 12 * 12 * 16
    no_sample_lost(stage.folder)


class Poisoned(Objective):
    """Gives nan for the batches at the positions listed."""

    positions: tuple[int, ...] = ()

    def __call__(self, wrapped: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total, nats = super().__call__(wrapped, batch)
        if batch.position in self.positions and torch.is_grad_enabled():
            return total * float("nan"), nats * float("nan")
        return total, nats


def test_a_step_that_is_not_finite_is_skipped_and_named(tmp_path, text, monkeypatch):
    monkeypatch.setattr(pretrain, "Objective", Poisoned)
    monkeypatch.setattr(Poisoned, "positions", (7 * 12,))
    stage = run(tmp_path / "decoder", [text], steps=10)
    assert stage.summary["skipped_steps"] == 1
    (fault,) = [json.loads(x) for x in (stage.folder / "faults.jsonl").read_text().splitlines()]
    assert fault["step"] == 8
    assert fault["skipped"] == "loss is nan"
    assert len(fault["ids"]) == 12
    lines = [json.loads(x) for x in (stage.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "fault" in line] == [8]
    found = newest(stage.folder / "checkpoints")
    assert found is not None
    assert all(torch.isfinite(t).all() for kind in ("model", "ema") for _, t in found.tensors(kind))


def test_faults_in_a_row_lead_back_and_past_the_data(tmp_path, text, monkeypatch):
    monkeypatch.setattr(pretrain, "Objective", Poisoned)
    # Steps 12, 13, 14 fail; the way back is to step 10, and on from the data after them.
    monkeypatch.setattr(Poisoned, "positions", (12 * 12, 13 * 12, 14 * 12))
    stage = run(tmp_path / "decoder", [text], steps=20, faults={"consecutive": 3})
    assert stage.summary["rollbacks"] == 1
    assert stage.summary["skipped_steps"] == 3
    assert [x[0] for x in ranks.losses_of(stage.folder)] == list(range(1, 21))
    found = newest(stage.folder / "checkpoints")
    assert found is not None
    assert found.state["position"] == (20 + 5) * 12  # steps 11 to 15 were read twice, on new data
    lines: list[str] = []
    assert verify.main(stage.folder, lines.append), lines


class Overflowing(Objective):
    """The loss is finite, the gradient is not, for the batches at the positions listed."""

    positions: tuple[int, ...] = ()

    def __call__(self, wrapped: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total, nats = super().__call__(wrapped, batch)
        if batch.position in self.positions and torch.is_grad_enabled():
            return total * float("inf"), nats
        return total, nats


def test_overflows_of_fp16_are_counted_and_many_in_a_row_lead_back(tmp_path, text, monkeypatch):
    accelerate = Engine._accelerate

    def with_scaler(self: Engine, gpu: bool) -> Any:
        found = accelerate(self, gpu)
        found.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        return found

    monkeypatch.setattr(Engine, "_accelerate", with_scaler)
    monkeypatch.setattr(pretrain, "Objective", Overflowing)
    # One at step 3; steps 12 to 15 in a row, the last two of which are faults.
    monkeypatch.setattr(Overflowing, "positions", tuple(12 * i for i in (2, 11, 12, 13, 14)))
    stage = run(tmp_path / "decoder", [text], steps=20, faults={"overflows": 3, "consecutive": 2})
    assert stage.summary["skipped_steps"] == 2
    assert stage.summary["rollbacks"] == 1
    lines = (stage.folder / "faults.jsonl").read_text().splitlines()
    faults = [json.loads(line) for line in lines]
    scales = [(line["step"], line["overflow_at_scale"]) for line in faults[:3]]
    assert scales == [(3, 2.0**16), (12, 2.0**15), (13, 2.0**14)]
    assert all(len(line["ids"]) == 12 for line in faults[:5])
    assert faults[3]["skipped"].startswith("gradient is not finite for 3 steps in a row")
    assert faults[5] == {"step": 15, "rolled_back": 1}
    found = newest(stage.folder / "checkpoints")
    assert found is not None
    assert found.state["faults"]["overflows"] == 3
    assert all(torch.isfinite(t).all() for _, t in found.tensors("model"))


def test_too_many_rollbacks_end_the_stage(tmp_path, text, monkeypatch):
    monkeypatch.setattr(pretrain, "Objective", Poisoned)
    monkeypatch.setattr(Poisoned, "positions", tuple(range(7 * 12, 10_000, 12)))
    with pytest.raises(StageFailed, match="2 faults of learning in a row at step"):
        run(tmp_path / "decoder", [text], faults={"consecutive": 2, "rollbacks": 1})
    found = newest(tmp_path / "decoder" / "checkpoints")
    assert found is not None
    assert found.step == 5


def test_faults_before_the_first_checkpoint_end_the_stage(tmp_path, text, monkeypatch):
    monkeypatch.setattr(pretrain, "Objective", Poisoned)
    monkeypatch.setattr(Poisoned, "positions", (0, 12))
    with pytest.raises(StageFailed, match="no checkpoint yet"):
        run(tmp_path / "decoder", [text], faults={"consecutive": 2})


@pytest.mark.slow
def test_checkpoints_that_take_long_are_said_to_once(tmp_path, text, caplog, monkeypatch):
    export = Engine.export

    def slow(self: Engine) -> Any:
        time.sleep(0.6)
        return export(self)

    monkeypatch.setattr(Engine, "export", slow)
    run(tmp_path / "decoder", [text], steps=12, checkpoint_every=2, validate_every=None, ema=None)
    said = [line for line in caplog.messages if line.startswith("a checkpoint held up training")]
    assert len(said) == 1
    assert "raise checkpoint_every" in said[0]


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, text, caplog):
    folder = tmp_path / "decoder"
    run(folder, [text], steps=20)
    losses = ranks.losses_of(folder)
    (folder / "checkpoints" / "step-00000020" / "state-00000.safetensors").write_bytes(b"torn")
    run(folder, [text], steps=20)
    assert "step-00000020" in caplog.text
    assert ranks.losses_of(folder) == losses
    assert [Checkpoint.open(p).step for p in sorted((folder / "checkpoints").glob("step-*"))] == [
        15,
        20,
    ]


def test_where_no_checkpoint_is_whole_nothing_begins_anew(tmp_path, text):
    folder = tmp_path / "decoder"
    run(folder, [text], steps=10)
    losses = ranks.losses_of(folder)
    for state in (folder / "checkpoints").glob("step-*/state-00000.safetensors"):
        state.write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="none of 2 checkpoints is whole .* begin at step 0"):
        run(folder, [text], steps=10)
    assert ranks.losses_of(folder) == losses


def test_what_a_signal_breaks_is_an_interruption(tmp_path, text, monkeypatch):
    """A compiler, or another rank, that hears the same signal ends what the step waits for."""
    folder = tmp_path / "decoder"
    update = Engine.update

    def breaking(after: int, signalled: bool) -> Any:
        left = [after]

        def broken(engine: Engine, *arguments: Any) -> Any:
            if left[0]:
                left[0] -= 1
                return update(engine, *arguments)
            if signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            raise ConnectionResetError("the other side is gone")

        return broken

    for signalled, error in ((True, StageInterrupted), (False, ConnectionResetError)):
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "update", breaking(7, signalled))
            with pytest.raises(error):
                run(folder, [text], steps=20)
    run(folder, [text], steps=20)
    run(tmp_path / "whole", [text], steps=20)
    assert ranks.losses_of(folder) == ranks.losses_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["d.engine.strategy=single", "d.resources.processes=2"], "same data 2 times; use ddp"),
        (["d.engine.strategy=zero0", "d.precision=bf16"], "first update is wrong"),
    ],
)
def test_strategies_that_cannot_work_are_refused_before_anything_runs(tmp_path, overrides, words):
    path = tmp_path / "p.yaml"
    path.write_text(
        "name: p\nstages:\n"
        "  t: {job: ingest, source: {kind: text, path: x}}\n"
        "  k: {job: train_tokenizer, inputs: {data: t}, tokenizer: {kind: bytes}}\n"
        "  s: {job: pretokenize, inputs: {data: t, tokenizer: k}}\n"
        "  d: {job: pretrain, inputs: {tokens: s}, model: gpt2-debug, steps: 2, batch_size: 2}\n"
    )
    pipeline = load_pipeline(path, overrides)
    with pytest.raises(RequestError, match=f"stage 'd': .*{words}"):
        pretrain.check(pipeline, pipeline.stages["d"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "gpt-2"}, "unknown preset 'gpt-2'; did you mean 'gpt2'"),
        ({"model": {"family": "lama"}}, "unknown family 'lama'; did you mean 'llama'"),
        ({"model": {"layers": 2}}, "give a 'preset' or a 'family'"),
        (
            {"model": {"preset": "wavenet-debug", "local_width": 80, "local_hop": 4}},
            "local_width 80: token artifacts hold no local features, .* use from Python",
        ),
        (
            {"model": {"preset": "gpt2-debug", "widht": 64}},
            "unknown key 'widht'; did you mean 'width'",
        ),
        ({"model": {"preset": "gpt2-debug", "dropout": 2.0}}, "'dropout': .* less than 1"),
        (
            {"model": {"preset": "imagegpt-debug", "captions": {"dropot": 0.1}}},
            "unknown key 'captions.dropot'; did you mean 'dropout'",
        ),
        ({"accumulate": 5}, "batch_size 12 does not divide by accumulate 5"),
        ({"steps": 0}, "greater than or equal to 1"),
        *(
            ({"mixture_weights": {"a": weight, "b": 1}}, "a: .* is no share of the rows; leave")
            for weight in (0, -1)
        ),
        *(
            ({"mixture_weights": {"a": weight, "b": 1}}, "should be a finite number")
            for weight in (math.inf, math.nan)
        ),
        *(
            (
                {"optimizer": {"name": "muon"}, "engine": {"strategy": strategy}},
                f"muon needs whole matrices, engine.strategy {strategy} .* take engine",
            )
            for strategy in ("zero1", "zero2", "zero3")
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        pretrain.Config.model_validate({**BASE, **changes})


@pytest.mark.parametrize(
    "model",
    [
        "gpt2",
        {"family": "pixelcnn", "event_shape": [8, 8]},
        {"preset": "imagegpt-debug", "captions": {"dropout": 0.2}},
        {"preset": "imagegpt-debug", "captions": None},
        {"family": "llama", "layers": 2, "heads": 2, "width": 32},
    ],
)
def test_what_the_tokens_fill_in_later_is_not_missed(model):
    assert pretrain.Config.model_validate({**BASE, "model": model}).model == model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {**TINY, "vocabulary_size": 20}}, "tokens go up to 33"),
        ({"model": {**TINY, "heads": 3}}, "width"),
        ({"mixture_weights": {"texts": 1}}, r"mixture_weights names \['texts'\]"),
        ({"engine": {"strategy": "zero0"}, "precision": "bf16"}, "zero0 with precision bf16"),
        ({"model": {"preset": "made-debug", "event_shape": [4]}, "z_loss": 1e-4}, "z_loss needs"),
    ],
)
def test_a_request_that_the_tokens_contradict_is_refused(tmp_path, text, changes, words):
    with pytest.raises(RequestError, match=words):
        run(tmp_path / "decoder", [text], **changes)


def test_a_batch_that_ranks_cannot_share_is_refused():
    config = pretrain.Config.model_validate(BASE)
    with pytest.raises(RequestError, match="12 rows does not divide by 5 ranks"):
        pretrain.batch_sizes(config, 5)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, text):
    run(tmp_path / "decoder", [text], steps=5)
    with pytest.raises(LineageError, match="models do not match"):
        run(tmp_path / "decoder", [text], steps=5, model={**TINY, "width": 32})


@pytest.mark.parametrize("shard", [0, 1])
def test_ids_beyond_the_vocabulary_are_refused_before_the_first_step(tmp_path, text, shard):
    """Of either split: the shards' entries tell, so that no sample need be read."""
    other = tmp_path / "other"
    other.mkdir()
    for path in text.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    index = read_json(other / "index.json")
    assert [entry["largest_id"] for entry in index["shards"]] == [33, 33]
    index["shards"][shard]["largest_id"] = 34
    (other / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match=f"shard-00000{shard}.tar: holds token 34, .* has 34"):
        run(tmp_path / "decoder", [other])
    assert not (tmp_path / "decoder" / "metrics.jsonl").exists()


def test_tokens_without_a_validation_split_are_refused(tmp_path, text):
    other = tmp_path / "train-only"
    other.mkdir()
    for path in text.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    index = read_json(other / "index.json")
    index["shards"] = index["shards"][:1]
    (other / "index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="set a larger `validation` in ingest"):
        run(tmp_path / "decoder", [other])


def test_a_model_beyond_the_memory_is_refused_before_it_is_built(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = run(tmp_path / "fits", [text], steps=1)
    model = build(read_json(stage.folder / "model.json")["model"])
    needed = 12 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(pretrain, "physical_memory", lambda: needed)
    run(tmp_path / "just", [text], steps=1)
    monkeypatch.setattr(pretrain, "physical_memory", lambda: needed - 1)
    with pytest.raises(StageFailed, match=r"parameters, .* or more; this machine has .* of memory"):
        run(tmp_path / "beyond", [text], steps=1)
    monkeypatch.setattr(pretrain, "physical_memory", lambda: None)
    run(tmp_path / "unknown", [text], steps=1)


def test_any_seed_of_a_step_is_one_that_torch_takes() -> None:
    assert pretrain.seed_of(3, 5, 7) == (3 * 1_000_003 + 5) * 65_537 + 7
    torch.manual_seed(pretrain.seed_of(2**63 - 1, 10**9, 1000))
