"""The engine: all strategies learn the same, resume exactly, and go on from each other."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chainrule.pipeline.config import RequestError
from chainrule.pipeline.stage import StageFailed
from chainrule.pipeline.training.checkpoints import Checkpoint, CheckpointWriter, step_folder
from chainrule.pipeline.training.engine import (
    Engine,
    EngineSettings,
    check_combination,
    checkpoint_activations,
    share_out,
)
from chainrule.pipeline.training.optimizers import OptimizerSettings, build_optimizer

sys.path.insert(0, str(Path(__file__).parent))
from engine_ranks import train

STRATEGIES = ["ddp", "zero0", "zero1", "zero2", "zero3"]
FAULTS = {"veto_at": 1, "nan_at": 4}
STEPS = 23  # 20 after the checkpoint of step 3


def run_ranks(world_size: int, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of `engine_ranks.py` on `world_size` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("engine_ranks.py"))]
    ranks = [
        subprocess.Popen(
            [*program, json.dumps(tasks)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, errors[-3000:]
    lines = [line for line in outputs[0][0].splitlines() if line.startswith("{")]
    assert len(lines) == len(tasks)
    return [json.loads(line) for line in lines]


def losses(result: dict[str, Any]) -> list[float]:
    return [update[0] for update in result["updates"]]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The reference: one process, with a vetoed step and one whose gradient is nan."""
    folder = str(tmp_path_factory.mktemp("single"))
    result = train("single", STEPS, folder=folder, save_at=3, ema=0.9, **FAULTS)
    return {**result, "folder": folder}


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory, single: dict[str, Any]) -> dict[str, Any]:
    """Two processes: each strategy whole, resumed from its own checkpoint and from another's."""
    folder = tmp_path_factory.mktemp("spread")
    common = {"steps": STEPS, "accumulate": 2, "ema": 0.9, **FAULTS}
    folders = {name: str(folder / name) for name in STRATEGIES}
    whole = [
        {**common, "strategy": name, "folder": folders[name], "save_at": 3} for name in STRATEGIES
    ]
    again = [
        {**common, "strategy": name, "folder": folders[name], "resume": 3} for name in STRATEGIES
    ]
    others = [*STRATEGIES[1:], STRATEGIES[0]]
    crossed = [
        {**common, "strategy": to, "folder": folders[name], "resume": 3}
        for name, to in zip(STRATEGIES, others, strict=True)
    ]
    crossed += [
        {**common, "strategy": name, "folder": single["folder"], "resume": 3} for name in STRATEGIES
    ]
    results = run_ranks(2, [*whole, *again, *crossed])
    return {
        "whole": dict(zip(STRATEGIES, results[:5], strict=True)),
        "again": dict(zip(STRATEGIES, results[5:10], strict=True)),
        "crossed": results[10:],
        "folders": folders,
    }


def test_a_single_process_skips_faults_and_goes_on(single):
    applied = [update[2] for update in single["updates"]]
    assert applied == [True, False, True, True, False, *[True] * (STEPS - 5)]
    assert single["updates"][1][3] == "veto"
    assert single["updates"][4][3] == "gradient is not finite"


