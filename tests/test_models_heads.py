"""The distributions against torch.distributions, their draws against themselves."""

import math
from typing import Any

import pytest
import torch

from chainrule.pipeline.models.heads import (
    Categorical,
    CategoricalHead,
    DiscretizedMixtureOfLogistics,
    DiscretizedMixtureOfLogisticsHead,
    Gaussian,
    GaussianHead,
    MixtureOfGaussians,
    MixtureOfGaussiansHead,
    MixtureOfLogistics,
    MixtureOfLogisticsHead,
    check_head,
    discretized_logistic_log_prob,
    projection,
)

SHAPE = (4, 3)
HEADS = (
    CategoricalHead(),
    GaussianHead(),
    MixtureOfGaussiansHead(components=2),
    MixtureOfLogisticsHead(components=2),
    DiscretizedMixtureOfLogisticsHead(components=2),
)


def _mixture(components: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(*SHAPE, components) for _ in range(3))  # type: ignore[return-value]


def test_log_probs_are_those_of_torch_distributions() -> None:
    torch.manual_seed(0)
    logits, x = torch.randn(*SHAPE, 7), torch.randint(7, SHAPE)
    wanted = torch.distributions.Categorical(logits=logits).log_prob(x)
    assert torch.allclose(Categorical(logits).log_prob(x), wanted, atol=1e-6)

    mean, log_scale, y = (torch.randn(SHAPE) for _ in range(3))
    wanted = torch.distributions.Normal(mean, log_scale.exp()).log_prob(y)
    assert torch.allclose(Gaussian(mean, log_scale).log_prob(y), wanted, atol=1e-5)

    weights, means, log_scales = _mixture()
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=weights),
        torch.distributions.Normal(means, log_scales.exp()),
    )
    found = MixtureOfGaussians(weights, means, log_scales).log_prob(y)
    assert torch.allclose(found, mixture.log_prob(y), atol=1e-5)

    uniform = torch.distributions.Uniform(torch.zeros(means.shape), torch.ones(means.shape))
    logistic = torch.distributions.TransformedDistribution(
        uniform,
        [
            torch.distributions.SigmoidTransform().inv,
            torch.distributions.AffineTransform(means, log_scales.exp()),
        ],
    )
    component = logistic.log_prob(y.unsqueeze(-1).expand(means.shape))
    wanted = torch.logsumexp(torch.log_softmax(weights, -1) + component, -1)
    found = MixtureOfLogistics(weights, means, log_scales).log_prob(y)
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("log_scale", [-12.0, -7.0, -3.0, 0.0, 8.0])
@pytest.mark.parametrize("values", [2, 256, 65536])
def test_bins_of_a_logistic_sum_to_one_at_any_scale(values: int, log_scale: float) -> None:
    """Also where a bin is many or a thousandth of scales wide, and the mean outside [-1, 1]."""
    x = torch.arange(values)
    for mean in (-3.0, 0.123, 1.0):
        args = (torch.tensor(mean).double(), torch.tensor(log_scale).double(), values)
        nats = discretized_logistic_log_prob(x, *args)
        assert torch.isfinite(nats).all()
        assert float(nats.exp().sum()) == pytest.approx(1, abs=1e-9)
    # Against the difference of the distribution function where that is well conditioned.
    if log_scale == -3.0 and values == 256:
        edges = (2 * x[1:-1] / 255 - 1).double()
        scale = math.exp(log_scale)
        upper = torch.sigmoid((edges + 1 / 255 - 1.0) / scale)
        lower = torch.sigmoid((edges - 1 / 255 - 1.0) / scale)
        assert torch.allclose(nats[1:-1].exp(), upper - lower, rtol=1e-6, atol=1e-15)


def test_far_bins_have_gradients() -> None:
    """A value hundreds of scales away still pulls: there is no cut-off that hides it."""
    mean = torch.tensor(-0.9, requires_grad=True)
    discretized_logistic_log_prob(torch.tensor(250), mean, torch.tensor(-7.0), 256).backward()
    assert mean.grad is not None
    assert float(mean.grad) == pytest.approx(math.exp(7), rel=1e-3)


def test_a_negative_value_is_an_error_and_no_silent_zero() -> None:
    """cross_entropy ignores -100 by default: log p would be 0 nats."""
    with pytest.raises(ValueError, match=r"x holds -100: elements lie in 0\.\.2"):
        Categorical(torch.zeros(2, 3)).log_prob(torch.tensor([-100, 0]))


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.kind)
def test_what_has_no_probability_is_refused(head: Any) -> None:
    size = 8 if head.discrete else None
    conditional = head.conditional(torch.zeros(2, 3, head.size(size)), size)
    x = torch.zeros(2, 3, dtype=torch.long if head.discrete else torch.float32)
    assert conditional.log_prob(x).shape == (2, 3)
    for wrong in (x[:1], x[:, :1], x[0], x.unsqueeze(-1)):
        with pytest.raises(ValueError, match=r"x has shape .*: the conditionals have \(2, 3\)"):
            conditional.log_prob(wrong)
    if head.discrete:
        conditional.log_prob(x)  # what it keeps for the next time is no way around
        for value in (-1, 8):
            with pytest.raises(ValueError, match=f"x holds {value}: elements lie in 0..7"):
                conditional.log_prob(x + value)
        with pytest.raises(ValueError, match="dtype torch.bool"):
            conditional.log_prob(x.bool())


