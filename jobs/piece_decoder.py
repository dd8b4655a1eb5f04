"""Samples of raw shards as pretokenize takes them: read, checked, decoded, cut into views.

Several workers are processes: threads would wait for each other at the interpreter's lock, where
pictures are small. (One beside an encoder on a CPU is as fast as a thread.)
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainrule.pipeline.data.reader import Sample, Shards
from chainrule.pipeline.processes import worker_processes
from chainrule.tokenizers.interface import TokenizerError
from chainrule.tokenizers.views import Views


@dataclass
class Piece:
    """One sample to write: its key's number, what it holds, or why it cannot be used."""

    number: int
    where: str
    meta: dict[str, Any]
    raw_bytes: int
    raw: Any
    fault: str | None = None


Submit = Callable[[int, int, int], "Future[list[Piece]]"]
"""Have rows start..stop-1 of shard `number` decoded."""


@contextmanager
def decoders(shards: Shards, views: Views | None, workers: int) -> Iterator[Submit]:
    """Who decodes: one thread, or so many processes; of what is no picture, so many threads."""
    if shards.modality == "image" and workers > 1:
        given = (shards.folder, views)
        with worker_processes(workers, _open, *given) as processes:
            yield lambda *rows: processes.submit(_decode_opened, *rows)
        return
    with ThreadPoolExecutor(workers, "decode") as threads:
        yield lambda *rows: threads.submit(decode_rows, shards, views, *rows)


def decode_rows(
    shards: Shards, views: Views | None, number: int, start: int, stop: int
) -> list[Piece]:
    """The pieces of rows start..stop-1 of a shard; ShardError where one is damaged."""
    split = shards.entries[number]["split"]
    return [
        piece
        for sample in shards.rows(number, start, stop)
        for piece in _decode(sample, shards.modality, split, views)
    ]


def _decode(sample: Sample, modality: str, split: str, views: Views | None) -> list[Piece]:
    each = views.count(split) if views is not None else 1
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


_opened: tuple[Shards, Views | None]
"""Of a worker process."""


def _open(folder: Path, views: Views | None) -> None:
    global _opened
    _opened = Shards.open(folder), views


def _decode_opened(number: int, start: int, stop: int) -> list[Piece]:
    return decode_rows(*_opened, number, start, stop)
