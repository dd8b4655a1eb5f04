"""VQ-GAN's encoder and decoder (Esser et al., "Taming Transformers", 2021, appendix A.1).

Residual blocks with group norm and swish, one halving of the grid between levels,
attention at chosen levels and in the middle; the decoder mirrors it with one block more a
level. What makes it a GAN is how it is trained: `adversarial` in train_tokenizer.

    taming f16, 256 px: downsampling 16, channels 128, multipliers 1,1,2,2,4, attention
    at the last level, codebook_size 1024 or 16384, dim 256
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from chainrule.tokenizers.autoencoder import Autoencoder, AutoencoderTokenizer
from chainrule.tokenizers.interface import TokenizerSettings
from chainrule.tokenizers.quantizers import (
    Cosine,
    QuantizerSettings,
    build_quantizer,
    check_codebook_size,
)
from chainrule.tokenizers.vqvae import check_downsampling


class VQGANSettings(TokenizerSettings):
    kind: Literal["vqgan"] = "vqgan"
    downsampling: int = Field(16, ge=2, description="pixels a code, along each side: 2, 4, 8, 16")
    codebook_size: int = Field(1024, ge=2, description="K")
    dim: int = Field(256, ge=1, description="channels of the features that are quantised")
    channels: int = Field(128, ge=1, description="channels of the first level")
    multipliers: tuple[int, ...] | None = Field(
        None, description="of the channels at each level; by default 1, 1, 2, 2, 4, its end alone"
    )
    residual_blocks: int = Field(2, ge=1, description="a level")
    attention_levels: tuple[int, ...] | None = Field(
        None, description="levels with attention, 0 the finest; by default the coarsest"
    )
    dropout: float = Field(0.0, ge=0, lt=1)
    quantizer: QuantizerSettings = Cosine()

    @model_validator(mode="after")
    def _can_be_built(self) -> "VQGANSettings":
        check_downsampling(self.downsampling)
        check_codebook_size(self.quantizer, self.codebook_size)
        levels = self.downsampling.bit_length()
        if self.multipliers is not None and len(self.multipliers) != levels:
            raise ValueError(
                f"multipliers has {len(self.multipliers)} levels, downsampling "
                f"{self.downsampling} needs {levels}"
            )
        for level in self.attention_levels or ():
            if not 0 <= level < levels:
                raise ValueError(f"attention level {level} is none of 0 to {levels - 1}")
        return self

    def widths(self) -> list[int]:
        """Channels at each level, finest first."""
        levels = self.downsampling.bit_length()
        default = (1, 1, 2, 2, 4)
        multipliers = self.multipliers or default[max(0, len(default) - levels) :]
        multipliers = tuple(multipliers) + (4,) * (levels - len(multipliers))
        return [self.channels * m for m in multipliers]

    def attends(self, level: int) -> bool:
        if self.attention_levels is None:
            return level == self.downsampling.bit_length() - 1
        return level in self.attention_levels


def norm(channels: int) -> nn.Module:
    groups = 32
    while channels % groups:  # narrow ones, for tests and small images
        groups //= 2
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, width: int, out: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        out: Tensor = self.shortcut(x) + h
        return out


class Attention(nn.Module):
    """One head over all positions of the grid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, c, h * w).transpose(2, 3).unbind(1)
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(b, c, h, w))
        return x + out


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))  # as Taming Transformers pads
        return out


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def middle(width: int, dropout: float) -> list[nn.Module]:
    return [
        ResidualBlock(width, width, dropout),
        Attention(width),
        ResidualBlock(width, width, dropout),
    ]


class Encoder(nn.Module):
    """(B, C, H, W) to features (B, dim, H/f, W/f)."""

    def __init__(self, settings: VQGANSettings, channels: int) -> None:
        super().__init__()
        widths = settings.widths()
        width = widths[0]
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        for level, out in enumerate(widths):
            for _ in range(settings.residual_blocks):
                layers.append(ResidualBlock(width, out, settings.dropout))
                width = out
                if settings.attends(level):
                    layers.append(Attention(width))
            if level < len(widths) - 1:
                layers.append(Downsample(width))
        layers += middle(width, settings.dropout)
        layers += [norm(width), nn.SiLU(), nn.Conv2d(width, settings.dim, 3, padding=1)]
        layers.append(nn.Conv2d(settings.dim, settings.dim, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features


class Decoder(nn.Module):
    """Quantised features (B, dim, h, w) to (B, C, h*f, w*f)."""

    def __init__(self, settings: VQGANSettings, channels: int) -> None:
        super().__init__()
        widths = settings.widths()
        width = widths[-1]
        layers: list[nn.Module] = [nn.Conv2d(settings.dim, settings.dim, 1)]
        layers.append(nn.Conv2d(settings.dim, width, 3, padding=1))
        layers += middle(width, settings.dropout)
        for level in reversed(range(len(widths))):
            for _ in range(settings.residual_blocks + 1):
                layers.append(ResidualBlock(width, widths[level], settings.dropout))
                width = widths[level]
                if settings.attends(level):
                    layers.append(Attention(width))
            if level > 0:
                layers.append(Upsample(width))
        layers += [norm(width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.layers(z)
        return pixels


class VQGAN(Autoencoder):
    def __init__(self, settings: VQGANSettings, channels: int) -> None:
        super().__init__()
        self.encoder = Encoder(settings, channels)
        self.quantizer = build_quantizer(settings.quantizer, settings.codebook_size, settings.dim)
        self.decoder = Decoder(settings, channels)


class VQGANTokenizer(AutoencoderTokenizer):
    kind = "vqgan"
    settings_class = VQGANSettings

    @staticmethod
    def build(settings: Any, channels: int) -> Autoencoder:
        return VQGAN(settings, channels)


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): a logit for each overlapping patch, (B, 1, h', w').

    Group norm where the original has batch norm: nothing to keep in step between ranks,
    and real and fake batches cannot be told apart by their statistics.
    """

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        stack: list[nn.Module] = [
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        inner = width
        for i in range(1, layers + 1):
            out = width * min(2**i, 8)
            stride = 2 if i < layers else 1
            stack += [
                nn.Conv2d(inner, out, 4, stride=stride, padding=1),
                norm(out),
                nn.LeakyReLU(0.2),
            ]
            inner = out
        stack.append(nn.Conv2d(inner, 1, 4, padding=1))
        self.layers = nn.Sequential(*stack)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x).float()  # losses want float32 whatever autocast did
        return logits


def smallest_side(layers: int) -> int:
    """Least side of an image for which `Discriminator` still has a patch."""
    side = 8
    while True:
        with torch.no_grad():
            out = side
            for i in range(layers + 2):
                out = (out + 2 - 4) // (2 if i < layers else 1) + 1
            if out >= 1:
                return side
        side += 1
