"""Pixel levels as tokens, for models of pixels themselves (PixelCNN, MADE).

Grey images give tokens (h, w), RGB images (3, h, w): planes of red, green and blue, the
event shape of the PixelCNN families. With fewer than 256 levels a value is rounded to
the nearest of so many evenly spaced ones: 2 binarises at half, 256 loses nothing. Or it is
rounded at random, up or down with the probabilities that keep its mean: with 2 levels a pixel
is then 1 with its intensity as probability, the binarisation of MNIST that likelihoods are
usually reported on (Salakhutdinov and Murray 2008).
"""

import hashlib
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
)


class PixelSettings(TokenizerSettings):
    kind: Literal["pixels"] = "pixels"
    levels: int = Field(256, ge=2, le=256)
    rounding_seed: int | None = Field(
        None, ge=0, lt=2**32, description="round at random, from this seed and the image itself"
    )


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
        if self.settings.rounding_seed is None:
            levels = ((image.astype(np.int32) * (2 * top) + 255) // 510).astype(np.uint8)
        else:
            levels = _round_at_random(image, top, self.settings.rounding_seed)
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


def _round_at_random(image: np.ndarray, top: int, seed: int) -> np.ndarray:
    """Levels 0..top, image * top / 255 rounded up with probability of its fraction.

    The draws are a function of the seed and the image alone, whatever the batch or the order;
    Philox's raw stream is the same under every version of numpy.
    """
    image = np.ascontiguousarray(image)
    key = hashlib.sha256(seed.to_bytes(4, "little") + image.tobytes()).digest()[:16]
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(image.size)
    floor, rest = np.divmod(image.astype(np.uint64) * np.uint64(top), np.uint64(255))
    up = (raw >> np.uint64(32)).reshape(image.shape) * np.uint64(255) < rest << np.uint64(32)
    return (floor + up).astype(np.uint8)