def _draws(distribution: Any, **filters: Any) -> torch.Tensor:
    drawn: torch.Tensor = distribution.sample(torch.Generator().manual_seed(3), **filters)
    return drawn


def test_draws_follow_the_distribution() -> None:
    n = 40_000
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0])
    drawn = _draws(Categorical(logits.expand(n, 4)))
    share = torch.bincount(drawn, minlength=4) / n
    assert torch.allclose(share, torch.softmax(logits, -1), atol=0.01)
    share = torch.bincount(_draws(Categorical(logits.expand(n, 4)), temperature=0.5)) / n
    assert torch.allclose(share, torch.softmax(logits / 0.5, -1), atol=0.01)

    y = _draws(Gaussian(torch.full((n,), 2.0), torch.full((n,), 1.0)))
    assert float(y.mean()) == pytest.approx(2, abs=0.05)
    assert float(y.std()) == pytest.approx(math.e, abs=0.05)

    parameters = (
        torch.tensor([0.0, 1.0]).expand(n, 2),
        torch.tensor([-2.0, 1.0]).expand(n, 2),
        torch.tensor([-1.0, -0.5]).expand(n, 2),
    )
    first = float(torch.softmax(torch.tensor([0.0, 1.0]), -1)[0])
    for kind in (MixtureOfGaussians, MixtureOfLogistics):
        y = _draws(kind(*parameters))
        assert float(y.mean()) == pytest.approx(-2 * first + (1 - first), abs=0.05)
        # The mean surprise of draws is the entropy, which the density itself gives.
        grid = torch.linspace(-30, 30, 20001)
        one = kind(*(p[:1].expand(len(grid), -1) for p in parameters))
        nats = one.log_prob(grid)
        entropy = float(-(nats.exp() * nats).sum() * (grid[1] - grid[0]))
        assert float(-kind(*parameters).log_prob(y).mean()) == pytest.approx(entropy, abs=0.03)

    discretized = DiscretizedMixtureOfLogistics(*parameters, vocabulary_size=5)
    share = torch.bincount(_draws(discretized), minlength=5) / n
    assert torch.allclose(share, discretized.pmf()[0], atol=0.01)


def test_top_k_and_top_p_keep_what_they_say() -> None:
    probs = torch.tensor([0.1, 0.4, 0.3, 0.2])
    distribution = Categorical(probs.log().expand(5000, 4))
    assert set(_draws(distribution, top_k=2).tolist()) == {1, 2}
    assert set(_draws(distribution, top_p=0.69).tolist()) == {1, 2}
    assert set(_draws(distribution, top_p=0.75).tolist()) == {1, 2, 3}
    assert set(_draws(distribution, top_p=0.01).tolist()) == {1}
    assert set(_draws(distribution, temperature=0.0).tolist()) == {1}
    assert set(_draws(distribution, top_k=9, top_p=1.0).tolist()) == {0, 1, 2, 3}


def test_temperature_zero_is_the_mode() -> None:
    weights = torch.tensor([[0.0, 3.0]])
    means = torch.tensor([[-1.0, 2.0]])
    scales = torch.zeros(1, 2)
    for kind in (MixtureOfGaussians, MixtureOfLogistics):
        assert float(_draws(kind(weights, means, scales), temperature=0.0)) == 2.0
    assert float(_draws(Gaussian(torch.tensor([1.5]), torch.tensor([4.0])), temperature=0.0)) == 1.5


def test_heads_and_vocabularies_that_do_not_fit_are_refused() -> None:
    for head in (CategoricalHead(), DiscretizedMixtureOfLogisticsHead()):
        check_head(head, 2)
        for size in (None, 1):
            with pytest.raises(ValueError, match=f"vocabulary_size is {size}"):
                check_head(head, size)
    for density in (GaussianHead(), MixtureOfGaussiansHead(), MixtureOfLogisticsHead()):
        check_head(density, None)
        with pytest.raises(ValueError, match="density over real numbers"):
            check_head(density, 8)


@pytest.mark.parametrize(
    "head", [MixtureOfGaussiansHead(components=4), DiscretizedMixtureOfLogisticsHead(components=4)]
)
def test_components_start_apart(head: Any) -> None:
    size = 256 if head.discrete else None
    layer = projection(head, 8, size)
    parts = layer(torch.zeros(1, 8)).view(3, 4)
    assert torch.unique(parts[1]).numel() == 4
    wild = head.conditional(torch.full((1, 12), -50.0), size)
    assert float(wild.log_scales.min()) == head.min_log_scale
