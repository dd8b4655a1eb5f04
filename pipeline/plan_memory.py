"""Memory of a training on paper: what lies where, in bytes of one rank.

States (Rajbhandari et al. 2020, ZeRO, section 3.1; this project's engine, engine.py): N
parameters, n ranks, w bytes a weight (4 in fp32, 2 in bf16 or fp16).

    strategy      weights  gradients  masters  AdamW    moving average
    single, ddp   4N       4N         -        8N       4N      autocast: + 2N of cast weights
    zero0         4N       4N         -        8N       4N      (fp32 only)
    zero1         wN       wN         4N/n     8N/n     4N/n    + 4N/n of gradients in a step
    zero2         wN       wN/n       4N/n     8N/n     4N/n    + a bucket of gradients
    zero3         wN/n     wN/n       4N/n     8N/n     4N/n    + the weights gathered at once

Activations are not estimated by a formula but counted: the model is run on torch's meta
device (shapes without memory) with one layer and with two, and what autograd keeps is added
up. On a GPU attention is counted as the fused kernels keep it: q, k, v, the output and one
number a row (Dao et al. 2022, section 3.1), never the T x T matrix. On a CPU the very operations
of a CPU are run on shapes, autocast included (`plan_paper.py`); what torch holds at the peak is
met within a percent, and what the process takes is a quarter more: freed tensors leave holes in
the heap (measured in tests/test_pipeline_plan.py; gone with MALLOC_MMAP_THRESHOLD_=1048576, which
costs a quarter of the speed).
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from chainrule.pipeline.config import Settings
from chainrule.pipeline.models.kv_cache import SPARE, slots_of
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.sampling.int8 import quantise
from chainrule.pipeline.training.optimizers import OptimizerSettings, parameter_groups

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size: gradients that are on their way at once."""
HOLES = 0.37
"""Bytes in holes of the heap for each byte of activations in tensors that lie there: between 0.25
and 0.57 in 24 runs of three trainings of 3 to 13 M parameters, medians 0.28, 0.36 and 0.40."""
MAPPED_FROM = 32 << 20
"""glibc's DEFAULT_MMAP_THRESHOLD_MAX: from here on a tensor is never of the heap."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: weights gathered at once."""


