"""Cursors of the masked and convolutional families, in variants that the debug presets leave
out: one channel and three, embedded values, classes, every kind of head, odd orders."""

import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from chainrule.pipeline.models.registry import build

MIXTURE = {"kind": "discretized-mixture-of-logistics", "components": 2}
DENSITY = {"kind": "mixture-of-gaussians", "components": 2}

VARIANTS = {
    "made orders": {
        "family": "made",
        "event_shape": [3, 3],
        "vocabulary_size": 3,
        "hidden": [20, 16],
        "ordering": "spiral",
        "classes": 4,
        "class_dropout": 0.5,
    },
    "made logistics": {
        "family": "made",
        "event_shape": [7],
        "vocabulary_size": 16,
        "head": MIXTURE,
    },
    "made gaussian": {
        "family": "made",
        "event_shape": [5],
        "vocabulary_size": None,
        "head": {"kind": "gaussian"},
        "hidden": [30],
        "direct": False,
        "ordering": {"kind": "permutation", "seed": 5},
    },
    "made one element": {"family": "made", "event_shape": [1], "hidden": [4, 4]},
    "pixelcnn grey": {
        "preset": "pixelcnn-debug",
        "event_shape": [5, 6],
        "head": MIXTURE,
        "width": 6,
    },
    "pixelcnn codes": {
        "preset": "pixelcnn-debug",
        "event_shape": [2, 4, 4],
        "input": "embedding",
        "embedding_width": 3,
        "first_kernel": 5,
    },
    "gated grey": {
        "preset": "gated-pixelcnn-debug",
        "event_shape": [5, 6],
        "classes": 4,
        "layers": 3,
        "kernel": 5,
    },
    "gated codes": {
        "preset": "gated-pixelcnn-debug",
        "event_shape": [2, 3, 5],
        "input": "embedding",
        "embedding_width": 3,
    },
    "gated density": {
        "preset": "gated-pixelcnn-debug",
        "event_shape": [4, 4],
        "vocabulary_size": None,
        "head": DENSITY,
    },
    "pixelcnnpp grey": {
        "preset": "pixelcnnpp-debug",
        "event_shape": [8, 4],
        "scales": 2,
        "head": {"kind": "categorical"},
        "classes": 4,
    },
    "pixelcnnpp one scale": {
        "preset": "pixelcnnpp-debug",
        "event_shape": [3, 3, 5],
        "scales": 1,
        "blocks": 2,
        "classes": 4,
    },
    "pixelcnnpp": {"preset": "pixelcnnpp-debug", "event_shape": [3, 12, 4]},
    "wavenet classes": {"preset": "wavenet-debug", "classes": 4, "kernel": 3},
    "wavenet logistics": {"preset": "wavenet-debug", "head": MIXTURE, "event_shape": [200]},
    "wavenet density": {
        "preset": "wavenet-debug",
        "vocabulary_size": None,
        "head": {"kind": "mixture-of-logistics", "components": 2},
    },
    "wavenet gaussian": {
        "preset": "wavenet-debug",
        "vocabulary_size": None,
        "head": {"kind": "gaussian"},
        "cycles": 1,
    },
}
CONVOLUTIONAL = [name for name in VARIANTS if not name.startswith("made")]


