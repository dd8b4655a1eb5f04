"""What the learned image tokenizers share: pixels <-> codes, saving, loading, health.

Pixels are uint8 (H, W, C) outside and floats in [-1, 1], (B, C, H, W), inside.
"""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from chainrule.tokenizers.interface import (
    Tokenizer,
    TokenizerError,
    TokenizerSettings,
    check_ids,
    fingerprint_of,
    read_card,
    read_weights,
    require_fingerprint,
    write_card,
    write_whole,
)
from chainrule.tokenizers.quantizers import Quantized, Quantizer

WEIGHTS = "weights.safetensors"


class Autoencoder(nn.Module):
    """Encoder, quantizer, decoder."""

    encoder: nn.Module
    quantizer: Quantizer
    decoder: nn.Module

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        """Pixels (B, C, H, W) in [-1, 1] to their reconstruction and the quantised features."""
        features = self.encoder(x)
        # distances between features and codes want float32 whatever the rest computes in
        with torch.autocast(features.device.type, enabled=False):
            quantized = self.quantizer(features.float())
        return self.decoder(quantized.z), quantized

    @property
    def last_layer(self) -> Tensor:
        """Weight of the layer that makes pixels: where losses are balanced against each other."""
        last = [m for m in self.decoder.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        return last[-1].weight

    def encode(self, x: Tensor) -> Tensor:
        """Pixels (B, C, H, W) to codes (B, h, w*Q)."""
        codes: Tensor = self.quantizer(self.encoder(x)).codes
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w*Q) to pixels (B, C, H, W)."""
        pixels: Tensor = self.decoder(self.quantizer.lookup(codes))
        return pixels


def to_pixels(images_BHWC: np.ndarray) -> Tensor:
    """uint8 (B, H, W, C) to floats in [-1, 1], (B, C, H, W)."""
    x = torch.from_numpy(np.ascontiguousarray(images_BHWC)).permute(0, 3, 1, 2)
    return x.float() / 127.5 - 1


def from_pixels(x_BCHW: Tensor) -> np.ndarray:
    """Floats in [-1, 1], (B, C, H, W), to uint8 (B, H, W, C)."""
    x = ((x_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    array: np.ndarray = x.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array


class AutoencoderTokenizer(Tokenizer):
    """A learned image tokenizer; a kind names its settings and builds its module."""

    modality = "image"
    settings_class: ClassVar[type[TokenizerSettings]]

    def __init__(
        self,
        settings: Any,
        channels: int,
        resolution: tuple[int, int],
        model: Autoencoder | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        """`resolution` (H, W) is that of training; any that the factor divides is taken.

        `facts` are what training measured (codebook health, PSNR): into the card, not
        into the fingerprint.
        """
        self.settings = settings
        self.channels = channels
        self.resolution = resolution
        self.model = self.build(settings, channels) if model is None else model
        self.model.eval()
        self.facts = dict(facts or {})
        self._fingerprint: str | None = None

    @staticmethod
    @abstractmethod
    def build(settings: Any, channels: int) -> Autoencoder:
        """A fresh module of these settings, for images of `channels`."""

    @property
    def depth(self) -> int:
        """Codes a position of the grid."""
        return self.model.quantizer.depth

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def vocabulary(self) -> dict[str, Any]:
        size = self.settings.codebook_size
        return {"size": size, "ranges": {"image": [0, size]}, "specials": {}}

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.min_scalar_type(self.settings.codebook_size - 1)

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self._decisive(), self._arrays())
        return self._fingerprint

    def _decisive(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "settings": self.settings.model_dump(mode="json"),
            "channels": self.channels,
        }

    def _arrays(self) -> dict[str, np.ndarray]:
        state = self.model.state_dict()
        return {name: value.detach().cpu().numpy() for name, value in state.items()}

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Shape of the tokens of an image; TokenizerError where the factor does not divide it."""
        f = self.settings.downsampling
        if height % f or width % f:
            raise TokenizerError(
                f"image of {height}x{width}: not divisible by the downsampling {f}; "
                f"resize or crop it (ingest: size, a multiple of {f})"
            )
        return height // f, width // f * self.depth

    def _check(self, image: Any) -> np.ndarray:
        image = np.asarray(image)
        self.check_shape(image.shape, image.dtype)
        return image

    def check_shape(self, shape: tuple[int, ...], dtype: Any = np.uint8) -> None:
        """TokenizerError where an image of this shape cannot be encoded."""
        if len(shape) != 3 or np.dtype(dtype) != np.uint8 or shape[2] != self.channels:
            raise TokenizerError(
                f"image is {np.dtype(dtype)} {shape}; this tokenizer takes uint8 "
                f"(H, W, {self.channels})"
            )
        self.token_grid(*shape[:2])

    @torch.no_grad()
    def encode(self, batch: Sequence[Any]) -> list[np.ndarray]:
        images = [self._check(image) for image in batch]
        tokens: list[Any] = [None] * len(images)
        for places in _alike(images):
            x = to_pixels(np.stack([images[i] for i in places])).to(self.device)
            codes = self.model.encode(x).cpu().numpy().astype(self.dtype)
            for i, place in enumerate(places):
                tokens[place] = codes[i]
        return tokens

    @torch.no_grad()
    def decode(self, batch: Sequence[np.ndarray]) -> list[Any]:
        codes = [check_ids(tokens, self.settings.codebook_size) for tokens in batch]
        for array in codes:
            if array.ndim != 2 or array.shape[1] % self.depth:
                raise TokenizerError(
                    f"tokens of shape {array.shape}: this tokenizer takes (h, w*{self.depth})"
                )
        images: list[Any] = [None] * len(codes)
        for places in _alike(codes):
            x = torch.from_numpy(np.stack([codes[i] for i in places])).to(self.device)
            pixels = from_pixels(self.model.decode(x))
            for i, place in enumerate(places):
                images[place] = pixels[i]
        return images

    def card(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "format": 1,
            "modality": self.modality,
            "vocabulary": self.vocabulary,
            "settings": self.settings.model_dump(mode="json"),
            "downsampling": self.settings.downsampling,
            "channels": self.channels,
            "resolution": list(self.resolution),
            "grid": list(self.token_grid(*self.resolution)),
            "depth": self.depth,
            **self.facts,
            "fingerprint": self.fingerprint,
        }

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save

        folder.mkdir(parents=True, exist_ok=True)
        self._fingerprint = None
        write_whole(folder / WEIGHTS, save(self._arrays()))
        write_card(folder, self.card())

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "AutoencoderTokenizer":
        from safetensors import SafetensorError
        from safetensors.torch import load

        card = read_card(folder)
        try:
            settings = cls.settings_class.model_validate(card["settings"])
            channels, resolution = _channels_and_resolution(card)
            state = load(read_weights(folder, WEIGHTS))
        except TokenizerError:
            raise
        except (SafetensorError, KeyError, ValueError) as error:
            raise TokenizerError(f"{folder}: altered or cut ({_first_line(error)})") from None
        model = cls.build(settings, channels)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise TokenizerError(f"{folder / WEIGHTS}: {_first_line(error)}") from None
        facts = {key: value for key, value in card.items() if key not in _CARD_KEYS}
        tokenizer = cls(settings, channels, resolution, model, facts)
        require_fingerprint(folder, card, tokenizer.fingerprint)
        model.to(device)
        return tokenizer


_CARD_KEYS = {
    "kind",
    "format",
    "modality",
    "vocabulary",
    "settings",
    "downsampling",
    "channels",
    "resolution",
    "grid",
    "depth",
    "fingerprint",
}


def _channels_and_resolution(card: dict[str, Any]) -> tuple[int, tuple[int, int]]:
    """ValueError where they are not those of pictures."""
    channels, resolution = card["channels"], card["resolution"]
    if channels not in (1, 3):
        raise ValueError(f"channels {channels!r}")
    sides = resolution if isinstance(resolution, list) else []
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"resolution {resolution!r}")
    return channels, (sides[0], sides[1])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _alike(arrays: Sequence[np.ndarray]) -> list[list[int]]:
    """Places of arrays of one shape, for each shape."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, array in enumerate(arrays):
        groups[array.shape].append(i)
    return list(groups.values())
