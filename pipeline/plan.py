"""`chainrule plan`: what a pipeline will take, on paper, before anything is queued.

For each stage, from its settings and `resources` alone (and from what its inputs published,
where they have run): parameters, memory a rank under every way of spreading it, FLOPs,
hours, shards and disk; what does not fit, and the smallest change that would.
"""

import math
from dataclasses import dataclass
from typing import Any

from chainrule.pipeline.config import RequestError, nearest
from chainrule.pipeline.graph import Pipeline, StageSpec
from chainrule.pipeline.plan_inputs import (
    assumed,
    from_tokens,
    image_shape,
    model_of,
    published,
    ranks_of,
    rows_of,
    unsettled,
)

BYTES_OF = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
"""Slurm's suffixes of --mem."""


@dataclass(frozen=True)
class Device:
    """A kind of GPU: memory in bytes, dense peak FLOP/s by precision (vendors' data sheets)."""

    memory: float
    fp32: float
    bf16: float

    def peak(self, precision: str) -> float:
        return self.fp32 if precision == "fp32" else self.bf16


DEVICES = {
    "v100": Device(32e9, 15.7e12, 125e12),  # fp16; it has no bf16
    "a10": Device(24e9, 31.2e12, 125e12),
    "l40s": Device(48e9, 91.6e12, 362e12),
    "a100-40": Device(40e9, 19.5e12, 312e12),
    "a100": Device(80e9, 19.5e12, 312e12),
    "h100": Device(80e9, 67e12, 989e12),
    "h200": Device(141e9, 67e12, 989e12),
    "b200": Device(180e9, 75e12, 2250e12),
    "mi300x": Device(192e9, 163e12, 1307e12),
}
RESERVED = 0.07
"""Share of a GPU's memory that the driver, the libraries and fragmentation take."""
UTILISATION = 0.4
"""Share of the peak that well-kept training loops reach on 100M to 7B decoders (ANCHORS: llm.c
124M 41 % on H100, OLMo-core 7B 47 %)."""


def plan(
    pipeline: Pipeline,
    utilisation: float = UTILISATION,
    gpu: str | None = None,
    calibrate: int = 0,
) -> list[dict[str, Any]]:
    """One plain dict a stage. `gpu` stands in for stages that name no gpu_type.

    With `calibrate`, so many real steps of each training run here, and the hours that follow
    are given too. RequestError for an unknown GPU or a utilisation outside (0, 1].
    """
    if not 0 < utilisation <= 1:
        raise RequestError(f"utilisation {utilisation:g}: a share of the peak, above 0, at most 1")
    known = {spec.resources.gpu_type for spec in pipeline.stages.values()} | {gpu}
    for name in sorted(known - {None, *DEVICES}, key=str):
        raise RequestError(f"unknown GPU '{name}'{nearest(str(name), list(DEVICES))}")
    return [
        _plan_of(pipeline, spec, utilisation, gpu, calibrate) for spec in pipeline.stages.values()
    ]


def _plan_of(
    pipeline: Pipeline, spec: StageSpec, utilisation: float, gpu: str | None, calibrate: int
) -> dict[str, Any]:
    resources = spec.resources
    found: dict[str, Any] = {
        "stage": spec.name,
        "job": spec.job,
        "nodes": resources.nodes,
        "ranks": ranks_of(spec),
        "gpu": (resources.gpu_type or gpu) if resources.gpus else None,
    }
    if spec.job == "pretrain":
        found |= _pretrain(pipeline, spec, found["gpu"], utilisation, calibrate)
    elif spec.job == "sample":
        found |= _sample(pipeline, spec)
    elif spec.job in ("ingest", "pretokenize"):
        found |= _shards(pipeline, spec.name)
    elif spec.job == "train_tokenizer" and spec.module.is_learned(spec.config):
        found |= _tokenizer(pipeline, spec, found["gpu"], utilisation)
    return found


# --- stages -------------------------------------------------------------------------------


def _shards(pipeline: Pipeline, stage: str) -> dict[str, Any]:
    index = published(pipeline, stage)
    if index is None:
        return {"shards": None, "note": "shards and bytes are known once it has run"}
    entries = index["shards"]
    found = {
        "shards": len(entries),
        "samples": sum(entry["samples"] for entry in entries),
        "bytes": sum(entry["bytes"] for entry in entries),
    }
    if index["kind"] == "tokens":
        found["tokens"] = sum(entry["tokens"] for entry in entries)
    return found


