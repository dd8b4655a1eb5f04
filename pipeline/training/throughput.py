"""How fast it goes, beside what the machine could do."""

import itertools
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from chainrule.pipeline.devices import synchronise
from chainrule.pipeline.models import native, native_product
from chainrule.pipeline.models.contract import Autoregressive

PEAK_WITHIN_S = 0.4
CHECKPOINT_SHARE = 0.05
"""What checkpoints may take of the time from one to the next."""
SHORT_STALL_S = 0.5
"""A stall that nobody notices, whatever its share is."""


def flops_per_element(model: Autoregressive) -> float:
    """Floating point operations of forward and backward for one element of an event.

    Transformers: 6N + 12 L d T (Chowdhery et al. 2022, appendix B): N weights that are
    multiplied with (no embedding tables, but the output layer), L layers of width d, T
    elements. The attention term counts the whole square, though causality needs half of it.
    A caption's tokens are inputs of which nothing is predicted: they are divided among the
    elements. Others: counted on one event by torch's FlopCounterMode, backward as twice the
    forward.
    """
    config = model.config
    length = torch.Size(model.event_shape).numel()
    if hasattr(config, "layers") and hasattr(config, "heads"):
        inputs = config.inputs
        head = multiplied_weights(model.head)  # type: ignore[arg-type]
        weights = multiplied_weights(model) - head
        of_input = 6.0 * weights + 12.0 * config.layers * config.width * inputs
        return of_input * inputs / length + 6.0 * head
    device = next(model.parameters()).device
    if getattr(config, "vocabulary_size", None) is None:
        x = torch.zeros(1, *model.event_shape, device=device)
    else:
        x = torch.zeros(1, *model.event_shape, dtype=torch.long, device=device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), counter:
        model(x)
    return 3.0 * counter.get_total_flops() / length


def multiplied_weights(model: nn.Module) -> int:
    """Elements of the weight matrices that take part in a product for each element."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    total = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    total -= sum(table.numel() for table in tables)
    positions = getattr(model, "positions", None)
    if isinstance(positions, nn.Parameter):
        total -= positions.numel()
    head = getattr(getattr(model, "head", None), "weight", None)
    if any(head is table for table in tables):
        total += head.numel()  # type: ignore[union-attr]  # tied: looked up and multiplied with
    return total


def measured_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large square matrix product here and now; a few tenths of a second.

    The best of many: on a machine that others use as well, a small one ends between two of them.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    sizes = (8192,) if device.type == "cuda" else (512, 1024)
    factors = [torch.ones(size, size, dtype=dtype, device=device) for size in sizes]
    multiply: list[Callable[[Tensor, Tensor], Tensor]] = [torch.matmul]
    with native.allowed():
        if native_product.ready(factors[0], factors[0]):
            multiply.append(native_product.product)
    best = 0.0
    until = time.perf_counter() + PEAK_WITHIN_S
    while time.perf_counter() < until or best == 0.0:
        for a, way in itertools.product(factors, multiply):
            synchronise(device)
            began = time.perf_counter()
            way(a, a)
            synchronise(device)
            best = max(best, 2.0 * len(a) ** 3 / (time.perf_counter() - began))
    return best


def memory_gb(device: torch.device) -> float:
    """Most memory used so far, in GB (10^9 bytes): of the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


class Meter:
    """Rates over the steps since the last report. Time spent on other things is left out."""

    def __init__(self, flops_per_element: float, peak: float) -> None:
        """`peak`: FLOP/s of all ranks together."""
        self._flops, self._peak = flops_per_element, peak
        self._elements = 0.0
        self._began = time.perf_counter()
        self._left_out: dict[str, float] = {}
        self._stalled_before = 0.0
        self._checkpointed = self._began
        self.checkpoint_share = 0.0
        """Of the time from the end of one checkpoint to that of the next, the last time."""

    def step(self, elements: float) -> None:
        self._elements += elements

    @contextmanager
    def leaving_out(self, what: str) -> Iterator[None]:
        """Time inside is no part of training speed; it is reported as `<what>_s`."""
        began = time.perf_counter()
        yield
        now = time.perf_counter()
        self._left_out[what] = self._left_out.get(what, 0.0) + now - began
        if what == "checkpoint":
            self.checkpoint_share = (now - began) / max(now - self._checkpointed, 1e-9)
            self._checkpointed = now

    def report(self, data_stalled: float) -> dict[str, float]:
        """Rates since the last report; `data_stalled` is the loader's total of seconds.

        `data_stall` is the share of training time that was waiting for data; a checkpoint
        made since the last report shows as `checkpoint_s`, the seconds that training stood, and
        `checkpoint_share`, what that is of the time since the checkpoint before.
        """
        now = time.perf_counter()
        spent = max(now - self._began - sum(self._left_out.values()), 1e-9)
        rate = self._elements / spent
        # What is done cannot be more than what could be: the measurement was disturbed.
        self._peak = max(self._peak, rate * self._flops)
        stalled = max(data_stalled - self._stalled_before, 0.0)
        found = {
            "tokens_per_second": rate,
            "model_flops_per_second": rate * self._flops,
            "peak_share": rate * self._flops / self._peak,
            "data_stall": stalled / spent,
            **{f"{what}_s": seconds for what, seconds in self._left_out.items()},
        }
        if "checkpoint" in self._left_out:
            found["checkpoint_share"] = self.checkpoint_share
        self._elements, self._began = 0.0, now
        self._left_out.clear()
        self._stalled_before = data_stalled
        return found


def checkpoints_too_dear(record: dict[str, float]) -> str | None:
    """What to say where a report's checkpoint held up training for longer than it may."""
    share, seconds = record.get("checkpoint_share", 0.0), record.get("checkpoint_s", 0.0)
    if share <= CHECKPOINT_SHARE or seconds < SHORT_STALL_S:
        return None
    return (
        f"a checkpoint held up training for {seconds:.1f} s, {share:.0%} of the time since the one "
        f"before (more than {CHECKPOINT_SHARE:.0%}): raise checkpoint_every, or write to a faster "
        "disk"
    )


def progress_line(record: dict[str, float], checkpoint_share: float) -> dict[str, str]:
    """What stands beside the bar, short enough for a line of a terminal.

    The two stalls are shares of the time: waiting for data, then for the last checkpoint.
    """
    mantissa, exponent = f"{record['learning_rate']:.1e}".split("e")
    return {
        "loss": f"{record['loss']:.4g}",
        "grad": f"{record['gradient_norm']:.2g}",
        "lr": f"{mantissa}e{int(exponent)}",
        "tok/s": _in_thousands(record["tokens_per_second"]),
        "peak": f"{record['peak_share']:.0%}",
        "GB": f"{record['memory_gb']:.3g}",
        "stall": f"{record['data_stall']:.0%}+{checkpoint_share:.0%}",
    }


def _in_thousands(value: float) -> str:
    """Three digits: 987, 12.3k, 1.23M."""
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"
