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
up. Attention is counted as the fused kernels keep it: q, k, v, the output and one number a
row (Dao et al. 2022, section 3.1), never the T x T matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from chainrule.pipeline.config import Settings
from chainrule.pipeline.models.registry import build

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size: gradients that are on their way at once."""
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
    moments: int = 2
    """Numbers that the optimiser keeps a parameter: 2 for AdamW, 1 for Muon's matrices."""
    average: bool = False

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
    """Buckets on their way, weights gathered, cast copies."""
    activations: int
    host: int = 0

    @property
    def states(self) -> int:
        """Parameters, gradients and optimiser."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def device(self) -> int:
        return self.states + self.buffers + self.activations


def training_memory(parameters: int, scheme: Scheme, activations: int) -> Memory:
    """Where the bytes of a training lie; `activations` as `Activations.of` counts them."""
    n, ranks, stage = parameters, scheme.ranks, scheme.stage
    weight = WEIGHT_BYTES[scheme.precision]
    kept = 4 * scheme.moments + (4 if scheme.average else 0)
    if not stage:  # single, ddp, zero0: all in fp32; autocast keeps cast copies of the weights
        buffers = weight * n if scheme.precision != "fp32" else 0
        return Memory(4 * n, 4 * n, kept * n, buffers, activations)
    shard = -(-n // ranks)
    optimizer = (4 + kept) * shard  # masters, also in fp32: DeepSpeed copies its partition
    weights, gradients = weight * n, weight * n
    buffers = 4 * shard  # the partition's gradients in fp32 while it steps
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


class _FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel keeps it for backward."""

    def __torch_function__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("only shapes are run through here")


def kept_for_backward(config: Settings, rows: int, precision: str) -> int:
    """Bytes that autograd keeps of a forward pass of `rows` events, weights left out."""
    with torch.device("meta"):
        model = build(config)
        model.to("meta", DTYPES[precision])  # buffers made from numpy arrays too
        vocabulary = getattr(config, "vocabulary_size", None)
        dtype = torch.long if vocabulary is not None else DTYPES[precision]
        x = torch.zeros(rows, *model.event_shape, dtype=dtype)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = tensor
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), _FusedAttention():
        model.log_prob(x).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@dataclass(frozen=True)
class Activations:
    """Bytes kept for backward: what each layer keeps, and the rest; for one row."""

    layers: int
    layer: int
    rest: int
    boundary: int
    """What a checkpointed layer keeps: its input."""
    logits: int
    """The gradient of the logits, in float32, which lies beside them for a moment."""

    @classmethod
    def count(cls, config: Settings, precision: str) -> "Activations":
        """Run the model's shapes. A decoder with one and with two layers; others whole."""
        vocabulary = getattr(config, "vocabulary_size", None) or 0
        length = int(torch.Size(_event_shape(config)).numel())
        if not hasattr(config, "layers") or not hasattr(config, "width"):
            return cls(0, 0, kept_for_backward(config, 1, precision), 0, 4 * length * vocabulary)
        one, two = (
            kept_for_backward(config.model_copy(update={"layers": n}), 1, precision) for n in (1, 2)
        )
        boundary = WEIGHT_BYTES[precision] * length * config.width
        logits = 4 * length * vocabulary
        return cls(config.layers, two - one, 2 * one - two, boundary, logits)

    def of(self, rows: int, checkpointing: bool) -> int:
        """Bytes at the start of backward, which is the most."""
        if checkpointing and self.layers:
            each = self.layers * self.boundary + self.layer + self.rest
        else:
            each = self.layers * self.layer + self.rest
        return rows * (each + self.logits)


def _event_shape(config: Settings) -> tuple[int, ...]:
    with torch.device("meta"):
        small = config.model_copy(update={"layers": 1}) if hasattr(config, "layers") else config
        return tuple(build(small).event_shape)


def parameter_count(config: Settings) -> int:
    """Parameters of a model, exactly, without its memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(config).parameters())


def kv_cache_bytes(config: Settings, batch: int, precision: str) -> int | None:
    """2 · layers · kv_heads · head_width · positions · bytes; None for what is no decoder."""
    if not hasattr(config, "kv_heads"):
        return None
    length = int(torch.Size(config.event_shape).numel())  # type: ignore[attr-defined]
    each = 2 * config.layers * config.kv_heads * config.head_width  # type: ignore[attr-defined]
    return batch * each * length * WEIGHT_BYTES[precision]
