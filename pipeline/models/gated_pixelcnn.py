"""Gated PixelCNN: two stacks, no blind spot, gates, a class.

van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves, Kavukcuoglu 2016, "Conditional Image
Generation with PixelCNN Decoders". The vertical stack sees all rows above, the horizontal
stack the row up to the pixel; each layer (figure 2) feeds the vertical maps into the
horizontal ones, never the other way, so nothing above the pixel is hidden. Units are gated,
y = tanh(W_f x + V_f h) * sigmoid(W_g x + V_g h) (eq. 2 and 4), with h the class; the
horizontal stack has residual connections, the vertical one has none (section 2.3).

Legend: B batch, C channels, H rows, W columns, T = H*W*C elements, p maps, P parameters an
element; a gated layer makes 2p maps and halves them.
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from chainrule.pipeline.config import Settings
from chainrule.pipeline.models.contract import Conditional
from chainrule.pipeline.models.cursors import CachedCursor
from chainrule.pipeline.models.heads import CategoricalHead, Head, check_head
from chainrule.pipeline.models.inputs import (
    ClassEmbedding,
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


class GatedPixelCNNConfig(Settings):
    family: Literal["gated-pixelcnn"] = "gated-pixelcnn"
    event_shape: tuple[int, ...] = Field((3, 32, 32), description="(C, H, W) or (H, W)")
    vocabulary_size: int | None = Field(256, ge=2)
    head: Head = CategoricalHead()
    width: int = Field(384, ge=1, description="p: maps of each stack")
    layers: int = Field(20, ge=1, description="gated layers, the first under mask A")
    first_kernel: int = Field(7, ge=1)
    kernel: int = Field(5, ge=1)
    output_width: int = Field(1024, ge=1, description="maps of the layer before the head")
    input: InputKind = Field("intensity", description="embedding: for values that are names")
    embedding_width: int = Field(32, ge=1)
    classes: int | None = Field(None, ge=1)
    class_dropout: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _settings_agree(self) -> "GatedPixelCNNConfig":
        check_head(self.head, self.vocabulary_size)
        check_input(self.input, self.vocabulary_size)
        check_odd(first_kernel=self.first_kernel, kernel=self.kernel)
        if self.first_kernel == 1:
            raise ValueError("first_kernel is 1: it sees the rows above alone, so at least 3")
        check_picture(self.event_shape)
        return self


PRESETS = {
    # Section 3.2: 20 layers of 384 maps, 5x5, classes of ImageNet.
    "gated-pixelcnn-imagenet32": {"family": "gated-pixelcnn", "classes": 1000},  # 158,862,592
    "gated-pixelcnn-mnist": {  # 333,506
        "family": "gated-pixelcnn",
        "event_shape": [28, 28],
        "vocabulary_size": 2,
        "width": 32,
        "layers": 8,
        "output_width": 64,
    },
    "gated-pixelcnn-debug": {  # 5,244
        "family": "gated-pixelcnn",
        "event_shape": [3, 4, 4],
        "vocabulary_size": 4,
        "width": 12,
        "layers": 2,
        "first_kernel": 3,
        "kernel": 3,
        "output_width": 24,
    },
}


class VerticalConv2d(nn.Conv2d):
    """n x n over the rows above a pixel: up to its own row, or `strictly` above it.

    Only the rows that are seen have weights: ceil(n/2) x n, or floor(n/2) x n.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, strictly: bool) -> None:
        self.above = kernel // 2
        rows = self.above if strictly else self.above + 1
        super().__init__(inputs, outputs, (rows, kernel), padding=(0, kernel // 2))

    def forward(self, x: Tensor) -> Tensor:
        # Rows above the picture are zero; a strict one must not see the last row.
        height = x.shape[2]
        return super().forward(F.pad(x, (0, 0, self.above, 0)))[:, :, :height]


def gate(maps: Tensor, dim: int) -> Tensor:
    filtered, gated = maps.chunk(2, dim)
    return torch.tanh(filtered) * torch.sigmoid(gated)


class GatedLayer(nn.Module):
    """Figure 2. The first layer takes the picture itself into both stacks, under mask A."""

    def __init__(self, inputs: int | None, width: int, kernel: int, channels: int) -> None:
        super().__init__()
        first = inputs is not None
        below = width if inputs is None else inputs
        self.first = first
        self.vertical = VerticalConv2d(below, 2 * width, kernel, strictly=first)
        self.across = nn.Conv2d(2 * width, 2 * width, 1)
        self.horizontal = MaskedConv2d(
            "A" if first else "B", below, 2 * width, (1, kernel), channels, parts=2
        )
        self.residual = MaskedConv2d("B", width, width, (1, 1), channels)

    def forward(self, v: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Vertical and horizontal maps (B, ., H, W); `bias` (B, 4p, 1, 1) from the class."""
        vertical_bias, horizontal_bias = bias.chunk(2, dim=1)
        v = self.vertical(v)
        out = gate(self.horizontal(h) + self.across(v) + horizontal_bias, 1)
        out = self.residual(out)
        return gate(v + vertical_bias, 1), out if self.first else h + out


class GatedPixelCNN(RasterModel):
    config: GatedPixelCNNConfig

    def __init__(self, config: GatedPixelCNNConfig) -> None:
        super().__init__()
        self.config = config
        self._set_picture(config.event_shape)
        channels = self.channels
        self.input = ElementInput(config.input, config.vocabulary_size, config.embedding_width)
        self.layers = nn.ModuleList(
            GatedLayer(
                channels * self.input.features if layer == 0 else None,
                config.width,
                config.first_kernel if layer == 0 else config.kernel,
                channels,
            )
            for layer in range(config.layers)
        )
        self.classes = (
            ClassEmbedding(config.classes, 4 * config.width * config.layers, config.class_dropout)
            if config.classes
            else None
        )
        self.hidden = MaskedConv2d("B", config.width, config.output_width, (1, 1), channels)
        self.output = MaskedConv2d(
            "B",
            config.output_width,
            channels * config.head.size(config.vocabulary_size),
            (1, 1),
            channels,
        )
        self.output.set_bias(config.head.initial_bias(config.vocabulary_size).repeat(channels))

    def conditionals(self, x: Tensor, cond: Tensor | None = None) -> Conditional:
        x = check_elements(x, self.event_shape, self.config.vocabulary_size)
        cond = check_condition(cond, self.config.classes, len(x))
        encoded = self.input(self.to_image(x), self.output.weight.dtype)  # (B, C, H, W, E)
        v = h = encoded.permute(0, 1, 4, 2, 3).flatten(1, 2)
        biases = self._class_biases(cond, len(x))
        for layer, bias in zip(self.layers, biases, strict=True):
            v, h = layer(v, h, bias[:, :, None, None])
        h = self.output(F.relu(self.hidden(F.relu(h))))
        return self._conditional(self.by_element(h))

    def _class_biases(self, cond: Tensor | None, batch: int) -> tuple[Tensor, ...]:
        """(B, 4p) for each layer: V_f h and V_g h of both stacks."""
        width, layers = self.config.width, self.config.layers
        if self.classes is None:
            return (self.output.weight.new_zeros(batch, 4 * width),) * layers
        embedded: Tensor = self.classes(cond, batch)
        return embedded.chunk(layers, dim=1)

    def _conditional(self, parameters: Tensor) -> Conditional:
        return self.config.head.conditional(parameters, self.config.vocabulary_size)

    def cursor(self, batch: int, cond: Tensor | None = None) -> "GatedPixelCNNCursor":
        cond = check_condition(cond, self.config.classes, batch)
        return GatedPixelCNNCursor(self, batch, cond)


class GatedPixelCNNCursor(CachedCursor):
    """The vertical stack is evaluated once a row, when the row begins: it depends on the rows
    above only. The horizontal stack is evaluated once an element.

    Kept: the inputs of every convolution of both stacks, and for the row in hand what the
    vertical stack adds to the horizontal one.
    """

    def __init__(self, model: GatedPixelCNN, batch: int, cond: Tensor | None) -> None:
        super().__init__(batch, model.length, model.config.vocabulary_size, model._conditional)
        self.model = model
        self.row = -1
        self.layers = [cast(GatedLayer, layer) for layer in model.layers]

        def cached(conv: MaskedConv2d) -> CachedConvolution:
            return CachedConvolution(conv, batch, model.height, model.width)

        with torch.no_grad():
            self.biases = [b.chunk(2, dim=1) for b in model._class_biases(cond, batch)]
            self.horizontal = [cached(layer.horizontal) for layer in self.layers]
            self.residual = [cached(layer.residual) for layer in self.layers]
            self.hidden, self.output = cached(model.hidden), cached(model.output)
            # Inputs of the vertical convolutions, with `above` rows of zeros on top.
            self.vertical = [
                model.output.weight.new_zeros(
                    batch,
                    layer.vertical.in_channels,
                    layer.vertical.above + model.height,
                    model.width,
                )
                for layer in self.layers
            ]
            device = model.output.weight.device
            self.gates = [
                (self.layers[0].horizontal.output_groups == channel).nonzero().flatten().to(device)
                for channel in range(model.channels)
            ]
        self.across: list[list[Tensor]] = []
        self._start()

    def _write(self, first: int, x: Tensor) -> None:
        model = self.model
        runs = Runs(first, first + x.shape[1], model.channels)
        maps = runs.split(model.input(x, self.output.cache.dtype))
        self.horizontal[0].write(runs, maps)
        features, above = model.input.features, self.layers[0].vertical.above
        picture = self.vertical[0].flatten(2)
        for channel, pixels in runs.pixels.items():
            own = slice(channel * features, (channel + 1) * features)
            run = slice(above * model.width + pixels.start, above * model.width + pixels.stop)
            picture[:, own, run] = maps[channel].transpose(1, 2)

    def _predict(self, first: int, end: int) -> Tensor:
        row_length = self.model.width * self.model.channels
        parts = []
        while first < end:
            row = first // row_length
            stop = min(end, (row + 1) * row_length)
            if row != self.row:
                self._begin_row(row)
            parts.append(self._predict_in_row(first, stop))
            first = stop
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _begin_row(self, row: int) -> None:
        """The vertical stack at every pixel of a row, and what it adds to the horizontal one."""
        self.row = row
        self.across = []
        for i, (layer, bias) in enumerate(zip(self.layers, self.biases, strict=True)):
            conv = layer.vertical
            seen = self.vertical[i][:, :, row : row + conv.kernel_size[0]]
            v = F.conv2d(seen, conv.weight, conv.bias, padding=conv.padding)
            across = layer.across(v).squeeze(2).transpose(1, 2) + bias[1].unsqueeze(1)
            self.across.append([across[:, :, gates] for gates in self.gates])
            if i + 1 < len(self.layers):
                above = self.layers[i + 1].vertical.above
                self.vertical[i + 1][:, :, above + row] = gate(v + bias[0][:, :, None, None], 1)[
                    :, :, 0
                ]

    def _predict_in_row(self, first: int, end: int) -> Tensor:
        runs = Runs(first, end, self.model.channels)
        left = self.row * self.model.width
        h: dict[int, Tensor] = {}
        for i, layer in enumerate(self.layers):
            if layer.first:
                inner = self.horizontal[i].read(runs)
            else:
                inner = self.horizontal[i](runs, h)
            gated = {}
            for channel, pixels in runs.pixels.items():
                across = self.across[i][channel][:, pixels.start - left : pixels.stop - left]
                gated[channel] = gate(inner[channel] + across, 2)
            out = self.residual[i](runs, gated)
            h = out if layer.first else {c: h[c] + maps for c, maps in out.items()}
        h = self.hidden(runs, {c: F.relu(maps) for c, maps in h.items()})
        return runs.join(self.output(runs, {c: F.relu(maps) for c, maps in h.items()}))

    @property
    def nbytes(self) -> int:
        convs = [*self.horizontal, *self.residual, self.hidden, self.output]
        across = [maps for layer in self.across for maps in layer]
        tensors = [*self.vertical, *across]
        return sum(c.nbytes for c in convs) + sum(t.numel() * t.element_size() for t in tensors)


FAMILIES = {"gated-pixelcnn": (GatedPixelCNNConfig, GatedPixelCNN)}
