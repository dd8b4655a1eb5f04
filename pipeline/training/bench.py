"""How fast training is, as ratios within one run: `chainrule bench train`, `bench loader`.

    ours           a step of the pretraining loop: seed, schedule, update, faults, log line
    bare           forward, backward, clip, fused AdamW on the same module: what the loop adds
    transformers   GPT2LMHeadModel of the same shape with Accelerate, in the plainest way

And the same step on batches that the loader reads from shards while it trains, against the step on
one ready batch: what reading costs, however far ahead it is done.

Contestants take turns; each ratio is the median of the rounds' ratios.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from chainrule.pipeline.data.batches import Batch, Loader, mixture_of
from chainrule.pipeline.data.tokens import TokenSet
from chainrule.pipeline.devices import synchronise
from chainrule.pipeline.models import native
from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.models.decoder import Decoder
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.stage import Stage
from chainrule.pipeline.training.engine import Engine, EngineSettings, Precision
from chainrule.pipeline.training.faults import FaultMonitor, FaultSettings
from chainrule.pipeline.training.objective import Objective
from chainrule.pipeline.training.optimizers import (
    OptimizerSettings,
    build_optimizer,
    parameter_groups,
    set_learning_rate,
)
from chainrule.pipeline.training.schedules import ScheduleSettings
from chainrule.pipeline.training.throughput import Meter, flops_per_element, measured_peak

SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    # name: batch, settings. The first two are nanoGPT's for a CPU and for a small GPU.
    "4x128": (12, {"layers": 4, "heads": 4, "width": 128, "context": 64, "vocabulary_size": 65}),
    "6x384": (8, {"layers": 6, "heads": 6, "width": 384, "context": 256, "vocabulary_size": 65}),
    "124m": (
        8,
        {"layers": 12, "heads": 12, "width": 768, "context": 1024, "vocabulary_size": 50257},
    ),
}
AHEAD = 8
"""Steps that are not measured after a loader is opened: more than it fetches ahead."""
Step = Callable[[], object]


def train(
    shapes: Sequence[str] = ("4x128",),
    precisions: Sequence[str] = ("fp32", "bf16"),
    rounds: int = 15,
    compiled: bool = False,
    gpu: bool | None = None,
) -> list[dict[str, Any]]:
    """A row a shape and precision. `transformers` is left out where it is not installed."""
    rows = []
    for name in shapes:
        size, shape = SHAPES[name]
        for chosen in precisions:
            precision = cast(Precision, chosen)
            settings = EngineSettings(strategy="single", compile=compiled)
            with Engine(settings, precision, gpu=gpu) as engine, tempfile.TemporaryDirectory() as t:
                model = build({"family": "gpt2", **shape, "bos": 0}, seed=0)
                batch = random_batch(size, shape).to(engine.device)
                flops = flops_per_element(model)
                ours = our_step(engine, model, flops, Path(t))
                steps: dict[str, Step] = {
                    "ours": partial(ours, batch),
                    "bare": bare_step(engine.device, shape, batch, precision, compiled),
                }
                theirs = transformers_step(engine.device, shape, batch, precision, compiled)
                if theirs is not None:
                    steps["transformers"] = theirs
                times = take_turns(steps, rounds, engine.device)
                peak = measured_peak(engine.device, precision)
            seconds = statistics.median(times["ours"])
            row: dict[str, Any] = {"shape": name, "batch": size, "precision": precision}
            row |= {f"{who} ms": 1000 * statistics.median(found) for who, found in times.items()}
            row["over bare"] = ratio(times["ours"], times["bare"])
            if theirs is not None:
                row["transformers / ours"] = ratio(times["transformers"], times["ours"])
            row["tokens/s"] = batch.tokens / seconds
            row["share of peak"] = batch.tokens * flops / seconds / peak
            rows.append(row)
    return rows


def loader(
    tokens: Path,
    shapes: Sequence[str] = ("4x128",),
    precisions: Sequence[str] = ("fp32",),
    rounds: int = 9,
    steps: int = 30,
    workers: int = 1,
    gpu: bool | None = None,
) -> list[dict[str, Any]]:
    """A row a shape and precision: a step on batches of these shards against one on a ready batch.

    `tokens`: a pretokenize artifact; its vocabulary takes the place of the shape's. A round is
    `steps` steps of each kind; what the loader had fetched before they began is used up first.
    """
    rows = []
    for name in shapes:
        size, shape = SHAPES[name]
        read_from = TokenSet.open(tokens, "train")
        drawn = mixture_of([read_from], context=shape["context"])
        shape = {**shape, "vocabulary_size": read_from.vocabulary.values}
        for chosen in precisions:
            precision = cast(Precision, chosen)
            settings = EngineSettings(strategy="single")
            with Engine(settings, precision, gpu=gpu) as engine, tempfile.TemporaryDirectory() as t:
                model = build({"family": "gpt2", **shape, "bos": 0}, seed=0)
                step = our_step(engine, model, flops_per_element(model), Path(t))
                ready = drawn.batch(0, size)
                pin = engine.device.type == "cuda"
                times: dict[str, list[float]] = {"ready": [], "loaded": [], "stall": []}
                for turn in range(rounds + 1):
                    spent = _steps(engine, step, repeat(ready), steps)
                    with Loader(drawn, size, step=turn * steps, workers=workers, pin=pin) as read:
                        for _ in range(AHEAD):
                            step(next(read))
                        before = read.stalled
                        loaded = _steps(engine, step, read, steps)
                        stalled = read.stalled - before
                    if turn:  # the first is warm-up
                        for kind, seconds in zip(times, (spent, loaded, stalled), strict=True):
                            times[kind].append(seconds)
            rows.append(
                {
                    "shape": name,
                    "batch": size,
                    "precision": precision,
                    "ready ms": 1000 * statistics.median(times["ready"]) / steps,
                    "loaded ms": 1000 * statistics.median(times["loaded"]) / steps,
                    "loaded / ready": ratio(times["loaded"], times["ready"]),
                    "waited": ratio(times["stall"], times["loaded"]),
                }
            )
    return rows


def _steps(
    engine: Engine, step: Callable[[Batch], object], batches: Iterator[Batch], count: int
) -> float:
    """Seconds of so many steps."""
    synchronise(engine.device)
    began = time.perf_counter()
    for _ in range(count):
        step(next(batches))
    synchronise(engine.device)
    return time.perf_counter() - began


def random_batch(size: int, shape: dict[str, Any]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(shape["vocabulary_size"], (size, shape["context"]), generator=generator)
    return Batch(x, None, None, None, 0, 0, np.zeros((0, 6), np.int64))


def our_step(
    engine: Engine, model: Autoregressive, flops: float, folder: Path
) -> Callable[[Batch], object]:
    """What `jobs.pretrain` does in a step."""
    objective = Objective(model, documents=True)
    engine.prepare(model, lambda module: build_optimizer(module, OptimizerSettings()))
    monitor = FaultMonitor(FaultSettings())
    schedule = ScheduleSettings(warmup=10)
    meter = Meter(flops, 1.0)
    stage = Stage("bench", "bench", "pretrain", folder, "")
    done = 0

    def step(batch: Batch) -> None:
        nonlocal done
        elements, _, _ = engine.sum(batch.tokens, 0.0, 0.0)
        torch.manual_seed(done)
        rate = set_learning_rate(engine.optimizer, schedule.factor(done, 10_000))
        micro = [part.to(engine.device) for part in batch.split(1)]
        update = engine.update(micro, objective, elements, monitor.judge_loss)
        done += 1
        meter.step(elements)
        monitor.accept(update.loss)
        record = {"loss": update.loss, "gradient_norm": update.gradient_norm, "rate": rate}
        stage.log(done, **record, **meter.report(0.0))

    return step


def bare_step(
    device: torch.device, shape: dict[str, Any], batch: Batch, precision: Precision, compiled: bool
) -> Step:
    """A loop of a few lines around the same module."""
    model = build({"family": "gpt2", **shape, "bos": 0}, seed=0).to(device).train()
    assert isinstance(model, Decoder)
    if compiled and not model.is_faster_uncompiled(device, precision):
        model.compile()
    settings = OptimizerSettings()
    groups = parameter_groups(model, settings)
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, fused=True)
    parameters = list(model.parameters())

    def step() -> float:
        # The same kernels as in training: what differs is the loop alone.
        with (
            native.allowed(),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            loss = -model(batch.x).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def transformers_step(
    device: torch.device, shape: dict[str, Any], batch: Batch, precision: Precision, compiled: bool
) -> Step | None:
    """As a tutorial would write it: Accelerator.prepare, torch's AdamW, loss from labels."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    from chainrule.pipeline.training.engine import plain_accelerator

    config = GPT2Config(
        vocab_size=shape["vocabulary_size"],
        n_positions=shape["context"],
        n_embd=shape["width"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = GPT2LMHeadModel(config).train()
    if compiled:
        model.compile()
    accelerator = plain_accelerator(device, precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step() -> float:
        loss = model(input_ids=batch.x, labels=batch.x).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


def take_turns(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after two rounds of warm-up.

    Every second round goes the other way about: who comes after a large one finds the caches empty.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in list(steps.items())[:: 1 if turn % 2 else -1]:
            synchronise(device)
            began = time.perf_counter()
            step()
            synchronise(device)
            if turn >= 2:
                times[name].append(time.perf_counter() - began)
    return times


def ratio(numerator: list[float], denominator: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
