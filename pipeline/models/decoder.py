"""Decoder-only Transformers: GPT-2 and 3, LLaMA 1 to 3, Mistral, Falcon, ImageGPT.

    input 0 is the start symbol (a learned vector, the class, or a BOS token); input t is x_{t-1}
    conditioned on a text, its tokens come before the start symbol, and every input after them
    sees them (Ramesh et al. 2021, section 2.2: one stream of text and image tokens); they are
    given, so that the likelihood is that of the elements alone
    output t is p(x_t | x_<t), through causal self-attention
    with packed documents, each has a start symbol of its own and sees no other: its
    likelihood is what it would be alone

Differences between families are named settings (decoder_config.py). Linear layers that read
the same features are one matrix: q, k, v; SwiGLU's gate and up.

Legend: B batch, T elements, S starts (inputs before the first element, 1 without a caption),
D width, H heads, K key/value heads, d width of a head, F width of the MLP, P numbers a
conditional.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chainrule.pipeline.models import native, native_attention, native_block
from chainrule.pipeline.models.attention import Attend, FullAttention
from chainrule.pipeline.models.contract import Autoregressive, Conditional, Cursor
from chainrule.pipeline.models.decoder_config import PRESETS, DecoderConfig
from chainrule.pipeline.models.heads import projection
from chainrule.pipeline.models.inputs import (
    CaptionEmbedding,
    ClassEmbedding,
    check_captions,
    check_condition,
    check_documents,
    check_elements,
    runs_of,
)
from chainrule.pipeline.models.kernels import (
    Linear,
    RMSNorm,
    gelu,
    gelu_tanh,
    quick_gelu,
    split_heads,
    swiglu,
)
from chainrule.pipeline.models.kv_cache import DecoderCursor
from chainrule.pipeline.models.orderings import inverse

__all__ = ["FAMILIES", "PRESETS", "Decoder", "DecoderConfig"]


def _norm(config: DecoderConfig) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(config.width, eps=config.norm_epsilon)
    return RMSNorm(config.width, config.norm_epsilon)


def rope_table(config: DecoderConfig, device: torch.device) -> Tensor:
    """(2, inputs, d) float32: angles of rotary position embedding, as `rotate` wants them.

    Su et al. 2021, section 3.2.2; halves are rotated against each other, as in LLaMA's
    published weights for `transformers`. Scaling: LLaMA 3.1's reference code, `apply_scaling`.
    """
    half = torch.arange(0, config.head_width, 2, dtype=torch.float32, device=device)
    frequency = config.rope_base ** -(half / config.head_width)
    scaling = config.rope_scaling
    if scaling is not None:
        waves = scaling.original_context * frequency / (2 * math.pi)  # in the original context
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        keep = ((waves - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
    angle = torch.outer(torch.arange(config.inputs, device=device).float(), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


ACTIVATIONS = {"gelu": gelu, "gelu-tanh": gelu_tanh, "quick-gelu": quick_gelu, "swiglu": swiglu}


class Attention(nn.Module):
    """Multi-head self-attention, with fewer key/value heads where the config says so
    (Vaswani et al. 2017, section 3.2; Ainslie et al. 2023, section 2.2)."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_width = config.head_width
        inner = config.heads * config.head_width
        self.qkv = Linear(
            config.width, inner + 2 * config.kv_heads * config.head_width, bias=config.bias
        )
        self.output = Linear(inner, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor, rope: Tensor | None, attend: Attend) -> Tensor:
        qkv = self.qkv(x_BTD)
        q, k, v = split_heads(qkv, rope, self.heads, self.kv_heads, self.head_width)
        y_BHTd = attend(self.layer, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        y: Tensor = self.output(y_BHTd.transpose(1, 2).flatten(2))
        return y


class MLP(nn.Module):
    """Two layers with a GELU between, or SwiGLU (Shazeer 2020, equation 6)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.activation = config.activation
        inner = config.mlp_width * (2 if config.activation == "swiglu" else 1)
        self.input = Linear(config.width, inner, bias=config.bias)
        self.output = Linear(config.mlp_width, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h = self.input(x_BTD)
        y: Tensor = self.output(ACTIVATIONS[self.activation](h))
        return y


class Block(nn.Module):
    """One layer: attention then MLP, or both from the same input (Falcon)."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.parallel = config.block != "sequential"
        self.attention_norm = _norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = _norm(config) if config.block != "parallel" else None
        self.mlp = MLP(config)
        self.shape = native_block.Shape(
            config.heads,
            config.kv_heads,
            config.head_width,
            config.activation.replace("-", "_"),
            self.parallel,
            config.norm_epsilon,
        )

    def forward(
        self, x_BTD: Tensor, rope: Tensor | None, attend: Attend, dropout: float = 0.0
    ) -> Tensor:
        if dropout == 0 and isinstance(attend, FullAttention) and attend.dropout == 0:
            fits = native_block.fits(x_BTD, self.shape)
            weights = self._weights(x_BTD, rope) if fits else None
            if weights is not None:
                first = attend.first(len(x_BTD))
                y: Tensor = native_block.BlockInC.apply(x_BTD, rope, first, self.shape, *weights)
                return y
        normed = self.attention_norm(x_BTD)
        attended = _drop(self.attention(normed, rope, attend), dropout)
        if self.parallel:
            if self.mlp_norm is not None:
                normed = self.mlp_norm(x_BTD)
            return x_BTD + attended + _drop(self.mlp(normed), dropout)
        x_BTD = x_BTD + attended
        assert self.mlp_norm is not None
        return x_BTD + _drop(self.mlp(self.mlp_norm(x_BTD)), dropout)

    def _weights(self, x: Tensor, rope: Tensor | None) -> list[Tensor | None] | None:
        for part, kind in ((self.attention, Attention), (self.mlp, MLP)):
            if type(part) is not kind or native.is_watched(part):
                return None
        attention, mlp = self.attention, self.mlp
        parts = (self.attention_norm, attention.qkv, attention.output)
        return native_block.weights_of(
            x, rope, (*parts, self.mlp_norm, mlp.input, mlp.output), self.shape
        )


def _drop(x: Tensor, rate: float) -> Tensor:
    return F.dropout(x, rate) if rate else x


class Decoder(Autoregressive):
    """See the head of this file. Elements are token ids, or floats for a density head."""

    config: DecoderConfig
    order: Tensor
    steps: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.event_shape = config.event_shape
        self.activation_checkpointing = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        if config.vocabulary_size is not None:
            self.embedding: nn.Module = nn.Embedding(config.vocabulary_size, config.width)
        else:
            self.embedding = nn.Linear(1, config.width)
        if config.position == "learned":
            self.positions = nn.Parameter(torch.empty(config.inputs, config.width))
        if config.captions is not None:
            self.caption_embedding = CaptionEmbedding(config.captions, config.width)
        if config.classes is not None:
            self.class_embedding = ClassEmbedding(
                config.classes, config.width, config.class_dropout
            )
        elif config.bos is None:
            self.start = nn.Parameter(torch.empty(config.width))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.final_norm = _norm(config)
        self.head = projection(
            config.head,
            config.width,
            config.vocabulary_size,
            bias=config.head.kind != "categorical",
        )
        self._initialise()
        self.tie()

        with torch.device("cpu"):  # also where the weights are being made on "meta"
            order = config.ordering.indices(config.event_shape)
            steps = inverse(order)
        self._reordered = bool((order[1:] < order[:-1]).any())
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("steps", steps, persistent=False)
        self._rope: Tensor | None = None

    def _initialise(self) -> None:
        """GPT-2's: N(0, 0.02), what is added to the residual stream by 1/sqrt(2 layers) less
        (Radford et al. 2019, section 2.3). With a `base_width`, matrices of the network have
        deviation 1/sqrt(inputs), as µP wants it (Yang et al. 2022, table 3)."""
        width, base = self.config.width, self.config.base_width or self.config.width
        if base != width:
            with torch.no_grad():
                self.head.weight.mul_(base / width)
        for name, parameter in self.named_parameters():
            if name.startswith(("head.", "class_embedding.")):
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2 or name == "start":
                residual = name.endswith("output.weight")
                std = 0.02
                if self.config.base_width is not None and name.startswith("blocks."):
                    std = parameter.shape[1] ** -0.5
                if residual:
                    std /= math.sqrt(2 * self.config.layers)
                nn.init.normal_(parameter, std=std)
        if self.config.vocabulary_size is None:
            # One number has to fill the whole width: as wide as a table's row would be, it
            # would drown in what is added to it.
            nn.init.normal_(self.embedding.weight)  # type: ignore[arg-type]

    def tie(self) -> None:
        """Let the output layer use the embedding's weights, where the config says so."""
        if self.config.tied_embeddings:
            self.head.weight = self.embedding.weight  # type: ignore[assignment]

    def is_faster_uncompiled(self, device: torch.device, precision: str) -> bool:
        """Whether blocks are trained in C (native_block.py), in 0.8 of the time that they take
        compiled. (A batch of very few rows is not.)"""
        config = self.config
        if sum(p.numel() for p in self.blocks[0].parameters()) > native_block.MOST_WEIGHTS:
            return False
        if device.type != "cpu" or precision != "fp32":
            return False
        if config.dropout or config.attention_dropout:
            return False
        if not native_attention.suits(config.inputs, config.head_width):
            return False
        with native.allowed():
            return native.is_allowed() and native_block.is_built()

    def conditionals(
        self, x: Tensor, cond: Tensor | None = None, documents: Tensor | None = None
    ) -> Conditional:
        """As the contract says. `documents` (B, T) integers: elements of one document have
        one number and stand together (a number that comes back is another document); documents
        neither see nor shift each other."""
        hidden = self._hidden(x, cond, documents)[-1]
        return self.config.head.conditional(self.head(hidden), self.config.vocabulary_size)

    def log_prob(
        self, x: Tensor, cond: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        return self.conditionals(x, cond, documents).log_prob(self.to_sequence(x))

    def features(self, x: Tensor, cond: Tensor | None = None) -> list[Tensor]:
        """Layers + 1 tensors (B, T, D): the embedded inputs, then what each block makes of
        them, the last one normalised. Feature t has seen x_<t only."""
        return self._hidden(x, cond, None, keep=True)

    def cursor(self, batch: int, cond: Tensor | None = None, spare: int = 0) -> Cursor:
        """With a window, `spare` elements can be forgotten without feeding any again."""
        cond = self.check_condition(cond, batch)
        return DecoderCursor(self, batch, cond, spare)

    def to_sequence(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return x[:, self.order] if self._reordered else x

    def to_event(self, sequence: Tensor) -> Tensor:
        if self._reordered:
            sequence = sequence[:, self.steps]
        return sequence.reshape(sequence.shape[0], *self.event_shape)

    def _hidden(
        self, x: Tensor, cond: Tensor | None, documents: Tensor | None, keep: bool = False
    ) -> list[Tensor]:
        """The last hidden states, or with `keep` all of them."""
        config = self.config
        # Part of an event can be told from a whole one only where it comes first.
        x = check_elements(x, self.event_shape, config.vocabulary_size, shorter=not self._reordered)
        cond = self.check_condition(cond, len(x))
        if documents is not None and config.captions is not None:
            raise ValueError("documents were given: a model of captions takes one event a row")
        documents = check_documents(documents, x)
        sequence = self.to_sequence(x)
        batch, length = sequence.shape
        if documents is not None:
            documents = runs_of(self.to_sequence(documents))
        dropout = config.dropout if self.training else 0.0

        start = self.start_vectors(cond, batch, training=self.training)
        h = self.embed(sequence[:, :-1])
        before = config.starts - 1
        length += before
        h = torch.cat([start.to(h.dtype), h], dim=1)[:, :length]
        positions: slice | Tensor = slice(0, length)
        if documents is not None:
            first = torch.ones_like(documents, dtype=torch.bool)
            first[:, 1:] = documents[:, 1:] != documents[:, :-1]
            h = torch.where(first.unsqueeze(-1), start.to(h.dtype), h)
            # Every document counts from 0. (RoPE knows differences only.)
            steps = torch.arange(length, device=x.device).expand(batch, -1)
            positions = steps - torch.where(first, steps, 0).cummax(dim=1).values
        if config.position == "learned":
            h = h + self.positions[positions]
        h = _drop(h, dropout)

        rope = self.rope(0, length, h)
        attention_dropout = config.attention_dropout if self.training else 0.0
        attend = FullAttention(length, config.window, documents, attention_dropout, x.device)
        kept = [h[:, before:]] if keep else []
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                h = checkpoint(
                    block, h, rope, attend, dropout, use_reentrant=False, context_fn=native.twice
                )
            else:
                h = block(h, rope, attend, dropout)
            if keep:
                kept.append(h[:, before:])
        h = self.final_norm(h[:, before:])
        return [*kept[:-1], h]

    def check_condition(self, cond: Tensor | None, batch: int) -> Tensor | None:
        """`cond` as int64; ValueError where it is not of the model's kind."""
        if self.config.captions is not None:
            return check_captions(cond, self.config.captions, batch)
        return check_condition(cond, self.config.classes, batch)

    def start_vectors(self, cond: Tensor | None, batch: int, training: bool = False) -> Tensor:
        """What stands before the first element, (B, S, D)."""
        start = self._start_symbol(cond, batch, training).unsqueeze(1)
        if self.config.captions is None:
            return start
        return torch.cat([self.caption_embedding(cond, batch, drop=training), start], dim=1)

    def _start_symbol(self, cond: Tensor | None, batch: int, training: bool) -> Tensor:
        config = self.config
        if config.bos is not None:
            return self.embedding.weight[config.bos].expand(batch, -1)  # type: ignore[index,operator]
        if config.classes is None:
            return self.start.expand(batch, -1)
        if training:
            embedded: Tensor = self.class_embedding(cond, batch)
            return embedded
        table = self.class_embedding.table
        if cond is None:
            cond = torch.full((batch,), -1, device=table.weight.device)
        return table(torch.where(cond < 0, config.classes, cond.long()).to(table.weight.device))

    def embed(self, elements: Tensor) -> Tensor:
        """Elements (B, t) to (B, t, D), without positions."""
        if self.config.vocabulary_size is None:
            elements = elements.unsqueeze(-1).to(self.embedding.weight.dtype)  # type: ignore[arg-type]
        embedded: Tensor = self.embedding(elements)
        return embedded

    def compile(self, *given: Any, **more: Any) -> None:
        """As nn.Module's."""
        # made within the graph, under inference_mode, it would be of no use to training
        self.rope(0, 1, self.head.weight)
        super().compile(*given, **more)

    def rope(self, first: int, end: int, like: Tensor) -> Tensor | None:
        """Angles of positions first..end-1, (2, t, 1, d); computed in float32 whatever the
        model's dtype is (which is why the table is no buffer), rounded last."""
        if self.config.position != "rope":
            return None
        if self._rope is None or self._rope.device != like.device:
            with torch.inference_mode(False):  # kept: a training to come must be able to use it
                self._rope = rope_table(self.config, like.device)
        kind = "cpu" if like.is_meta else like.device.type  # meta: shapes alone (chainrule plan)
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        return self._rope[:, first:end].unsqueeze(2).to(cast)


FAMILIES: dict[str, tuple[type[DecoderConfig], type[Decoder]]] = {
    family: (DecoderConfig, Decoder)
    for family in ("gpt2", "llama", "mistral", "falcon", "imagegpt")
}
