"""What is reported of speed: operations counted, rates, and the bench's contestants."""

import pytest
import torch

from chainrule.pipeline.models.registry import build
from chainrule.pipeline.training import bench
from chainrule.pipeline.training.throughput import (
    Meter,
    flops_per_element,
    measured_peak,
    multiplied_weights,
)


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


def test_the_peak_is_a_number_of_operations():
    assert measured_peak(torch.device("cpu"), "fp32") > 1e8


@pytest.mark.slow
def test_the_bench_has_a_row_a_shape_and_precision(monkeypatch):
    tiny = {"layers": 1, "heads": 2, "width": 16, "context": 16, "vocabulary_size": 30}
    monkeypatch.setitem(bench.SHAPES, "tiny", (4, tiny))
    rows = bench.train(["tiny"], ("fp32", "bf16"), rounds=3, gpu=False)
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    assert all(row["ours ms"] > 0 and row["over bare"] > 0 for row in rows)
