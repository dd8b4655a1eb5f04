"""Plans against reality and against figures known from elsewhere."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from chainrule.jobs.sample import open_source
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.launch import Selection, decide
from chainrule.pipeline.models.folder import save
from chainrule.pipeline.models.kv_cache import SPARE
from chainrule.pipeline.models.registry import build, resolve
from chainrule.pipeline.pipeline_file import load_pipeline
from chainrule.pipeline.plan import plan
from chainrule.pipeline.plan_inputs import from_tokens
from chainrule.pipeline.plan_memory import (
    Activations,
    Scheme,
    drawing_weights,
    kv_cache_bytes,
    moments_a_parameter,
    parameter_count,
    training_memory,
)
from chainrule.pipeline.plan_schemes import choices, remedy
from chainrule.pipeline.plan_text import count, hours, size, text
from chainrule.pipeline.slurm import Profile
from chainrule.pipeline.submit import submit
from chainrule.pipeline.training.optimizers import OptimizerSettings, build_optimizer
from chainrule.tokenizers.vqgan import Discriminator, VQGANSettings, VQGANTokenizer

PIPELINE = """
name: small
stages:
  pictures: {job: ingest, source: {kind: image-folder, path: pictures, size: 256}}
  codes:
    job: train_tokenizer
    inputs: {data: pictures}
    tokenizer: {kind: vqgan, downsampling: 16, codebook_size: 1024}
    steps: 20000
  tokens: {job: pretokenize, inputs: {data: pictures, tokenizer: codes}}
  decoder:
    job: pretrain
    inputs: {tokens: tokens}
    model: {preset: llama-7b}
    precision: bf16
    steps: 1000
    batch_size: 512
    accumulate: 2
    engine: {strategy: zero1}
    resources: {nodes: 2, gpus: 8, gpu_type: h100}
  model: {job: handoff, inputs: {decoder: decoder, tokenizer: codes}}
  samples: {job: sample, inputs: {model: model}, number: 4, batch_size: 4}
"""


@pytest.fixture
def pipeline_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(PIPELINE)
    return path


def plan_of(stage: str, path: Path, overrides: list[str]) -> dict[str, Any]:
    [found] = [found for found in plan(load_pipeline(path, overrides)) if found["stage"] == stage]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("width", "layers"), [(512, 8), (640, 8), (768, 8)])
def test_states_are_within_a_tenth_of_what_a_process_takes(width: int, layers: int) -> None:
    """Parameters, gradients and optimiser on the CPU; activations kept small (8 elements)."""
    program = f"""
from chainrule.pipeline.models.registry import resolve
from chainrule.pipeline.plan_measure import measure
measure(resolve("gpt2-debug"), "fp32", 1, 1)  # what the libraries take is taken before
config = resolve("gpt2-debug", width={width}, layers={layers}, heads=8, context=8, event_shape=(8,),
                 vocabulary_size=1000)
print(measure(config, "fp32", 1, 1).memory)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    measured = int(done.stdout)
    config = resolve(
        "gpt2-debug",
        **{"width": width, "layers": layers, "heads": 8, "vocabulary_size": 1000},
        **{"context": 8, "event_shape": (8,)},
    )
    parameters = parameter_count(config)
    activations = Activations.count(config, "fp32", gpu=False)
    predicted = training_memory(parameters, Scheme(), activations.of(1, False))
    error = predicted.device / measured - 1
    print(
        f"{parameters / 1e6:.1f}M: {predicted.device} predicted, {measured} measured: {error:+.1%}"
    )
    assert predicted.states > 0.97 * predicted.device
    assert abs(error) < 0.1


