"""A model that learns while it codes: both sides alike, and better for it."""

import numpy as np
import pytest
import torch

from chainrule.pipeline.coding.adapt import Adapt, Learner
from chainrule.pipeline.coding.blocks import Layout, decode, encode
from chainrule.pipeline.coding.entropy import CodingError
from chainrule.pipeline.models.registry import build

CHAIN = np.random.default_rng(3).dirichlet(np.full(20, 0.1), 20)


def markov(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    symbols = [0]
    for _ in range(n):
        symbols.append(int(rng.choice(20, p=CHAIN[symbols[-1]])))
    return np.array(symbols[1:], dtype=np.int64)


@pytest.mark.parametrize("preset", ["gpt2-debug", "llama-debug"])
def test_learning_pays_and_decodes(preset):
    model = build(preset, seed=0, vocabulary_size=20, context=16, layers=1)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    items = [markov(1500, 0), markov(700, 1)]
    plain = Layout(rows=4, least_row=200)
    learning = plain.model_copy(update={"adapt": Adapt(learning_rate=1e-2, every=8)})
    fixed = encode(model, items, [0, 1], plain)
    coded = encode(model, items, [0, 1], learning)
    assert sum(coded.ideal_bits) < 0.9 * sum(fixed.ideal_bits)
    for stream, bits in zip(coded.streams, coded.ideal_bits, strict=True):
        assert len(stream) <= bits / 8 * 1.001 + 64
    back = decode(model, coded.streams, [1500, 700], [0, 1], coded.checks, learning)
    for item, other in zip(items, back, strict=True):
        np.testing.assert_array_equal(item, other)
    # the model that was given is what it was
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_decoder_that_learns_otherwise_does_not_give_the_item(monkeypatch):
    model = build("gpt2-debug", seed=0, vocabulary_size=20, context=16, layers=1)
    item = markov(1200, 0)
    layout = Layout(rows=2, least_row=200, adapt=Adapt(learning_rate=1e-2, every=8))
    coded = encode(model, [item], [0], layout)
    other = layout.model_copy(update={"adapt": Adapt(learning_rate=1.01e-2, every=8)})
    try:
        back = decode(model, coded.streams, [1200], [0], coded.checks, other)
    except CodingError:
        return
    assert not np.array_equal(back[0], item)


def test_padding_past_a_rows_end_teaches_nothing():
    model = build("gpt2-debug", seed=0, vocabulary_size=20, context=16, layers=1)
    x = torch.from_numpy(np.stack([markov(16, 0), markov(16, 1)]))
    counted = np.ones((2, 16), dtype=bool)
    counted[1, 10:] = False
    changed = x.clone()
    changed[1, 10:] = 7
    learned = []
    for data in (x, changed):
        learner = Learner(model, Adapt(learning_rate=1e-2))
        learner.learn(data, None, counted, first=4)
        learned.append(learner.model.state_dict())
    for name, value in learned[0].items():
        assert torch.equal(value, learned[1][name])
    learner = Learner(model, Adapt())
    learner.learn(x, None, np.zeros((2, 16), dtype=bool), first=0)
    for name, value in learner.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
