"""What is reported of speed: operations counted, rates, and the bench's contestants."""

import sys
import time
from pathlib import Path

import pytest
import torch

from chainrule.pipeline.data.batches import Mixture
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.progress import Progress
from chainrule.pipeline.training import bench
from chainrule.pipeline.training.throughput import (
    Meter,
    checkpoints_too_dear,
    flops_per_element,
    measured_peak,
    multiplied_weights,
    progress_line,
)

sys.path.insert(0, str(Path(__file__).parent))
import pretrain_ranks as ranks


def test_a_decoder_costs_6n_and_the_attention():
    model = build({"preset": "llama-debug", "width": 32, "layers": 2, "heads": 2, "context": 16})
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 2 and not name.startswith("embedding")
    )
    assert multiplied_weights(model) == matrices
    assert flops_per_element(model) == 6 * matrices + 12 * 2 * 32 * 16


def test_a_tied_output_layer_is_multiplied_with():
    tied = build({"preset": "gpt2-debug", "width": 32, "layers": 1, "heads": 2, "context": 16})
    apart = build(
        {
            "preset": "gpt2-debug",
            "width": 32,
            "layers": 1,
            "heads": 2,
            "context": 16,
            "tied_embeddings": False,
        }
    )
    assert multiplied_weights(tied) == multiplied_weights(apart)


def test_other_families_are_counted():
    small = flops_per_element(build("pixelcnn-debug"))
    large = flops_per_element(build({"preset": "pixelcnn-debug", "width": 24}))
    assert 0 < small < large < 5 * small


def test_the_formula_agrees_with_the_count():
    """Counted by torch, forward: 2N + 4 L d T, of which SDPA on a CPU counts the attention."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build({"preset": "gpt2-debug", "width": 64, "layers": 2, "heads": 2, "context": 32})
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros(1, 32, dtype=torch.long))
    counted = 3 * counter.get_total_flops() / 32
    without_attention = 6 * multiplied_weights(model)
    assert without_attention * 0.99 <= counted <= flops_per_element(model) * 1.01


def test_rates_leave_out_what_is_not_training(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr(
        "chainrule.pipeline.training.throughput.time.perf_counter", lambda: next(clock)
    )
    meter = Meter(flops_per_element=10.0, peak=1000.0)
    meter.step(60)
    with meter.leaving_out("validation"):
        pass
    found = meter.report(data_stalled=0.5)
    assert found["validation_s"] == 2.0
    assert found["tokens_per_second"] == pytest.approx(60 / 2)
    assert found["peak_share"] == pytest.approx(0.3)
    assert found["data_stall"] == pytest.approx(0.25)


def test_no_more_than_the_peak_is_ever_reached(monkeypatch):
    """One that was measured while the machine did other things is put right."""
    clock = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr(
        "chainrule.pipeline.training.throughput.time.perf_counter", lambda: next(clock)
    )
    meter = Meter(flops_per_element=10.0, peak=100.0)
    meter.step(20)
    assert meter.report(data_stalled=0.0)["peak_share"] == 1.0
    meter.step(10)
    assert meter.report(data_stalled=0.0)["peak_share"] == pytest.approx(0.5)


def test_a_checkpoints_share_is_of_the_time_since_the_one_before(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 12.0, 29.0, 30.0, 30.5, 31.0, 32.0, 33.0])
    monkeypatch.setattr(
        "chainrule.pipeline.training.throughput.time.perf_counter", lambda: next(clock)
    )
    meter = Meter(flops_per_element=10.0, peak=1000.0)
    with meter.leaving_out("checkpoint"):
        pass
    found = meter.report(0.0)
    assert found["checkpoint_s"] == 1.0
    assert found["checkpoint_share"] == pytest.approx(0.1)  # of 10 seconds
    assert checkpoints_too_dear(found) == (
        "a checkpoint held up training for 1.0 s, 10% of the time since the one before "
        "(more than 5%): raise checkpoint_every, or write to a faster disk"
    )
    with meter.leaving_out("checkpoint"):
        pass
    found = meter.report(0.0)
    assert found["checkpoint_share"] == pytest.approx(0.05)  # of 20
    assert checkpoints_too_dear(found) is None
    assert "checkpoint_share" not in meter.report(0.0)
    with meter.leaving_out("checkpoint"):
        pass
    assert meter.checkpoint_share == pytest.approx(1 / 3)
    assert checkpoints_too_dear({"checkpoint_share": 0.5, "checkpoint_s": 0.4}) is None


def test_the_line_of_progress_is_short_and_says_all(capsys):
    record = {
        "loss": 11.123456,
        "gradient_norm": 0.5234,
        "learning_rate": 2.953e-4,
        "tokens_per_second": 1234567.8,
        "peak_share": 0.4567,
        "memory_gb": 71.234,
        "data_stall": 0.0123,
    }
    with Progress("decoder", 600, "steps") as bar:
        bar.update(60, **progress_line(record, 0.034))
    line = capsys.readouterr().err
    shown = "loss 11.12 grad 0.52 lr 3.0e-4 tok/s 1.23M peak 46% GB 71.2 stall 1%+3%"
    assert line.endswith(f", {shown}\n")
    assert len(shown) <= 75
    assert len(line) <= 130


@pytest.mark.parametrize(
    ("speed", "said"), [(7.25, "7.25"), (999.7, "1k"), (12_345.0, "12.3k"), (4.5e9, "4.5G")]
)
def test_speeds_have_three_digits(speed, said):
    record = dict.fromkeys(
        ("loss", "gradient_norm", "learning_rate", "peak_share", "memory_gb", "data_stall"), 0.0
    )
    assert progress_line({**record, "tokens_per_second": speed}, 0.0)["tok/s"] == said


def test_the_peak_is_a_number_of_operations():
    assert measured_peak(torch.device("cpu"), "fp32") > 1e8


@pytest.mark.slow
def test_the_loaders_bench_says_what_reading_costs(monkeypatch, tmp_path):
    tokens = ranks.write_tokens(tmp_path / "text", "text")
    tiny = {"layers": 1, "heads": 2, "width": 16, "context": 16, "vocabulary_size": 30}
    monkeypatch.setitem(bench.SHAPES, "tiny", (4, tiny))
    [row] = bench.loader(tokens, ["tiny"], rounds=3, steps=10, gpu=False)
    assert row["loaded / ready"] > 0.5
    assert 0 <= row["waited"] < 1
    fetch = Mixture.batch

    def slow(self: Mixture, *arguments: int):
        time.sleep(0.05)
        return fetch(self, *arguments)

    monkeypatch.setattr(Mixture, "batch", slow)
    [slower] = bench.loader(tokens, ["tiny"], rounds=3, steps=10, gpu=False)
    assert slower["loaded / ready"] > 2 * row["loaded / ready"]
    assert slower["waited"] > 0.5


@pytest.mark.slow
def test_the_bench_has_a_row_a_shape_and_precision(monkeypatch):
    tiny = {"layers": 1, "heads": 2, "width": 16, "context": 16, "vocabulary_size": 30}
    monkeypatch.setitem(bench.SHAPES, "tiny", (4, tiny))
    rows = bench.train(["tiny"], ("fp32", "bf16"), rounds=3, gpu=False)
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    assert all(row["ours ms"] > 0 and row["over bare"] > 0 for row in rows)
