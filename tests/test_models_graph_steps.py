"""Steps that a CUDA graph can record: their numbers on a CPU, and whether they can be recorded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from chainrule.pipeline import build
from chainrule.pipeline.models import graph_steps, kv_cache, native
from chainrule.pipeline.models.decoder import Decoder
from chainrule.pipeline.models.graph_steps import GraphSteps, StaticStep, held_at
from chainrule.pipeline.models.kv_cache import DecoderCursor, KVCache

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"preset": "gpt2-debug"},
    "llama": {"preset": "llama-debug"},
    "mistral": {"preset": "mistral-debug", "window": 5},
    "falcon 40b": {"preset": "falcon-debug", "block": "parallel-two-norms", "kv_heads": 2},
    "imagegpt": {"preset": "imagegpt-debug", "event_shape": [40]},
    "classes": {"preset": "vqgan-transformer-debug", "event_shape": [40]},
    "density": {
        "preset": "llama-debug",
        "vocabulary_size": None,
        "head": {"kind": "mixture-of-gaussians", "components": 2},
    },
}

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


def make(name: str) -> tuple[Decoder, Tensor, Tensor | None]:
    model = build(SHAPES[name], seed=0, layers=2)
    assert isinstance(model, Decoder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    x = torch.randint(60, (3, 30), generator=generator)
    if model.config.vocabulary_size is None:
        x = torch.randn(3, 30, generator=generator)
    cond = torch.tensor([0, 4, -1]) if model.config.classes else None
    return model.eval(), x, cond


class OnACPU(GraphSteps):
    """The steps that would be recorded, run instead."""

    asked: list[int]
    made: Callable[[StaticStep], Callable[[], Tensor]] = staticmethod(lambda step: step.run)

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        super().__init__(model, cache)
        self.asked = []
        self._made: dict[int, tuple[StaticStep, Callable[[], Tensor]]] = {}

    def __call__(self, h: Tensor, position: int) -> Tensor:
        held = held_at(position, self.cache.slots)
        self.asked.append(held)
        if held not in self._made:
            step = StaticStep(self.model, self.cache, held)
            self._made[held] = step, type(self).made(step)
        step, run = self._made[held]
        step.h.copy_(h)
        step.position.fill_(position)
        return run()


def walk(cursor: DecoderCursor, x: Tensor) -> Tensor:
    """Parameters at every turn of a way that has steps, runs, and goes back."""
    found = [cursor._next]
    for first, end in ((0, 1), (1, 2), (2, 7), (7, 8), (8, 9), (9, 21), (21, 22), (22, 23)):
        cursor.advance(x[:, first:end])
        found.append(cursor._next)
    cursor.rewind(4)
    for position in range(19, 30):
        cursor.advance(x[:, position : position + 1])
        found.append(cursor._next)
    return torch.stack(found)


@pytest.mark.parametrize("spare", [0, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_a_static_step_is_a_step(name: str, spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, cond = make(name)
    wanted = walk(DecoderCursor(model, 3, cond, spare), x)
    monkeypatch.setattr(graph_steps, "LEAST_HELD", 4)
    monkeypatch.setattr(kv_cache, "graph_steps_of", OnACPU)
    cursor = DecoderCursor(model, 3, cond, spare)
    assert torch.allclose(walk(cursor, x), wanted, atol=1e-5, rtol=1e-5)
    assert isinstance(cursor._graphs, OnACPU)
    # One for each single element, and the start; a ring without spare slots feeds a run again.
    assert len(cursor._graphs.asked) in (1 + 6 + 11, 1 + 6 + 10)
    assert set(cursor._graphs.asked) <= {4, 8, 16, 32, cursor.cache.slots}
    assert len(set(cursor._graphs.asked)) > 1


@pytest.mark.parametrize("name", ["gpt2", "mistral", "falcon 40b"])
def test_nothing_in_it_waits_for_a_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks the GPU for a number, or takes a branch on one, is no single graph to torch's
    tracer either."""
    model, x, cond = make(name)
    wanted = walk(DecoderCursor(model, 3, cond), x)
    monkeypatch.setattr(graph_steps, "LEAST_HELD", 16)
    monkeypatch.setattr(
        OnACPU,
        "made",
        staticmethod(lambda step: torch.compile(step.run, fullgraph=True, backend="eager")),
    )
    monkeypatch.setattr(kv_cache, "graph_steps_of", OnACPU)
    assert torch.allclose(walk(DecoderCursor(model, 3, cond), x), wanted, atol=1e-5, rtol=1e-5)


def test_graphs_grow_by_doubling_and_end_at_the_cache() -> None:
    assert [held_at(position, 1024) for position in (0, 255, 256, 511, 512, 1023)] == [
        *(256, 256, 512, 512, 1024, 1024)
    ]
    assert held_at(0, 100) == held_at(99, 100) == 100
    assert held_at(10_000, 4096) == 4096  # a ring that has come round


def test_a_cpu_has_none() -> None:
    model, *_ = make("gpt2")
    with native.allowed():
        assert DecoderCursor(model, 1, None)._graphs is None


@on_a_gpu
@pytest.mark.parametrize("name", SHAPES)
def test_recorded_steps_are_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, cond = make(name)
    model.cuda()
    x = x.cuda()
    cond = None if cond is None else cond.cuda()
    wanted = walk(DecoderCursor(model, 3, cond, 8), x)
    monkeypatch.setattr(graph_steps, "LEAST_HELD", 4)
    with native.allowed():
        cursor = DecoderCursor(model, 3, cond, 8)
    assert cursor._graphs is not None
    assert torch.allclose(walk(cursor, x), wanted, atol=1e-4, rtol=1e-4)