@dataclass(frozen=True)
class Scheme:
    """How a training is spread: the choices that decide its memory."""

    strategy: str = "single"
    precision: str = "fp32"
    ranks: int = 1
    rows: int = 1
    """Sequences in one micro-batch of one rank."""
    checkpointing: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    moments: float = 2.0
    """Numbers that the optimiser keeps a parameter: 2 for AdamW, 1 for Muon's matrices."""
    average: bool = False
    whole_matrices: bool = False
    """Muon's updates need them: what ZeRO 1 to 3 cut into pieces cannot be trained by it."""

    @property
    def stage(self) -> int | None:
        return int(self.strategy[-1]) if self.strategy.startswith("zero") else None


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, on its device, and what offloading puts into the host's memory."""

    parameters: int
    gradients: int
    optimizer: int
    """Masters, moments and the moving average."""
    buffers: int
    """Buckets on their way, weights gathered, cast copies; on a CPU, holes of the heap."""
    activations: int
    host: int = 0

    @property
    def states(self) -> int:
        """Parameters, gradients and optimiser."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def device(self) -> int:
        return self.states + self.buffers + self.activations


def training_memory(parameters: int, scheme: Scheme, activations: int, heap: int = 0) -> Memory:
    """Where the bytes of a training lie; `activations` and `heap` as `Activations` counts them."""
    n, ranks, stage = parameters, scheme.ranks, scheme.stage
    weight = WEIGHT_BYTES[scheme.precision]
    kept = 4 * scheme.moments + (4 if scheme.average else 0)
    if not stage:  # single, ddp, zero0: all in fp32; autocast keeps cast copies of the weights
        buffers = weight * n if scheme.precision != "fp32" else 0
        return Memory(4 * n, 4 * n, int(kept * n), buffers + heap, activations)
    shard = -(-n // ranks)
    optimizer = int((4 + kept) * shard)  # masters, also in fp32: DeepSpeed copies its partition
    weights, gradients = weight * n, weight * n
    buffers = heap + 4 * shard  # the partition's gradients in fp32 while it steps
    host = 0
    if stage >= 2:
        gradients = weight * shard
        buffers += weight * min(n, BUCKET_ELEMENTS)
    if stage == 3:
        weights = weight * shard
        buffers += weight * min(n, LIVE_ELEMENTS)
    if scheme.offload_optimizer:
        host += optimizer + 4 * shard
        optimizer, buffers = 0, buffers - 4 * shard
    if scheme.offload_parameters:
        host, weights = host + weights, 0
    return Memory(weights, gradients, optimizer, buffers, activations, host)


# --- activations --------------------------------------------------------------------------


def kept_for_backward(config: Settings, rows: int, precision: str, gpu: bool = True) -> list[int]:
    """Bytes of each tensor that autograd keeps of a forward pass of `rows` events, without the
    weights."""
    from chainrule.pipeline.plan_paper import FusedAttention, Kept, on_cpu, on_gpu

    with torch.device("meta"):
        model = build(config)
    vocabulary = getattr(config, "vocabulary_size", None)
    with contextlib.ExitStack() as stack:
        if gpu:
            model.to("meta", DTYPES[precision])  # buffers made from numpy arrays too
            dtype = torch.long if vocabulary is not None else DTYPES[precision]
            x = torch.zeros(rows, *model.event_shape, dtype=dtype, device="meta")
            stack.enter_context(on_gpu())
            stack.enter_context(FusedAttention())
        else:
            stack.enter_context(on_cpu(precision))
            model.to_empty(device="cpu")
            dtype = torch.long if vocabulary is not None else torch.float32
            x = torch.zeros(rows, *model.event_shape, dtype=dtype)
        kept = stack.enter_context(Kept(model))
        model.train()
        model.log_prob(x).sum()
    return kept.sizes()


@dataclass(frozen=True)
class Activations:
    """Bytes kept for backward: what each layer keeps, and the rest; for one row."""

    layers: int
    layer: int
    rest: int
    boundary: int
    """What a checkpointed layer keeps: its input."""
    logits: int
    """Gradients of the logits and of their logarithms, in float32, beside them for a moment."""
    sizes: tuple[int, ...] = ()
    """On a CPU: bytes of the single tensors."""

    @classmethod
    def count(cls, config: Settings, precision: str, gpu: bool = True) -> "Activations":
        """Run the model's shapes. A decoder with one and with two layers; others whole."""
        vocabulary = getattr(config, "vocabulary_size", None) or 0
        length = int(torch.Size(_event_shape(config)).numel())
        logits = 2 * 4 * length * vocabulary
        if not hasattr(config, "layers") or not hasattr(config, "width"):
            whole, sizes = _a_row(config, precision, gpu)
            return cls(0, 0, whole, 0, logits, sizes)
        (one, _), (two, sizes) = (
            _a_row(config.model_copy(update={"layers": n}), precision, gpu) for n in (1, 2)
        )
        boundary = WEIGHT_BYTES[precision] * getattr(config, "inputs", length) * config.width
        return cls(config.layers, two - one, 2 * one - two, boundary, logits, sizes)

    def of(self, rows: int, checkpointing: bool) -> int:
        """Bytes at the start of backward, which is the most."""
        if checkpointing and self.layers:
            each = self.layers * self.boundary + self.layer + self.rest
        else:
            each = self.layers * self.layer + self.rest
        return rows * (each + self.logits)

    def heap(self, rows: int, checkpointing: bool) -> int:
        """On a CPU: what lies idle in the holes of the heap. Tensors that the C library maps on
        their own (32 MiB or more each) leave none."""
        if not self.sizes:
            return 0
        small = sum(size for size in self.sizes if size * rows < MAPPED_FROM) / sum(self.sizes)
        return heap_of(int(small * self.of(rows, checkpointing)))


def heap_of(activations: int) -> int:
    """What so many bytes of small tensors leave idle in the heap."""
    return int(HOLES * activations)


def _a_row(config: Settings, precision: str, gpu: bool) -> tuple[int, tuple[int, ...]]:
    """Bytes kept for one row more; of the single tensors on a CPU."""
    one = kept_for_backward(config, 1, precision, gpu)
    if gpu:
        return sum(one), ()
    two = kept_for_backward(config, 2, precision, gpu)  # without casts of weights and masks
    return sum(two) - sum(one), tuple(one)


def _event_shape(config: Settings) -> tuple[int, ...]:
    with torch.device("meta"):
        small = config.model_copy(update={"layers": 1}) if hasattr(config, "layers") else config
        return tuple(build(small).event_shape)


def parameter_count(config: Settings) -> int:
    """Parameters of a model, exactly, without its memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(config).parameters())


def drawing_weights(config: Settings, dtype: str) -> int:
    """Bytes of the weights that samples are drawn with: float32, bfloat16 or int8."""
    with torch.device("meta"):
        model = build(config)
        if dtype == "int8":
            quantise(model)
        else:
            model.to(getattr(torch, dtype))
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def kv_cache_bytes(config: Settings, batch: int, precision: str) -> int | None:
    """2 · layers · kv_heads · head_width · slots · bytes, as the sampler's cursor holds them; None
    for what is no decoder."""
    if not hasattr(config, "kv_heads"):
        return None
    slots = slots_of(config, SPARE)  # type: ignore[arg-type]
    each = 2 * config.layers * config.kv_heads * config.head_width  # type: ignore[attr-defined]
    return batch * each * slots * WEIGHT_BYTES[precision]


def moments_a_parameter(model: nn.Module, optimizer: OptimizerSettings) -> float:
    """Numbers that the optimiser keeps a parameter, on average: Muon has one for its matrices."""
    groups = parameter_groups(model, optimizer)
    sizes = [
        (sum(p.numel() for p in group["params"]), 1 if group.get("muon") else 2) for group in groups
    ]
    return sum(n * kept for n, kept in sizes) / sum(n for n, _ in sizes)
