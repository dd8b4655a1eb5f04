import itertools

import pytest
import torch

from chainrule.pipeline.models.registry import build
from chainrule.pipeline.models.wavenet_cursor import REWINDABLE


def continuous(**changes):
    return build(
        {
            "preset": "wavenet-debug",
            "vocabulary_size": None,
            "head": {"kind": "gaussian", "min_log_scale": -100.0},
            **changes,
        },
        seed=0,
    )


@pytest.mark.parametrize(
    ("cycles", "layers", "kernel", "field"),
    [(1, 1, 2, 2), (1, 3, 2, 8), (1, 5, 2, 32), (2, 3, 2, 15), (1, 3, 3, 15)],
)
def test_the_receptive_field(cycles, layers, kernel, field):
    """k layers that double see 2^k samples (figure 3); a cycle more adds 2^k - 1."""
    model = continuous(cycles=cycles, layers=layers, kernel=kernel, event_shape=[48])
    assert model.config.receptive_field == field
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
    conditionals = model.conditionals(x)
    for t in (47, 20):
        score = conditionals.mean[:, t].sum() + conditionals.log_scale[:, t].sum()
        (gradient,) = torch.autograd.grad(score, x, retain_graph=True)
        seen = (gradient != 0).any(dim=0)
        steps = torch.arange(48)
        assert torch.equal(seen, (steps < t) & (steps >= t - field)), t


@torch.no_grad()
def test_probabilities_of_all_sequences_sum_to_one():
    model = build({"preset": "wavenet-debug", "event_shape": [5], "vocabulary_size": 3}, seed=0)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    x = torch.tensor(list(itertools.product(range(3), repeat=5)))
    assert model.log_prob(x).sum(dim=1).exp().sum().item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_a_shorter_sequence_is_a_prefix():
    model = build("wavenet-debug", seed=0).eval()
    x = torch.randint(8, (2, 24), generator=torch.Generator().manual_seed(0))
    whole = model.log_prob(x)
    for length in (1, 7, 24):
        torch.testing.assert_close(model.log_prob(x[:, :length]), whole[:, :length])
    with pytest.raises(ValueError, match=r"\(batch, 24\) or shorter"):
        model.log_prob(torch.cat([x, x], dim=1))


@torch.no_grad()
def test_recordings_in_one_window_do_not_see_each_other():
    model = build({"preset": "wavenet-debug", "kernel": 3}, seed=0).eval()
    model.start += 1
    x = torch.randint(8, (2, 24), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[5] * 7 + [2] * 17, [0] * 23 + [1]])
    packed = model.log_prob(x, documents=documents)
    for row, cut in ((0, 7), (1, 23)):
        alone = torch.cat(
            [model.log_prob(x[row : row + 1, :cut]), model.log_prob(x[row : row + 1, cut:])], dim=1
        )
        torch.testing.assert_close(packed[row : row + 1], alone, atol=1e-5, rtol=0)
    one = model.log_prob(x[:, :3], documents=documents[:, :3])
    torch.testing.assert_close(one, model.log_prob(x[:, :3]))
    with pytest.raises(ValueError, match=r"documents has shape \(2, 3\)"):
        model.log_prob(x, documents=documents[:, :3])


@torch.no_grad()
def test_queues_are_of_dilation_length_and_do_not_grow():
    model = build({"preset": "wavenet-debug", "event_shape": [300]}, seed=0).eval()
    cursor = model.cursor(2)
    queues = sum(dilation + REWINDABLE for dilation in (1, 2, 4, 1, 2, 4)) * 2 * 8 * 4
    known = 2 * 300 * 8
    assert cursor.nbytes == queues + known
    x = torch.randint(8, (2, 300), generator=torch.Generator().manual_seed(0))
    cursor.advance(x)
    assert cursor.nbytes == queues + known


@torch.no_grad()
@pytest.mark.parametrize("n", [1, REWINDABLE - 1, REWINDABLE, REWINDABLE + 1, 200, 290])
def test_a_long_rewind_fills_the_queues_again(n):
    model = build({"preset": "wavenet-debug", "event_shape": [300]}, seed=0).eval()
    x = torch.randint(8, (2, 300), generator=torch.Generator().manual_seed(0))
    full = model.log_prob(x)
    cursor = model.cursor(2)
    cursor.advance(x[:, :295].flip(1))
    cursor.rewind(295)
    cursor.advance(x[:, :295])
    cursor.rewind(n)
    at = 295 - n
    torch.testing.assert_close(cursor.next.log_prob(x[:, at]), full[:, at], atol=1e-5, rtol=0)
    for _ in range(2):  # and a short one after it
        following = cursor.advance(x[:, at:]).log_prob(x[:, at + 1 :])
        torch.testing.assert_close(following, full[:, at + 1 :], atol=1e-5, rtol=0)
        at = 300 - min(n, 30)
        cursor.rewind(300 - at)


@torch.no_grad()
def test_a_longer_one_has_the_same_weights():
    model = build("wavenet-debug", seed=0).eval()
    longer = model.lengthened(40)
    assert longer.event_shape == longer.config.event_shape == (40,)
    assert model.event_shape == (24,)
    x = torch.randint(8, (2, 40), generator=torch.Generator().manual_seed(0))
    full = longer.log_prob(x)
    assert torch.equal(full[:, :24], model.log_prob(x[:, :24]))
    cursor = longer.cursor(2)
    cursor.advance(x[:, :39])
    torch.testing.assert_close(cursor.next.log_prob(x[:, 39]), full[:, 39], atol=1e-5, rtol=0)
    model.start += 1
    assert not torch.equal(longer.log_prob(x), full)
    with pytest.raises(ValueError, match="length is 0"):
        model.lengthened(0)


@torch.no_grad()
def test_local_features_are_brought_up_to_the_samples_rate():
    model = build({"preset": "wavenet-debug", "local_width": 3, "local_hop": 5}, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(8, (2, 24), generator=generator)
    local = torch.randn(2, 5, 3, generator=generator)
    full = model.log_prob(x, local=local)
    cursor = model.cursor(2, local=local)
    torch.testing.assert_close(cursor.next.log_prob(x[:, 0]), full[:, 0])
    following = cursor.advance(x).log_prob(x[:, 1:])
    torch.testing.assert_close(following, full[:, 1:], atol=1e-5, rtol=0)
    # A frame conditions its own samples and, through the residual path, later ones.
    other = local.clone()
    other[:, 3] += 1
    moved = (model.log_prob(x, local=other) != full).any(dim=0)
    assert not moved[:15].any()
    assert moved[15:20].all()
    for wrong in (None, local[:, :4], local[:1], local[:, :, :2]):
        with pytest.raises(ValueError, match=r"local .*the model takes \(2, "):
            model.log_prob(x, local=wrong)
    with pytest.raises(ValueError, match="without local_width"):
        build("wavenet-debug").log_prob(x, local=local)


def test_mu_law_values_are_embedded_and_amplitudes_are_numbers():
    categorical = build("wavenet-debug")
    logistics = build(
        {"preset": "wavenet-debug", "head": {"kind": "discretized-mixture-of-logistics"}}
    )
    assert categorical.project is None
    assert logistics.project.weight.shape == (8, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"event_shape": [4, 4]}, "event_shape"),
        ({"local_hop": 4}, "local_width is missing"),
        ({"vocabulary_size": None, "head": {"kind": "gaussian"}, "input": "embedding"}, "no vocab"),
        ({"kernel": 1}, "kernel"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build({"preset": "wavenet-debug", **changes})
