"""Draws from densities by given uniform numbers, so that a sample owes nothing to its batch.

The heads' own `sample` takes a generator, whose numbers depend on the rows before; here a
component is chosen and a value drawn by inverting their distribution functions. Temperature
means what it means there: w^(1/t) for components, p^(1/t) inside one.
"""

import math

import torch
from torch import Tensor

from chainrule.pipeline.models.contract import Conditional
from chainrule.pipeline.models.heads import Gaussian, MixtureOfGaussians, MixtureOfLogistics
from chainrule.pipeline.sampling.filters import invert


def draw_density(
    conditional: Conditional, u: Tensor, u_component: Tensor, temperature: float
) -> Tensor:
    """An element for each number of `u` and `u_component`, of the conditional's shape.

    Raises TypeError for a density of a kind that is not known here.
    """
    if temperature == 0:
        return conditional.sample(temperature=0)
    if isinstance(conditional, Gaussian):
        noise = torch.special.ndtri(u) * math.sqrt(temperature)
        return _place(conditional.mean, conditional.log_scale, noise)
    if isinstance(conditional, MixtureOfGaussians | MixtureOfLogistics):
        weights = torch.log_softmax(conditional.mixture_logits / temperature, dim=-1)
        component = invert(weights, u_component).unsqueeze(-1)
        mean = conditional.means.gather(-1, component).squeeze(-1)
        log_scale = conditional.log_scales.gather(-1, component).squeeze(-1)
        if isinstance(conditional, MixtureOfGaussians):
            noise = torch.special.ndtri(u) * math.sqrt(temperature)
        else:
            noise = torch.logit(u) * temperature
        return _place(mean, log_scale, noise)
    raise TypeError(f"{type(conditional).__name__}: no way to draw from it by given numbers")


def _place(mean: Tensor, log_scale: Tensor, noise: Tensor) -> Tensor:
    return mean + log_scale.exp() * noise.to(mean.dtype)
