"""PixelCNN and Gated PixelCNN: what a pixel sees, and which channels."""

import itertools

import pytest
import torch

from chainrule.pipeline.models.registry import build


def seen_by_the_middle(model, batch: int = 4) -> torch.Tensor:
    """(H, W) bool: the pixels that the distribution of the middle pixel moves with."""
    height, width = model.height, model.width
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, height, width, generator=generator, requires_grad=True)
    conditionals = model.conditionals(x)
    middle = (height // 2) * width + width // 2
    scores = conditionals.mean[:, middle] + conditionals.log_scale[:, middle]
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    return (gradient != 0).any(dim=0)


def grey(preset: str, **changes):
    spec = {
        "preset": preset,
        "event_shape": [11, 11],
        "vocabulary_size": None,
        "head": {"kind": "gaussian", "min_log_scale": -100.0},
        "first_kernel": 3,
        "width": 16,
        **changes,
    }
    return build(spec, seed=0)


def test_the_plain_pixelcnn_has_the_known_blind_spot():
    """A stack of 3x3 masked convolutions climbs one row for each column to the right: what
    lies further right than up is never seen (van den Oord et al. 2016b, figure 1)."""
    seen = seen_by_the_middle(grey("pixelcnn-debug", blocks=8), batch=16)
    expected = torch.zeros(11, 11, dtype=torch.bool)
    for row, column in itertools.product(range(11), range(11)):
        up, right = 5 - row, column - 5
        expected[row, column] = (up == 0 and right < 0) or (up > 0 and right <= up)
    assert torch.equal(seen, expected)
    assert not expected[4, 7]


def test_the_gated_pixelcnn_has_none():
    seen = seen_by_the_middle(grey("gated-pixelcnn-debug", layers=8), batch=16)
    assert torch.equal(seen.flatten(), torch.arange(121) < 60)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_reach_of_a_gated_pixelcnn(layers):
    """Each 3x3 layer reaches one pixel further in every direction that it sees."""
    seen = seen_by_the_middle(grey("gated-pixelcnn-debug", layers=layers))
    expected = torch.zeros(11, 11, dtype=torch.bool)
    expected[5, 5 - layers : 5] = True
    # The horizontal stack takes the vertical maps of up to layers - 1 pixels to its left.
    expected[5 - layers : 5, 5 - layers : 5 + layers + 1] = True
    assert torch.equal(seen & ~expected, torch.zeros_like(seen))
    assert seen[5, 5 - layers]
    assert seen[5 - layers, 5]
    assert seen[5 - 1, 5 + 1]


@pytest.mark.parametrize("preset", ["pixelcnn-debug", "gated-pixelcnn-debug"])
def test_channels_are_predicted_in_the_order_red_green_blue(preset):
    model = build({"preset": preset, "event_shape": [3, 1, 2]}, seed=0)
    x = torch.randint(4, (1, 3, 1, 2), generator=torch.Generator().manual_seed(0))

    def distributions(event):
        return model.conditionals(event).pmf()[0]  # (2 pixels * R, G, B; V)

    before = distributions(x)
    for channel in range(3):
        other = x.clone()
        other[0, channel, 0, 0] = (other[0, channel, 0, 0] + 1) % 4
        moved = (distributions(other) != before).any(dim=-1)
        assert moved.tolist() == [t > channel for t in range(6)], channel


@torch.no_grad()
@pytest.mark.parametrize("preset", ["pixelcnn-debug", "gated-pixelcnn-debug"])
@pytest.mark.parametrize("shape", [[2, 2, 1], [3, 1, 1], [2, 3]])
def test_probabilities_of_all_pictures_sum_to_one(preset, shape):
    model = build({"preset": preset, "event_shape": shape, "vocabulary_size": 3}, seed=0)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    length = torch.Size(shape).numel()
    x = torch.tensor(list(itertools.product(range(3), repeat=length))).reshape(-1, *shape)
    assert model.log_prob(x).sum(dim=1).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_class_changes_both_stacks():
    model = build({"preset": "gated-pixelcnn-debug", "classes": 3}, seed=0).eval()
    x = torch.randint(4, (1, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    nats = [model.log_prob(x, torch.tensor([c])).sum().item() for c in range(3)]
    assert len(set(nats)) == 3
    table = model.classes.table.weight
    (-model.log_prob(x, torch.tensor([1])).sum()).backward()
    for layer, bias in enumerate(table.grad[1].chunk(2)):
        vertical, horizontal = bias.chunk(2)
        assert horizontal.abs().sum() > 0
        # What the last layer's vertical stack gives is read by nothing.
        assert (vertical.abs().sum() > 0) == (layer == 0)
    assert table.grad[[0, 2, 3]].abs().sum() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": 4}, "kernel is 4"),
        ({"first_kernel": 2}, "first_kernel is 2"),
        ({"event_shape": [16]}, "a picture is"),
        ({"event_shape": [1, 2, 3, 4]}, "a picture is"),
        ({"vocabulary_size": None, "head": {"kind": "gaussian"}, "input": "embedding"}, "no vocab"),
    ],
)
@pytest.mark.parametrize("preset", ["pixelcnn-debug", "gated-pixelcnn-debug"])
def test_settings_that_do_not_fit_are_refused(preset, changes, message):
    with pytest.raises(ValueError, match=message):
        build({"preset": preset, **changes})


def test_the_first_vertical_layer_has_rows_above():
    with pytest.raises(ValueError, match="first_kernel is 1: it sees the rows above alone"):
        build({"preset": "gated-pixelcnn-debug", "first_kernel": 1})
    model = build({"preset": "gated-pixelcnn-debug", "kernel": 1})
    model.log_prob(torch.zeros(1, *model.event_shape, dtype=torch.long)).sum().backward()
