"""What a plan says, measured: real steps of one process, their time and their memory."""

import contextlib
import ctypes
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chainrule.pipeline.config import RequestError
from chainrule.pipeline.devices import synchronise
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.training.optimizers import OptimizerSettings, build_optimizer

LARGEST_HERE = 400_000_000
"""Parameters above which steps are not tried on a CPU."""


@dataclass(frozen=True)
class Measured:
    """A few real updates of one process."""

    device: str
    seconds: float
    """An update, the mean over all but the first."""
    memory: int
    """Bytes at the peak, over what the process held before."""


def measure(
    config: Any,
    precision: str,
    rows: int,
    steps: int,
    optimizer: OptimizerSettings | None = None,
) -> Measured:
    """Make `steps` updates on `rows` events after a first; RequestError if it is too large here."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(config).parameters())
    if not gpu and parameters > LARGEST_HERE:
        raise RequestError(
            f"{parameters / 1e6:,.0f}M parameters are too many to calibrate on this CPU; "
            "calibrate on a node with a GPU"
        )
    before = _begin_peak(device)
    step = training_step(config, precision, rows, device, optimizer)
    step()
    synchronise(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise(device)
    seconds = (time.perf_counter() - began) / steps
    name = torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads"
    return Measured(name, seconds, _peak(device) - before)


def _begin_peak(device: torch.device) -> int:
    """Bytes held now; the peak is counted anew from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # what was freed before would be taken again without being seen: back to the kernel with it
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    # resets VmHWM to VmRSS; where it may not, the peak so far stands
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """A size in bytes from /proc/self/status (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def training_step(
    config: Any,
    precision: str,
    rows: int,
    device: torch.device,
    settings: OptimizerSettings | None = None,
) -> Any:
    """A callable that makes one plain update of a fresh model on random events."""
    model = build(config, seed=0).to(device).train()
    optimizer = build_optimizer(model, settings or OptimizerSettings())
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
