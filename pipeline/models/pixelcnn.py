"""PixelCNN: masked convolutions and a softmax over the values of each channel.

van den Oord, Kalchbrenner, Kavukcuoglu 2016, "Pixel Recurrent Neural Networks", sections
3.3 to 3.5 and Table 1: a 7x7 convolution under mask A, residual blocks
(ReLU, 1x1, ReLU, 3x3, ReLU, 1x1; figure 5) under mask B, two more ReLU and 1x1 layers, a
256-way softmax. A pixel's R is predicted from the pixels before it, G from those and R, B
from those and R and G.

Stacks of 3x3 masked convolutions never see part of the pixels to the upper right (the blind
spot; van den Oord et al. 2016b, figure 1); gated_pixelcnn.py is the model without it.

Legend: B batch, C channels, H rows, W columns, T = H*W*C elements, P parameters an element.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from chainrule.pipeline.config import Settings
from chainrule.pipeline.models.contract import Conditional
from chainrule.pipeline.models.cursors import CachedCursor
from chainrule.pipeline.models.heads import CategoricalHead, Head, check_head
from chainrule.pipeline.models.inputs import (
    ElementInput,
    InputKind,
    check_condition,
    check_elements,
    check_input,
)
from chainrule.pipeline.models.masked_convolution import (
    CachedConvolution,
    MaskedConv2d,
    Runs,
    check_odd,
)
from chainrule.pipeline.models.raster import RasterModel, check_picture


class PixelCNNConfig(Settings):
    family: Literal["pixelcnn"] = "pixelcnn"
    event_shape: tuple[int, ...] = Field((3, 32, 32), description="(C, H, W) or (H, W)")
    vocabulary_size: int | None = Field(256, ge=2)
    head: Head = CategoricalHead()
    width: int = Field(128, ge=1, description="h: maps inside a residual block; 2h outside")
    blocks: int = Field(15, ge=0)
    first_kernel: int = Field(7, ge=1)
    kernel: int = Field(3, ge=1)
    output_width: int = Field(1024, ge=1, description="maps of the two layers before the head")
    input: InputKind = Field("intensity", description="embedding: for values that are names")
    embedding_width: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _settings_agree(self) -> "PixelCNNConfig":
        check_head(self.head, self.vocabulary_size)
        check_input(self.input, self.vocabulary_size)
        check_odd(first_kernel=self.first_kernel, kernel=self.kernel)
        check_picture(self.event_shape)
        return self


PRESETS = {
    # Table 1 of the paper.
    "pixelcnn-mnist": {  # 27,522
        "family": "pixelcnn",
        "event_shape": [28, 28],
        "vocabulary_size": 2,
        "width": 16,
        "blocks": 7,
        "output_width": 32,
    },
    "pixelcnn-cifar10": {"family": "pixelcnn", "width": 128, "blocks": 15},  # 5,340,416
    "pixelcnn-debug": {  # 6,012
        "family": "pixelcnn",
        "event_shape": [3, 4, 4],
        "vocabulary_size": 4,
        "width": 12,
        "blocks": 2,
        "first_kernel": 3,
        "output_width": 24,
    },
}


class ResidualBlock(nn.Module):
    """Figure 5, left: 2h to h by 1x1, h to h by 3x3, h to 2h by 1x1, all under mask B."""

    def __init__(self, width: int, kernel: int, channels: int) -> None:
        super().__init__()
        self.reduce = MaskedConv2d("B", 2 * width, width, (1, 1), channels)
        self.middle = MaskedConv2d("B", width, width, (kernel, kernel), channels)
        self.expand = MaskedConv2d("B", width, 2 * width, (1, 1), channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.reduce(F.relu(x))
        h = self.middle(F.relu(h))
        return x + self.expand(F.relu(h))


class PixelCNN(RasterModel):
    config: PixelCNNConfig

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__()
        self.config = config
        self._set_picture(config.event_shape)
        channels = self.channels
        self.input = ElementInput(config.input, config.vocabulary_size, config.embedding_width)
        self.first = MaskedConv2d(
            "A",
            channels * self.input.features,
            2 * config.width,
            (config.first_kernel, config.first_kernel),
            channels,
        )
        self.blocks = nn.ModuleList(
            ResidualBlock(config.width, config.kernel, channels) for _ in range(config.blocks)
        )
        output = MaskedConv2d(
            "B",
            config.output_width,
            channels * config.head.size(config.vocabulary_size),
            (1, 1),
            channels,
        )
        output.set_bias(config.head.initial_bias(config.vocabulary_size).repeat(channels))
        self.last = nn.ModuleList(
            [
                MaskedConv2d("B", 2 * config.width, config.output_width, (1, 1), channels),
                MaskedConv2d("B", config.output_width, config.output_width, (1, 1), channels),
                output,
            ]
        )

    def conditionals(self, x: Tensor, cond: Tensor | None = None) -> Conditional:
        x = check_elements(x, self.event_shape, self.config.vocabulary_size)
        check_condition(cond, None, len(x))
        encoded = self.input(self.to_image(x), self.first.weight.dtype)  # (B, C, H, W, E)
        h = self.first(encoded.permute(0, 1, 4, 2, 3).flatten(1, 2))
        for block in self.blocks:
            h = block(h)
        for layer in self.last:
            h = layer(F.relu(h))
        return self._conditional(self.by_element(h))

    def _conditional(self, parameters: Tensor) -> Conditional:
        return self.config.head.conditional(parameters, self.config.vocabulary_size)

    def cursor(self, batch: int, cond: Tensor | None = None) -> "PixelCNNCursor":
        check_condition(cond, None, batch)
        return PixelCNNCursor(self, batch)


class PixelCNNCursor(CachedCursor):
    """The inputs of every layer are kept; an element costs the maps of its channel's group
    at its pixel, in each layer once."""

    def __init__(self, model: PixelCNN, batch: int) -> None:
        super().__init__(batch, model.length, model.config.vocabulary_size, model._conditional)
        self.model = model

        def cached(conv: nn.Module) -> CachedConvolution:
            assert isinstance(conv, MaskedConv2d)
            return CachedConvolution(conv, batch, model.height, model.width)

        with torch.no_grad():
            self.first = cached(model.first)
            self.blocks = [
                [cached(conv) for conv in (block.reduce, block.middle, block.expand)]
                for block in model.blocks
                if isinstance(block, ResidualBlock)
            ]
            self.last = [cached(layer) for layer in model.last]
        self._start()

    def _write(self, first: int, x: Tensor) -> None:
        runs = Runs(first, first + x.shape[1], self.model.channels)
        self.first.write(runs, runs.split(self.model.input(x, self.first.cache.dtype)))

    def _predict(self, first: int, end: int) -> Tensor:
        runs = Runs(first, end, self.model.channels)
        maps = self.first.read(runs)
        for convs in self.blocks:
            inner = maps
            for conv in convs:
                inner = conv(runs, {g: F.relu(h) for g, h in inner.items()})
            maps = {g: h + inner[g] for g, h in maps.items()}
        for conv in self.last:
            maps = conv(runs, {g: F.relu(h) for g, h in maps.items()})
        return runs.join(maps)

    @property
    def nbytes(self) -> int:
        convs = [self.first, *self.last, *(conv for block in self.blocks for conv in block)]
        return sum(conv.nbytes for conv in convs)


FAMILIES = {"pixelcnn": (PixelCNNConfig, PixelCNN)}
