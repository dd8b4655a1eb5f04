import itertools

import pytest
import torch

from chainrule.pipeline.models.heads import discretized_logistic_log_prob
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.models.weight_norm import WeightNormConv2d


def perturbed(**changes):
    model = build({"preset": "pixelcnnpp-debug", **changes}, seed=0).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def test_channels_conditionals_multiply_to_the_papers_joint():
    """log sum_k pi_k prod_c p_k(x_c | x_<c), section 2.2, written out for R, G, B."""
    model = perturbed(event_shape=[3, 4, 4])
    x = torch.randint(8, (5, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    parameters = model.network(x, None).permute(0, 2, 3, 1)  # (B, H, W, 10 K)
    weights, means, log_scales, coefficients = parameters.split([3, 9, 9, 9], dim=-1)
    mu_r, mu_g, mu_b = means.split(3, dim=-1)
    s_r, s_g, s_b = log_scales.clamp(min=-7).split(3, dim=-1)
    alpha, beta, gamma = torch.tanh(coefficients).split(3, dim=-1)
    r, g, b = (x[:, c, :, :, None] for c in range(3))
    scaled_r, scaled_g = (2 * v / 7 - 1 for v in (r, g))
    joint = torch.log_softmax(weights, dim=-1)
    joint = joint + discretized_logistic_log_prob(r, mu_r, s_r, 8)
    joint = joint + discretized_logistic_log_prob(g, mu_g + alpha * scaled_r, s_g, 8)
    joint = joint + discretized_logistic_log_prob(
        b, mu_b + beta * scaled_r + gamma * scaled_g, s_b, 8
    )
    ours = model.log_prob(x).reshape(5, 4, 4, 3).sum(dim=-1)
    torch.testing.assert_close(ours, joint.logsumexp(dim=-1), atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "scales"), [([3, 1, 1], 1), ([2, 1, 2], 1), ([2, 2], 2), ([4, 1, 1], 1)]
)
def test_probabilities_of_all_pictures_sum_to_one(shape, scales):
    model = perturbed(event_shape=shape, scales=scales, vocabulary_size=4)
    length = torch.Size(shape).numel()
    x = torch.tensor(list(itertools.product(range(4), repeat=length))).reshape(-1, *shape)
    assert model.log_prob(x).sum(dim=1).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_pixel_sees_every_pixel_before_it():
    model = build(
        {
            "preset": "pixelcnnpp-debug",
            "event_shape": [8, 8],
            "vocabulary_size": None,
            "head": {"kind": "gaussian", "min_log_scale": -100.0},
            "blocks": 3,
        },
        seed=0,
    )
    x = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    conditionals = model.conditionals(x)
    for t in (5, 20, 36, 63):
        score = conditionals.mean[:, t].sum() + conditionals.log_scale[:, t].sum()
        (gradient,) = torch.autograd.grad(score, x, retain_graph=True)
        seen = (gradient != 0).any(dim=0).flatten()
        assert torch.equal(seen, torch.arange(64) < t), t


@torch.no_grad()
def test_initialisation_from_data_sets_each_maps_mean_and_scale():
    model = build({"preset": "pixelcnnpp-debug", "event_shape": [3, 8, 8]}, seed=0)
    x = torch.randint(8, (32, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    model.initialise_from(x)
    assert model.training
    seen = {}

    def note(name, scale):
        def hook(module, inputs, output):
            seen[name] = (output.mean(dim=(0, 2, 3)), output.std(dim=(0, 2, 3)) / scale)

        return hook

    convolutions = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, WeightNormConv2d)
    ]
    handles = [
        module.register_forward_hook(note(name, module.init_scale)) for name, module in convolutions
    ]
    model.eval().network(x, None)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(convolutions)
    for name, (mean, deviation) in seen.items():
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-3, rtol=0, msg=name)
        torch.testing.assert_close(
            deviation, torch.ones_like(deviation), atol=1e-2, rtol=0, msg=name
        )
    assert {module.init_scale for _, module in convolutions} == {1.0, 0.1}
    assert not any(module.initialise for _, module in convolutions)
    before = model.log_prob(x).mean()
    again = build(model.config, seed=0)
    again.initialise_from(x)
    again.eval()
    assert torch.equal(again.log_prob(x).mean(), before)


def test_dropout_is_for_training_only():
    model = build({"preset": "pixelcnnpp-debug", "event_shape": [3, 4, 4], "dropout": 0.5}, seed=0)
    x = torch.randint(8, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    assert not torch.equal(model.log_prob(x), model.log_prob(x))
    model.eval()
    assert torch.equal(model.log_prob(x), model.log_prob(x))


def test_a_few_steps_learn_that_channels_agree():
    """Grey pictures, three equal channels of fair bits: 1 bit a pixel instead of 3."""
    model = build(
        {
            "preset": "pixelcnnpp-debug",
            "event_shape": [3, 4, 4],
            "vocabulary_size": 2,
            "scales": 1,
        },
        seed=0,
    )
    generator = torch.Generator().manual_seed(0)

    def batch():
        return torch.randint(2, (64, 1, 4, 4), generator=generator).expand(-1, 3, -1, -1)

    model.initialise_from(batch())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        x = batch()
        loss = -model.log_prob(x).sum(dim=1).mean() / 16
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0.69 < loss.item() < 0.85


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"event_shape": [3, 6, 8]}, "3 scales need sides that 4 divides"),
        ({"head": {"kind": "categorical"}}, "pictures of one channel"),
        ({"event_shape": [64]}, "a picture is"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build({"preset": "pixelcnnpp-debug", **changes})
