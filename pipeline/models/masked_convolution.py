"""Convolutions that see only what precedes a pixel, whole pictures at once or pixel by pixel.

Pictures are generated in raster order, and R, G, B within a pixel (van den Oord, Kalchbrenner,
Kavukcuoglu 2016, section 2). Feature maps are divided among the C channels: those of group g
may see groups before g of their own pixel (mask A) or up to g (mask B), and every group of the
pixels above and to the left (section 3.4 and figure 4 of the paper).

Legend: B batch, C channels of a pixel, H rows, W columns, n pixels.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MaskType = Literal["A", "B"]


def feature_groups(features: int, channels: int, parts: int = 1) -> Tensor:
    """(features,): the channel that each feature map belongs to, nearly equal shares.
    With `parts` (the halves of a gate) each part is divided in the same way."""
    share = features // parts
    return (torch.arange(share) * channels // share).repeat(parts)


class MaskedConv2d(nn.Conv2d):
    """A convolution of size (kh, kw), both odd, under a type A or type B mask.

    `parts`: the output is so many stacked halves, each divided among the channels.
    """

    mask: Tensor

    def __init__(
        self,
        mask_type: MaskType,
        inputs: int,
        outputs: int,
        kernel_size: tuple[int, int],
        channels: int,
        parts: int = 1,
    ) -> None:
        rows, columns = kernel_size
        super().__init__(inputs, outputs, kernel_size, padding=(rows // 2, columns // 2))
        self.channels = channels
        self.input_groups = feature_groups(inputs, channels)
        self.output_groups = feature_groups(outputs, channels, parts)
        above, left = rows // 2, columns // 2
        mask = torch.zeros_like(self.weight)
        mask[:, :, :above] = 1
        mask[:, :, above, :left] = 1
        below, own = self.input_groups.unsqueeze(0), self.output_groups.unsqueeze(1)
        mask[:, :, above, left] = (below < own if mask_type == "A" else below <= own).float()
        self.register_buffer("mask", mask, persistent=False)

    def set_bias(self, bias: Tensor) -> None:
        assert self.bias is not None
        with torch.no_grad():
            self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class CachedConvolution:
    """A masked convolution evaluated at a run of pixels, its input kept: one pixel costs one
    pixel's multiplications.

    The input is kept as (B, padded pixels, features), so that the window of a pixel is a
    gather. A pixel's features arrive group by group. What was written at pixels that are
    "forgotten" later is masked out until it is written again.
    """

    def __init__(self, conv: MaskedConv2d, batch: int, height: int, width: int) -> None:
        rows, columns = conv.kernel_size
        above, left = rows // 2, columns // 2
        stride = width + columns - 1
        self.cache = conv.weight.new_zeros(batch, (height + above) * stride, conv.in_channels)
        weight = conv.weight * conv.mask
        taps = [(r, c) for r in range(above) for c in range(columns)]
        taps += [(above, c) for c in range(left + 1)]
        # A window as the taps that the mask leaves, each with all its features.
        packed = torch.stack([weight[:, :, r, c] for r, c in taps], dim=1).flatten(1)
        pixel = torch.arange(height * width)
        corner = pixel // width * stride + pixel % width
        window = corner.unsqueeze(1) + torch.tensor([r * stride + c for r, c in taps])
        self.windows = window.to(weight.device)
        self.centres = (corner + above * stride + left).to(weight.device)
        self.single = len(taps) == 1
        self.columns, self.weights, self.biases = [], [], []
        for group in range(conv.channels):
            own = (conv.input_groups == group).nonzero().flatten()
            self.columns.append(slice(int(own[0]), int(own[-1]) + 1) if len(own) else slice(0, 0))
            outputs = (conv.output_groups == group).nonzero().flatten().to(weight.device)
            self.weights.append(packed[outputs].contiguous())
            self.biases.append(None if conv.bias is None else conv.bias[outputs])

    def write(self, runs: "Runs", maps: dict[int, Tensor]) -> None:
        """Features (B, n, features of the group) of each group at its run of pixels."""
        for group, pixels in runs.pixels.items():
            run = slice(pixels.start, pixels.stop)
            where = run if self.single else self.centres[run]
            self.cache[:, where, self.columns[group]] = maps[group].to(self.cache.dtype)  # autocast

    def read(self, runs: "Runs") -> dict[int, Tensor]:
        """Output features of each group at its run of pixels."""
        return {group: self._read(group, pixels) for group, pixels in runs.pixels.items()}

    def _read(self, group: int, pixels: range) -> Tensor:
        if self.single:
            window = self.cache[:, pixels.start : pixels.stop]
        else:
            index = self.windows[pixels.start : pixels.stop].flatten()
            window = self.cache.index_select(1, index).view(len(self.cache), len(pixels), -1)
        return F.linear(window, self.weights[group], self.biases[group])

    def __call__(self, runs: "Runs", maps: dict[int, Tensor]) -> dict[int, Tensor]:
        """Input of each channel's group at its pixels in, output there out. All groups are
        written before any is read: a pixel sees every group of the one before it."""
        self.write(runs, maps)
        return self.read(runs)

    @property
    def nbytes(self) -> int:
        return self.cache.numel() * self.cache.element_size()


class Runs:
    """Elements first..end-1 in generation order, as a run of pixels for each channel."""

    def __init__(self, first: int, end: int, channels: int) -> None:
        self.first, self.end, self.channels = first, end, channels
        self.pixels: dict[int, range] = {}
        for channel in range(channels):
            pixels = range(-(-(first - channel) // channels), -(-(end - channel) // channels))
            if len(pixels):
                self.pixels[channel] = pixels

    def _steps(self, channel: int) -> slice:
        start = self.pixels[channel].start * self.channels + channel - self.first
        return slice(start, None, self.channels)

    def split(self, elements: Tensor) -> dict[int, Tensor]:
        """(B, end - first, E) features of the elements, to (B, n, E) of each channel."""
        return {channel: elements[:, self._steps(channel)] for channel in self.pixels}

    def join(self, maps: dict[int, Tensor]) -> Tensor:
        """(B, n, P) of each channel, to (B, end - first, P)."""
        some = next(iter(maps.values()))
        if self.channels == 1:
            return some
        elements = some.new_empty(len(some), self.end - self.first, some.shape[-1])
        for channel in self.pixels:
            elements[:, self._steps(channel)] = maps[channel]
        return elements


def check_odd(**sizes: int) -> None:
    """ValueError for a kernel without a centre."""
    for name, size in sizes.items():
        if size % 2 == 0:
            raise ValueError(f"{name} is {size}: a masked kernel has a centre, so an odd size")
