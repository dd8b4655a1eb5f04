"""A WaveNet sample by sample (Paine et al. 2016, "Fast WaveNet Generation Algorithm").

Legend: B batch, n steps, C residual channels, G gate channels, S skip channels, K taps of a
convolution.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chainrule.pipeline.models.cursors import CachedCursor
from chainrule.pipeline.models.wavenet import GatedLayer, WaveNet

REWINDABLE = 64
"""Samples that a cursor forgets without recomputing, and evaluates at once in `advance`."""


class WaveNetCursor(CachedCursor):
    """A queue a layer, as long as its reach, so that a sample costs one step of each layer.

    Queues are rings with room for REWINDABLE more inputs, so that a short `rewind` finds what
    it needs; a longer one evaluates the last receptive field again. They lie one after another
    in one tensor: what the older taps of all layers contribute to a step depends on nothing
    of that step, and is one product.
    """

    def __init__(
        self, model: WaveNet, batch: int, cond: Tensor | None, local: Tensor | None
    ) -> None:
        length = model.event_shape[0]
        super().__init__(batch, length, model.config.vocabulary_size, model._conditional)
        self.model = model
        self.layers = [cast(GatedLayer, layer) for layer in model.layers]
        weight = model.start
        with torch.no_grad():
            local = model._local_features(local, batch, length)
            self.local = None if local is None else local.transpose(0, 1)  # (T, B, .)
            biases = model._class_biases(cond, batch)
            self.biases = [None if bias is None else bias.squeeze(1) for bias in biases]
            self._pack()
        sizes = [layer.reach + REWINDABLE for layer in self.layers]
        self.sizes = torch.tensor(sizes, device=weight.device)
        self.offsets = self.sizes.cumsum(0) - self.sizes
        self.rings = weight.new_zeros(sum(sizes), batch, len(weight))
        self.queues = self.rings.split(sizes)
        discrete = model.config.vocabulary_size is not None
        self.known = torch.zeros(
            (batch, length),
            dtype=torch.long if discrete else weight.dtype,
            device=weight.device,
        )
        self.evaluated = 0
        """Steps whose inputs the queues have taken in: they hold the last of them."""
        self._start()

    def _pack(self) -> None:
        """The layers' weights side by side for `_step`, with everything constant folded in.

        sigmoid(g) is (1 + tanh(g / 2)) / 2: the gate's rows are halved, so that one tanh makes
        both parts of a unit, tanh(f) (1 + tanh(g / 2)), and so are the weights that read it.
        The residual path's biases add up along the layers; their sum enters where it is read.
        """
        model, config = self.model, self.model.config
        width, gate_width = config.residual_width, config.gate_width
        convolutions = torch.stack([layer.convolution.weight for layer in self.layers])
        halved = convolutions.new_ones(2 * gate_width)
        halved[gate_width:] = 0.5
        convolutions = convolutions * halved.unsqueeze(1)
        older = convolutions.shape[2] - width
        self.older_weights = convolutions[:, :, :older].transpose(1, 2).contiguous()
        own_weights = convolutions[:, :, older:].transpose(1, 2).contiguous()
        residuals = [layer.paths.bias[:width] for layer in self.layers[:-1]]
        self.drift = torch.stack([torch.zeros_like(model.start), *residuals]).cumsum(0).unsqueeze(1)
        biases = [
            (layer.convolution.bias + (0.0 if bias is None else bias)).expand(self.batch, -1)
            for layer, bias in zip(self.layers, self.biases, strict=True)
        ]
        self.constants = torch.stack(biases) * halved + self.drift @ own_weights
        self.local_weights = None
        if self.local is not None:
            local = [cast(nn.Linear, layer.local).weight.T for layer in self.layers]
            self.local_weights = torch.stack(local) * halved
        self.back = torch.tensor(
            [list(range(layer.reach, 0, -layer.dilation)) for layer in self.layers],
            device=model.start.device,
        )
        residual_weights = [
            (layer.paths.weight[:width].T * 0.5).contiguous() for layer in self.layers[:-1]
        ]
        skips = [layer.paths.weight[layer.residual_width :] * 0.5 for layer in self.layers]
        self.skip_weights = torch.cat(skips, dim=1)
        biases = [layer.paths.bias[layer.residual_width :] for layer in self.layers]
        self.skip_bias = torch.stack(biases).sum(0)
        # What a step writes and reads again, with the views of each layer cut once: at a batch
        # of 1 a view costs as much as the product it is for.
        count = len(self.layers)
        self.maps = self.constants.new_empty(count, self.batch, 2 * gate_width)
        self.inputs = self.constants.new_empty(count, self.batch, width)
        self.units = self.constants.new_empty(self.batch, count * gate_width)
        filtered, gated = self.maps.chunk(2, dim=-1)
        self.steps = list(
            zip(
                self.maps.unbind(),
                filtered.unbind(),
                gated.unbind(),
                self.units.split(gate_width, dim=1),
                self.inputs.unbind(),
                own_weights.unbind(),
                [*zip(self.inputs[1:].unbind(), residual_weights, strict=True), None],
                strict=True,
            )
        )

    def _write(self, first: int, x: Tensor) -> None:
        self.known[:, first : first + x.shape[1]] = x

    def _predict(self, first: int, end: int) -> Tensor:
        if self.evaluated - first > REWINDABLE:
            self._rebuild(first)
        if end - first == 1:
            return self.model._parameters_from(self._step(first)).unsqueeze(1)
        steps = range(first, end, REWINDABLE)
        skip = torch.cat([self._block(step, min(step + REWINDABLE, end)) for step in steps])
        return self.model._parameters_from(skip).transpose(0, 1)

    def _rebuild(self, end: int) -> None:
        """Fill the queues as they stood when `end` steps had been evaluated."""
        self.rings.zero_()
        begin = max(0, end - REWINDABLE - self.model.config.receptive_field)
        self.evaluated = begin
        for step in range(begin, end, REWINDABLE):
            self._block(step, min(step + REWINDABLE, end))

    def _inputs(self, first: int, end: int) -> Tensor:
        """(n, B, C): what enters the first layer at steps first..end-1."""
        known = self.known[:, max(first - 1, 0) : end - 1].T
        h = self.model._embed(known)
        if first == 0:
            h = torch.cat([self.model.start.expand(1, self.batch, -1), h])
        return h

    def _block(self, first: int, end: int) -> Tensor:
        """(n, B, S): the skip path at steps first..end-1, at most REWINDABLE of them."""
        count, h = end - first, self._inputs(first, end)
        local = None if self.local is None else self.local[first:end]
        skip: Tensor | float = 0.0
        for layer, queue, bias in zip(self.layers, self.queues, self.biases, strict=True):
            _put(queue, first, h)
            back = range(layer.reach, 0, -layer.dilation)
            taps = [_take(queue, first - steps, count) for steps in back]
            h, path = layer.unit(h, torch.cat([*taps, h], dim=-1), bias, local)
            skip = skip + path
        self.evaluated = max(self.evaluated, end)
        return cast(Tensor, skip)

    def _step(self, step: int) -> Tensor:
        """(B, S): the same at one step, in as few operations as can be."""
        sizes, offsets = self.sizes, self.offsets
        older = offsets.unsqueeze(1) + torch.remainder(step - self.back, sizes.unsqueeze(1))
        taps = self.rings[older].transpose(1, 2).flatten(2)  # (layers, B, (K - 1) C)
        torch.baddbmm(self.constants, taps, self.older_weights, out=self.maps)
        if self.local is not None and self.local_weights is not None:
            self.maps += self.local[step] @ self.local_weights
        self.inputs[0] = self._inputs(step, step + 1)[0]
        for maps, filtered, gated, unit, h, own_weight, residual in self.steps:
            maps.addmm_(h, own_weight).tanh_()
            torch.addcmul(filtered, filtered, gated, out=unit)
            if residual is not None:
                following, weight = residual
                torch.addmm(h, unit, weight, out=following)  # without the drift
        places = offsets + torch.remainder(step, sizes)
        self.rings[places] = self.inputs + self.drift
        self.evaluated = max(self.evaluated, step + 1)
        return F.linear(self.units, self.skip_weights, self.skip_bias)

    @property
    def nbytes(self) -> int:
        return self.rings.nbytes + self.known.nbytes


def _put(ring: Tensor, first: int, x: Tensor) -> None:
    """x (n, B, C) becomes entries first, first + 1, ... of the ring (size, B, C)."""
    size, count = len(ring), len(x)
    at = first % size
    head = min(count, size - at)
    ring[at : at + head] = x[:head]
    if head < count:
        ring[: count - head] = x[head:]


def _take(ring: Tensor, first: int, count: int) -> Tensor:
    """Entries first..first+count-1 (count, B, C); those before 0 were never put in: zeros."""
    size = len(ring)
    at = first % size
    head = min(count, size - at)
    if head == count:
        return ring[at : at + count]
    return torch.cat([ring[at:], ring[: count - head]])