def make(name):
    """A model whose every weight matters, with a batch of events and of classes."""
    model = build(VARIANTS[name], seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    size = (3, *model.event_shape)
    values = model.config.vocabulary_size
    if values is None:
        x = torch.randn(size, generator=generator)
    else:
        x = torch.randint(values, size, generator=generator)
    cond = torch.tensor([0, 3, -1]) if getattr(model.config, "classes", None) else None
    return model, x, cond


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_cursor_gives_what_teacher_forcing_gives(name):
    model, x, cond = make(name)
    full = model.log_prob(x, cond)
    sequence = model.to_sequence(x)
    assert torch.equal(model.to_event(sequence), x)
    length = sequence.shape[1]

    one_by_one = model.cursor(len(x), cond)
    for t in range(length):
        got = one_by_one.next.log_prob(sequence[:, t])
        torch.testing.assert_close(got, full[:, t], atol=1e-5, rtol=0)
        one_by_one.advance(sequence[:, t : t + 1])
    with pytest.raises(ValueError, match="complete"):
        _ = one_by_one.next

    blocks = model.cursor(len(x), cond)
    at_once = blocks.advance(sequence).log_prob(sequence[:, 1:])
    torch.testing.assert_close(at_once, full[:, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_what_is_forgotten_leaves_no_trace(name):
    model, x, cond = make(name)
    full = model.log_prob(x, cond)
    sequence = model.to_sequence(x)
    wrong = sequence.roll(1, 0)
    length = sequence.shape[1]
    rng = random.Random(0)
    cursor = model.cursor(len(x), cond)
    bytes_before = cursor.nbytes
    position = 0
    while position < length:
        # Go astray, come back further than that, and go on.
        astray = rng.randint(0, length - position)
        cursor.advance(wrong[:, position : position + astray])
        back = rng.randint(0, min(position, 4))
        cursor.rewind(astray + back)
        position -= back
        assert cursor.position == position
        torch.testing.assert_close(
            cursor.next.log_prob(sequence[:, position]), full[:, position], atol=1e-5, rtol=0
        )
        count = min(rng.randint(1, 9), length - position)
        following = cursor.advance(sequence[:, position : position + count])
        expected = full[:, position + 1 : position + count + 1]
        got = following.log_prob(sequence[:, position + 1 : position + count + 1])
        assert following.shape == got.shape == expected.shape
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        position += count
    # A Gated PixelCNN keeps its row's maps from the first row on; nothing else is added.
    assert cursor.nbytes == bytes_before


@pytest.mark.parametrize("name", VARIANTS)
def test_an_element_moves_only_what_comes_after_it(name):
    model, x, cond = make(name)
    sequence = model.to_sequence(x[:1])
    cond = None if cond is None else cond[:1]
    values = model.config.vocabulary_size

    def distributions(elements):
        conditionals = model.conditionals(model.to_event(elements), cond)
        if values is None:
            return conditionals.log_prob(torch.zeros_like(elements))
        return conditionals.pmf()

    with torch.no_grad():
        before = distributions(sequence)
        moved = False
        for t in range(sequence.shape[1]):
            other = sequence.clone()
            other[:, t] = other[:, t] + 1 if values is None else (other[:, t] + 1) % values
            after = distributions(other)
            assert torch.equal(before[:, : t + 1], after[:, : t + 1])
            moved |= not torch.equal(before, after)
    assert moved or sequence.shape[1] == 1
    assert model.log_prob(x[:1], cond).sum().isfinite()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_has_a_finite_gradient(name):
    """A weight without a gradient would hang a distributed run."""
    model, x, cond = make(name)
    model.train()
    model.log_prob(x, cond).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [*CONVOLUTIONAL, "made orders", "made gaussian"])
@torch.no_grad()
def test_a_step_never_costs_more_than_an_earlier_one(name):
    model, x, cond = make(name)
    sequence = model.to_sequence(x)
    length = sequence.shape[1]
    steps = [flops(lambda: model.cursor(len(x), cond))]  # which predicts the first element
    cursor = model.cursor(len(x), cond)
    steps += [flops(lambda t=t: cursor.advance(sequence[:, t : t + 1])) for t in range(length - 1)]
    if name in CONVOLUTIONAL:
        # A row, two rows of a PixelCNN++, and so on: the same again and again.
        half = len(steps) // 2
        assert max(steps[half:]) <= max(steps[:half])
    whole = flops(lambda: model.conditionals(x, cond))
    # Everything is evaluated once (and the direct connections of MADE with every output).
    assert sum(steps) <= 1.05 * whole


@pytest.mark.parametrize("name", ["made orders", "gated grey", "pixelcnnpp", "wavenet logistics"])
def test_wrong_elements_are_named_before_anything_is_kept(name):
    model, x, cond = make(name)
    sequence = model.to_sequence(x)
    cursor = model.cursor(len(x), cond)
    high = model.config.vocabulary_size
    wrong = sequence[:, :2].clone()
    wrong[0, 1] = high
    with pytest.raises(ValueError, match=f"x holds {high}: elements lie in 0..{high - 1}"):
        cursor.advance(wrong)
    with pytest.raises(ValueError, match="dtype"):
        cursor.advance(sequence[:, :2].float())
    with pytest.raises(ValueError, match=r"the cursor takes \(3, k\)"):
        cursor.advance(sequence[:2, :2])
    with pytest.raises(ValueError, match=f"the event has {sequence.shape[1]}"):
        cursor.advance(torch.cat([sequence, sequence[:, :1]], dim=1))
    with pytest.raises(ValueError, match="0 elements can be forgotten"):
        cursor.rewind(1)
    assert cursor.position == 0
    with pytest.raises(ValueError, match=f"x holds -1: elements lie in 0..{high - 1}"):
        model.conditionals(x - 1 - x.min(), cond)
    with pytest.raises(ValueError, match="x has shape"):
        model.conditionals(x[:, :-1, ...].repeat(1, 3, *(1,) * (x.dim() - 2)), cond)
    if cond is not None:
        with pytest.raises(ValueError, match=r"cond holds 4: classes are 0..3"):
            model.conditionals(x, cond + 1)
        with pytest.raises(ValueError, match=r"shape \(3,\)"):
            model.cursor(3, cond[:2])
    else:
        with pytest.raises(ValueError, match="without classes"):
            model.conditionals(x, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_cursors_go_under_autocast(name):
    model, x, cond = make(name)
    sequence = model.to_sequence(x)
    with torch.autocast("cpu", torch.bfloat16):
        cursor = model.cursor(len(x), cond)
        found = [cursor.next.log_prob(sequence[:, 0]).unsqueeze(1)]
        found.append(cursor.advance(sequence[:, :3]).log_prob(sequence[:, 1:4]))
        found.append(cursor.advance(sequence[:, 3:-1]).log_prob(sequence[:, 4:]))
    exact = model.log_prob(x, cond)
    assert (torch.cat(found, dim=1).float() - exact).abs().max() < 0.1 * exact.abs().max()
