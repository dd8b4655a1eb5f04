"""The characters of a corpus as tokens, for small text such as tinyshakespeare.

Ids follow code points; then `bos`, `eos` and `unk`. Lossless on text whose characters
all occurred in training; another character becomes `unk`, which decodes to U+FFFD.
"""

from collections.abc import Iterable, Sequence
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


class CharacterSettings(TokenizerSettings):
    kind: Literal["characters"] = "characters"


class CharacterTokenizer(Tokenizer):
    kind = "characters"
    modality = "text"

    def __init__(self, alphabet: str) -> None:
        if not alphabet:
            raise TokenizerError("characters: the corpus has no character")
        self.alphabet = "".join(sorted(set(alphabet)))
        self._points = np.array([ord(c) for c in self.alphabet], dtype=np.uint32)

    @classmethod
    def train(cls, texts: Iterable[str]) -> "CharacterTokenizer":
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        return cls("".join(seen))

    @property
    def vocabulary(self) -> dict[str, Any]:
        n = len(self.alphabet)
        return {
            "size": n + 3,
            "ranges": {"text": [0, n], "specials": [n, n + 3]},
            "specials": {"bos": n, "eos": n + 1, "unk": n + 2},
        }

    @property
    def fingerprint(self) -> str:
        return fingerprint_of({"kind": self.kind, "alphabet": self.alphabet}, {})

    def encode(self, batch: Sequence[str]) -> list[np.ndarray]:
        n = len(self.alphabet)
        dtype = np.min_scalar_type(n + 2)
        encoded = []
        for text in batch:
            points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
            place = np.searchsorted(self._points, points)
            known = self._points[np.minimum(place, n - 1)] == points
            encoded.append(np.where(known, place, n + 2).astype(dtype))
        return encoded

    def decode(self, batch: Sequence[np.ndarray]) -> list[str]:
        n = len(self.alphabet)
        letters = np.array([*self.alphabet, "", "", "\ufffd"], dtype=object)
        return ["".join(letters[check_ids(tokens, n + 3)]) for tokens in batch]

    def card(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "format": 1,
            "modality": self.modality,
            "vocabulary": self.vocabulary,
            "alphabet": self.alphabet,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "CharacterTokenizer":
        card = read_card(folder)
        if not isinstance(card.get("alphabet"), str):
            raise TokenizerError(f"{folder / 'card.json'}: no alphabet")
        tokenizer = cls(card["alphabet"])
        require_fingerprint(folder, card, tokenizer.fingerprint)
        return tokenizer