def test_a_vetoed_step_changes_nothing(tmp_path):
    kept = train("single", 1, folder=str(tmp_path / "a"), save_at=1)
    vetoed = train("single", 2, folder=str(tmp_path / "b"), save_at=2, veto_at=1)
    assert kept["updates"] == vetoed["updates"][:1]
    before = dict(Checkpoint.open(step_folder(tmp_path / "a", 1)).tensors("model"))
    after = dict(Checkpoint.open(step_folder(tmp_path / "b", 2)).tensors("model"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_accumulation_is_the_same_update(single):
    parted = train("single", STEPS, accumulate=3, **FAULTS)
    assert losses(parted) == pytest.approx(losses(single), rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_single_process_resumes_exactly(tmp_path, optimizer):
    common = {"folder": str(tmp_path), "ema": 0.9, "optimizer": optimizer}
    whole = train("single", 6, save_at=3, **common)
    again = train("single", 6, resume=3, **common)
    assert again["updates"] == whole["updates"][3:]
    assert again["averaged"] == whole["averaged"]


def test_bf16_is_near_and_resumes_exactly(tmp_path, single):
    whole = train("single", 6, "bf16", folder=str(tmp_path), save_at=3, **FAULTS)
    again = train("single", 6, "bf16", folder=str(tmp_path), resume=3, **FAULTS)
    assert again["updates"][0] == whole["updates"][3]
    assert losses(whole)[:3] == pytest.approx(losses(single)[:3], rel=1e-2)
    assert losses(whole) != losses(single)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_learn_what_one_learns(spread, single, strategy):
    found = spread["whole"][strategy]
    assert losses(found) == pytest.approx(losses(single), rel=1e-6)
    assert [update[2:] for update in found["updates"]] == [u[2:] for u in single["updates"]]
    norms = [u[1] for u in found["updates"] if u[2]]
    assert norms == pytest.approx([u[1] for u in single["updates"] if u[2]], rel=1e-5)
    assert found["averaged"] == pytest.approx(single["averaged"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_resume_exactly(spread, strategy):
    whole, again = spread["whole"][strategy], spread["again"][strategy]
    assert repr(again["updates"]) == repr(whole["updates"][3:])  # repr: nan equals nan
    assert again["averaged"] == whole["averaged"]


@pytest.mark.slow
def test_any_strategy_goes_on_from_any_other(spread, single):
    for result in spread["crossed"]:
        assert losses(result) == pytest.approx(losses(single)[3:], rel=1e-6)
        assert result["averaged"] == pytest.approx(single["averaged"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_process_goes_on_from_two(spread, single, strategy):
    common = {"folder": spread["folders"][strategy], "ema": 0.9, **FAULTS}
    result = train("single", STEPS, resume=3, **common)
    assert losses(result) == pytest.approx(losses(single)[3:], rel=1e-6)
    assert result["averaged"] == pytest.approx(single["averaged"], rel=1e-6)


@pytest.mark.slow
def test_three_processes_in_bf16_go_on_from_one(tmp_path):
    whole = train("single", 6, "bf16", folder=str(tmp_path), save_at=3)
    task = {"steps": 6, "precision": "bf16", "folder": str(tmp_path), "resume": 3}
    for result in run_ranks(3, [{**task, "strategy": name} for name in ("ddp", "zero2", "zero3")]):
        assert losses(result) == pytest.approx(losses(whole)[3:], rel=2e-3)


# --- fp16's loss scale ----------------------------------------------------------------------


def scale_losses(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """A loss scale as a GPU has under fp16, over float32 on this CPU."""
    accelerate = Engine._accelerate

    def with_scaler(self: Engine, gpu: bool) -> Any:
        found = accelerate(self, gpu)
        found.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        return found

    monkeypatch.setattr(Engine, "_accelerate", with_scaler)


def test_a_loss_scale_falls_after_an_overflow_and_not_after_a_fault(monkeypatch, single):
    """A scale is a power of two: the losses are those of the run without one, bit for bit."""
    scale_losses(monkeypatch, 2.0**16)
    found = train("single", STEPS, ema=0.9, **FAULTS)
    assert losses(found) == losses(single)
    assert found["averaged"] == single["averaged"]
    assert [update[2:] for update in found["updates"]][:6] == [
        [True, None],
        [False, "veto"],
        [True, None],
        [True, None],
        [False, None],  # an overflow is no fault as long as the scale can fall
        [True, None],
    ]
    assert found["scales"][:6] == [2.0**16, 2.0**16, 2.0**16, 2.0**17, 2.0**17, 2.0**16]


def test_an_overflow_at_the_lowest_loss_scale_is_a_fault(monkeypatch):
    scale_losses(monkeypatch, 1.0)
    found = train("single", 3, nan_at=1)
    assert found["updates"][1][2:] == [False, "gradient is not finite at the lowest loss scale, 1"]
    assert found["updates"][2][2:] == [True, None]
    assert found["scales"] == [1.0, 1.0, 1.0]


@pytest.mark.slow
def test_deepspeeds_loss_scale_does_the_same(single):
    stages = ("zero2", "zero3")
    common = {"steps": 6, "precision": "fp16", **FAULTS}
    growing = [{**common, "strategy": s, "scaler": {"scale_window": 2}} for s in stages]
    lowest = [
        {**common, "strategy": s, "scaler": {"cur_scale": 1.0}, "veto_at": None} for s in stages
    ]
    results = run_ranks(2, [*growing, *lowest])
    for found in results[:2]:
        assert [update[2:] for update in found["updates"]] == [
            [True, None],
            [False, "veto"],
            [True, None],
            [True, None],
            [False, None],
            [True, None],
        ]
        assert found["scales"] == [2.0**16, 2.0**16, 2.0**16, 2.0**16, 2.0**17, 2.0**16]
        assert losses(found) == pytest.approx(losses(single)[:6], rel=1e-2)
        for ours, reference in zip(found["updates"], single["updates"], strict=False):
            if ours[2]:  # also in the step at whose end the scale grows
                assert ours[1] == pytest.approx(reference[1], rel=2e-2)
    for found in results[2:]:
        assert found["updates"][4][2:] == [
            False,
            "gradient is not finite at the lowest loss scale, 1",
        ]
        assert found["scales"] == [1.0] * 6


def test_ranks_that_all_believe_to_be_the_first_are_found_out(monkeypatch):
    monkeypatch.setattr(Engine, "_accelerate", lambda self, gpu: _OneOfOne())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(StageFailed, match="rank 0 of 1, the environment says 1 of 2"):
        Engine(EngineSettings(strategy="ddp"), gpu=False)


class _OneOfOne:
    device = torch.device("cpu")
    process_index = 0
    num_processes = 1


@pytest.mark.parametrize(
    ("strategy", "precision", "ranks", "gpu", "words"),
    [
        ("single", "fp32", 2, False, "train the same data 2 times"),
        ("zero0", "bf16", 2, False, "first update is wrong"),
        ("zero0", "fp16", 2, True, "first update is wrong"),
        ("ddp", "fp16", 2, False, "fp16 needs a GPU"),
    ],
)
def test_silently_wrong_combinations_are_refused(strategy, precision, ranks, gpu, words):
    with pytest.raises(RequestError, match=words):
        check_combination(strategy, precision, ranks, gpu)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": "ddp", "offload_optimizer": "cpu"}, "offload needs strategy"),
        ({"strategy": "zero2", "offload_parameters": "cpu"}, "needs strategy zero3"),
        ({"strategy": "zero3", "offload_optimizer": "nvme"}, "needs nvme_path"),
        ({"strategy": "zero3", "compile": True}, "compile does not work with zero3"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        EngineSettings(**settings)


def test_another_architecture_is_refused_by_name(tmp_path):
    train("single", 1, folder=str(tmp_path), save_at=1)
    checkpoint = Checkpoint.open(step_folder(tmp_path, 1))
    with Engine(EngineSettings(), gpu=False) as engine:
        engine.prepare(nn.Linear(3, 3), lambda m: build_optimizer(m, OptimizerSettings()))
        with pytest.raises(RequestError, match="of another architecture: weight is missing"):
            engine.restore(checkpoint)


def test_tensors_are_shared_out_evenly():
    sizes = [100, 1, 1, 50, 49, 99]
    owners = share_out(sizes, 3)
    loads = [sum(s for s, o in zip(sizes, owners, strict=True) if o == rank) for rank in range(3)]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= 2


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])[0])
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.blocks[0].load_state_dict(plain[0].state_dict())
    checkpoint_activations(model)
    x = torch.randn(2, 4)
    plain(x).square().sum().backward()
    model.blocks[0](x.requires_grad_()).square().sum().backward()
    assert torch.allclose(plain[0].weight.grad, model.blocks[0].weight.grad)
    with pytest.raises(RequestError, match="no list of blocks"):
        checkpoint_activations(nn.Linear(2, 2))


def test_an_export_is_a_copy(tmp_path):
    with Engine(EngineSettings(), gpu=False) as engine:
        model = nn.Linear(2, 2)
        engine.prepare(model, lambda m: build_optimizer(m, OptimizerSettings()))
        tensors, _ = engine.export()
        before = tensors["model/weight"].clone()
        with torch.no_grad():
            model.weight.add_(1)
        assert torch.equal(tensors["model/weight"], before)
        CheckpointWriter(tmp_path).save(1, tensors, {"step": 1}, None)
