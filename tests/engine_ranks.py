"""One rank of the tests of `pipeline.training.engine`: several trainings, one after another.

Not a test file; `test_training_engine.py` starts it, one process a rank, with a list of
trainings as JSON, and reads a JSON line from rank 0.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from chainrule.pipeline.training import engine as engine_file
from chainrule.pipeline.training.checkpoints import Checkpoint, CheckpointWriter, step_folder
from chainrule.pipeline.training.engine import Engine, EngineSettings
from chainrule.pipeline.training.optimizers import (
    OptimizerSettings,
    build_optimizer,
    set_learning_rate,
)

BATCH, LENGTH, VALUES = 12, 9, 33


class Toy(nn.Module):
    """Odd sizes, so that no shard ends where a parameter does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VALUES, 31)
        self.blocks = nn.ModuleList(nn.Linear(31, 31) for _ in range(3))
        self.norm = nn.LayerNorm(31)
        self.head = nn.Linear(31, VALUES)
        self.register_buffer("order", torch.arange(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embedding(x)
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return torch.log_softmax(self.head(self.norm(h)).float(), dim=-1)


def allow_fp16() -> None:
    """fp16 on a CPU: too slow to be of use, and enough to see what the loss scale does."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True
    engine_file.check_combination = lambda *_: None  # type: ignore[assignment]


def rows(step: int, rank: int, world_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(VALUES, (BATCH, LENGTH), generator=generator)
    share = BATCH // world_size
    return x[rank * share : (rank + 1) * share]


def train(
    strategy: str,
    steps: int,
    precision: str = "fp32",
    accumulate: int = 1,
    folder: str | None = None,
    save_at: int | None = None,
    resume: int | None = None,
    veto_at: int | None = None,
    nan_at: int | None = None,
    ema: float | None = None,
    optimizer: str = "adamw",
    scaler: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Losses, gradient norms and faults by step; the loss of the averaged weights at the end."""
    torch.manual_seed(0)
    settings = OptimizerSettings(name=optimizer, learning_rate=1e-2)  # type: ignore[arg-type]
    with Engine(EngineSettings(strategy=strategy), precision) as engine:  # type: ignore[arg-type]
        engine.prepare(Toy(), lambda model: build_optimizer(model, settings))
        poison = torch.ones((), requires_grad=False)

        def objective(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            log_p = model(x[:, :-1]).gather(-1, x[:, 1:, None]).squeeze(-1)
            return -log_p.sum() * poison, -log_p.detach().sum()

        for name, value in (scaler or {}).items():  # DeepSpeed's, of fp16
            setattr(engine._zero.loss_scaler, name, value)
        if ema is not None:
            engine.keep_average(ema)
        first = 0
        if resume is not None:
            checkpoint = Checkpoint.open(step_folder(Path(str(folder)), resume))
            engine.restore(checkpoint)
            first = checkpoint.step
        writer = None
        if save_at is not None:
            writer = CheckpointWriter(Path(str(folder)), engine.rank, engine.world_size)
        engine.barrier()
        updates, scales = [], []
        for step in range(first, steps):
            set_learning_rate(engine.optimizer, 1 - step / 50)
            poison.fill_(float("nan") if step == nan_at else 1.0)
            update = engine.update(
                rows(step, engine.rank, engine.world_size).chunk(accumulate),
                objective,
                BATCH * (LENGTH - 1),
                lambda loss, step=step: "veto" if step == veto_at else None,
            )
            updates.append([update.loss, update.gradient_norm, update.applied, update.fault])
            scales.append(update.loss_scale)
            if writer is not None and step + 1 == save_at:
                tensors, scalars = engine.export()
                writer.save(step + 1, tensors, {"step": step + 1, "engine": scalars}, None)
        if writer is not None:
            writer.wait()
        poison.fill_(1.0)
        found: dict[str, Any] = {"updates": updates, "scales": scales, "rank": engine.rank}
        if ema is not None:
            with engine.averaged(), torch.no_grad():
                nats = objective(engine.wrapped, rows(99, engine.rank, engine.world_size))[1]
                (found["averaged"],) = engine.sum(nats.item())
        engine.barrier()
    return found


def main() -> None:
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")  # one for all engines
    for task in json.loads(sys.argv[1]):
        if task.get("precision") == "fp16":
            allow_fp16()
        result = train(**task)
        if result["rank"] == 0:
            print(json.dumps(result), flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    # DeepSpeed's threads may abort the interpreter's own exit, after all work is done.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
