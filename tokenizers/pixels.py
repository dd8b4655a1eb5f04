"""Pixel levels as tokens, for models of pixels themselves (PixelCNN, MADE).

Grey images give tokens (h, w), RGB images (3, h, w): planes of red, green and blue, the
event shape of the PixelCNN families. With fewer than 256 levels a value is rounded to
the nearest of so many evenly spaced ones: 2 binarises at half, 256 loses nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from chainrule.tokenizers.interface import (
    Tokenizer,
    TokenizerError,
    TokenizerSettings,
    check_ids,
    fingerprint_of,
    read_card,
    require_fingerprint,
    write_card,
)


class PixelSettings(TokenizerSettings):
    kind: Literal["pixels"] = "pixels"
    levels: int = Field(256, ge=2, le=256)


class PixelTokenizer(Tokenizer):
    kind = "pixels"
    modality = "image"

    def __init__(self, settings: PixelSettings) -> None:
        self.settings = settings

    @property
    def vocabulary(self) -> dict[str, Any]:
        n = self.settings.levels
        return {"size": n, "ranges": {"image": [0, n]}, "specials": {}}

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.settings.model_dump(mode="json"), {})

    def encode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._encode(np.asarray(image)) for image in batch]

    def _encode(self, image: np.ndarray) -> np.ndarray:
        if image.ndim != 3 or image.dtype != np.uint8 or image.shape[2] not in (1, 3):
            raise TokenizerError(
                f"image is {image.dtype} {image.shape}; this tokenizer takes uint8 (H, W, 1 or 3)"
            )
        top = self.settings.levels - 1
        levels = ((image.astype(np.int32) * (2 * top) + 255) // 510).astype(np.uint8)
        return levels[:, :, 0] if image.shape[2] == 1 else levels.transpose(2, 0, 1).copy()

    def decode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._decode(check_ids(tokens, self.settings.levels)) for tokens in batch]

    def _decode(self, levels: np.ndarray) -> np.ndarray:
        if levels.ndim == 3 and levels.shape[0] == 3:
            image = levels.transpose(1, 2, 0)
        elif levels.ndim == 2:
            image = levels[:, :, None]
        else:
            raise TokenizerError(f"tokens of shape {levels.shape}; expected (h, w) or (3, h, w)")
        top = self.settings.levels - 1
        return ((image * 510 + top) // (2 * top)).astype(np.uint8)

    def card(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "format": 1,
            "modality": self.modality,
            "vocabulary": self.vocabulary,
            "settings": self.settings.model_dump(mode="json"),
            "fingerprint": self.fingerprint,
        }

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_card(folder, self.card())

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "PixelTokenizer":
        card = read_card(folder)
        try:
            tokenizer = cls(PixelSettings.model_validate(card.get("settings")))
        except ValueError:
            raise TokenizerError(
                f"{folder / 'card.json'}: settings are not those of pixels"
            ) from None
        require_fingerprint(folder, card, tokenizer.fingerprint)
        return tokenizer