def _pretrain(
    pipeline: Pipeline, spec: StageSpec, gpu: str | None, utilisation: float, calibrate: int
) -> dict[str, Any]:
    import torch

    from chainrule.pipeline.models.registry import build
    from chainrule.pipeline.plan_memory import (
        Activations,
        Scheme,
        moments_a_parameter,
        parameter_count,
    )
    from chainrule.pipeline.plan_schemes import choices, option, remedy, words
    from chainrule.pipeline.training.throughput import flops_per_element

    config: Any = spec.config
    settled = from_tokens(pipeline, spec)
    if (open_still := unsettled(spec, settled)) is not None:
        return open_still
    model = model_of(spec, settled)
    ranks, rows = ranks_of(spec), rows_of(spec)
    with torch.device("meta"):
        built = build(model).to("meta")  # buffers made from numpy arrays too
    flops = flops_per_element(built)
    length = math.prod(built.event_shape)
    parameters = parameter_count(model)
    strategy = config.engine.strategy
    if strategy == "auto":
        strategy = "single" if ranks == 1 else "ddp"
    scheme = Scheme(
        strategy=strategy,
        precision=config.precision,
        ranks=ranks,
        rows=rows,
        checkpointing=config.engine.activation_checkpointing,
        offload_optimizer=config.engine.offload_optimizer != "none",
        offload_parameters=config.engine.offload_parameters != "none",
        moments=moments_a_parameter(built, config.optimizer),
        average=config.ema is not None,
        whole_matrices=config.optimizer.name == "muon",
    )
    activations = Activations.count(model, config.precision, gpu=spec.resources.gpus > 0)
    limit = _limit(spec, gpu)
    schemes = choices(scheme)
    if ranks == 1 and not spec.resources.gpus:  # nothing to spread, and no host beside it
        schemes = [c for c in schemes if c.strategy in ("single", scheme.strategy)]
    options = [option(parameters, choice, activations, limit) for choice in schemes]
    chosen = next(found for found in options if found["scheme"] == words(scheme))
    tokens = config.steps * config.batch_size * length
    peak = _peak(gpu, config.precision, ranks)
    checkpoint = round(parameters * 4 * (1 + scheme.moments + (config.ema is not None)))
    found: dict[str, Any] = {
        "model": model.model_dump(mode="json"),
        "parameters": parameters,
        "length": length,
        "assumed": assumed(spec, settled),
        "rows_per_micro_batch": scheme.rows,
        "tokens_per_step": config.batch_size * length,
        "tokens": tokens,
        "flops_per_token": flops,
        "flops": flops * tokens,
        "peak": peak,
        "utilisation": utilisation,
        "hours": flops * tokens / (peak * utilisation) / 3600,
        "tokens_per_day": peak * utilisation / flops * 86400,
        "memory": options,
        "chosen": chosen,
        "limit": limit,
        "checkpoint_bytes": checkpoint,
        "checkpoints_bytes": checkpoint * (config.keep + _kept_for_good(config)),
    }
    if limit is not None and chosen["total"] > limit:
        found["remedy"] = remedy(parameters, scheme, activations, limit)
    if calibrate:
        found |= _calibrated(model, config, scheme, parameters, calibrate)
    return found


def _tokenizer(
    pipeline: Pipeline, spec: StageSpec, gpu: str | None, utilisation: float
) -> dict[str, Any]:
    """A learned tokenizer: both networks, their optimisers, what is kept for backward."""
    from chainrule.pipeline.plan_memory import WEIGHT_BYTES, heap_of

    config: Any = spec.config
    data = spec.inputs["data"][0]
    image = image_shape(pipeline, data, config.crop)
    if image is None:
        return {
            "note": f"planned once '{data}' has run: the size of its images is not known "
            "(source.size, or crop here, would settle it)"
        }
    ranks, rows = ranks_of(spec), rows_of(spec)
    try:
        paper = spec.module.on_paper(config, *image)
    except (ValueError, RequestError) as error:
        raise RequestError(f"stage '{spec.name}': {error}") from None
    trained = paper.parameters + paper.discriminator
    activations = rows * paper.activations
    heap = 0 if spec.resources.gpus else heap_of(activations)
    buffers = paper.fixed + heap
    if ranks > 1:
        buffers += 4 * paper.parameters  # gradients as one message
    if config.precision != "fp32":
        buffers += WEIGHT_BYTES[config.precision] * trained
    average = 4 * paper.parameters if config.ema else 0
    memory = {
        "parameters": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained + average,
        "buffers": buffers,
        "activations": activations,
    }
    total, limit = sum(memory.values()), _limit(spec, gpu)
    peak = _peak(gpu, config.precision, ranks)
    flops = paper.training_flops(config)
    checkpoint = 12 * trained + average
    found = {
        "parameters": paper.parameters,
        "discriminator_parameters": paper.discriminator,
        "image": list(image),
        "rows_per_micro_batch": rows,
        "flops": flops,
        "flops_per_image": paper.flops_joined,
        "images": config.steps * config.batch_size,
        "peak": peak,
        "utilisation": utilisation,
        "hours": flops / (peak * utilisation) / 3600,
        "memory": {**memory, "total": total, "fits": limit is None or total <= limit},
        "limit": limit,
        "checkpoint_bytes": checkpoint,
    }
    if limit is not None and total > limit:
        states = total - activations - heap
        found["remedy"] = _fewer_rows(rows, limit - states, activations / rows)
    return found


