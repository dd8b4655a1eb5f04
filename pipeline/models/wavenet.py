"""WaveNet: dilated causal convolutions over a waveform.

van den Oord, Dieleman, Zen, Simonyan, Vinyals, Graves, Kalchbrenner, Senior, Kavukcuoglu 2016,
"WaveNet: A Generative Model for Raw Audio": causal convolutions whose dilation doubles from
layer to layer (section 2.1), a softmax over mu-law values (2.2), gated units (eq. 2), residual
and skip paths (figure 4), global conditioning on a class and local conditioning on features
at a lower rate, learned up to the samples' rate by a transposed convolution (2.5, eq. 3).
Mixtures of logistics as in Parallel WaveNet (van den Oord et al. 2017, section 2), and
Gaussians as in ClariNet (Ping et al. 2018, section 3.1), are heads.

The input layer is 1x1, so k layers that double from 1 see exactly 2^k samples, as in figure 3
(the paper's code has one more convolution of 2 below them).

Legend: B batch, t samples, C residual channels, G gate channels, S skip channels, K taps of a
convolution, d dilation, F frames of local features, P parameters of one conditional.
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from chainrule.pipeline.config import Settings
from chainrule.pipeline.models.contract import Autoregressive, Conditional
from chainrule.pipeline.models.cursors import CachedCursor
from chainrule.pipeline.models.heads import CategoricalHead, Head, check_head, projection
from chainrule.pipeline.models.inputs import (
    ClassEmbedding,
    ElementInput,
    InputKind,
    check_condition,
    check_elements,
)

REWINDABLE = 64
"""Samples that a cursor forgets without recomputing, and evaluates at once in `advance`."""


class WaveNetConfig(Settings):
    family: Literal["wavenet"] = "wavenet"
    event_shape: tuple[int] = Field((16000,), description="(samples,)")
    vocabulary_size: int | None = Field(256, ge=2)
    head: Head = CategoricalHead()
    input: InputKind | None = Field(
        None, description="default: embedding under a categorical head, intensity otherwise"
    )
    cycles: int = Field(3, ge=1, description="times that the dilations 1, 2, 4, ... are repeated")
    layers: int = Field(10, ge=1, description="layers a cycle: dilations up to 2^(layers-1)")
    kernel: int = Field(2, ge=2)
    residual_width: int = Field(64, ge=1)
    gate_width: int = Field(64, ge=1)
    skip_width: int = Field(256, ge=1)
    classes: int | None = Field(None, ge=1, description="global conditioning")
    class_dropout: float = Field(0.0, ge=0, le=1)
    local_width: int | None = Field(None, ge=1, description="local conditioning: features a frame")
    local_hop: int = Field(1, ge=1, description="samples a frame")

    @model_validator(mode="after")
    def _settings_agree(self) -> "WaveNetConfig":
        check_head(self.head, self.vocabulary_size)
        if self.input == "embedding" and self.vocabulary_size is None:
            raise ValueError("input is 'embedding': a continuous element has no vocabulary")
        if self.local_hop > 1 and self.local_width is None:
            raise ValueError(f"local_hop is {self.local_hop}: local_width is missing")
        return self

    @property
    def dilations(self) -> list[int]:
        return [2**layer for _ in range(self.cycles) for layer in range(self.layers)]

    @property
    def receptive_field(self) -> int:
        """Samples before the predicted one that it depends on."""
        return 1 + (self.kernel - 1) * sum(self.dilations)


PRESETS = {
    # Section 3.1: dilations 1..512 repeated; the paper leaves the widths open.
    "wavenet": {"family": "wavenet"},  # 1,263,232
    # Parallel WaveNet's teacher, section 4.1: 30 layers, 3 taps, 512 channels, gates of 256.
    "wavenet-parallel-teacher": {  # 29,473,054
        "family": "wavenet",
        "event_shape": [24000],
        "vocabulary_size": 65536,
        "head": {"kind": "discretized-mixture-of-logistics", "components": 10},
        "kernel": 3,
        "residual_width": 512,
        "gate_width": 256,
        "skip_width": 256,
    },
    "wavenet-debug": {  # 3,336
        "family": "wavenet",
        "event_shape": [24],
        "vocabulary_size": 8,
        "cycles": 2,
        "layers": 3,
        "residual_width": 8,
        "gate_width": 8,
        "skip_width": 16,
    },
}


class GatedLayer(nn.Module):
    """tanh(W_f * x + V_f h) sigmoid(W_g * x + V_g h), then 1x1 to the residual and skip paths.

    The last layer has no residual path: nothing would read it.
    """

    def __init__(self, config: WaveNetConfig, dilation: int, last: bool) -> None:
        super().__init__()
        self.kernel, self.dilation = config.kernel, dilation
        self.residual_width = 0 if last else config.residual_width
        self.convolution = nn.Linear(config.kernel * config.residual_width, 2 * config.gate_width)
        self.local = (
            nn.Linear(config.local_width, 2 * config.gate_width, bias=False)
            if config.local_width
            else None
        )
        self.paths = nn.Linear(config.gate_width, self.residual_width + config.skip_width)

    @property
    def reach(self) -> int:
        """Steps back that the convolution sees."""
        return (self.kernel - 1) * self.dilation

    def forward(self, x: Tensor, bias: Tensor | None, local: Tensor | None) -> tuple[Tensor, ...]:
        """(B, t, C) to the next layer's (B, t, C) and the skip path's (B, t, S)."""
        length, padded = x.shape[1], F.pad(x, (0, 0, self.reach, 0))
        taps = [padded[:, i * self.dilation :][:, :length] for i in range(self.kernel)]
        return self.unit(x, torch.cat(taps, dim=-1), bias, local)

    def unit(
        self, x: Tensor, taps: Tensor, bias: Tensor | None, local: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`taps` (B, t, K*C): what the convolution sees at each step, the oldest first."""
        maps = self.convolution(taps)
        if bias is not None:
            maps = maps + bias
        if self.local is not None and local is not None:
            maps = maps + self.local(local)
        filtered, gated = maps.chunk(2, dim=-1)
        paths = self.paths(torch.tanh(filtered) * torch.sigmoid(gated))
        if self.residual_width == 0:
            return x, paths
        return x + paths[..., : self.residual_width], paths[..., self.residual_width :]


