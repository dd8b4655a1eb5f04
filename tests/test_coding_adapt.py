"""A model that learns while it codes: both sides alike, and better for it."""

import numpy as np
import pytest
import torch

from chainrule.pipeline.coding.adapt import Adapt, Learner
from chainrule.pipeline.coding.blocks import Layout, decode, encode
from chainrule.pipeline.coding.entropy import CodingError
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.training.optimizers import OptimizerSettings

ADAPT = Adapt(optimizer=OptimizerSettings(learning_rate=1e-2), every=8, steps=2)
FASTER = Adapt(optimizer=OptimizerSettings(learning_rate=1.01e-2), every=8, steps=2)
CHAIN = np.random.default_rng(3).dirichlet(np.full(20, 0.1), 20)


def markov(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    symbols = [0]
    for _ in range(n):
        symbols.append(int(rng.choice(20, p=CHAIN[symbols[-1]])))
    return np.array(symbols[1:], dtype=np.int64)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gpt2-debug", "llama-debug"])
def test_learning_pays_and_decodes(preset):
    model = build(preset, seed=0, vocabulary_size=20, context=16, layers=1)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    items = [markov(1500, 0), markov(700, 1)]
    plain = Layout(rows=4, least_row=200)
    learning = plain.model_copy(update={"adapt": ADAPT})
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
    layout = Layout(rows=2, least_row=200, adapt=ADAPT)
    coded = encode(model, [item], [0], layout)
    other = layout.model_copy(update={"adapt": FASTER})
    try:
        back = decode(model, coded.streams, [1200], [0], coded.checks, other)
    except CodingError:
        return
    assert not np.array_equal(back[0], item)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_padding_past_a_rows_end_teaches_nothing(optimizer):
    model = build("gpt2-debug", seed=0, vocabulary_size=20, context=8, layers=1)
    settings = Adapt(optimizer=OptimizerSettings(name=optimizer), steps=3)
    x = np.stack([markov(16, 0), markov(16, 1)])
    changed = x.copy()
    changed[1, 10:] = 7
    learned = []
    for data in (x, changed):
        learner = Learner(model, settings, 8)
        learner.learn(data, None, np.array([16, 10]))
        learned.append(learner.model.state_dict())
    for name, value in learned[0].items():
        assert torch.equal(value, learned[1][name])
        assert not torch.equal(value, model.state_dict()[name]) or "bias" in name
    learner = Learner(model, settings, 8)
    learner.learn(x, None, np.array([0, 0]))
    for name, value in learner.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_what_was_coded_long_ago_is_learned_again():
    model = build("gpt2-debug", seed=0, vocabulary_size=20, context=8, layers=1)
    x = markov(400, 0)[None]
    seen = []
    for steps in (1, 4):
        learner = Learner(model, Adapt(optimizer=OptimizerSettings(name="muon"), steps=steps), 8)
        taught = []
        learner._step = lambda window, cond, counted, taught=taught: taught.append(window[0])
        learner.learn(x, None, np.array([400]))
        seen.append(taught)
    assert [len(taught) for taught in seen] == [1, 4]
    np.testing.assert_array_equal(seen[0][0], x[0, -8:])
    old = [w for w in seen[1][1:] if not np.array_equal(w, x[0, -8:])]
    assert len(old) >= 2
    for window in old:
        assert any(np.array_equal(window, x[0, i : i + 8]) for i in range(393))