def _measured(settings: dict, precision: str, rows: int, steps: int, **environment: str) -> int:
    program = f"""
from chainrule.pipeline.models.registry import resolve
from chainrule.pipeline.plan_measure import measure
measure(resolve("gpt2-debug"), "{precision}", 1, 1)
print(measure(resolve({settings!r}), "{precision}", {rows}, {steps}).memory)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "precision", "width", "rows"),
    [
        ("gpt2-debug", "bf16", 256, 16),
        ("llama-debug", "fp32", 384, 8),
        ("gpt2-debug", "fp32", 512, 8),
    ],
)
def test_activations_are_within_a_tenth_of_what_a_process_takes(
    preset: str, precision: str, width: int, rows: int
) -> None:
    """What torch holds at the peak, and with it the holes that the C library's heap gets."""
    settings = {
        **{"preset": preset, "width": width, "layers": 4, "heads": 4, "vocabulary_size": 1000},
        **{"context": 256, "event_shape": (256,)},
    }
    config = resolve(settings)
    activations = Activations.count(config, precision, gpu=False)
    of, heap = activations.of(rows, False), activations.heap(rows, False)
    scheme = Scheme(precision=precision, rows=rows)
    predicted = training_memory(parameter_count(config), scheme, of, heap)
    held = predicted.device - heap
    without_holes = _measured(settings, precision, rows, 1, MALLOC_MMAP_THRESHOLD_="1048576")
    as_it_is = median(_measured(settings, precision, rows, 4) for _ in range(5))
    errors = held / without_holes - 1, predicted.device / as_it_is - 1
    print(f"held {held}: {errors[0]:+.1%}; with holes {predicted.device}: {errors[1]:+.1%}")
    assert predicted.activations > 0.35 * predicted.device
    assert abs(errors[0]) < 0.1
    assert abs(errors[1]) < 0.1


def test_tensors_that_are_mapped_on_their_own_leave_no_holes() -> None:
    activations = Activations(2, 100, 50, 10, 20, sizes=(100 << 10, 1 << 10))
    assert activations.heap(8, False) > 0.29 * activations.of(8, False)
    assert activations.heap(1024, False) < 0.01 * activations.of(1024, False)
    assert Activations.count(resolve("gpt2-debug"), "fp32").heap(8, False) == 0  # a GPU's


@pytest.mark.slow
def test_muon_keeps_one_number_for_a_matrix_and_adamw_two() -> None:
    """Counted as the optimiser counts them after a step."""
    settings = OptimizerSettings(name="muon")
    config = resolve("llama-debug")
    model = build(config)
    optimizer = build_optimizer(model, settings)
    model.log_prob(torch.zeros(1, *model.event_shape, dtype=torch.long)).sum().backward()
    optimizer.step()
    kept = sum(
        value.numel()
        for state in optimizer.state.values()
        for value in state.values()
        if value.dim() > 0
    )
    moments = moments_a_parameter(model, settings)
    assert 1 < moments < 2
    assert moments * parameter_count(config) == pytest.approx(kept)
    assert moments_a_parameter(model, OptimizerSettings()) == 2
    memory = training_memory(1000, Scheme(moments=moments), 0)
    assert memory.optimizer == int(4000 * moments)


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("gpt2", 124.4), ("llama-7b", 6738), ("mistral-7b", 7242), ("falcon-7b", 6922)],
)
def test_parameters_are_those_that_the_papers_models_have(preset: str, millions: float) -> None:
    assert parameter_count(resolve(preset)) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_keys_and_values_a_token() -> None:
    """2 · layers · kv_heads · head_width · 2 bytes: 524,288, 131,072 and 8,192 a token."""
    for preset, each in (("llama-7b", 524_288), ("mistral-7b", 131_072), ("falcon-7b", 8_192)):
        config = resolve(preset)
        slots = 4096 + SPARE if preset == "mistral-7b" else config.context
        assert kv_cache_bytes(config, 3, "bf16") == 3 * each * slots
    assert kv_cache_bytes(resolve("pixelcnn-debug"), 1, "fp32") is None


