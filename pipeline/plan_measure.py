"""What a plan says, measured: real steps of one process, their time and their memory."""

import time
from typing import Any

import torch

from chainrule.pipeline.config import RequestError
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.training.optimizers import OptimizerSettings, build_optimizer

LARGEST_HERE = 400_000_000
"""Parameters above which steps are not tried on a CPU."""


def seconds_per_step(config: Any, precision: str, rows: int, steps: int) -> tuple[float, str]:
    """Seconds of one update on `rows` events, the mean of `steps` after a first; and the device.

    RequestError where the model is too large to be tried here.
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(config).parameters())
    if not gpu and parameters > LARGEST_HERE:
        raise RequestError(
            f"{parameters / 1e6:,.0f}M parameters are too many to calibrate on this CPU; "
            "calibrate on a node with a GPU"
        )
    step = training_step(config, precision, rows, device)
    step()
    _synchronise(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    _synchronise(device)
    name = torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads"
    return (time.perf_counter() - began) / steps, name


def training_step(config: Any, precision: str, rows: int, device: torch.device) -> Any:
    """A callable that makes one plain update of a fresh model on random events."""
    model = build(config, seed=0).to(device).train()
    optimizer = build_optimizer(model, OptimizerSettings())
    vocabulary = getattr(config, "vocabulary_size", None)
    generator = torch.Generator().manual_seed(0)
    if vocabulary is None:
        x = torch.randn(rows, *model.event_shape, generator=generator).to(device)
    else:
        x = torch.randint(vocabulary, (rows, *model.event_shape), generator=generator).to(device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = -model.log_prob(x).mean()
        loss.backward()
        optimizer.step()

    return step


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
