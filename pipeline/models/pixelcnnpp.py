"""PixelCNN++: shifted convolutions at three scales and a mixture of logistics a pixel.

Salimans, Karpathy, Chen, Kingma 2017, "PixelCNN++", and its code (openai/pixel-cnn). Two
streams of maps: `u` at a pixel sees the rows above it, `ul` those and the pixels to its left.
Both go down through gated ResNets and convolutions of stride 2 and up again through transposed
ones, with a skip from each layer down to its mirror up (figure 2). Convolutions are not masked:
padding shifts them up and to the left. concat_elu, dropout between the convolutions of a
ResNet, and weight normalisation with data-dependent initialisation, as in the code.

The network gives a pixel's parameters once, for all its channels (section 2.2): K mixture
weights pi, means, log scales, and coefficients by which the means of later channels follow the
values of earlier ones. The joint of a pixel is sum_k pi_k prod_c p_k(x_c | x_<c); here it is
factorised exactly, one channel after another:

    p(x_c | x_<c) = sum_k w_k p_k(x_c | x_<c),   w_k = pi_k prod_{j<c} p_k(x_j | x_<j), normalised

so that each element has its own conditional, a mixture whose weights are a posterior.

Legend: B batch, C channels, H rows, W columns, T = H*W*C elements, K components, F maps of
each stream, n pixels.
"""

from collections.abc import Iterator
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from chainrule.pipeline.config import Settings
from chainrule.pipeline.models.contract import Conditional, Cursor
from chainrule.pipeline.models.heads import (
    DiscretizedMixtureOfLogisticsHead,
    Head,
    check_head,
    discretized_logistic_log_prob,
)
from chainrule.pipeline.models.inputs import (
    ClassEmbedding,
    check_condition,
    check_elements,
    intensity,
)
from chainrule.pipeline.models.raster import RasterModel, check_picture
from chainrule.pipeline.models.weight_norm import WeightNormConv2d, WeightNormTransposedConv2d


class PixelCNNppConfig(Settings):
    family: Literal["pixelcnnpp"] = "pixelcnnpp"
    event_shape: tuple[int, ...] = Field((3, 32, 32), description="(C, H, W) or (H, W)")
    vocabulary_size: int | None = Field(256, ge=2)
    head: Head = DiscretizedMixtureOfLogisticsHead()
    width: int = Field(160, ge=1, description="F: maps of each stream")
    blocks: int = Field(5, ge=1, description="gated ResNets at each scale, down and up")
    scales: int = Field(3, ge=1, description="each scale halves the picture")
    dropout: float = Field(0.5, ge=0, lt=1)
    classes: int | None = Field(None, ge=1)
    class_dropout: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _settings_agree(self) -> "PixelCNNppConfig":
        check_head(self.head, self.vocabulary_size)
        check_picture(self.event_shape)
        factor = 2 ** (self.scales - 1)
        if any(side % factor for side in self.event_shape[-2:]):
            raise ValueError(
                f"event_shape is {self.event_shape}: {self.scales} scales need "
                f"sides that {factor} divides"
            )
        channels = self.event_shape[0] if len(self.event_shape) == 3 else 1
        if channels > 1 and self.head.kind != "discretized-mixture-of-logistics":
            raise ValueError(
                f"head is '{self.head.kind}': the channels of a pixel are coupled through a "
                "discretized-mixture-of-logistics; other heads take pictures of one channel"
            )
        return self


PRESETS = {
    # Section 3 and the code's defaults: 2.92 bits a dimension on CIFAR-10.
    "pixelcnnpp-cifar10": {"family": "pixelcnnpp"},  # 53,659,080
    "pixelcnnpp-small": {  # 974,856
        "family": "pixelcnnpp",
        "width": 32,
        "blocks": 2,
        "dropout": 0.0,
    },
    "pixelcnnpp-debug": {  # 37,388
        "family": "pixelcnnpp",
        "event_shape": [3, 8, 8],
        "vocabulary_size": 8,
        "head": {"kind": "discretized-mixture-of-logistics", "components": 3},
        "width": 8,
        "blocks": 1,
        "scales": 3,
        "dropout": 0.0,
    },
}


def concat_elu(x: Tensor, dim: int = 1) -> Tensor:
    return F.elu(torch.cat([x, -x], dim))


def down_shifted(inputs: int, outputs: int, stride: int = 1, scale: float = 1.0) -> nn.Module:
    """2 x 3: the pixel, its neighbours left and right, and the three above."""
    return WeightNormConv2d(inputs, outputs, (2, 3), (1, 1, 1, 0), stride, scale)


def down_right_shifted(inputs: int, outputs: int, stride: int = 1, scale: float = 1.0) -> nn.Module:
    """2 x 2: the pixel, the one to its left, and the two above."""
    return WeightNormConv2d(inputs, outputs, (2, 2), (1, 0, 1, 0), stride, scale)


