"""Raw samples as tokens on the fly, with the face of `pipeline.data.tokens.TokenSet`.

For evaluating a model folder on data that nobody pretokenized. Nothing is kept: a sample is
encoded when it is asked for, and once before to learn its length.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from chainrule.pipeline.data.reader import Sample, ShardError, Shards
from chainrule.pipeline.data.tokens import OF_ONE_SHAPE, TokenSet
from chainrule.pipeline.data.vocabulary import Vocabulary
from chainrule.pipeline.stage import StageFailed


class Encoded:
    """Samples of one split, through `tokenizer`; text gets the `eos` that pretokenize appends."""

    known_as: Sequence[int] | None = None
    """The model's number of each class; None where both count alike."""

    def __init__(
        self,
        shards: Shards,
        tokenizer: Any,
        split: str,
        limit: int | None = None,
        captioner: Any = None,
        caption_tokens: int = 0,
    ) -> None:
        """With `limit`, that many samples from all over the split; the same for `Stored`.

        `captioner` makes `caption_tokens` tokens at most of a sample's first caption."""
        self.shards, self.tokenizer, self.split = shards, tokenizer, split
        self.chosen = shards.spread(split, limit)
        self.samples = len(self.chosen)
        self.vocabulary = Vocabulary.model_validate(tokenizer.vocabulary)
        self.tokenizer_fingerprint = str(tokenizer.fingerprint)
        self.tokenizer_kind = str(tokenizer.kind)
        self.classes = shards.classes
        self.captioner = captioner if shards.captioned else None
        self.captions: dict[str, Any] | None = None
        if self.captioner is not None:
            self.captions = {
                "longest": caption_tokens,
                "fingerprint": str(self.captioner.fingerprint),
            }
        self.modality = shards.modality
        if self.samples == 0:
            raise ShardError(f"{shards.folder}: split '{split}' is empty")

    def __getitem__(self, i: int) -> tuple[np.ndarray, dict[str, Any]]:
        sample = self.shards.read(self.split, self.chosen[i])
        assert sample is not None  # shards opened to stop at damage raise instead
        meta = self._meta_of(sample)
        if self.captioner is not None and self.captions is not None:
            [ids] = self.captioner.encode(meta["captions"][:1])
            meta["caption_ids"] = [ids[: self.captions["longest"]].tolist()]
        return self.encode(sample.raw(self.modality)), meta

    def meta(self, i: int) -> dict[str, Any]:
        sample = self.shards.read(self.split, self.chosen[i])
        assert sample is not None
        return self._meta_of(sample)

    def _meta_of(self, sample: Sample) -> dict[str, Any]:
        meta = dict(sample.meta)
        if self.modality == "text":
            meta["bytes"] = len(sample.members["txt"])
        return meta

    def encode(self, raw: Any) -> np.ndarray:
        tokens = np.asarray(self.tokenizer.encode([raw])[0])
        if self.modality == "text" and "eos" in self.vocabulary.specials:
            tokens = np.append(tokens, tokens.dtype.type(self.vocabulary.specials["eos"]))
        return tokens

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 (samples,)."""
        return np.array([self[i][0].size for i in range(self.samples)], dtype=np.int64)

    @cached_property
    def grid(self) -> tuple[int, ...] | None:
        return tuple(self[0][0].shape) if self.modality in OF_ONE_SHAPE else None

    def training(self, most: int | None = None) -> Iterator[np.ndarray]:
        """Tokens of training samples, about `most` from all over them."""
        number = None if most is None else math.ceil(most / max(1.0, self.lengths.mean()))
        for sample in self.shards.pick("train", number):
            yield self.encode(sample.raw(self.modality)).ravel()


class Stored:
    """The same face over a pretokenized set."""

    known_as: Sequence[int] | None = None

    def __init__(self, tokens: TokenSet, limit: int | None = None) -> None:
        self.tokens = tokens
        self.shards, self.split = tokens.shards, tokens.split
        self.chosen = tokens.shards.spread(tokens.split, limit)
        self.samples = len(self.chosen)
        self.vocabulary, self.classes = tokens.vocabulary, tokens.classes
        self.captions = tokens.captions
        self.tokenizer_fingerprint = tokens.tokenizer_fingerprint
        self.tokenizer_kind = tokens.tokenizer_kind
        self.modality, self.grid = tokens.modality, tokens.grid
        self.lengths = tokens.lengths[self.chosen]

    def __getitem__(self, i: int) -> tuple[np.ndarray, dict[str, Any]]:
        return self.tokens[self.chosen[i]]

    def meta(self, i: int) -> dict[str, Any]:
        return self[i][1]

    def training(self, most: int | None = None) -> Iterator[np.ndarray]:
        """Tokens of training samples, about `most` from all over them."""
        number = None if most is None else len(self.shards.spread_tokens("train", most))
        for sample in self.shards.pick("train", number):
            yield sample.tokens().ravel()


HeldOut = Encoded | Stored
ConditionKind = Literal["class", "caption"]
"""What a model is told of a sample that it scores."""


def event_batches(
    tokens: HeldOut,
    todo: range,
    event_shape: tuple[int, ...],
    given: ConditionKind | None,
    batch_size: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """(B, *event_shape) tokens and what they are given: (B,) classes, or (B, n) captions (the
    first of each sample), in order."""
    for start in range(todo.start, todo.stop, batch_size):
        pairs = [tokens[i] for i in range(start, min(start + batch_size, todo.stop))]
        stacked = np.stack([t.ravel() for t, _ in pairs])
        x = torch.from_numpy(stacked.astype(tokens.vocabulary.batch_dtype))
        cond = None
        if given is not None:
            cond = torch.from_numpy(conditions(tokens, [meta for _, meta in pairs], given))
        yield x.reshape(len(pairs), *event_shape), cond


def documents(
    tokens: HeldOut, todo: range, given: ConditionKind | None
) -> Iterator[tuple[np.ndarray, int | None]]:
    """(t,) tokens of each document and, for a model with classes, its own."""
    for i in todo:
        document, meta = tokens[i]
        yield document.ravel(), class_given(tokens, meta) if given is not None else None


def conditions(tokens: HeldOut, metas: Sequence[dict[str, Any]], of: ConditionKind) -> np.ndarray:
    """What samples are conditioned on: (B,) classes, or (B, n) tokens of captions."""
    if of == "class" or tokens.captions is None:
        return np.array([class_given(tokens, meta) for meta in metas])
    cond = np.full((len(metas), tokens.captions["longest"]), -1)
    for row, meta in enumerate(metas):
        ids = meta["caption_ids"][0]
        cond[row, : len(ids)] = ids
    return cond


def class_given(tokens: HeldOut, meta: dict[str, Any]) -> int:
    """A sample's class by the model's numbers; -1 where it has none."""
    label = label_of(meta)
    return label if tokens.known_as is None or label < 0 else tokens.known_as[label]


def label_of(meta: dict[str, Any]) -> int:
    """A sample's class; -1 where it has none."""
    label = meta.get("label")
    return -1 if label is None else int(label)


def labelled_images(
    shards: Shards, split: str, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) and labels (N,) of a split, or of `most` from all over it;
    StageFailed without."""
    samples = list(shards.pick(split, most))
    if not samples:
        raise StageFailed(f"{shards.folder}: split '{split}' is empty; the classifier needs it")
    if any(sample.meta.get("label") is None for sample in samples):
        raise StageFailed(f"{shards.folder}: images without labels; the classifier needs them")
    images = np.stack([sample.image() for sample in samples])
    return images, np.array([int(sample.meta["label"]) for sample in samples])
