"""WaveNet: dilated causal convolutions over a waveform.

van den Oord, Dieleman, Zen, Simonyan, Vinyals, Graves, Kalchbrenner, Senior, Kavukcuoglu 2016,
"WaveNet: A Generative Model for Raw Audio": causal convolutions whose dilation doubles from
layer to layer (section 2.1), a softmax over mu-law values (2.2), gated units (eq. 2), residual
and skip paths (figure 4), global conditioning on a class and local conditioning on features
at a lower rate, learned up to the samples' rate by a transposed convolution (2.5, eq. 3).
Mixtures of logistics as in Parallel WaveNet (van den Oord et al. 2017, section 2), and
Gaussians as in ClariNet (Ping et al. 2018, section 3.1), are heads. Local features are given
from Python (`local=`): token artifacts hold none, so the jobs refuse `local_width`.

The input layer is 1x1, so k layers that double from 1 see exactly 2^k samples, as in figure 3
(the paper's code has one more convolution of 2 below them).

Legend: B batch, t samples, C residual channels, G gate channels, S skip channels, K taps of a
convolution, d dilation, F frames of local features, P parameters of one conditional.
"""

from copy import copy
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from chainrule.pipeline.config import Settings
from chainrule.pipeline.models.contract import Autoregressive, Conditional, Cursor
from chainrule.pipeline.models.heads import CategoricalHead, Head, check_head, projection
from chainrule.pipeline.models.inputs import (
    ClassEmbedding,
    ElementInput,
    InputKind,
    check_condition,
    check_documents,
    check_elements,
    runs_of,
)


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

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        local: Tensor | None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, t, C) to the next layer's (B, t, C) and the skip path's (B, t, S).

        With `documents` (B, t) a tap that would reach into another document sees zeros, as one
        that reaches before the first sample does.
        """
        length, padded = x.shape[1], F.pad(x, (0, 0, self.reach, 0))
        taps = [padded[:, i * self.dilation :][:, :length] for i in range(self.kernel)]
        if documents is not None:
            for i in range(self.kernel - 1):
                back = self.reach - i * self.dilation
                same = documents[:, back:] == documents[:, :-back]
                taps[i] = taps[i] * F.pad(same, (min(back, length), 0)).unsqueeze(-1)
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
        self,
        x: Tensor,
        cond: Tensor | None = None,
        documents: Tensor | None = None,
        local: Tensor | None = None,
    ) -> Conditional:
        """As the contract says. `documents` (B, t): samples of one recording have one number
        and stand together; recordings in one window do not see each other. `local`
        (B, F, local_width), where the model is conditioned on it: features of every
        `local_hop` samples, F * local_hop covering them."""
        x = check_elements(x, self.event_shape, self.config.vocabulary_size, shorter=True)
        cond = check_condition(cond, self.config.classes, len(x))
        documents = check_documents(documents, x)
        if documents is not None:
            documents = runs_of(documents)
        features = self._local_features(local, len(x), x.shape[1])
        start = self.start.expand(len(x), 1, -1)
        h = torch.cat([start, self._embed(x[:, :-1])], dim=1)[:, : x.shape[1]]
        if documents is not None:
            begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
            h = torch.where(begins.unsqueeze(-1), start, h)
        skip: Tensor | float = 0.0
        for layer, bias in zip(self.layers, self._class_biases(cond, len(x)), strict=True):
            h, path = layer(h, bias, features, documents)
            skip = skip + path
        return self._conditional(self._parameters_from(cast(Tensor, skip)))

    def log_prob(
        self,
        x: Tensor,
        cond: Tensor | None = None,
        documents: Tensor | None = None,
        local: Tensor | None = None,
    ) -> Tensor:
        return self.conditionals(x, cond, documents, local).log_prob(x)

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

    def lengthened(self, length: int) -> "WaveNet":
        """As the contract says: convolutions are the same everywhere."""
        if length < 1:
            raise ValueError(f"length is {length}: an event has at least one element")
        model = copy(self)
        model.event_shape = (length,)
        model.config = self.config.model_copy(update={"event_shape": (length,)})
        return model

    def cursor(self, batch: int, cond: Tensor | None = None, local: Tensor | None = None) -> Cursor:
        from chainrule.pipeline.models.wavenet_cursor import WaveNetCursor

        cond = check_condition(cond, self.config.classes, batch)
        return WaveNetCursor(self, batch, cond, local)


FAMILIES = {"wavenet": (WaveNetConfig, WaveNet)}
