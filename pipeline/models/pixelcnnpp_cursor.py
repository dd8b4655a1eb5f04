"""A PixelCNN++ pixel by pixel (Ramachandran et al. 2017, "Fast Generation for Convolutional
Autoregressive Models").

The u stream depends on the rows above only: it is evaluated a row at a time, when the row
begins. The ul stream is evaluated a pixel at a time. The maps at scale s stand for 2^s x 2^s
pixels and are evaluated once for them, at their first pixel. So over a picture each map of
each layer is computed once, and a pixel costs at most one pixel's work at each scale.

Legend: B batch, F maps, n pixels of one row, i and j row and column at a scale.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chainrule.pipeline.models.cursors import CachedCursor
from chainrule.pipeline.models.pixelcnnpp import GatedResNet, Layer, Pair, PixelCNNpp, concat_elu
from chainrule.pipeline.models.weight_norm import WeightNormConv2d


class RowConvolution:
    """A down-shifted convolution of the u stream, evaluated a row at a time. Its input is
    kept as (B, maps, 1 + rows, columns), a row of zeros on top."""

    def __init__(self, conv: WeightNormConv2d, batch: int, height: int, width: int) -> None:
        self.weight, self.bias, self.stride = conv.weight, conv.bias, conv.stride
        self.cache = self.weight.new_zeros(batch, self.weight.shape[1], 1 + height, width)

    def write(self, i: int, x: Tensor) -> None:
        """x (B, maps, 1, columns) is row i of the input."""
        self.cache[:, :, 1 + i] = x.squeeze(2)

    def read(self, i: int) -> Tensor:
        """Row i of the output, (B, maps, 1, columns of the output)."""
        top = i * self.stride
        seen = self.cache[:, :, top : top + 2]
        return F.conv2d(seen, self.weight, self.bias, stride=self.stride, padding=(0, 1))

    def __call__(self, where: tuple[Any, ...], x: Tensor) -> Tensor:
        (i,) = where
        self.write(i, x)
        return self.read(i)


class PixelConvolution:
    """A down-right-shifted convolution of the ul stream, evaluated at pixels of one row. Its
    input is kept as (B, 1 + rows, 1 + columns, maps), zeros on top and at the left."""

    def __init__(self, conv: WeightNormConv2d, batch: int, height: int, width: int) -> None:
        weight, self.bias, self.stride = conv.weight, conv.bias, conv.stride
        self.cache = weight.new_zeros(batch, 1 + height, 1 + width, weight.shape[1])
        self.weight = weight.permute(0, 2, 3, 1).flatten(1)  # taps as they lie in a window

    def write(self, i: int, columns: range, x: Tensor) -> None:
        """x (B, n, maps) are pixels of row i of the input."""
        self.cache[:, 1 + i, 1 + columns.start : 1 + columns.stop] = x

    def read(self, i: int, columns: range) -> Tensor:
        """Pixels of row i of the output, (B, n, maps)."""
        step = self.stride
        rows = self.cache[:, i * step : i * step + 2]
        if len(columns) == 1:
            j = columns.start * step
            window = rows[:, :, j : j + 2].flatten(1).unsqueeze(1)
        else:
            span = slice(columns.start * step, (columns.stop - 1) * step + 2)
            window = rows[:, :, span].unfold(2, 2, step)  # (B, 2, n, maps, 2)
            window = window.permute(0, 2, 1, 4, 3).flatten(2)
        return F.linear(window, self.weight, self.bias)

    def __call__(self, where: tuple[Any, ...], x: Tensor) -> Tensor:
        i, columns = where
        self.write(i, columns, x)
        return self.read(i, columns)


class CachedResNet:
    """A GatedResNet whose convolutions keep their inputs. `where` is what the convolutions
    take: a row in the u stream, a row and columns in the ul stream."""

    def __init__(self, block: GatedResNet, u: bool, batch: int, size: tuple[int, int]) -> None:
        self.u = u
        conv: type[RowConvolution] | type[PixelConvolution]
        conv = RowConvolution if u else PixelConvolution
        self.first = conv(cast(WeightNormConv2d, block.first), batch, *size)
        self.second = conv(cast(WeightNormConv2d, block.second), batch, *size)
        self.across: tuple[Tensor, Tensor] | None = None
        if block.skip is not None:
            weight = block.skip.weight
            self.across = (weight if u else weight.flatten(1), block.skip.bias)
        self.bias: Tensor | None = None

    def __call__(self, where: tuple[Any, ...], x: Tensor, skip: Tensor | None) -> Tensor:
        maps = 1 if self.u else 2  # the dimension of the maps
        c = self.first(where, concat_elu(x, maps))
        if self.across is not None and skip is not None:
            mix = F.conv2d if self.u else F.linear
            c = c + mix(concat_elu(skip, maps), *self.across)
        c = self.second(where, concat_elu(c, maps))
        if self.bias is not None:
            c = c + (self.bias[:, :, None, None] if self.u else self.bias[:, None])
        a, b = c.chunk(2, dim=maps)
        return x + a * torch.sigmoid(b)

    @property
    def caches(self) -> list[Tensor]:
        return [self.first.cache, self.second.cache]


class Scale:
    """Both streams at one scale: ResNets down and up, and the convolutions to the next
    coarser scale and back."""

    def __init__(self, model: PixelCNNpp, scale: int, batch: int) -> None:
        size = (model.height >> scale, model.width >> scale)

        def cached(layers: nn.Module) -> list[tuple[CachedResNet, CachedResNet]]:
            return [
                (
                    CachedResNet(cast(Layer, layer).u, True, batch, size),
                    CachedResNet(cast(Layer, layer).ul, False, batch, size),
                )
                for layer in cast(nn.ModuleList, layers)
            ]

        self.down, self.up = cached(model.down[scale]), cached(model.up[scale])
        self.coarsest = scale == model.config.scales - 1
        self.caches = [c for pair in [*self.down, *self.up] for net in pair for c in net.caches]
        # The u rows at hand, for the ul stream: after each ResNet down and up, (B, columns, F).
        self.u_down: list[Tensor] = []
        self.u_up: list[Tensor] = []
        if not self.coarsest:
            shrink, grow = cast(Pair, model.shrink[scale]), cast(Pair, model.grow[scale])
            self.shrink_u = RowConvolution(cast(WeightNormConv2d, shrink.u), batch, *size)
            self.shrink_ul = PixelConvolution(cast(WeightNormConv2d, shrink.ul), batch, *size)
            self.grow_u = cast(WeightNormConv2d, grow.u)
            # A coarse pixel to its four fine ones: (rows, columns, F) flattened.
            ul = cast(WeightNormConv2d, grow.ul)
            self.grow_ul = (ul.weight.permute(2, 3, 0, 1).flatten(0, 2), ul.bias.repeat(4))
            # What comes back from the coarser scale.
            self.grown_u = self.shrink_u.cache.new_zeros(batch, model.config.width, *size)
            self.grown_ul = self.shrink_u.cache.new_zeros(batch, *size, model.config.width)
            self.caches += [
                self.shrink_u.cache,
                self.shrink_ul.cache,
                self.grown_u,
                self.grown_ul,
            ]

    def u_row_down(self, i: int, u: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Row i down this scale: its last maps, and the skips."""
        skips, self.u_down = [u], []
        for net, _ in self.down:
            u = net((i,), u, None)
            skips.append(u)
            self.u_down.append(u.squeeze(2).transpose(1, 2))
        if not self.coarsest:
            self.shrink_u.write(i, u)
        return u, skips

    def u_row_up(self, i: int, skips: list[Tensor]) -> Tensor:
        u = skips.pop() if self.coarsest else self.grown_u[:, :, i : i + 1]
        self.u_up = []
        for net, _ in self.up:
            u = net((i,), u, skips.pop())
            self.u_up.append(u.squeeze(2).transpose(1, 2))
        return u

    def ul_down(self, i: int, columns: range, ul: Tensor) -> list[Tensor]:
        """Pixels of row i down this scale: the skips, the last of which goes on."""
        skips = [ul]
        for (_, net), u in zip(self.down, self.u_down, strict=True):
            ul = net((i, columns), ul, u[:, columns.start : columns.stop])
            skips.append(ul)
        if not self.coarsest:
            self.shrink_ul.write(i, columns, ul)
        return skips

    def ul_up(self, i: int, columns: range, skips: list[Tensor]) -> Tensor:
        run = slice(columns.start, columns.stop)
        ul = skips.pop() if self.coarsest else self.grown_ul[:, i, run]
        for (_, net), u in zip(self.up, self.u_up, strict=True):
            ul = net((i, columns), ul, torch.cat([u[:, run], skips.pop()], dim=2))
        return ul

    def take_u(self, i: int, coarse: Tensor) -> None:
        """Row i of the coarser scale becomes two rows of this one."""
        self.grown_u[:, :, 2 * i : 2 * i + 2] = self.grow_u(coarse)

    def take_ul(self, i: int, columns: range, coarse: Tensor) -> None:
        """Pixels (B, n, F) of row i of the coarser scale become four each of this one."""
        fine = F.linear(coarse, *self.grow_ul).unflatten(2, (2, 2, -1))  # (B, n, 2, 2, F)
        fine = fine.permute(0, 2, 1, 3, 4).flatten(2, 3)
        self.grown_ul[:, 2 * i : 2 * i + 2, 2 * columns.start : 2 * columns.stop] = fine


