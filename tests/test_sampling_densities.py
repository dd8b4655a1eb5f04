"""Draws by given numbers follow the density that the head itself states."""

import numpy as np
import pytest
import torch

from chainrule.pipeline.models.contract import Conditional
from chainrule.pipeline.models.heads import Gaussian, MixtureOfGaussians, MixtureOfLogistics
from chainrule.pipeline.sampling.densities import draw_density
from chainrule.pipeline.sampling.uniforms import LANE_COMPONENT, sample_seeds, uniforms

N = 20_000


def repeat(*values: float) -> torch.Tensor:
    return torch.tensor(values).expand(N, -1).squeeze(-1)


CONDITIONALS = {
    "gaussian": Gaussian(repeat(0.3), repeat(-0.5)),
    "mixture of gaussians": MixtureOfGaussians(
        repeat(0.2, 1.0, -0.5), repeat(-2.0, 0.1, 1.5), repeat(-1.0, -0.3, -2.0)
    ),
    "mixture of logistics": MixtureOfLogistics(
        repeat(0.2, 1.0, -0.5), repeat(-2.0, 0.1, 1.5), repeat(-1.0, -1.3, -2.0)
    ),
}


def numbers() -> tuple[torch.Tensor, torch.Tensor]:
    seeds = sample_seeds(0, np.arange(N))
    u, component = uniforms(seeds, 3), uniforms(seeds, 3, LANE_COMPONENT)
    return torch.from_numpy(u), torch.from_numpy(component)


@pytest.mark.parametrize("name", CONDITIONALS)
def test_draws_follow_the_stated_density(name: str) -> None:
    conditional: Conditional = CONDITIONALS[name]
    x = draw_density(conditional, *numbers(), temperature=1.0).double().numpy()
    grid = torch.linspace(-12, 12, N)
    density = conditional.log_prob(grid).exp().double().numpy()
    distribution = np.cumsum(density) * (24 / (N - 1))
    assert distribution[-1] == pytest.approx(1, abs=1e-3)
    at_draws = np.interp(np.sort(x), grid.numpy(), distribution)
    distance = np.abs(at_draws - (np.arange(N) + 0.5) / N).max()
    assert distance < 1.95 / np.sqrt(N)  # Kolmogorov-Smirnov: P < 0.001


@pytest.mark.parametrize("name", CONDITIONALS)
def test_temperature_narrows_and_zero_is_the_heads_mode(name: str) -> None:
    conditional = CONDITIONALS[name]
    cold = draw_density(conditional, *numbers(), temperature=0.3)
    warm = draw_density(conditional, *numbers(), temperature=1.0)
    assert cold.std() < warm.std()
    zero = draw_density(conditional, *numbers(), temperature=0)
    torch.testing.assert_close(zero, conditional.sample(temperature=0))


def test_an_unknown_density_is_refused() -> None:
    class Strange(Gaussian):
        pass

    class Other(Conditional):
        def log_prob(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def sample(self, generator=None, temperature=1.0, top_k=None, top_p=None):
            return torch.zeros(1)

    assert draw_density(Strange(repeat(0.0), repeat(0.0)), *numbers(), 1.0).shape == (N,)
    with pytest.raises(TypeError, match="Other"):
        draw_density(Other(), *numbers(), 1.0)
