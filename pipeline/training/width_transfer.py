"""Does a learning rate found at a small width hold at larger ones? `chainrule bench width`.

Decoders of several widths are trained from the same seed on the same bytes at a row of learning
rates, once with `base_width` (µP) and once without. Under µP the best rate stays where it is
(Yang et al. 2022, "Tensor Programs V", figure 1); without, it falls as the width grows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.training.optimizers import (
    OptimizerSettings,
    build_optimizer,
    set_learning_rate,
)
from chainrule.pipeline.training.schedules import ScheduleSettings

CONTEXT, HEAD_WIDTH, LAYERS = 64, 16, 2
WAYS = ("µP", "standard")


@dataclass(frozen=True)
class Run:
    """One training: the mean loss, in nats, of its last tenth."""

    way: str
    width: int
    learning_rate: float
    loss: float


def decoder(width: int, base_width: int | None) -> Autoregressive:
    """A small LLaMA over bytes."""
    return build(
        "llama-debug",
        seed=0,
        vocabulary_size=256,
        context=CONTEXT,
        layers=LAYERS,
        width=width,
        heads=width // HEAD_WIDTH,
        kv_heads=width // HEAD_WIDTH,
        head_width=HEAD_WIDTH,
        mlp_width=2 * width,
        base_width=base_width,
    )


def train(
    model: Autoregressive, batches: Callable[[int], Tensor], steps: int, learning_rate: float
) -> list[float]:
    """AdamW, a tenth of warm-up, then a line to nothing; the loss of each step."""
    optimizer = build_optimizer(
        model, OptimizerSettings(learning_rate=learning_rate, weight_decay=0.0)
    )
    schedule = ScheduleSettings(name="linear", warmup=max(1, steps // 10), floor=0.0)
    losses = []
    for step in range(steps):
        set_learning_rate(optimizer, schedule.factor(step, steps))
        loss = -model.log_prob(batches(step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def sweep(
    text: bytes,
    widths: Sequence[int],
    rates: Sequence[float],
    steps: int,
    batch: int,
    report: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Every width at every rate, both ways; the first width is the base."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def batches(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(data) - CONTEXT, (batch,), generator=generator)
        return torch.stack([data[s : s + CONTEXT] for s in starts.tolist()]).long()

    runs = []
    for way in WAYS:
        for width in widths:
            for rate in rates:
                model = decoder(width, widths[0] if way == "µP" else None)
                losses = train(model, batches, steps, rate)
                last = losses[-max(1, steps // 10) :]
                loss = sum(last) / len(last)
                runs.append(Run(way, width, rate, loss if math.isfinite(loss) else math.inf))
                report(runs[-1])
    return runs


def best_rates(runs: Sequence[Run]) -> dict[str, dict[int, float]]:
    """way -> width -> the learning rate with the lowest loss."""
    best: dict[tuple[str, int], Run] = {}
    for run in runs:
        known = best.get((run.way, run.width))
        if known is None or run.loss < known.loss:
            best[run.way, run.width] = run
    found: dict[str, dict[int, float]] = {}
    for (way, width), run in best.items():
        found.setdefault(way, {})[width] = run.learning_rate
    return found


def picture(runs: Sequence[Run], path: Path) -> None:
    """Loss against learning rate, a curve a width, a panel a way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(WAYS), sharey=True)
    for axis, way in zip(axes, WAYS, strict=True):
        for width in sorted({run.width for run in runs}):
            some = [run for run in runs if run.way == way and run.width == width]
            some.sort(key=lambda run: run.learning_rate)
            axis.plot([r.learning_rate for r in some], [r.loss for r in some], ".-", label=width)
        axis.set_xscale("log", base=2)
        axis.set_title(way)
        axis.set_xlabel("learning rate")
    axes[0].set_ylabel("nats a byte, last tenth of the steps")
    axes[0].legend(title="width")
    figure.savefig(path, dpi=120, metadata={"Software": None})
