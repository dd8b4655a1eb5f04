"""Text as SentencePiece tokens: BPE or unigram, byte fallback, lossless.

With identity normalisation (the default) decode(encode(x)) == x for every string that
has a UTF-8 form. SentencePiece itself would turn U+2581, its mark for a space, into a
space; that one character is written as its three byte tokens instead. So that a space never
needs those bytes, it always has a piece of its own, whatever the training text held.
A model trained before it had may lack that piece: there the three bytes are decoded as a
space, and a text with U+2581 itself is refused.

Ids: those of the SentencePiece model, then `bos` and `eos`. Newlines are ordinary
characters of the training text, so pieces such as ":\\n" are learned.

Kudo and Richardson, "SentencePiece" (2018); Sennrich et al. 2016 (BPE); Kudo 2018 (unigram).
"""

import io
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator

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
from chainrule.tokenizers.utf8 import to_utf8

MODEL = "sentencepiece.model"
SPACE = "\u2581"
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
TRAINING_THREADS = 16
"""Fixed: the unigram vocabulary depends on it (not on the cores that are there)."""
HARD = (
    "",
    "   ",
    " \t\r\n\n  x  \u00a0\u3000",
    "<s></s><unk><0x41>",
    "e\u0301 \u0301 \ufeff\u200b",
    "\0 \uffff \U0010ffff",
    "\U0001f469\u200d\U0001f467 \u6f22\u5b57",
    "def f(x):\n    return x\n",
)
"""Strings on which a faster encoder must agree with SentencePiece."""
SENTENCE_CHARACTERS = 4000
"""Training text is handed over in parts of at most so many characters."""


class SentencePieceSettings(TokenizerSettings):
    kind: Literal["sentencepiece"] = "sentencepiece"
    model: Literal["bpe", "unigram"] = "bpe"
    vocabulary_size: int = Field(8192, ge=260, description="ids of the model, bos and eos not in")
    normalization: Literal["identity", "nfkc"] = "identity"
    character_coverage: float = Field(
        0.9995, ge=0.98, le=1, description="share of characters with a piece of their own"
    )
    max_piece_length: int = Field(16, ge=1, le=512, description="characters")
    user_symbols: tuple[str, ...] = Field((), description="strings that always are one token")
    sample_bytes: int = Field(
        20_000_000, ge=1, description="UTF-8 bytes of whole training documents, drawn by the seed"
    )

    @field_validator("user_symbols")
    @classmethod
    def _symbols_are_plain(cls, symbols: tuple[str, ...]) -> tuple[str, ...]:
        for symbol in symbols:
            if not symbol or SPACE in symbol or symbols.count(symbol) > 1:
                raise ValueError(f"user symbol {symbol!r} is empty, doubled or holds U+2581")
            to_utf8(symbol)  # raises, naming a lone surrogate
            if "\0" in symbol:
                raise ValueError(f"user symbol {symbol!r} holds U+0000, which ends it")
            if symbol == "<unk>" or BYTE_PIECE.fullmatch(symbol):
                raise ValueError(f"user symbol {symbol!r} is a piece of every model; remove it")
        return symbols

    @model_validator(mode="after")
    def _symbols_stay_as_they_are(self) -> "SentencePieceSettings":
        spaced = [s for s in self.user_symbols if " " in s and self.normalization == "nfkc"]
        for symbol in spaced:
            # the space becomes U+2581, after which nfkc no longer knows the symbol in a text
            if not unicodedata.is_normalized("NFKC", symbol):
                raise ValueError(
                    f"user symbol {symbol!r} is not what normalization nfkc makes of it; "
                    f"write {unicodedata.normalize('NFKC', symbol)!r}"
                )
        return self


