"""A split of a token artifact: sample i as an array, lengths without reading the samples."""

import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from chainrule.pipeline.artifact import MANIFEST, ArtifactError, read_json
from chainrule.pipeline.data.reader import (
    NPY,
    OnDamage,
    Sample,
    ShardError,
    Shards,
)
from chainrule.pipeline.data.vocabulary import Vocabulary

OF_ONE_SHAPE = ("image", "table")
"""Modalities whose samples have a shape, the same for all of a set if it is to be a grid."""
LARGE = 1 << 16  # bytes; of a longer sample a piece alone is read, once the whole was checked
Conditions = tuple[int | None, list[np.ndarray] | None]
"""A sample's class, and the token ids of each of its captions."""
OVERHEAD = 112  # bytes of an array beside its numbers
CACHE = 1 << 28  # bytes of tokens that a set keeps in memory once they were read


class TokenSet:
    """Token arrays of one split: (h, w) for grids, (t,) for text and audio."""

    def __init__(self, shards: Shards, split: str = "train") -> None:
        if shards.index["kind"] != "tokens":
            raise ArtifactError(
                f"{shards.folder}: holds {shards.index['kind']} samples, not tokens; "
                "pretokenize it first"
            )
        self.shards, self.split = shards, split
        self.samples = shards.count(split)
        if self.samples == 0:
            raise ArtifactError(f"{shards.folder}: split '{split}' is empty")
        index = shards.index
        self.vocabulary = Vocabulary.model_validate(index["vocabulary"])
        self.tokenizer_fingerprint = str(index["tokenizer"]["fingerprint"])
        self.tokenizer_kind = str(index["tokenizer"]["kind"])
        self.grid: tuple[int, ...] | None = tuple(index["grid"]) if index.get("grid") else None
        self.classes = shards.classes
        self.captions: dict[str, Any] | None = index.get("captions")
        """What the samples' captions are tokens of: fingerprint and kind of the tokenizer, its
        vocabulary_size, and the length of the `longest`; None where there are no captions."""
        self.modality = shards.modality
        self.raw_bytes = int(index["raw_bytes"][split])
        self._large: dict[int, tuple[int, np.dtype[Any], Conditions]] = {}
        self._held: dict[int, tuple[np.ndarray, Conditions]] = {}
        self._held_bytes = 0
        self._lock = threading.Lock()
        self.tokens = sum(shards.entries[n]["tokens"] for n in shards.numbers(split))
        self._require_ids_within()

    @classmethod
    def open(
        cls, folder: str | Path, split: str = "train", on_damage: OnDamage = "stop"
    ) -> "TokenSet":
        """A split of the token artifact in `folder`. ArtifactError, ShardError."""
        return cls(Shards.open(folder, on_damage), split)

    def _require_ids_within(self) -> None:
        """ShardError on ids that the vocabulary lacks, as far as the shards' entries tell: those of
        older sets do not, and `decode` refuses the sample."""
        for number in self.shards.numbers(self.split):
            entry = self.shards.entries[number]
            largest = entry.get("largest_id", 0)
            if not self.vocabulary.continuous and largest >= self.vocabulary.size:
                raise ShardError(
                    f"{self.shards.folder / entry['name']}: holds token {largest}, the "
                    f"vocabulary has {self.vocabulary.size}; pretokenize again with its own "
                    "tokenizer"
                )

    @cached_property
    def fingerprint(self) -> str:
        """Of the artifact that holds the set; of its index where it is a bare folder."""
        path = self.shards.folder / MANIFEST
        if path.is_file():
            return str(read_json(path)["fingerprint"])
        from chainrule.pipeline.config import digest

        return digest(self.shards.index)

    def spread(self, tokens: int) -> list[int]:
        """Samples from all over the set that hold about so many tokens, at least one."""
        return self.shards.spread_tokens(self.split, tokens)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 (samples,)."""
        return self.shards.lengths(self.split)

    @property
    def name(self) -> str:
        return self.shards.folder.name

    @property
    def damaged(self) -> int:
        """Samples given up so far under skip-and-count."""
        return self.shards.damaged

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> tuple[np.ndarray, dict[str, Any]]:
        """(tokens, meta) of sample `i`. ShardError where it is damaged, however it was opened."""
        sample = self.sample(i)
        if sample is None:
            raise ShardError(f"{self.shards.folder}: sample {i} of '{self.split}' is damaged")
        return self.decode(sample), sample.meta

    def sample(self, i: int) -> Sample | None:
        """Sample `i` as stored; None where it is damaged under skip-and-count."""
        return self.shards.read(self.split, i)

    def decode(self, sample: Sample) -> np.ndarray:
        """The token array of a sample; ShardError on ids that the vocabulary lacks."""
        try:
            tokens = sample.tokens()
        except (KeyError, ValueError) as error:
            raise ShardError(
                f"{self.shards.folder}: sample {sample.key}: no token array ({error})"
            ) from None
        if self.vocabulary.continuous:
            if tokens.dtype.kind != "f" or not np.isfinite(tokens).all():
                raise ShardError(
                    f"{self.shards.folder}: sample {sample.key} holds {tokens.dtype} that are not "
                    "all finite real numbers; pretokenize again"
                )
            return tokens
        if tokens.dtype.kind not in "iu":
            raise ShardError(
                f"{self.shards.folder}: sample {sample.key} holds {tokens.dtype}, not token ids; "
                "pretokenize again"
            )
        if tokens.size and int(tokens.max()) >= self.vocabulary.size:
            raise ShardError(
                f"{self.shards.folder}: sample {sample.key} holds token {int(tokens.max())}, the "
                f"vocabulary has {self.vocabulary.size}; pretokenize again with its own tokenizer"
            )
        return tokens

    def conditions(self, meta: dict[str, Any]) -> Conditions:
        """What a model can be told of the sample that has this metadata."""
        label = meta.get("label") if self.classes is not None else None
        if self.captions is None:
            return label, None
        dtype = np.min_scalar_type(self.captions["vocabulary_size"])
        return label, [np.array(ids, dtype) for ids in meta["caption_ids"]]

    def piece(
        self, i: int, start: int, stop: int
    ) -> tuple[np.ndarray, int | None, list[np.ndarray] | None] | None:
        """Tokens [start, stop) of sample `i`, flat, its class and its captions; None where it is
        damaged.

        A sample is read and checked whole the first time and kept while there is room; of a
        large one that is not kept, later only the piece is read.
        """
        held = self._held.get(i)
        if held is not None:
            return held[0][start:stop], *held[1]
        known = self._large.get(i)
        if known is not None:
            offset, dtype, given = known
            data = self.shards.read_range(
                self.split, i, NPY, offset + start * dtype.itemsize, (stop - start) * dtype.itemsize
            )
            return np.frombuffer(data, dtype), *given
        sample = self.sample(i)
        if sample is None:
            return None
        tokens = self.decode(sample)
        flat = tokens.reshape(-1)
        if len(flat) < stop:
            raise ShardError(
                f"{self.shards.folder}: sample {sample.key} has {len(flat)} tokens, its offsets "
                f"promise {stop}; pretokenize again"
            )
        given = self.conditions(sample.meta)
        held_bytes = flat.nbytes + sum(ids.nbytes + OVERHEAD for ids in given[1] or ())
        with self._lock:
            if self._held_bytes + held_bytes <= CACHE:
                self._held[i] = (flat.copy(), given)  # the rest of the sample's bytes may go
                self._held_bytes += held_bytes
            elif len(sample.members[NPY]) > LARGE:
                head = len(sample.members[NPY]) - tokens.nbytes
                self._large[i] = (head, tokens.dtype, given)
        return flat[start:stop], *given
