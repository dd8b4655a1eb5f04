"""UTF-8 bytes as tokens: 256 ids, then `bos` and `eos`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chainrule.tokenizers.interface import (
    Tokenizer,
    TokenizerSettings,
    check_ids,
    fingerprint_of,
    read_card,
    require_fingerprint,
)
from chainrule.tokenizers.utf8 import from_utf8, to_utf8


class ByteSettings(TokenizerSettings):
    kind: Literal["bytes"] = "bytes"


class ByteTokenizer(Tokenizer):
    """Lossless on every string. Bytes that are not UTF-8 decode to U+FFFD; specials to nothing."""

    kind = "bytes"
    modality = "text"

    @property
    def vocabulary(self) -> dict[str, Any]:
        return {
            "size": 258,
            "ranges": {"text": [0, 256], "specials": [256, 258]},
            "specials": {"bos": 256, "eos": 257},
        }

    @property
    def fingerprint(self) -> str:
        return fingerprint_of({"kind": self.kind}, {})

    def encode(self, batch: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(to_utf8(text), dtype=np.uint8).astype(np.uint16) for text in batch]

    def decode(self, batch: Sequence[np.ndarray]) -> list[str]:
        texts = []
        for tokens in batch:
            ids = check_ids(tokens, 258)
            texts.append(from_utf8(ids[ids < 256].astype(np.uint8).tobytes()))
        return texts

    def card(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "format": 1,
            "modality": self.modality,
            "vocabulary": self.vocabulary,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "ByteTokenizer":
        tokenizer = cls()
        require_fingerprint(folder, read_card(folder), tokenizer.fingerprint)
        return tokenizer