class SentencePieceTokenizer(Tokenizer):
    kind = "sentencepiece"
    modality = "text"

    def __init__(
        self,
        settings: SentencePieceSettings,
        model: bytes,
        facts: dict[str, Any] | None = None,
        threads: int | None = None,
    ) -> None:
        """`model`: a serialised SentencePiece model. `threads`: for encoding; all cores if None."""
        from sentencepiece import SentencePieceProcessor

        self.settings = settings
        self.model = model
        self.facts = dict(facts or {})
        self.threads = threads or len(os.sched_getaffinity(0))
        self._fast: Any = None
        try:
            self._processor: Any = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TokenizerError(f"not a SentencePiece model ({str(error)[:80]})") from None
        self.pieces: int = self._processor.get_piece_size()
        self._space = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
        self._has_space = self._processor.piece_to_id(SPACE) != self._processor.unk_id()

    @classmethod
    def train(
        cls, settings: SentencePieceSettings, documents: Iterable[str]
    ) -> "SentencePieceTokenizer":
        """Learn a vocabulary; a function of settings and documents alone."""
        from sentencepiece import SentencePieceTrainer

        model = io.BytesIO()
        symbols = [symbol.replace(" ", SPACE) for symbol in settings.user_symbols]
        try:
            SentencePieceTrainer.train(
                sentence_iterator=_parts(documents),
                model_writer=model,
                model_type=settings.model,
                vocab_size=settings.vocabulary_size,
                character_coverage=settings.character_coverage,
                max_sentencepiece_length=settings.max_piece_length,
                user_defined_symbols=symbols,
                # else a space that is rare would be the bytes that stand for U+2581 itself
                required_chars="" if SPACE in symbols else SPACE,
                normalization_rule_name=settings.normalization,
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                unk_id=0,
                unk_surface="\ufffd",
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=TRAINING_THREADS,
                max_sentence_length=8 * SENTENCE_CHARACTERS,
                train_extremely_large_corpus=settings.sample_bytes > 1 << 30,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise TokenizerError(
                f"SentencePiece cannot learn {settings.vocabulary_size} pieces from this text: "
                f"{_reason(str(error))}"
            ) from None
        return cls(settings, model.getvalue())

    @property
    def vocabulary(self) -> dict[str, Any]:
        n = self.pieces
        return {
            "size": n + 2,
            "ranges": {"text": [0, n], "specials": [n, n + 2]},
            "specials": {"bos": n, "eos": n + 1},
        }

    @property
    def fingerprint(self) -> str:
        return fingerprint_of({"kind": self.kind}, {"model": self.model})

    def piece(self, number: int) -> str:
        """The text of a piece, spaces as U+2581; bytes as <0x0A>."""
        return str(self._processor.id_to_piece(number))

    def score(self, number: int) -> float:
        """Log-probability of a unigram piece; minus the order of merging of a BPE piece."""
        return float(self._processor.get_score(number))

    def encode(self, batch: Sequence[str]) -> list[np.ndarray]:
        dtype = np.min_scalar_type(self.pieces + 1)
        plain = [i for i, text in enumerate(batch) if SPACE not in text]
        if len(plain) < len(batch) and not self._has_space:
            raise TokenizerError(
                "a text holds U+2581, which this SentencePiece model cannot tell from a space (it "
                "has no piece for a space); train the tokenizer again, or remove the character"
            )
        try:
            ids = self._encode_plain([batch[i] for i in plain])
        except (UnicodeEncodeError, TypeError):  # a lone surrogate: which, depends on the binding
            for text in batch:
                to_utf8(text)  # raises, naming the place
            raise
        encoded: list[Any] = [None] * len(batch)
        for i, tokens in zip(plain, ids, strict=True):
            encoded[i] = np.array(tokens, dtype=dtype)
        for i, text in enumerate(batch):
            if encoded[i] is None:
                encoded[i] = np.array(self._encode_with_space(text), dtype=dtype)
        return encoded

    def _encode_plain(self, texts: list[str]) -> Sequence[Any]:
        if self._fast is not None and texts:
            rows: Sequence[Any] = self._fast.encode_batch(texts)
            return rows
        ids: Sequence[Any] = self._processor.encode(texts, num_threads=self.threads)
        return ids

    def use_gigatoken(self, sample: Sequence[str]) -> None:
        """Encode with gigatoken from here on, which reads the same model and is faster.

        TokenizerError where it is not installed, cannot read the model, or gives other ids
        than SentencePiece on `sample` or on strings that are hard on purpose.
        """
        try:
            from gigatoken import Tokenizer as Gigatoken
        except ImportError:
            raise TokenizerError(
                "gigatoken is not installed; pip install gigatoken, or encode with sentencepiece"
            ) from None
        try:
            fast = Gigatoken.from_sentencepiece(self.model)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise TokenizerError(f"gigatoken cannot read this model ({error})") from None
        texts = [text.replace(SPACE, "") for text in [*HARD, *self.settings.user_symbols, *sample]]
        expected = self._processor.encode(texts, num_threads=self.threads)
        for text, ours, theirs in zip(texts, expected, fast.encode_batch(texts), strict=True):
            if not np.array_equal(np.asarray(ours), np.asarray(theirs)):
                raise TokenizerError(
                    f"gigatoken gives other ids than SentencePiece on {text[:40]!r}; "
                    "encode with sentencepiece"
                )
        self._fast = fast

    def _encode_with_space(self, text: str) -> list[int]:
        to_utf8(text)
        parts = self._processor.encode(text.split(SPACE), num_threads=self.threads)
        tokens: list[int] = list(parts[0])
        for part in parts[1:]:
            tokens += self._space
            tokens += part
        return tokens

    def decode(self, batch: Sequence[np.ndarray]) -> list[str]:
        texts = []
        for tokens in batch:
            ids = check_ids(tokens, self.pieces + 2)
            text = self._processor.decode(ids[ids < self.pieces].tolist())
            # without a piece for it a space was encoded as the bytes of its mark
            texts.append(text if self._has_space else text.replace(SPACE, " "))
        return texts

    def card(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "format": 1,
            "modality": self.modality,
            "vocabulary": self.vocabulary,
            "settings": self.settings.model_dump(mode="json"),
            **self.facts,
            "fingerprint": self.fingerprint,
        }

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / MODEL, self.model)
        write_card(folder, self.card())

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "SentencePieceTokenizer":
        card = read_card(folder)
        try:
            settings = SentencePieceSettings.model_validate(card.get("settings"))
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, ("settings", *fault["loc"])))
            raise TokenizerError(f"{folder / 'card.json'}: {where}: {fault['msg']}") from None
        model = read_weights(folder, MODEL)
        # before the model is parsed: nothing altered reaches SentencePiece's C++
        require_fingerprint(folder, card, fingerprint_of({"kind": cls.kind}, {"model": model}))
        known = {"kind", "format", "modality", "vocabulary", "settings", "fingerprint"}
        return cls(settings, model, {key: card[key] for key in card if key not in known})


def _reason(said: str) -> str:
    """Why SentencePiece could not train, and what to do, of what its C++ said."""
    if "sentences_.empty()" in said:
        return "it is empty; give it documents with text in them"
    if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", said):
        return (
            f"bytes, user_symbols and its characters take {least[1]}; take a vocabulary_size of "
            "that at least, or lower character_coverage (0.98 at least)"
        )
    if most := re.search(r"value <= (\d+)", said):
        return f"it has too few; take a vocabulary_size of {most[1]} at most, or more text"
    # "INTERNAL: file.cc(line) [condition] what it means"
    return said.splitlines()[0].rsplit("] ", 1)[-1][:200]


def _parts(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        text = text.replace("\0", "")  # SentencePiece's trainer skips a sentence with NUL
        for start in range(0, len(text), SENTENCE_CHARACTERS):
            yield text[start : start + SENTENCE_CHARACTERS]
