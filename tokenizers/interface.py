"""Raw data <-> tokens: what every tokenizer is, and how one is read back from its folder.

A tokenizer's folder holds `card.json` (kind, modality, vocabulary, fingerprint, and what
the kind adds: grid, downsampling, codebook health, ...) and its weights: `weights.safetensors`
or `sentencepiece.model`. The fingerprint is a hash of what decides encode and decode
(settings and weights), and `card_sha256` one of all else that the card states (its health,
the vocabulary), so an altered file is refused when it is loaded.
"""

import hashlib
import importlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

# kind -> module whose `Tokenizer` subclass is named by LOADERS[kind][1]
LOADERS: dict[str, tuple[str, str]] = {
    "vqvae": ("chainrule.tokenizers.vqvae", "VQVAETokenizer"),
    "vqgan": ("chainrule.tokenizers.vqgan", "VQGANTokenizer"),
    "palette": ("chainrule.tokenizers.palette", "PaletteTokenizer"),
    "sentencepiece": ("chainrule.tokenizers.text", "SentencePieceTokenizer"),
    "bytes": ("chainrule.tokenizers.bytes", "ByteTokenizer"),
    "characters": ("chainrule.tokenizers.characters", "CharacterTokenizer"),
    "mulaw": ("chainrule.tokenizers.mulaw", "MuLawTokenizer"),
    "pixels": ("chainrule.tokenizers.pixels", "PixelTokenizer"),
    "standardize": ("chainrule.tokenizers.standardize", "StandardizeTokenizer"),
}
MODALITY = {
    "vqvae": "image",
    "vqgan": "image",
    "palette": "image",
    "pixels": "image",
    "sentencepiece": "text",
    "bytes": "text",
    "characters": "text",
    "mulaw": "audio",
    "standardize": "table",
}
"""What each kind encodes."""


class TokenizerError(ValueError):
    """A tokenizer folder, or data handed to a tokenizer, that cannot be used."""


class TokenizerSettings(pydantic.BaseModel):
    """Base of every kind's settings: strict and immutable, in the card as they are."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class Tokenizer(ABC):
    """Encodes batches of raw samples to integer arrays, and back. (Tables stay real numbers.)

    Raw samples, by modality:
    - image: uint8 arrays (H, W, C), C = 1 or 3
    - text: str
    - audio: int16 arrays (T,), mono, at `card()["sample_rate"]`
    - table: float32 arrays (D,)
    Token arrays: (h, w) for images, (3, h, w) for the pixels of RGB images, (t,) for text
    and audio; of the smallest unsigned dtype that holds the vocabulary. Of tables: float32 (D,).
    """

    kind: str
    modality: str  # "image" | "text" | "audio" | "table"

    @property
    @abstractmethod
    def vocabulary(self) -> dict[str, Any]:
        """Size, ranges and specials, in the plain form of `pipeline.data.vocabulary`."""

    @property
    def depth(self) -> int:
        """Codes a position, side by side along a token array's last axis (residual quantizers)."""
        return 1

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 over everything that decides encode and decode."""

    @abstractmethod
    def encode(self, batch: Sequence[Any]) -> list[np.ndarray]:
        """One token array for each raw sample."""

    @abstractmethod
    def decode(self, batch: Sequence[np.ndarray]) -> list[Any]:
        """One raw sample for each token array. TokenizerError on an id out of range."""

    @abstractmethod
    def card(self) -> dict[str, Any]:
        """What `card.json` holds."""

    def save(self, folder: Path) -> None:
        """Write `card.json`, and before it weights where the kind has some, into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_card(folder, self.card())

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, device: str = "cpu") -> "Tokenizer":
        """Read a folder that `save` wrote. TokenizerError if it was altered."""


def fingerprint_of(settings: Mapping[str, Any], weights: Mapping[str, Any]) -> str:
    """sha256 over settings (canonical JSON) and weights (bytes, or arrays by name and shape)."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, allow_nan=False).encode())
    for name in sorted(weights):
        value = weights[name]
        if isinstance(value, bytes):
            head, body = f"{name} bytes {len(value)}", value
        else:
            array = np.ascontiguousarray(value)
            head, body = f"{name} {array.dtype.str} {array.shape}", array.tobytes()
        digest.update(head.encode())
        digest.update(body)
    return digest.hexdigest()


def require_fingerprint(folder: Path, card: Mapping[str, Any], found: str) -> None:
    """TokenizerError where what was read does not have the fingerprint that its card states."""
    stated = str(card.get("fingerprint"))
    if stated != found:
        raise TokenizerError(
            f"{folder}: altered: card.json states fingerprint {stated[:16]}, "
            f"its settings and weights have {found[:16]}; train the tokenizer again"
        )


def check_ids(tokens: np.ndarray, size: int) -> np.ndarray:
    """`tokens` as int64; TokenizerError on an id outside [0, size) or a float."""
    tokens = np.asarray(tokens)
    if tokens.dtype.kind not in "iu":
        raise TokenizerError(f"tokens are {tokens.dtype}, not integers")
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= size):
        wrong = tokens[(tokens < 0) | (tokens >= size)].flat[0]
        raise TokenizerError(f"token {wrong} lies outside the vocabulary [0, {size})")
    return tokens.astype(np.int64)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all (temporary file, fsync, rename)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_weights(folder: Path, name: str) -> bytes:
    """A file beside the card. TokenizerError where it is not there or cannot be read."""
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise TokenizerError(f"{folder}: no {name}") from None
    except OSError as error:
        raise TokenizerError(f"{folder / name}: {error.strerror}") from None


CARD = "card.json"
CARD_SHA256 = "card_sha256"


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """`card.json`, written last by every `save`: its presence says that the folder is whole."""
    content = json.dumps({**card, CARD_SHA256: _card_sha256(card)}, indent=1, allow_nan=False)
    write_whole(folder / CARD, (content + "\n").encode())


def read_card(folder: Path) -> dict[str, Any]:
    """What `write_card` was given. TokenizerError where it is not there, or was altered.

    A card that states no digest of itself was written before cards had one, and is taken as
    it is.
    """
    path = folder / CARD
    try:
        card = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise TokenizerError(f"{folder}: not a tokenizer folder (no card.json)") from None
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON ({error})") from None
    if not isinstance(card, dict) or "kind" not in card:
        raise TokenizerError(f"{path}: no 'kind'")
    stated = card.pop(CARD_SHA256, None)
    if stated is not None and stated != _card_sha256(card):
        raise TokenizerError(
            f"{path}: altered: it is not what {CARD_SHA256} in it was taken of; "
            "train the tokenizer again"
        )
    if not isinstance(card.get("health", {}), dict):
        raise TokenizerError(f"{path}: altered: health is not a table of figures")
    return card


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _card_sha256(card: Mapping[str, Any]) -> str:
    # by way of JSON: what is read back has lists for tuples
    plain = json.loads(json.dumps(card, allow_nan=False))
    return fingerprint_of(plain, {})


def load(folder: str | Path, device: str = "cpu") -> Tokenizer:
    """The tokenizer in `folder`, whatever its kind; refused if it was altered."""
    folder = Path(folder)
    kind = read_card(folder)["kind"]
    if not isinstance(kind, str) or kind not in LOADERS:
        raise TokenizerError(
            f"{folder / 'card.json'}: unknown kind {kind!r}; known: {', '.join(sorted(LOADERS))}"
        )
    module, name = LOADERS[kind]
    tokenizer_class: type[Tokenizer] = getattr(importlib.import_module(module), name)
    return tokenizer_class.load(folder, device)