class GatedResNet(nn.Module):
    """x + a * sigmoid(b) of two convolutions, with a skip and a class coming in between."""

    def __init__(self, stream: str, width: int, skip_width: int, dropout: float) -> None:
        super().__init__()
        convolution = down_shifted if stream == "u" else down_right_shifted
        self.first = convolution(2 * width, width)
        self.skip = WeightNormConv2d(2 * skip_width, width) if skip_width else None
        self.dropout = nn.Dropout(dropout)
        self.second = convolution(2 * width, 2 * width, scale=0.1)

    def forward(self, x: Tensor, skip: Tensor | None, bias: Tensor | None) -> Tensor:
        c = self.first(concat_elu(x))
        if self.skip is not None and skip is not None:
            c = c + self.skip(concat_elu(skip))
        c = self.second(self.dropout(concat_elu(c)))
        if bias is not None:
            c = c + bias[:, :, None, None]
        a, b = c.chunk(2, dim=1)
        return x + a * torch.sigmoid(b)


class Layer(nn.Module):
    """One ResNet of each stream; u flows into ul, never back. On the way up each also takes
    what the layer's mirror on the way down gave."""

    def __init__(self, width: int, up: bool, dropout: float) -> None:
        super().__init__()
        self.u = GatedResNet("u", width, width if up else 0, dropout)
        self.ul = GatedResNet("ul", width, 2 * width if up else width, dropout)

    def forward(
        self,
        u: Tensor,
        ul: Tensor,
        biases: Iterator[Tensor | None],
        skips: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        u = self.u(u, None if skips is None else skips[0], next(biases))
        ul = self.ul(ul, u if skips is None else torch.cat([u, skips[1]], dim=1), next(biases))
        return u, ul


class Pair(nn.Module):
    """The convolutions of both streams that change the scale."""

    def __init__(self, u: nn.Module, ul: nn.Module) -> None:
        super().__init__()
        self.u, self.ul = u, ul

    def forward(self, u: Tensor, ul: Tensor) -> tuple[Tensor, Tensor]:
        return self.u(u), self.ul(ul)


class PixelCNNpp(RasterModel):
    config: PixelCNNppConfig

    def __init__(self, config: PixelCNNppConfig) -> None:
        super().__init__()
        self.config = config
        self._set_picture(config.event_shape)
        width, scales = config.width, config.scales
        self.components = 0
        if config.head.kind == "discretized-mixture-of-logistics":
            self.components = config.head.components
        inputs = self.channels + 1  # and one of ones, which tells the picture from padding
        self.first_u = WeightNormConv2d(inputs, width, (2, 3), (1, 1, 1, 0))
        self.first_above = WeightNormConv2d(inputs, width, (1, 3), (1, 1, 0, 0))
        self.first_left = WeightNormConv2d(inputs, width, (2, 1), (0, 0, 1, 0))

        def layers(count: int, up: bool) -> nn.ModuleList:
            return nn.ModuleList(Layer(width, up, config.dropout) for _ in range(count))

        self.down = nn.ModuleList(layers(config.blocks, up=False) for _ in range(scales))
        self.shrink = nn.ModuleList(
            Pair(down_shifted(width, width, 2), down_right_shifted(width, width, 2))
            for _ in range(scales - 1)
        )
        self.up = nn.ModuleList(
            layers(config.blocks + (scale < scales - 1), up=True) for scale in range(scales)
        )
        self.grow = nn.ModuleList(
            Pair(
                WeightNormTransposedConv2d(width, width, (2, 3)),
                WeightNormTransposedConv2d(width, width, (2, 2)),
            )
            for _ in range(scales - 1)
        )
        self.output = WeightNormConv2d(width, self._parameters_a_pixel())
        resnets = sum(isinstance(module, GatedResNet) for module in self.modules())
        self.classes = (
            ClassEmbedding(config.classes, resnets * 2 * width, config.class_dropout)
            if config.classes
            else None
        )
        self.resnets = resnets

    def _parameters_a_pixel(self) -> int:
        """K weights, and for each channel K means, K log scales, and K coefficients for each
        channel before it: 10 K for R, G, B."""
        channels = self.channels
        if channels == 1:
            return self.config.head.size(self.config.vocabulary_size)
        return self.components * (1 + 2 * channels + channels * (channels - 1) // 2)

    # The chain rule, all elements at once.

    def conditionals(self, x: Tensor, cond: Tensor | None = None) -> Conditional:
        x = check_elements(x, self.event_shape, self.config.vocabulary_size)
        cond = check_condition(cond, self.config.classes, len(x))
        maps = self.network(self.to_image(x), cond)
        pixels = self.to_sequence(x).unflatten(1, (-1, self.channels))
        return self._conditional(self.couple(maps.flatten(2).transpose(1, 2), pixels))

    def network(self, image: Tensor, cond: Tensor | None) -> Tensor:
        """(B, C, H, W) to each pixel's parameters (B, ., H, W)."""
        biases = iter(self.class_biases(cond, len(image)))
        x = F.pad(self.scale(image), (0, 0, 0, 0, 0, 1), value=1.0)
        u = down_shift(self.first_u(x))
        ul = down_shift(self.first_above(x)) + right_shift(self.first_left(x))
        skips = [(u, ul)]
        for scale, layers in enumerate(self.down):
            if scale:
                u, ul = self.shrink[scale - 1](u, ul)
                skips.append((u, ul))
            for layer in cast(nn.ModuleList, layers):
                u, ul = layer(u, ul, biases)
                skips.append((u, ul))
        u, ul = skips.pop()
        for scale in reversed(range(self.config.scales)):
            for layer in cast(nn.ModuleList, self.up[scale]):
                u, ul = layer(u, ul, biases, skips.pop())
            if scale:
                u, ul = self.grow[scale - 1](u, ul)
        maps: Tensor = self.output(F.elu(ul))
        return maps

    def scale(self, image: Tensor) -> Tensor:
        return intensity(image, self.config.vocabulary_size).to(self.output.gain.dtype)

    def class_biases(self, cond: Tensor | None, batch: int) -> tuple[Tensor | None, ...]:
        """(B, 2F) for each ResNet, in the order of evaluation."""
        if self.classes is None:
            return (None,) * self.resnets
        embedded: Tensor = self.classes(cond, batch)
        return embedded.chunk(self.resnets, dim=1)

    def couple(self, parameters: Tensor, pixels: Tensor, wanted: int | None = None) -> Tensor:
        """A pixel's parameters (B, n, .) and its values (B, n, C) to the parameters of each
        channel's own conditional given the channels before it, (B, n*C, 3K). With `wanted`,
        of the first so many channels only."""
        channels, k = self.channels, self.components
        if channels == 1:
            return parameters
        sizes = [k, channels * k, channels * k, channels * (channels - 1) // 2 * k]
        weights, *rest = parameters.float().split(sizes, dim=-1)
        means, log_scales, coefficients = (part.unflatten(-1, (-1, k)) for part in rest)
        log_scales = log_scales.clamp(min=self._min_log_scale())
        coefficients = torch.tanh(coefficients)
        values = intensity(pixels, self.config.vocabulary_size).unsqueeze(-1)
        conditionals = []
        pair = 0
        count = channels if wanted is None else wanted
        for channel in range(count):
            mean, log_scale = means[..., channel, :], log_scales[..., channel, :]
            for earlier in range(channel):
                mean = mean + coefficients[..., pair, :] * values[..., earlier, :]
                pair += 1
            conditionals.append(torch.cat([weights, mean, log_scale], dim=-1))
            if channel + 1 < count:
                # Bayes: the components that explain this channel weigh more for the next.
                weights = weights + discretized_logistic_log_prob(
                    pixels[..., channel, None],
                    mean,
                    log_scale,
                    cast(int, self.config.vocabulary_size),
                )
        return torch.stack(conditionals, dim=2).flatten(1, 2)

    def _min_log_scale(self) -> float:
        return cast(DiscretizedMixtureOfLogisticsHead, self.config.head).min_log_scale

    def _conditional(self, parameters: Tensor) -> Conditional:
        return self.config.head.conditional(parameters, self.config.vocabulary_size)

    @torch.no_grad()
    def initialise_from(self, x: Tensor, cond: Tensor | None = None) -> None:
        """Set the gains and biases of every convolution from a batch (B, *event_shape), so
        that each map starts with mean 0 and its intended scale on it. Once, before training,
        with the same batch on every rank."""
        x = check_elements(x, self.event_shape, self.config.vocabulary_size)
        cond = check_condition(cond, self.config.classes, len(x))
        for module in self.modules():
            if isinstance(module, WeightNormConv2d):
                module.initialise = True
        was_training = self.training
        self.eval()
        self.network(self.to_image(x), cond)
        self.train(was_training)

    def cursor(self, batch: int, cond: Tensor | None = None) -> Cursor:
        from chainrule.pipeline.models.pixelcnnpp_cursor import PixelCNNppCursor

        cond = check_condition(cond, self.config.classes, batch)
        return PixelCNNppCursor(self, batch, cond)


def down_shift(x: Tensor) -> Tensor:
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))


def right_shift(x: Tensor) -> Tensor:
    return F.pad(x[:, :, :, :-1], (1, 0, 0, 0))


FAMILIES = {"pixelcnnpp": (PixelCNNppConfig, PixelCNNpp)}
