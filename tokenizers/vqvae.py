"""VQ-VAE (van den Oord et al., "Neural Discrete Representation Learning", 2017).

Encoder and decoder as in section 4.1 and DeepMind's Sonnet example: strided 4x4
convolutions, one for each factor of two, then residual blocks of a 3x3 and a 1x1
convolution, and the mirror image of that. Any power of two of downsampling, any
resolution that it divides.

    32x32 CIFAR-10 reference: downsampling 4, codebook_size 512, dim 64, hidden 128,
    residual_layers 2, residual_width 32, ema 0.99, commitment 0.25
"""

from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from chainrule.tokenizers.autoencoder import Autoencoder, AutoencoderTokenizer
from chainrule.tokenizers.interface import TokenizerSettings
from chainrule.tokenizers.quantizers import (
    EMA,
    QuantizerSettings,
    build_quantizer,
    check_codebook_size,
)


class VQVAESettings(TokenizerSettings):
    kind: Literal["vqvae"] = "vqvae"
    downsampling: int = Field(4, ge=1, description="pixels a code, along each side: 2, 4, 8, 16")
    codebook_size: int = Field(512, ge=2, description="K")
    dim: int = Field(64, ge=1, description="D: channels of the features that are quantised")
    hidden: int = Field(128, ge=2, description="channels of the convolutions")
    residual_layers: int = Field(2, ge=0)
    residual_width: int = Field(32, ge=1, description="channels inside a residual block")
    quantizer: QuantizerSettings = EMA()

    @model_validator(mode="after")
    def _can_be_built(self) -> "VQVAESettings":
        check_downsampling(self.downsampling)
        check_codebook_size(self.quantizer, self.codebook_size)
        return self


def check_downsampling(factor: int) -> None:
    if factor & (factor - 1):
        raise ValueError(f"downsampling {factor} is not a power of two")


class ResidualBlock(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(hidden, width, 3, padding=1)
        self.out = nn.Conv2d(width, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.out(F.relu(self.conv(F.relu(x))))
        return x + branch


class Encoder(nn.Module):
    """(B, C, H, W) to features (B, dim, H/f, W/f)."""

    def __init__(self, settings: VQVAESettings, channels: int) -> None:
        super().__init__()
        hidden, factors = settings.hidden, settings.downsampling.bit_length() - 1
        layers: list[nn.Module] = []
        width = channels
        for i in range(factors):
            # half the channels until the last stride, where the grid is still large
            out = hidden if i == factors - 1 else hidden // 2
            layers += [nn.Conv2d(width, out, 4, stride=2, padding=1), nn.ReLU()]
            width = out
        layers.append(nn.Conv2d(width, hidden, 3, padding=1))
        layers += [
            ResidualBlock(hidden, settings.residual_width) for _ in range(settings.residual_layers)
        ]
        layers += [nn.ReLU(), nn.Conv2d(hidden, settings.dim, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features


class Decoder(nn.Module):
    """Quantised features (B, dim, h, w) to (B, C, h*f, w*f)."""

    def __init__(self, settings: VQVAESettings, channels: int) -> None:
        super().__init__()
        hidden, factors = settings.hidden, settings.downsampling.bit_length() - 1
        layers: list[nn.Module] = [nn.Conv2d(settings.dim, hidden, 3, padding=1)]
        layers += [
            ResidualBlock(hidden, settings.residual_width) for _ in range(settings.residual_layers)
        ]
        layers.append(nn.ReLU())
        width = hidden
        for i in range(factors):
            out = channels if i == factors - 1 else hidden // 2
            layers.append(nn.ConvTranspose2d(width, out, 4, stride=2, padding=1))
            if i < factors - 1:
                layers.append(nn.ReLU())
            width = out
        if factors == 0:
            layers.append(nn.Conv2d(hidden, channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.layers(z)
        return pixels


class VQVAE(Autoencoder):
    def __init__(self, settings: VQVAESettings, channels: int) -> None:
        super().__init__()
        self.encoder = Encoder(settings, channels)
        self.quantizer = build_quantizer(settings.quantizer, settings.codebook_size, settings.dim)
        self.decoder = Decoder(settings, channels)


class VQVAETokenizer(AutoencoderTokenizer):
    kind = "vqvae"
    settings_class = VQVAESettings

    @staticmethod
    def build(settings: Any, channels: int) -> Autoencoder:
        return VQVAE(settings, channels)
