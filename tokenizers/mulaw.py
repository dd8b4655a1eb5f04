"""Audio as tokens: mu-law companding at 8 bits, or a lossless two-part code of 16.

8 bits: ITU-T G.711's continuous curve with μ = 255, as WaveNet (van den Oord et al.
2016, section 2.2) uses it: 256 ids, one a sample.
16 bits: each sample as coarse and fine byte (WaveRNN, Kalchbrenner et al. 2018, section
2), coarse first: 2T ids of the same 256; offset binary, so that ids grow with the wave.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chainrule.tokenizers.interface import (
    Tokenizer,
    TokenizerError,
    TokenizerSettings,
    check_ids,
    fingerprint_of,
    read_card,
    require_fingerprint,
)

MU = 255


class MuLawSettings(TokenizerSettings):
    kind: Literal["mulaw"] = "mulaw"
    bits: Literal[8, 16] = 8


class MuLawTokenizer(Tokenizer):
    kind = "mulaw"
    modality = "audio"

    def __init__(self, settings: MuLawSettings, sample_rate: int) -> None:
        """`sample_rate`: Hz of every recording that comes in (ingest resamples) and goes out."""
        self.settings = settings
        self.sample_rate = sample_rate

    @property
    def vocabulary(self) -> dict[str, Any]:
        return {"size": 256, "ranges": {"audio": [0, 256]}, "specials": {}}

    @property
    def fingerprint(self) -> str:
        decisive = {**self.settings.model_dump(mode="json"), "sample_rate": self.sample_rate}
        return fingerprint_of(decisive, {})

    def encode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._encode(np.asarray(samples)) for samples in batch]

    def _encode(self, samples: np.ndarray) -> np.ndarray:
        if samples.dtype != np.int16 or samples.ndim != 1:
            raise TokenizerError(
                f"audio is {samples.dtype} {samples.shape}; this tokenizer takes mono int16 (T,)"
            )
        if self.settings.bits == 16:
            offset = (samples.astype(np.int32) + 32768).astype(np.uint16)
            parts = np.stack([offset >> 8, offset & 255], axis=1).astype(np.uint8)
            return parts.reshape(-1)
        x = samples.astype(np.float64) / 32768
        y = np.sign(x) * np.log1p(MU * np.abs(x)) / np.log1p(MU)
        return np.floor((y + 1) / 2 * MU + 0.5).astype(np.uint8)

    def decode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._decode(check_ids(tokens, 256)) for tokens in batch]

    def _decode(self, ids: np.ndarray) -> np.ndarray:
        if self.settings.bits == 16:
            if len(ids) % 2:
                raise TokenizerError(f"{len(ids)} tokens: a 16-bit sample has two")
            return (ids[0::2] * 256 + ids[1::2] - 32768).astype(np.int16)
        y = ids / MU * 2 - 1
        x = np.sign(y) * np.expm1(np.abs(y) * np.log1p(MU)) / MU
        return np.clip(np.round(x * 32768), -32768, 32767).astype(np.int16)

    def card(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "format": 1,
            "modality": self.modality,
            "vocabulary": self.vocabulary,
            "settings": self.settings.model_dump(mode="json"),
            "sample_rate": self.sample_rate,
            "tokens_per_sample": 2 if self.settings.bits == 16 else 1,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "MuLawTokenizer":
        card = read_card(folder)
        try:
            settings = MuLawSettings.model_validate(card.get("settings"))
            tokenizer = cls(settings, int(card["sample_rate"]))
        except (ValueError, KeyError, TypeError):
            raise TokenizerError(f"{folder / 'card.json'}: not a card of mulaw") from None
        require_fingerprint(folder, card, tokenizer.fingerprint)
        return tokenizer