def _fewer_rows(rows: int, left: float, each: float) -> str:
    """What a tokenizer's training that does not fit can change: it is not sharded."""
    fit = int(left // each)
    if fit < 1:
        return "fewer channels, or a smaller crop: not even one image fits"
    return f"accumulate or the ranks times {-(-rows // fit)} ({fit} images a rank fit at once)"


def _kept_for_good(config: Any) -> int:
    return config.steps // config.keep_every if config.keep_every else 0


def _peak(gpu: str | None, precision: str, ranks: int) -> float:
    """FLOP/s of all ranks; on a CPU, which they share, as measured here."""
    import torch

    from chainrule.pipeline.training.throughput import measured_peak

    if gpu is None:
        return measured_peak(torch.device("cpu"), precision)
    return DEVICES[gpu].peak(precision) * ranks


def _limit(spec: StageSpec, gpu: str | None) -> float | None:
    """Bytes that one rank may use; None where nothing says it."""
    if gpu is not None:
        return DEVICES[gpu].memory * (1 - RESERVED)
    memory = spec.resources.memory
    if memory is None:
        return None
    digits = memory.rstrip("BbKkMmGgTt")
    unit = memory[len(digits) :].upper().removesuffix("B") or "M"
    if not digits.isdecimal() or unit not in BYTES_OF:
        raise RequestError(f"stage '{spec.name}': memory '{memory}': write it as Slurm does: 64G")
    return int(digits) * BYTES_OF[unit] / (spec.resources.gpus or spec.resources.processes)


def _calibrated(
    model: Any, config: Any, scheme: Any, parameters: int, steps: int
) -> dict[str, Any]:
    """Hours and memory by a few real steps of one plain process on this machine."""
    import torch

    from chainrule.pipeline.plan_measure import measure
    from chainrule.pipeline.plan_memory import Activations, Scheme, training_memory

    found = measure(model, config.precision, scheme.rows, steps, config.optimizer)
    alone = Scheme(precision=config.precision, rows=scheme.rows, moments=scheme.moments)
    activations = Activations.count(model, config.precision, gpu=torch.cuda.is_available())
    of, heap = activations.of(scheme.rows, False), activations.heap(scheme.rows, False)
    predicted = training_memory(parameters, alone, of, heap)
    return {
        "calibrated_on": found.device,
        "calibrated_step_s": found.seconds,
        "calibrated_hours": found.seconds * config.accumulate * config.steps / 3600,
        "measured_memory": found.memory,
        "predicted_memory": predicted.device,
    }


def _sample(pipeline: Pipeline, spec: StageSpec) -> dict[str, Any]:
    """Memory of sampling: weights and the cache of keys and values."""
    from chainrule.pipeline.plan_memory import drawing_weights, kv_cache_bytes, parameter_count

    [name] = spec.inputs["model"]
    decoder = pipeline.stages[name].inputs["decoder"][0] if name in pipeline.stages else None
    if decoder not in pipeline.stages:
        return {"note": "its model lies outside this pipeline"}
    spec_of_model = pipeline.stages[decoder]
    settled = from_tokens(pipeline, spec_of_model)
    if (open_still := unsettled(spec_of_model, settled)) is not None:
        return open_still
    model = model_of(spec_of_model, settled)
    config: Any = spec.config
    activations = "fp32" if config.dtype == "float32" else "bf16"
    guided = 2 if config.guidance.scale != 1 else 1  # the unconditional rows beside them
    return {
        "parameters": parameter_count(model),
        "weights_bytes": drawing_weights(model, config.dtype),
        "kv_cache_bytes": kv_cache_bytes(model, config.batch_size * guided, activations),
        "samples": config.number,
    }