def test_states_of_each_stage_of_zero() -> None:
    """The figures of Rajbhandari et al. 2020, figure 1: 7.5 B parameters on 64 GPUs."""
    n = 7_500_000_000

    def states(strategy: str) -> float:
        scheme = Scheme(strategy=strategy, precision="bf16", ranks=64)
        return training_memory(n, scheme, 0).states / 1e9

    assert states("zero1") == pytest.approx(31.4, abs=0.05)
    assert states("zero2") == pytest.approx(16.6, abs=0.05)
    assert states("zero3") == pytest.approx(1.9, abs=0.05)
    assert states("ddp") == pytest.approx(120, abs=0.1)


def test_a_layer_keeps_what_the_literature_counts() -> None:
    """34 bytes a token and unit of width (Korthikanti et al. 2022, section 4.1), attention fused
    and without dropout's 3 bytes; GPT-2 in bf16."""
    config = resolve("gpt2", dropout=0.0)
    found = Activations.count(config, "bf16")
    assert 29 < found.layer / (config.context * config.width) < 36
    assert found.of(4, True) < 0.75 * found.of(4, False)


@pytest.mark.slow
def test_a_learned_tokenizer_is_planned_with_both_networks(pipeline_file: Path) -> None:
    overrides = [
        "pictures.source.size=64",
        "codes.tokenizer={kind: vqgan, downsampling: 8, channels: 16, codebook_size: 64}",
        "codes.adversarial={start: 15000, channels: 8, layers: 1}",
        "codes.ema=0.99",
    ]
    codes = plan_of("codes", pipeline_file, overrides)
    settings = VQGANSettings(downsampling=8, channels=16, codebook_size=64)
    network, judge = VQGANTokenizer.build(settings, 3), Discriminator(3, 8, 1)
    n, d = (sum(p.numel() for p in m.parameters()) for m in (network, judge))
    assert (codes["parameters"], codes["discriminator_parameters"]) == (n, d)
    memory = codes["memory"]
    assert memory["parameters"] == memory["gradients"] == 4 * (n + d)
    assert memory["optimizer"] == 8 * (n + d) + 4 * n  # Adam's, and the moving average
    assert codes["checkpoint_bytes"] == 12 * (n + d) + 4 * n

    # against autograd's own account of a real step of 2 images
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.rand(2, 3, 64, 64)
    weights = {p.untyped_storage().data_ptr() for m in (network, judge) for p in m.parameters()}
    weights |= {b.untyped_storage().data_ptr() for b in network.buffers()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        fake, quantized = network(x)
        loss = (fake - x).square().mean() - judge(fake).mean() + quantized.loss
    real = sum(size for pointer, size in kept.items() if pointer not in weights)
    assert memory["activations"] / codes["rows_per_micro_batch"] == pytest.approx(
        real / 2, rel=0.05
    )
    loss.backward()

    with FlopCounterMode(display=False) as counter:
        fake, quantized = network(x[:1])
        ((fake - x[:1]).square().mean() + quantized.loss).backward()
    alone = counter.get_total_flops()
    assert alone < codes["flops_per_image"] < 1.5 * alone
    expected = codes["images"] * (0.75 * alone + 0.25 * codes["flops_per_image"])
    assert codes["flops"] == pytest.approx(expected, rel=1e-3)
    assert codes["hours"] > 0
    assert "discriminator" in text([codes])


def test_a_tokenizer_of_images_of_unknown_size_says_what_is_missing(pipeline_file: Path) -> None:
    codes = plan_of("codes", pipeline_file, ["pictures.source.size=null"])
    assert "the size of its images is not known" in codes["note"]


@pytest.mark.slow
def test_a_tokenizer_that_does_not_fit_is_told_how_many_images_would(pipeline_file: Path) -> None:
    overrides = [
        "codes.tokenizer.channels=64",
        "codes.batch_size=256",
        "codes.resources={gpus: 1, gpu_type: a10}",
    ]
    codes = plan_of("codes", pipeline_file, overrides)
    assert not codes["memory"]["fits"]
    assert re.search(
        r"accumulate or the ranks times \d+ \(\d+ images a rank fit at once", codes["remedy"]
    )
    assert "DOES NOT FIT" in text([codes])


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")))
def test_every_config_is_planned(path: Path, tmp_path: Path) -> None:
    plans = plan(load_pipeline(path, runs=tmp_path), gpu="h100")
    for found in plans:
        if found["job"] == "pretrain":
            assert "note" in found or found["hours"] > 0
    assert text(plans)
    json.dumps(plans)


@pytest.mark.slow
def test_plans_know_the_tokens_before_they_are_made(pipeline_file: Path) -> None:
    plans = {found["stage"]: found for found in plan(load_pipeline(pipeline_file), gpu="h100")}
    decoder = plans["decoder"]
    assert decoder["model"]["vocabulary_size"] == 1024  # codebook_size
    assert decoder["model"]["event_shape"] == [16, 16]  # 256 px / 16
    assert decoder["assumed"] == []
    assert decoder["ranks"] == 16
    assert decoder["rows_per_micro_batch"] == 512 // 16 // 2
    assert decoder["tokens"] == 1000 * 512 * 256
    # 6N + 12 L d T a token, N without the embedding table
    weights = decoder["parameters"] - 1024 * 4096
    expected = 6 * weights + 12 * 32 * 4096 * 256
    assert decoder["flops_per_token"] == pytest.approx(expected, rel=1e-3)
    assert decoder["hours"] == pytest.approx(
        expected * decoder["tokens"] / (16 * 989e12 * 0.4) / 3600, rel=1e-3
    )
    assert plans["samples"]["kv_cache_bytes"] == 4 * 2 * 32 * 4096 * 256 * 4
    assert plans["tokens"]["shards"] is None
    json.dumps(plans)
    assert "zero3, activation checkpointing" in text(list(plans.values()))


@pytest.mark.slow
def test_what_does_not_fit_gets_the_smallest_change_that_would(pipeline_file: Path) -> None:
    overrides = ["decoder.engine={strategy: ddp}", "decoder.resources.gpu_type=a100-40"]
    [decoder] = [
        p for p in plan(load_pipeline(pipeline_file, overrides)) if p["stage"] == "decoder"
    ]
    assert not decoder["chosen"]["fits"]
    assert decoder["remedy"] == "engine.strategy: zero1, engine.activation_checkpointing: true"
    assert "DOES NOT FIT" in text([decoder])

    config = resolve("llama-7b")
    activations = Activations.count(config, "bf16")
    parameters = parameter_count(config)
    scheme = Scheme(strategy="zero3", precision="bf16", ranks=64, rows=8)
    assert remedy(parameters, scheme, activations, 80e9) == "engine.activation_checkpointing: true"
    alone = Scheme(strategy="ddp", precision="bf16", ranks=2, rows=1)
    assert "times the ranks" in remedy(parameters, alone, activations, 8e9)
    assert "nothing here" in remedy(parameters, alone, activations, 1e9)
    muon = replace(alone, whole_matrices=True)
    assert {choice.strategy for choice in choices(muon)} == {"ddp"}
    assert "zero" not in remedy(parameters, muon, activations, 40e9)
    assert "adamw, which ZeRO can spread" in remedy(parameters, muon, activations, 8e9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"utilisation": 1.5}, "a share of the peak"),
        ({"gpu": "h10"}, "unknown GPU 'h10'; did you mean 'h100'"),
    ],
)
def test_bad_requests(pipeline_file: Path, arguments: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan(load_pipeline(pipeline_file), **arguments)


def test_a_batch_that_does_not_divide_is_named(pipeline_file: Path) -> None:
    with pytest.raises(RequestError, match="batch_size 100 does not divide by 16 ranks"):
        plan(load_pipeline(pipeline_file, ["decoder.batch_size=100"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("decoder.batch_size=100", "batch_size 100 does not divide by 16 ranks"),
        ("decoder.model.heads=5", r"stage 'decoder': model 'llama': width \(4096\) is no multiple"),
    ],
)
def test_what_could_only_fail_later_is_refused_before_anything_runs(
    pipeline_file: Path, tmp_path: Path, override: str, message: str
) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    pipeline = load_pipeline(pipeline_file, [override])
    for begin in (
        lambda: decide(pipeline, Selection()),
        lambda: submit(pipeline, Profile(), dry_run=True),
    ):
        with pytest.raises(RequestError, match=message):
            begin()
    decide(pipeline, Selection(until=("tokens",)))  # does not concern these


CLASSES = """
name: classes
stages:
  digits: {job: ingest, source: {kind: sklearn-digits}}
  other: {job: ingest, source: {kind: sklearn-digits}, seed: 1}
  pixels: {job: train_tokenizer, inputs: {data: digits}, tokenizer: {kind: pixels, levels: 16}}
  tokens: {job: pretokenize, inputs: {data: digits, tokenizer: pixels}}
  more: {job: pretokenize, inputs: {data: other, tokenizer: pixels}}
  decoder:
    job: pretrain
    inputs: {tokens: [tokens, more]}
    model: {preset: imagegpt-debug, class_dropout: 0.1}
    steps: 10
    batch_size: 8
    accumulate: 2
  model: {job: handoff, inputs: {decoder: decoder, tokenizer: pixels}}
  samples: {job: sample, inputs: {model: model}, guidance: 2.0}
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], None),
        (["decoder.mixture_weights={tokens: 3, more: 1}"], None),
        (["decoder.ema=0.99", "model.weights=ema"], None),
        (
            ["decoder.mixture_weights={tokens: 3, tokns: 1}"],
            "stage 'decoder': mixture_weights names",
        ),
        (["other.validation=0"], "stage 'other' holds nothing out"),
        (
            ["decoder.batch_ramp={start: 4, steps: 5}"],
            "5 rows does not divide by 1 ranks x accumulate 2; take batch_ramp.increment: 2",
        ),
        (["model.weights=ema"], "stage 'model': weights: ema, and stage 'decoder' keeps no"),
        (["decoder.model.class_dropout=0.0"], "'samples': guidance: stage 'decoder' trains with"),
    ],
)
def test_stages_are_held_against_those_above_them(
    tmp_path: Path, overrides: list[str], message: str | None
) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(CLASSES)
    pipeline = load_pipeline(path, overrides, runs=tmp_path)
    if message is None:
        assert len(decide(pipeline, Selection())) == 8
        [found] = [p for p in plan(pipeline) if p["stage"] == "decoder"]
        assert found["model"]["vocabulary_size"] == 16  # of both sets: they share a tokenizer
        return
    with pytest.raises(RequestError, match=message):
        decide(pipeline, Selection())


def test_windows_of_pictures_are_what_the_model_will_see(pipeline_file: Path) -> None:
    overrides = ["tokens.views={crops: center, size: 128}", "decoder.model.preset=imagegpt-small"]
    pipeline = load_pipeline(pipeline_file, overrides)
    assert from_tokens(pipeline, pipeline.stages["decoder"])["event_shape"] == (8, 8)


def test_words() -> None:
    assert size(1_500_000) == "1.5 MB"
    assert count(124_400_000) == "124.4 M"
    assert hours(0.5) == "30 min"
    assert hours(240) == "10.0 days"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("preset", ["llama-debug", "wavenet-debug", "made-debug"])
def test_weights_of_a_sample_stage_are_those_in_memory(
    preset: str, dtype: str, tmp_path: Path
) -> None:
    model = build(preset, seed=0)
    save(model, tmp_path / "model", {})
    opened = open_source(tmp_path / "model", "cpu", dtype).model
    held = sum(t.nbytes for t in (*opened.parameters(), *opened.buffers()))
    assert drawing_weights(model.config, dtype) == held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_sample_stages_are_planned_in_every_dtype(dtype: str, tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    plans = plan(load_pipeline(path, [f"digits_samples.dtype={dtype}"], tmp_path))
    [found] = [found for found in plans if found["stage"] == "digits_samples"]
    assert found["weights_bytes"] > 0
