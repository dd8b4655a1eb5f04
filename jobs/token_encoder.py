"""What pretokenize does at once: samples are decoded while those before them become tokens.

    shard --batches_of--> pieces (who decodes) --encoded--> tokens (threads that encode)

Order is kept, so that a shard's bytes do not depend on who is faster.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from chainrule.jobs.piece_decoder import Piece, Submit
from chainrule.tokenizers.autoencoder import AutoencoderTokenizer
from chainrule.tokenizers.interface import Tokenizer, TokenizerError

DECODED_AT_ONCE = 64
"""Samples that are decoded in one task, at most."""
PIXELS_AT_ONCE = 1 << 21
"""Pixels that are encoded at once on a CPU, unless a single batch has more."""


def batches_of(
    submit: Submit, number: int, samples: int, batch_size: int, workers: int
) -> Generator[list[Piece], None, None]:
    """What a shard's samples are made into, decoded by `workers`, in batches."""
    # several samples a task: handing one over costs as much as decoding a small picture
    at_once = max(1, min(DECODED_AT_ONCE, batch_size // workers))
    starts = iter(range(0, samples, at_once))
    pending: deque[Future[list[Piece]]] = deque()
    batch: list[Piece] = []
    try:
        while True:
            while len(pending) * at_once < 2 * batch_size:
                start = next(starts, None)
                if start is None:
                    break
                pending.append(submit(number, start, min(start + at_once, samples)))
            if not pending:
                break
            batch += pending.popleft().result()
            while len(batch) >= batch_size:
                yield batch[:batch_size]
                batch = batch[batch_size:]
        if batch:
            yield batch
    finally:
        for future in pending:
            future.cancel()


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
    decode; one batch more has its turn while another waits for the interpreter's lock. But each
    holds its activations, so that large ones go one by one.
    """
    if not isinstance(tokenizer, AutoencoderTokenizer) or tokenizer.device.type != "cpu":
        return 1
    pixels = _pixels(batch)
    most = threads + 1 if threads > 1 else 1
    return max(1, min(most, PIXELS_AT_ONCE // pixels)) if pixels else 1


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
