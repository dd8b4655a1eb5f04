"""Quantizers: continuous features to codes of a finite set, behind one small interface.

    quantized = quantizer(z_BDHW)      # codes, what the decoder sees, losses
    z_BDHW = quantizer.lookup(codes)   # codes back to what the decoder sees

Learned codebooks are in `codebooks.py`, those without one (FSQ, LFQ) in `lookup_free.py`.

Statistics (code counts, sums of features, entropies) are summed over the ranks of
`torch.distributed` where it is initialised, so that two ranks of half the batch each
give the codebook that one rank gives.

Shapes: B batch, D channels, H and W the grid, K codes, N = B*H*W positions,
Q codes a position (`depth`; above 1 for residual quantizers alone).
"""

import importlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from chainrule.tokenizers.interface import TokenizerSettings


@dataclass
class Quantized:
    z: Tensor
    """(B, D, H, W): what the decoder sees; gradients flow through it to the encoder."""
    codes: Tensor
    """(B, H, W*Q) long: the Q codes of a position lie side by side, coarse first."""
    loss: Tensor
    """Scalar to add to the reconstruction loss: commitment, codebook and entropy terms."""
    commitment: Tensor
    """Scalar for the log: mean squared distance between feature and code, per channel."""


class Quantizer(nn.Module, ABC):
    """What every quantizer is."""

    codebook_size: int
    depth: int = 1

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """Quantise features (B, D, H, W); in training mode statistics move as well."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """(B, H, W*Q) long to (B, D, H, W)."""

    def start(self, z: Tensor, generator: torch.Generator) -> None:
        """Begin the codebook from features (B, D, H, W) of the first batches (all ranks')."""

    def gather_start(self, z: Tensor) -> Tensor:
        """Features of all ranks, in rank order: what `start` is given."""
        return gather(z)


class Straight(TokenizerSettings):
    """Straight-through estimator with codebook and commitment loss.

    van den Oord et al., "Neural Discrete Representation Learning" (2017), eq. 3.
    """

    kind: Literal["straight-through"] = "straight-through"
    commitment: float = Field(0.25, ge=0, description="β of the commitment loss")
    revive_after: int = Field(50, ge=0, description="steps without use until revival; 0: never")


class EMA(TokenizerSettings):
    """Codebook as a moving average of the features assigned to it (same paper, appendix A.1)."""

    kind: Literal["ema"] = "ema"
    commitment: float = Field(0.25, ge=0, description="β of the commitment loss")
    decay: float = Field(0.99, gt=0, lt=1)
    revive_after: int = Field(50, ge=0, description="steps without use until revival; 0: never")


class Cosine(TokenizerSettings):
    """Low-dimensional codes on the unit sphere, by gradient.

    Yu et al., "Vector-quantized Image Modeling with Improved VQGAN" (2022), section 3.2;
    LlamaGen (Sun et al. 2024) uses dimension 8.
    """

    kind: Literal["l2"] = "l2"
    dim: int = Field(8, ge=2)
    commitment: float = Field(0.25, ge=0, description="β of the commitment loss")
    revive_after: int = Field(50, ge=0, description="steps without use until revival; 0: never")


class Residual(TokenizerSettings):
    """Each codebook quantises what the one before it left (SoundStream, 2021, section III-C)."""

    kind: Literal["residual"] = "residual"
    depth: int = Field(2, ge=1)
    commitment: float = Field(0.25, ge=0, description="β of the commitment loss")
    decay: float = Field(0.99, gt=0, lt=1)
    revive_after: int = Field(50, ge=0, description="steps without use until revival; 0: never")


class Gumbel(TokenizerSettings):
    """Gumbel-softmax over the codes (Jang et al. 2017), as in DALL-E's dVAE (2021, section 2.1).

    The temperature falls from `temperature` to `minimum_temperature` along a cosine over
    `anneal_steps`. Below about 0.5, or with less divergence, half of the codes went unused
    on digits.
    """

    kind: Literal["gumbel"] = "gumbel"
    temperature: float = Field(1.0, gt=0)
    minimum_temperature: float = Field(0.5, gt=0)
    anneal_steps: int = Field(5000, ge=1)
    divergence: float = Field(0.02, ge=0, description="weight of KL(q || uniform)")


class FSQ(TokenizerSettings):
    """Finite scalar quantisation: each channel rounded to a few levels (Mentzer et al. 2023).

    `levels` default to the paper's table 1 where it has the codebook size.
    """

    kind: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _levels_are_at_least_two(self) -> "FSQ":
        if self.levels is not None and (not self.levels or min(self.levels) < 2):
            raise ValueError(f"every level must be 2 or more, not {list(self.levels)}")
        return self


class LFQ(TokenizerSettings):
    """Lookup-free quantisation: one sign bit a channel, with an entropy term.

    Yu et al., "Language Model Beats Diffusion" (MAGVIT-v2, 2024), section 3.1.
    """

    kind: Literal["lfq"] = "lfq"
    commitment: float = Field(0.25, ge=0, description="β of the commitment loss")
    entropy: float = Field(0.1, ge=0, description="weight of the entropy term")
    diversity: float = Field(1.0, ge=0, description="γ: weight of the batch entropy within it")
    temperature: float = Field(1.0, gt=0, description="of the soft assignment in the entropies")


QuantizerSettings = Annotated[
    Straight | EMA | Cosine | Residual | Gumbel | FSQ | LFQ, Field(discriminator="kind")
]

# codebook size -> levels: table 1 of the FSQ paper, and the powers of two that digits need
FSQ_LEVELS: dict[int, tuple[int, ...]] = {
    64: (8, 8),
    128: (8, 4, 4),
    240: (8, 6, 5),
    256: (4, 4, 4, 4),
    512: (8, 8, 8),
    1000: (8, 5, 5, 5),
    1024: (8, 8, 4, 4),
    4375: (7, 5, 5, 5, 5),
    15360: (8, 8, 8, 6, 5),
    64000: (8, 8, 8, 5, 5, 5),
}

_BUILDERS = {
    "straight-through": ("chainrule.tokenizers.codebooks", "StraightThroughQuantizer"),
    "ema": ("chainrule.tokenizers.codebooks", "EMAQuantizer"),
    "l2": ("chainrule.tokenizers.codebooks", "CosineQuantizer"),
    "residual": ("chainrule.tokenizers.codebooks", "ResidualQuantizer"),
    "gumbel": ("chainrule.tokenizers.codebooks", "GumbelQuantizer"),
    "fsq": ("chainrule.tokenizers.lookup_free", "FSQQuantizer"),
    "lfq": ("chainrule.tokenizers.lookup_free", "LFQQuantizer"),
}


def check_codebook_size(settings: TokenizerSettings, codebook_size: int) -> None:
    """ValueError where a quantizer cannot have that many codes."""
    if isinstance(settings, FSQ):
        levels = settings.levels or FSQ_LEVELS.get(codebook_size)
        if levels is None:
            raise ValueError(
                f"fsq: no default levels for codebook_size {codebook_size}; set quantizer.levels "
                f"(their product), or take one of {', '.join(map(str, FSQ_LEVELS))}"
            )
        if math.prod(levels) != codebook_size:
            raise ValueError(
                f"fsq: levels {list(levels)} make {math.prod(levels)} codes, "
                f"codebook_size says {codebook_size}"
            )
    if isinstance(settings, LFQ) and codebook_size & (codebook_size - 1):
        raise ValueError(f"lfq: codebook_size {codebook_size} is not a power of two")


def build_quantizer(settings: TokenizerSettings, codebook_size: int, dim: int) -> Quantizer:
    """The quantizer of `settings`, with that many codes, for features of `dim` channels."""
    check_codebook_size(settings, codebook_size)
    module, name = _BUILDERS[settings.kind]  # type: ignore[attr-defined]
    quantizer: Quantizer = getattr(importlib.import_module(module), name)(
        settings, codebook_size, dim
    )
    return quantizer


def rows(z_BDHW: Tensor) -> Tensor:
    """(B, D, H, W) to (B*H*W, D), in float32 whatever autocast did."""
    return z_BDHW.float().permute(0, 2, 3, 1).reshape(-1, z_BDHW.shape[1])


def grid(z_ND: Tensor, like_BDHW: Tensor) -> Tensor:
    """(B*H*W, D) back to (B, D, H, W)."""
    b, _, h, w = like_BDHW.shape
    return z_ND.reshape(b, h, w, -1).permute(0, 3, 1, 2)


def straight_through(z: Tensor, quantised: Tensor) -> Tensor:
    """`quantised` forward, the gradient of `z` backward."""
    return z + (quantised - z).detach()


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """`x` summed over ranks, in place."""
    if distributed():
        dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean over ranks of equal batches; its gradient is that of the own part.

    With gradients averaged over ranks (DDP) any function of the mean then gets the
    gradient that one rank with the whole batch gives.
    """
    if not distributed():
        return x
    whole = sum_over_ranks(x.detach().clone()) / dist.get_world_size()
    return x + (whole - x).detach()


def gather(x: Tensor) -> Tensor:
    """`x` of all ranks along the first axis, in rank order (equal shapes)."""
    if not distributed():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