class PixelCNNppCursor(CachedCursor):
    def __init__(self, model: PixelCNNpp, batch: int, cond: Tensor | None) -> None:
        super().__init__(batch, model.length, model.config.vocabulary_size, model._conditional)
        self.model = model
        with torch.no_grad():
            self.scales = [Scale(model, s, batch) for s in range(model.config.scales)]
            self._give_biases(iter(model.class_biases(cond, batch)))
            self.first_u = (model.first_u.weight, model.first_u.bias)
            self.first_above = (model.first_above.weight, model.first_above.bias)
            self.first_left = (model.first_left.weight.flatten(1), model.first_left.bias)
            self.output = (model.output.weight.flatten(1), model.output.bias)
        # The picture and its map of ones, two rows of padding on top: (B, C + 1, 2 + H, W).
        weight = self.output[0]
        size = (model.height, model.width)
        self.picture = weight.new_zeros(batch, model.channels + 1, 2 + size[0], size[1])
        self.picture[:, -1, 2:] = 1.0
        self.values = torch.zeros(
            (batch, size[0] * size[1], model.channels),
            dtype=torch.long if model.config.vocabulary_size else weight.dtype,
            device=weight.device,
        )
        self.parameters = weight.new_zeros(batch, size[0] * size[1], len(weight))
        self.evaluated = 0
        """Pixels whose parameters are known."""
        self.row = -1
        self.above = weight
        self._start()

    def _give_biases(self, biases: Iterator[Tensor | None]) -> None:
        """What the class adds to each ResNet, in the order of the network."""
        down = [pair for scale in self.scales for pair in scale.down]
        up = [pair for scale in reversed(self.scales) for pair in scale.up]
        for pair in [*down, *up]:
            for net in pair:
                net.bias = next(biases)

    def _write(self, first: int, x: Tensor) -> None:
        channels = self.model.channels
        self.values.flatten(1)[:, first : first + x.shape[1]] = x
        pixels = slice(first // channels, (first + x.shape[1] - 1) // channels + 1)
        scaled = self.model.scale(self.values[:, pixels]).transpose(1, 2)
        start = 2 * self.model.width
        self.picture.flatten(2)[:, :channels, start + pixels.start : start + pixels.stop] = scaled

    def _predict(self, first: int, end: int) -> Tensor:
        channels, width = self.model.channels, self.model.width
        self.evaluated = min(self.evaluated, first // channels + 1)
        if self.evaluated <= self.row * width:  # the row was begun on rows now forgotten
            self.row = -1
        wanted = slice(first // channels, (end - 1) // channels + 1)
        while self.evaluated < wanted.stop:
            row, column = divmod(self.evaluated, width)
            columns = range(column, min(width, column + wanted.stop - self.evaluated))
            if row != self.row:
                self._begin_row(row)
            self._evaluate(row, columns)
            self.evaluated += len(columns)
        one = wanted.stop - wanted.start == 1  # whose later channels nobody asks for yet
        coupled = self.model.couple(
            self.parameters[:, wanted],
            self.values[:, wanted],
            end - wanted.start * channels if one else None,
        )
        return coupled[:, first - wanted.start * channels :][:, : end - first]

    def _begin_row(self, row: int) -> None:
        """The u stream at a row of the picture, at each scale that has a row beginning here."""
        self.row = row
        zeros = self.picture.new_zeros(self.batch, self.model.config.width, 1, self.model.width)
        u = above = zeros
        if row > 0:  # the streams are shifted down: their top row is zero
            u = F.conv2d(self.picture[:, :, row : row + 2], *self.first_u, padding=(0, 1))
            seen = self.picture[:, :, row + 1 : row + 2]
            above = F.conv2d(seen, *self.first_above, padding=(0, 1))
        self.above = above.squeeze(2).transpose(1, 2)
        skips = []
        for s, scale in enumerate(self.scales):
            if row % (1 << s):
                break
            if s:
                u = self.scales[s - 1].shrink_u.read(row >> s)
            u, kept = scale.u_row_down(row >> s, u)
            skips.append(kept)
        for s in reversed(range(len(skips))):
            u = self.scales[s].u_row_up(row >> s, skips[s])
            if s:
                self.scales[s - 1].take_u(row >> s, u)

    def _evaluate(self, row: int, columns: range) -> None:
        """The ul stream at pixels of a row, and their parameters."""
        width = self.model.width
        ul = self.above[:, columns.start : columns.stop]
        left = range(max(columns.start - 1, 0), columns.stop - 1)
        if len(left):
            seen = self.picture[:, :, row + 1 : row + 3, left.start : left.stop]
            window = seen.permute(0, 3, 1, 2).flatten(2)
            shifted = F.linear(window, *self.first_left)
            ul = ul + F.pad(shifted, (0, 0, len(columns) - len(left), 0))
        skips: list[tuple[range, list[Tensor]]] = []
        for s, scale in enumerate(self.scales):
            factor = 1 << s
            run = range(-(-columns.start // factor), -(-columns.stop // factor))
            if row % factor or not len(run):
                break
            if s:
                ul = self.scales[s - 1].shrink_ul.read(row >> s, run)
            skips.append((run, scale.ul_down(row >> s, run, ul)))
        for s in reversed(range(len(skips))):
            run, kept = skips[s]
            ul = self.scales[s].ul_up(row >> s, run, kept)
            if s:
                self.scales[s - 1].take_ul(row >> s, run, ul)
        pixels = slice(row * width + columns.start, row * width + columns.stop)
        self.parameters[:, pixels] = F.linear(F.elu(ul), *self.output)

    @property
    def nbytes(self) -> int:
        tensors = [self.picture, self.values, self.parameters, self.above]
        for scale in self.scales:
            tensors += [*scale.caches, *scale.u_down, *scale.u_up]
        return sum(t.numel() * t.element_size() for t in tensors)
