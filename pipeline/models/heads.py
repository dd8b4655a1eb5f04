"""Heads: from a backbone's features to a distribution over the next element.

A head is a setting (``head: {kind: mixture-of-gaussians, components: 10}``) that says how many
numbers describe one conditional (`size`) and what they mean (`conditional`). The backbone's
last layer, whichever it is, makes those numbers: a linear layer in Transformers and WaveNet, a
masked one in MADE. Where that layer has a bias, `initial_bias` starts it at something sensible.

Legend: ... batch dimensions, V values an element can take, M mixture components, P = `size`.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from chainrule.pipeline.config import Settings
from chainrule.pipeline.models.contract import Conditional
from chainrule.pipeline.models.inputs import check_outcome
from chainrule.pipeline.models.kernels import Linear


class Categorical(Conditional):
    """A probability for each of V values, from logits (..., V)."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.shape = logits.shape[:-1]
        self._log_probs: Tensor | None = None

    def log_probs(self) -> Tensor:
        """Of every value, (..., V) float32, normalised; kept, since who draws from them asks
        for one of them next."""
        if self._log_probs is None:
            self._log_probs = torch.log_softmax(self.logits.float(), dim=-1)
        return self._log_probs

    def log_prob(self, x: Tensor) -> Tensor:
        x = check_outcome(x, self.shape, self.logits.shape[-1])
        if self._log_probs is not None:
            return self._log_probs.gather(-1, x.unsqueeze(-1)).squeeze(-1)
        # cross_entropy is log_softmax and gather in one kernel. Its ignore_index must be no
        # element at all: with the default, log p(-100) would be a silent 0.
        nats = F.cross_entropy(
            self.logits.reshape(-1, self.logits.shape[-1]).float(),
            x.reshape(-1),
            reduction="none",
            ignore_index=torch.iinfo(torch.long).min,
        )
        return -nats.view(self.shape)

    def sample(
        self,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        _check_filters(temperature, top_k, top_p)
        if temperature == 0:
            return self.logits.argmax(dim=-1)
        logits = self.logits.float() / temperature
        if top_k is not None and top_k < logits.shape[-1]:
            least = logits.topk(top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if top_p is not None and top_p < 1:
            # The nucleus (Holtzman et al. 2020, section 3.1): the fewest values that reach top_p.
            ordered, index = torch.sort(logits, dim=-1, descending=True, stable=True)
            probs = torch.softmax(ordered, dim=-1)
            outside = probs.cumsum(dim=-1) - probs >= top_p
            outside[..., 0] = False
            logits = logits.masked_fill(
                torch.zeros_like(outside).scatter(-1, index, outside), -torch.inf
            )
        probs = torch.softmax(logits, dim=-1)
        drawn = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=generator)
        return drawn.view(self.shape)

    def pmf(self) -> Tensor:
        return torch.softmax(self.logits.float(), dim=-1)


class Gaussian(Conditional):
    """A normal density with its own mean and standard deviation, (...) each."""

    def __init__(self, mean: Tensor, log_scale: Tensor) -> None:
        self.mean, self.log_scale = mean, log_scale
        self.shape = mean.shape

    def log_prob(self, x: Tensor) -> Tensor:
        return _normal_log_density(check_outcome(x, self.shape, None), self.mean, self.log_scale)

    def sample(
        self,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """Temperature t draws from p^(1/t), a normal of t times the variance."""
        _check_filters(temperature, top_k, top_p, density=True)
        noise = torch.randn(
            self.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )
        return self.mean + math.sqrt(temperature) * self.log_scale.exp() * noise


class _Mixture(Conditional):
    """sum_m w_m p_m(x): mixture logits, means and log scales, (..., M) each."""

    def __init__(self, mixture_logits: Tensor, means: Tensor, log_scales: Tensor) -> None:
        self.mixture_logits, self.means, self.log_scales = mixture_logits, means, log_scales
        self.shape = means.shape[:-1]

    def _component_log_prob(self, x: Tensor) -> Tensor:
        """Nats of x (..., 1 or M) under each component, (..., M)."""
        raise NotImplementedError

    def _noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draws of a component with mean 0 and scale 1."""
        raise NotImplementedError

    def _widening(self, temperature: float) -> float:
        """What a component's scale is multiplied by at a temperature."""
        raise NotImplementedError

    def log_prob(self, x: Tensor) -> Tensor:
        x = check_outcome(x, self.shape, None)
        log_weights = torch.log_softmax(self.mixture_logits, dim=-1)
        return torch.logsumexp(log_weights + self._component_log_prob(x.unsqueeze(-1)), dim=-1)

    def sample(
        self,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """Temperature sharpens the choice of the component (w^(1/t)) and narrows it.

        Temperature 0 is the most probable of the component means: a mixture's true mode has
        no closed form.
        """
        _check_filters(temperature, top_k, top_p, density=True)
        if temperature == 0:
            density = torch.stack([self.log_prob(m) for m in self.means.unbind(-1)], dim=-1)
            return _pick(self.means, density.argmax(dim=-1))
        component = Categorical(self.mixture_logits).sample(generator, temperature)
        mean, log_scale = _pick(self.means, component), _pick(self.log_scales, component)
        noise = self._noise(mean, generator)
        return mean + self._widening(temperature) * log_scale.exp() * noise


class MixtureOfGaussians(_Mixture):
    """RNADE's and MADE-MoG's conditional (Uria et al. 2013, section 2)."""

    def _component_log_prob(self, x: Tensor) -> Tensor:
        return _normal_log_density(x, self.means, self.log_scales)

    def _noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    def _widening(self, temperature: float) -> float:
        return math.sqrt(temperature)


class MixtureOfLogistics(_Mixture):
    """A mixture of logistic densities (Parallel WaveNet, van den Oord et al. 2017, section 2)."""

    def _component_log_prob(self, x: Tensor) -> Tensor:
        z = (x - self.means) * torch.exp(-self.log_scales)
        return F.logsigmoid(z) + F.logsigmoid(-z) - self.log_scales

    def _noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        return logistic_noise(like, generator)

    def _widening(self, temperature: float) -> float:
        return temperature


class DiscretizedMixtureOfLogistics(Conditional):
    """Logistics integrated over V equal bins of [-1, 1] (PixelCNN++, Salimans et al. 2017,
    section 2.1): value x stands for 2x/(V-1) - 1, the outermost bins reach to infinity.

    The bins' probabilities are computed without the paper's code's cut-offs, so that they sum
    to 1 exactly: that is what a decompressor needs.
    """

    def __init__(
        self, mixture_logits: Tensor, means: Tensor, log_scales: Tensor, vocabulary_size: int
    ) -> None:
        self.mixture_logits, self.means, self.log_scales = mixture_logits, means, log_scales
        self.vocabulary_size = vocabulary_size
        self.shape = means.shape[:-1]

    def log_prob(self, x: Tensor) -> Tensor:
        x = check_outcome(x, self.shape, self.vocabulary_size)
        log_weights = torch.log_softmax(self.mixture_logits, dim=-1)
        nats = discretized_logistic_log_prob(
            x.unsqueeze(-1), self.means, self.log_scales, self.vocabulary_size
        )
        return torch.logsumexp(log_weights + nats, dim=-1)

    def _log_pmf(self) -> Tensor:
        values = torch.arange(self.vocabulary_size, device=self.means.device)
        nats = discretized_logistic_log_prob(
            values.unsqueeze(-1),
            self.means.unsqueeze(-2),
            self.log_scales.unsqueeze(-2),
            self.vocabulary_size,
        )
        log_weights = torch.log_softmax(self.mixture_logits, dim=-1).unsqueeze(-2)
        return torch.logsumexp(log_weights + nats, dim=-1)

    def sample(
        self,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        return Categorical(self._log_pmf()).sample(generator, temperature, top_k, top_p)

    def pmf(self) -> Tensor:
        return self._log_pmf().exp()


def discretized_logistic_log_prob(
    x: Tensor, means: Tensor, log_scales: Tensor, vocabulary_size: int
) -> Tensor:
    """Nats of bin `x` (integers 0..V-1) under logistics over [-1, 1]; arguments broadcast.

    With a and b the standardised upper and lower edge of the bin,
    sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b-a)):
    three logarithms that are each exact, however thin or far away the bin is.
    """
    half = 1 / (vocabulary_size - 1)
    value = 2 * half * x.to(means.dtype) - 1
    inverse_scale = torch.exp(-log_scales)
    upper = (value + half - means) * inverse_scale
    lower = (value - half - means) * inverse_scale
    below = F.logsigmoid(upper)
    above = F.logsigmoid(-lower)
    inside = below + above + torch.log(-torch.expm1(-2 * half * inverse_scale))
    return torch.where(x == 0, below, torch.where(x == vocabulary_size - 1, above, inside))


def logistic_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard logistic draws, of the shape, dtype and device of `like`."""
    u = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float64)
    # The open interval: rand may give 0, whose logit is -inf.
    return torch.logit(u, eps=1e-12).to(like.dtype)


def _normal_log_density(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    z = (x - mean) * torch.exp(-log_scale)
    return -0.5 * z.square() - log_scale - 0.5 * math.log(2 * math.pi)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _check_filters(
    temperature: float, top_k: int | None, top_p: float | None, density: bool = False
) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it is a finite number of at least 0")
    if density and (top_k is not None or top_p is not None):
        name = "top_p" if top_k is None else "top_k"
        raise ValueError(f"{name} was given: it cuts a discrete distribution, this is a density")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: it is at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: it lies in (0, 1]")


class CategoricalHead(Settings):
    """A free probability for each value."""

    kind: Literal["categorical"] = "categorical"

    @property
    def discrete(self) -> bool:
        return True

    def size(self, vocabulary_size: int | None) -> int:
        return _values(vocabulary_size, self.kind)

    def initial_bias(self, vocabulary_size: int | None) -> Tensor:
        return torch.zeros(self.size(vocabulary_size))

    def conditional(self, parameters: Tensor, vocabulary_size: int | None) -> Conditional:
        return Categorical(parameters)


class GaussianHead(Settings):
    """Mean and log standard deviation. Elements should be near zero mean and unit variance."""

    kind: Literal["gaussian"] = "gaussian"
    min_log_scale: float = Field(-7.0, description="a density cannot collapse on one point")

    @property
    def discrete(self) -> bool:
        return False

    def size(self, vocabulary_size: int | None) -> int:
        return 2

    def initial_bias(self, vocabulary_size: int | None) -> Tensor:
        return torch.zeros(2)

    def conditional(self, parameters: Tensor, vocabulary_size: int | None) -> Conditional:
        mean, log_scale = parameters.float().unbind(-1)
        return Gaussian(mean, log_scale.clamp(min=self.min_log_scale))


class _MixtureHead(Settings):
    components: int = Field(10, ge=1)
    min_log_scale: float = Field(
        -7.0, description="PixelCNN++'s code; a density cannot collapse on one point"
    )

    def size(self, vocabulary_size: int | None) -> int:
        return 3 * self.components

    def _spread(self, low: float, high: float, log_scale: float) -> Tensor:
        """Equal weights, means evenly from low to high: components that start in one place
        tend to stay there. (And components of a density that start far apart become the bars
        of a histogram instead of following what came before: on patches of photographs a MADE
        reached 11.9 nats in 300 steps from +-0.2, -1.8 from +-2.)"""
        means = torch.linspace(low, high, self.components + 2)[1:-1]
        return torch.cat([torch.zeros_like(means), means, torch.full_like(means, log_scale)])

    def _parts(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, means, log_scales = parameters.float().chunk(3, dim=-1)
        return logits, means, log_scales.clamp(min=self.min_log_scale)


class MixtureOfGaussiansHead(_MixtureHead):
    """Elements should be near zero mean and unit variance."""

    kind: Literal["mixture-of-gaussians"] = "mixture-of-gaussians"

    @property
    def discrete(self) -> bool:
        return False

    def initial_bias(self, vocabulary_size: int | None) -> Tensor:
        return self._spread(-0.2, 0.2, -0.5)

    def conditional(self, parameters: Tensor, vocabulary_size: int | None) -> Conditional:
        return MixtureOfGaussians(*self._parts(parameters))


class MixtureOfLogisticsHead(_MixtureHead):
    """Elements should be near zero mean and unit variance."""

    kind: Literal["mixture-of-logistics"] = "mixture-of-logistics"

    @property
    def discrete(self) -> bool:
        return False

    def initial_bias(self, vocabulary_size: int | None) -> Tensor:
        return self._spread(-0.2, 0.2, -1.0)

    def conditional(self, parameters: Tensor, vocabulary_size: int | None) -> Conditional:
        return MixtureOfLogistics(*self._parts(parameters))


class DiscretizedMixtureOfLogisticsHead(_MixtureHead):
    """For values that are amounts (grey levels, samples): neighbours share probability."""

    kind: Literal["discretized-mixture-of-logistics"] = "discretized-mixture-of-logistics"

    @property
    def discrete(self) -> bool:
        return True

    def initial_bias(self, vocabulary_size: int | None) -> Tensor:
        return self._spread(-1.0, 1.0, -2.0)

    def conditional(self, parameters: Tensor, vocabulary_size: int | None) -> Conditional:
        values = _values(vocabulary_size, self.kind)
        return DiscretizedMixtureOfLogistics(*self._parts(parameters), vocabulary_size=values)


Head = Annotated[
    CategoricalHead
    | GaussianHead
    | MixtureOfGaussiansHead
    | MixtureOfLogisticsHead
    | DiscretizedMixtureOfLogisticsHead,
    Field(discriminator="kind"),
]
"""The `head:` field of a model's config."""


def _values(vocabulary_size: int | None, kind: str) -> int:
    if vocabulary_size is None or vocabulary_size < 2:
        raise ValueError(
            f"vocabulary_size is {vocabulary_size}: a {kind} head needs at least 2 values"
        )
    return vocabulary_size


def check_head(head: Head, vocabulary_size: int | None) -> None:
    """A discrete head needs a vocabulary, a density has none; ValueError."""
    if head.discrete:
        _values(vocabulary_size, head.kind)
    elif vocabulary_size is not None:
        raise ValueError(
            f"vocabulary_size is {vocabulary_size}: a {head.kind} head is a density over real "
            "numbers, leave it out"
        )


def projection(head: Head, width: int, vocabulary_size: int | None, bias: bool = True) -> nn.Linear:
    """The linear layer from features (..., width) to a head's numbers (..., P)."""
    layer = Linear(width, head.size(vocabulary_size), bias=bias)
    nn.init.normal_(layer.weight, std=0.02)
    if bias:
        with torch.no_grad():
            layer.bias.copy_(head.initial_bias(vocabulary_size))
    return layer