class WaveNet(Autoregressive):
    config: WaveNetConfig

    def __init__(self, config: WaveNetConfig) -> None:
        super().__init__()
        self.config = config
        self.event_shape = config.event_shape
        kind = config.input or ("embedding" if config.head.kind == "categorical" else "intensity")
        width = config.residual_width
        self.input = ElementInput(kind, config.vocabulary_size, width)
        self.project = None if kind == "embedding" else nn.Linear(self.input.features, width)
        self.start = nn.Parameter(torch.zeros(width))
        count = len(config.dilations)
        self.layers = nn.ModuleList(
            GatedLayer(config, dilation, last=i == count - 1)
            for i, dilation in enumerate(config.dilations)
        )
        self.classes = (
            ClassEmbedding(config.classes, count * 2 * config.gate_width, config.class_dropout)
            if config.classes
            else None
        )
        self.upsample = (
            nn.ConvTranspose1d(
                config.local_width, config.local_width, config.local_hop, stride=config.local_hop
            )
            if config.local_width
            else None
        )
        self.hidden = nn.Linear(config.skip_width, config.skip_width)
        self.output = projection(config.head, config.skip_width, config.vocabulary_size)

    def conditionals(
        self, x: Tensor, cond: Tensor | None = None, local: Tensor | None = None
    ) -> Conditional:
        """`local` (B, F, local_width): features of every `local_hop` samples, where the model
        is conditioned on them; F * local_hop covers the samples."""
        check_elements(x, self.event_shape, self.config.vocabulary_size, shorter=True)
        check_condition(cond, self.config.classes, len(x))
        features = self._local_features(local, len(x), x.shape[1])
        start = self.start.expand(len(x), 1, -1)
        h = torch.cat([start, self._embed(x[:, :-1])], dim=1)[:, : x.shape[1]]
        skip: Tensor | float = 0.0
        for layer, bias in zip(self.layers, self._class_biases(cond, len(x)), strict=True):
            h, path = layer(h, bias, features)
            skip = skip + path
        return self._conditional(self._parameters_from(cast(Tensor, skip)))

    def log_prob(
        self, x: Tensor, cond: Tensor | None = None, local: Tensor | None = None
    ) -> Tensor:
        return self.conditionals(x, cond, local).log_prob(x)

    def _embed(self, x: Tensor) -> Tensor:
        """(B, t) to (B, t, C)."""
        features: Tensor = self.input(x, self.start.dtype)
        return features if self.project is None else self.project(features)

    def _parameters_from(self, skip: Tensor) -> Tensor:
        parameters: Tensor = self.output(F.relu(self.hidden(F.relu(skip))))
        return parameters

    def _conditional(self, parameters: Tensor) -> Conditional:
        return self.config.head.conditional(parameters, self.config.vocabulary_size)

    def _class_biases(self, cond: Tensor | None, batch: int) -> tuple[Tensor | None, ...]:
        """(B, 1, 2G) for each layer."""
        if self.classes is None:
            return (None,) * len(self.layers)
        embedded: Tensor = self.classes(cond, batch)
        return embedded.unsqueeze(1).chunk(len(self.layers), dim=-1)

    def _local_features(self, local: Tensor | None, batch: int, length: int) -> Tensor | None:
        """(B, F, local_width) to (B, length, local_width)."""
        width, hop = self.config.local_width, self.config.local_hop
        if width is None or self.upsample is None:
            if local is not None:
                raise ValueError("local was given: the model was built without local_width")
            return None
        frames = -(-length // hop)
        if local is None or local.dim() != 3 or local.shape[1] < frames:
            given = None if local is None else tuple(local.shape)
            raise ValueError(
                f"local is {given}: the model takes ({batch}, {frames} or more, {width})"
            )
        if local.shape[0] != batch or local.shape[2] != width:
            raise ValueError(
                f"local has shape {tuple(local.shape)}: the model takes ({batch}, frames, {width})"
            )
        samples: Tensor = self.upsample(local[:, :frames].transpose(1, 2))
        return samples.transpose(1, 2)[:, :length]

    def cursor(
        self, batch: int, cond: Tensor | None = None, local: Tensor | None = None
    ) -> "WaveNetCursor":
        check_condition(cond, self.config.classes, batch)
        return WaveNetCursor(self, batch, cond, local)


class WaveNetCursor(CachedCursor):
    """A queue a layer, as long as its reach, so that a sample costs one step of each layer
    (Paine et al. 2016, "Fast WaveNet Generation Algorithm").

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
        self.own_weights = own_weights.unbind()
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
        self.residual_weights = [
            (layer.paths.weight[:width].T * 0.5).contiguous() for layer in self.layers[:-1]
        ]
        skips = [layer.paths.weight[layer.residual_width :] * 0.5 for layer in self.layers]
        self.skip_weights = torch.cat(skips, dim=1)
        biases = [layer.paths.bias[layer.residual_width :] for layer in self.layers]
        self.skip_bias = torch.stack(biases).sum(0)

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
        maps = torch.baddbmm(self.constants, taps, self.older_weights)
        if self.local is not None and self.local_weights is not None:
            maps = maps + self.local[step] @ self.local_weights
        h = self._inputs(step, step + 1)[0]  # without the drift, from the second layer on
        inputs, units = [h], []
        for i, so_far in enumerate(maps.unbind()):
            filtered, gated = torch.addmm(so_far, h, self.own_weights[i]).tanh_().chunk(2, dim=-1)
            unit = torch.addcmul(filtered, filtered, gated)
            units.append(unit)
            if i < len(self.residual_weights):
                h = torch.addmm(h, unit, self.residual_weights[i])
                inputs.append(h)
        places = offsets + torch.remainder(step, sizes)
        self.rings[places] = torch.stack(inputs) + self.drift
        self.evaluated = max(self.evaluated, step + 1)
        return F.linear(torch.cat(units, dim=-1), self.skip_weights, self.skip_bias)

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


FAMILIES = {"wavenet": (WaveNetConfig, WaveNet)}
