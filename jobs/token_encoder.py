"""What pretokenize does at once: samples are decoded while those before them become tokens.

    shard --batches_of--> pieces (threads that decode) --encoded--> tokens (threads that encode)

Order is kept, so that a shard's bytes do not depend on who is faster.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from chainrule.pipeline.data.reader import Sample, Shards
from chainrule.tokenizers.autoencoder import AutoencoderTokenizer
from chainrule.tokenizers.interface import Tokenizer, TokenizerError
from chainrule.tokenizers.views import Views

DECODED_AT_ONCE = 16
"""Samples that a decoding thread takes at once, at most."""
PIXELS_AT_ONCE = 1 << 21
"""Pixels that are encoded at once on a CPU, unless a single batch has more."""


@dataclass
class Piece:
    """One sample to write: its key's number, what it holds, or why it cannot be used."""

    number: int
    where: str
    meta: dict[str, Any]
    raw_bytes: int
    raw: Any
    fault: str | None = None


def batches_of(
    shards: Shards, number: int, batch_size: int, workers: int, views: Views | None
) -> Generator[list[Piece], None, None]:
    """What a shard's samples are made into, decoded by `workers` threads, in batches."""
    modality, split = shards.modality, shards.entries[number]["split"]
    each = views.count(split) if views is not None else 1

    def decode(sample: Sample) -> list[Piece]:
        first, where = int(sample.key) * each, str(sample.meta.get("source", sample.key))
        raw_bytes = len(sample.members["txt"]) if modality == "text" else 0
        meta = {**sample.meta, "bytes": raw_bytes} if modality == "text" else sample.meta
        try:
            raw = sample.raw(modality)
            if views is None:
                return [Piece(first, where, meta, raw_bytes, raw)]
            return [
                Piece(first + i, where, {**meta, **done}, raw_bytes, view)
                for i, (done, view) in enumerate(views.of(raw, split))
            ]
        except (OSError, ValueError, KeyError, SyntaxError) as error:
            fault = str(error) if isinstance(error, TokenizerError) else repr(error)
            return [Piece(first, where, meta, raw_bytes, None, fault)]

    def decode_some(some: list[Sample]) -> list[Piece]:
        return [piece for sample in some for piece in decode(sample)]

    # several samples a task: handing one over costs as much as decoding a small picture
    at_once = max(1, min(DECODED_AT_ONCE, batch_size // workers))
    batch: list[Piece] = []
    with ThreadPoolExecutor(workers, "decode") as pool:
        pending: deque[Future[list[Piece]]] = deque()
        samples = shards.iterate_shard(number)
        while True:
            while len(pending) * at_once < 2 * batch_size:
                some = list(islice(samples, at_once))
                if not some:
                    break
                pending.append(pool.submit(decode_some, some))
            if not pending:
                break
            batch += pending.popleft().result()
            while len(batch) >= batch_size:
                yield batch[:batch_size]
                batch = batch[batch_size:]
    if batch:
        yield batch


def encoded(
    tokenizer: Tokenizer, batches: Iterator[list[Piece]]
) -> Generator[tuple[Sequence[Piece], list[np.ndarray | None]], None, None]:
    """Batches and their tokens, in order; the next are being encoded while one is given out."""
    first = next(batches, None)
    if first is None:
        return
    before = torch.get_num_threads()
    together = _side_by_side(tokenizer, first, before)
    threads = max(1, before // together)
    pool = ThreadPoolExecutor(together, "encode", torch.set_num_threads, (threads,))
    pending: deque[tuple[int, Future[Any]]] = deque()
    try:
        with pool:
            for batch in chain([first], batches):
                pixels = _pixels(batch) if together > 1 else 0
                while pending and (
                    len(pending) > together
                    or pixels + sum(size for size, _ in pending) > PIXELS_AT_ONCE
                ):
                    yield pending.popleft()[1].result()
                pending.append((pixels, pool.submit(encode, tokenizer, batch)))
            while pending:
                yield pending.popleft()[1].result()
    finally:
        torch.set_num_threads(before)  # what a thread of the pool set, others begin with


def _side_by_side(tokenizer: Tokenizer, batch: Sequence[Piece], threads: int) -> int:
    """How many batches are encoded at once, each with its share of the threads.

    On a CPU a thread a batch is faster than all of them on one, and leaves room for those that
    decode; but each batch holds its activations, so that large ones go one by one.
    """
    if not isinstance(tokenizer, AutoencoderTokenizer) or tokenizer.device.type != "cpu":
        return 1
    pixels = _pixels(batch)
    return max(1, min(threads, PIXELS_AT_ONCE // pixels)) if pixels else 1


def _pixels(batch: Sequence[Piece]) -> int:
    return sum(piece.raw.shape[0] * piece.raw.shape[1] for piece in batch if piece.fault is None)


def encode(
    tokenizer: Tokenizer, pieces: Sequence[Piece]
) -> tuple[Sequence[Piece], list[np.ndarray | None]]:
    """Tokens of each piece; None for one that cannot be used, whose fault is then set."""
    usable = [piece for piece in pieces if piece.fault is None]
    try:
        tokens = iter(tokenizer.encode([piece.raw for piece in usable]))
        return pieces, [next(tokens) if piece.fault is None else None for piece in pieces]
    except TokenizerError:
        # one of them is at fault: find which, and keep the rest
        encoded: list[np.ndarray | None] = []
        for piece in pieces:
            try:
                encoded.append(None if piece.fault else tokenizer.encode([piece.raw])[0])
            except TokenizerError as error:
                piece.fault = str(error)
                encoded.append(None)
        return pieces, encoded


@dataclass
class CaptionEncoder:
    """Captions as lists of token ids."""

    tokenizer: Tokenizer
    most: int
    """Tokens of a caption; what is longer is cut."""

    def __call__(self, captions: Sequence[str]) -> tuple[list[list[int]], int]:
        """The ids of each caption, and how many captions were cut."""
        encoded = [ids.tolist() for ids in self.tokenizer.encode(list(captions))]
        return [ids[: self.most] for ids in encoded], sum(len(ids) > self.most for ids in encoded)
