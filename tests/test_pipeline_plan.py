"""Plans against reality and against figures known from elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chainrule.pipeline.config import RequestError
from chainrule.pipeline.models.registry import resolve
from chainrule.pipeline.pipeline_file import load_pipeline
from chainrule.pipeline.plan import plan
from chainrule.pipeline.plan_memory import (
    Activations,
    Scheme,
    kv_cache_bytes,
    parameter_count,
    training_memory,
)
from chainrule.pipeline.plan_schemes import remedy
from chainrule.pipeline.plan_text import count, hours, size, text

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
    predicted = training_memory(
        parameters, Scheme(), Activations.count(config, "fp32").of(1, False)
    )
    error = predicted.device / measured - 1
    print(
        f"{parameters / 1e6:.1f}M: {predicted.device} predicted, {measured} measured: {error:+.1%}"
    )
    assert predicted.states > 0.97 * predicted.device
    assert abs(error) < 0.1


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
        assert kv_cache_bytes(config, 3, "bf16") == 3 * each * config.context
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
    assert found.of(4, True) < 0.7 * found.of(4, False)


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


def test_words() -> None:
    assert size(1_500_000) == "1.5 MB"
    assert count(124_400_000) == "124.4 M"
    assert hours(0.5) == "30 min"
    assert hours(240) == "10.0 days"
