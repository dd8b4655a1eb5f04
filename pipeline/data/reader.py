"""Reading shards: in order with every byte checked, or sample i by one read.

Nothing is unpickled, no shell is run, no path leads out of the folder: names come from the
index and must look like shard names, members are bytes that this module decodes itself.

A sample is checked whenever it is read, by the crc32 of its bytes. Sequential reading also
compares the shard's sha256, so that a change between samples is seen too. Damage is a
ShardError that names the shard and the first bad sample (`stop`), or the sample is left
out and counted (`skip-and-count`).
"""

import bisect
import hashlib
import io
import json
import math
import os
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chainrule.pipeline.artifact import ArtifactError, read_json
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.data.shards import (
    CRC,
    FORMAT,
    MEMBERS,
    NAME,
    NUMBER,
    TOKENS,
    key_of,
    offsets_name,
    span,
)
from chainrule.pipeline.data.stored_images import HEADER_BYTES, PICTURES, restore, shape_of

OnDamage = Literal["stop", "skip-and-count"]
NPY = "tokens.npy"
OPEN_FILES = 512  # shards kept open; past it a read opens and closes its own


class ShardError(RequestError):
    """A shard that is missing, truncated or altered; names it and the first bad sample."""


def decode_npy(data: bytes) -> np.ndarray:
    """The integer array of a `.npy` member, read-only. ValueError for anything else."""
    if len(data) < 10 or data[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("not a .npy of version 1.0")
    stop = 10 + int.from_bytes(data[8:10], "little")
    if len(data) < stop:
        raise ValueError("a .npy cut in its header")
    dtype, shape = _npy_header(data[:stop])
    count = 1
    for side in shape:
        count *= side
    if len(data) - stop != count * dtype.itemsize:
        raise ValueError(f".npy of shape {shape} holds {len(data) - stop} bytes")
    return np.frombuffer(data, dtype, count, stop).reshape(shape)


_HEADERS: dict[bytes, tuple[np.dtype[Any], tuple[int, ...]]] = {}


def _npy_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    # Parsing the header costs 30 times the copy of a small array, and few headers differ.
    known = _HEADERS.get(header)
    if known is None:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header[8:]))
        if fortran or dtype.kind not in "iuf":
            raise ValueError(f".npy of {dtype}, not integers or reals in C order")
        known = (dtype, shape)
        if len(_HEADERS) < 10_000:
            _HEADERS[header] = known
    return known


@dataclass(frozen=True)
class Sample:
    """One sample: its key and its members by extension, as bytes until asked for."""

    key: str
    members: dict[str, bytes]

    @cached_property
    def meta(self) -> dict[str, Any]:
        """`key.json`."""
        meta: dict[str, Any] = json.loads(self.members["json"])
        return meta

    def image(self) -> np.ndarray:
        """uint8 (H, W, C), C = 1 or 3."""
        return restore(self.members)

    def text(self) -> str:
        return self.members["txt"].decode("utf-8")

    def audio(self) -> tuple[np.ndarray, int]:
        """int16 (T,), mono, and its sampling rate in Hz."""
        import soundfile

        data = self.members.get("wav", self.members.get("flac"))
        if data is None:
            raise KeyError(f"sample {self.key} has neither wav nor flac")
        samples, rate = soundfile.read(io.BytesIO(data), dtype="int16")
        return samples, rate

    def values(self) -> np.ndarray:
        """float32 (D,) of a table row."""
        if "f32" in self.members:  # as they were stored at first
            return np.frombuffer(self.members["f32"], "<f4")
        return np.frombuffer(self.members["f64"], "<f8")

    def tokens(self) -> np.ndarray:
        return decode_npy(self.members[NPY])

    def raw(self, modality: str) -> Any:
        """The decoded sample as tokenizers take it."""
        if modality == "image":
            return self.image()
        if modality == "text":
            return self.text()
        if modality == "audio":
            return self.audio()[0]
        return self.values()


class Shards:
    """The shards of one artifact (raw or token)."""

    def __init__(self, folder: Path, index: dict[str, Any], on_damage: OnDamage = "stop") -> None:
        self.folder, self.index, self.on_damage = folder, index, on_damage
        self.entries: list[dict[str, Any]] = index["shards"]
        self.damaged = 0
        self._root = folder.resolve()
        self._lock = threading.Lock()
        self._files: dict[int, int] = {}
        self._tables: dict[int, np.ndarray] = {}
        self._of_split: dict[str, tuple[list[int], list[int]]] = {}
        for number, entry in enumerate(self.entries):
            if not NAME.fullmatch(entry["name"]) or entry["offsets"] != offsets_name(entry["name"]):
                raise ShardError(
                    f"{folder / 'index.json'}: {entry['name']!r} is no shard name; "
                    "the index was altered"
                )
            numbers, stops = self._of_split.setdefault(entry["split"], ([], []))
            numbers.append(number)
            stops.append((stops[-1] if stops else 0) + entry["samples"])
            if on_damage == "stop":
                self._check_size(number)

    @classmethod
    def open(cls, folder: str | Path, on_damage: OnDamage = "stop") -> "Shards":
        """The shards that `folder`/index.json lists. ShardError, ArtifactError."""
        folder = Path(folder)
        path = folder / "index.json"
        if not path.is_file():
            raise ArtifactError(f"{folder}: no index.json: not a folder of finished shards")
        index = read_json(path)
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise ArtifactError(f"{path}: not an index of format {FORMAT}")
        return cls(folder, index, on_damage)

    @classmethod
    def open_raw(cls, folder: str | Path, remedy: str = "") -> "Shards":
        """`open`, and ShardError for shards of tokens, with what to do with those."""
        shards = cls.open(folder)
        if shards.index.get("kind") == "tokens":
            raise ShardError(
                f"{folder}: holds tokens, not raw samples; give the ingest artifact{remedy}"
            )
        return shards

    @property
    def modality(self) -> str:
        return str(self.index["modality"])

    @property
    def classes(self) -> list[str] | None:
        return self.index.get("classes")

    @property
    def columns(self) -> list[str] | None:
        """Names of a table's columns, where it has them."""
        return self.index.get("columns")

    @property
    def captioned(self) -> bool:
        """Whether raw samples have captions."""
        return bool(self.index.get("captioned"))

    def count(self, split: str) -> int:
        stops = self._of_split.get(split, ([], []))[1]
        return stops[-1] if stops else 0

    def spread(self, split: str, most: int | None = None) -> list[int]:
        """Samples of a split, or `most` of them as evenly apart as that goes: folders are read
        class after class, so that the first ones would all be of one."""
        count = self.count(split)
        number = count if most is None else min(most, count)
        return [i * count // number for i in range(number)]

    def spread_tokens(self, split: str, tokens: int) -> list[int]:
        """Samples from all over a split of tokens that hold about so many, at least one."""
        held = sum(self.entries[n]["tokens"] for n in self.numbers(split))
        return self.spread(split, math.ceil(tokens * self.count(split) / max(held, 1)))

    def numbers(self, split: str) -> list[int]:
        """Numbers of the shards of a split."""
        return list(self._of_split.get(split, ([], []))[0])

    def lengths(self, split: str) -> np.ndarray:
        """Tokens of each sample of a split, int64 (samples,); reads offsets only."""
        columns = [np.asarray(self.table(n)[:, TOKENS]) for n in self.numbers(split)]
        return np.concatenate(columns) if columns else np.zeros(0, np.int64)

    def table(self, number: int) -> np.ndarray:
        """The offsets table of a shard (mapped, columns as in shards.py)."""
        table = self._tables.get(number)
        if table is None:
            entry = self.entries[number]
            path = self._path(entry["offsets"])
            try:
                # A view without memmap's own indexing, which costs more than the read.
                table = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            except (OSError, ValueError) as error:
                raise ShardError(f"{path}: unreadable ({error}); make the shards again") from None
            shape = (entry["samples"], MEMBERS + 2 * len(entry["members"]))
            if table.shape != shape or table.dtype != np.int64:
                raise ShardError(f"{path}: {table.dtype} {table.shape}, the index says {shape}")
            self._tables[number] = table
        return table

    def iterate(self, split: str, start: int = 0) -> Iterator[Sample]:
        """Samples of a split in order from sample `start` on, every byte checked."""
        for number in self.numbers(split):
            samples = self.entries[number]["samples"]
            if start >= samples:
                start -= samples
                continue
            yield from self.iterate_shard(number, start)
            start = 0

    def pick(self, split: str, most: int | None = None) -> Iterator[Sample]:
        """All samples of a split, every byte checked, or `most` of them from all over it."""
        if most is None or most >= self.count(split):
            yield from self.iterate(split)
            return
        for i in self.spread(split, most):
            sample = self.read(split, i)
            if sample is not None:  # damaged ones are counted
                yield sample

    def iterate_shard(self, number: int, start: int = 0) -> Iterator[Sample]:
        """Samples of one shard in order; its sha256 and its count are checked at the end."""
        damaged = self.damaged
        yield from self.rows(number, start, self.entries[number]["samples"])
        if start == 0 and damaged == self.damaged:
            self.check(number)

    def rows(self, number: int, start: int, stop: int) -> Iterator[Sample]:
        """Samples start..stop-1 of one shard, those left out that are damaged (skip-and-count)."""
        for row in range(start, stop):
            sample = self._read(number, row)
            if sample is not None:
                yield sample

    def check(self, number: int) -> None:
        """Compare a shard's and its offsets' sha256 with the index; ShardError."""
        entry = self.entries[number]
        for name, expected in (
            (entry["name"], entry["sha256"]),
            (entry["offsets"], entry["offsets_sha256"]),
        ):
            path = self._path(name)
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise ShardError(
                    f"{path}: altered: sha256 {found[:16]}, the index says {expected[:16]}; "
                    "make the shards again"
                )

    def read(self, split: str, i: int) -> Sample | None:
        """Sample `i` of a split by one read; None where it is damaged under skip-and-count."""
        return self._read(*self.locate(split, i))

    def read_range(self, split: str, i: int, member: str, start: int, length: int) -> bytes:
        """Bytes of a member of sample `i`, unchecked but for their number: `read` it first."""
        number, row = self.locate(split, i)
        column = MEMBERS + 2 * self.entries[number]["members"].index(member)
        data = self._pread(number, int(self.table(number)[row, column]) + start, length)
        if len(data) != length:
            raise ShardError(self._message(number, row, "truncated"))
        return data

    def picture_shape(self, split: str, i: int) -> tuple[int, int, int] | None:
        """(H, W, C) of picture `i` of a split by its header, unchecked; None where it has none."""
        number, row = self.locate(split, i)
        places = self.table(number)[row].tolist()
        for column, extension in enumerate(self.entries[number]["members"]):
            offset, length = places[MEMBERS + 2 * column : MEMBERS + 2 * column + 2]
            if extension in PICTURES and offset >= 0:
                return shape_of(extension, self._pread(number, offset, min(length, HEADER_BYTES)))
        return None

    def locate(self, split: str, i: int) -> tuple[int, int]:
        """(shard number, row in it) of sample `i` of a split. IndexError past the end."""
        numbers, stops = self._of_split.get(split, ([], []))
        at = bisect.bisect_right(stops, i)
        if i < 0 or at == len(numbers):
            raise IndexError(f"{self.folder}: split '{split}' has {self.count(split)} samples")
        return numbers[at], i - (stops[at - 1] if at else 0)

    def _read(self, number: int, row: int) -> Sample | None:
        entry = self.entries[number]
        places = self.table(number)[row].tolist()
        try:
            start, stop = span(places)
            data = self._pread(number, start, stop - start)
            if len(data) != stop - start:
                raise ShardError(self._message(number, row, "truncated"))
            if zlib.crc32(data) != places[CRC]:
                raise ShardError(self._message(number, row, "altered"))
        except ShardError:
            if self.on_damage == "stop":
                raise
            with self._lock:
                self.damaged += 1
            return None
        members = {}
        for column, extension in enumerate(entry["members"]):
            offset, length = places[MEMBERS + 2 * column : MEMBERS + 2 * column + 2]
            if offset >= 0:
                members[extension] = data[offset - start : offset - start + length]
        return Sample(key_of(places[NUMBER]), members)

    def _message(self, number: int, row: int, fault: str) -> str:
        key = key_of(int(self.table(number)[row, NUMBER]))
        # training alone can go on without a sample, and it reads tokens
        tokens = self.index.get("kind") == "tokens"
        without = ", or read with on_damage: skip-and-count" if tokens else ""
        return (
            f"{self.folder / self.entries[number]['name']}: {fault}; the first bad sample is "
            f"{key} ({row} of {self.entries[number]['samples']}); make the shards again{without}"
        )

    def _check_size(self, number: int) -> None:
        entry = self.entries[number]
        path = self._path(entry["name"])
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise ShardError(f"{path}: missing; make the shards again")
        if size != entry["bytes"]:
            table = self.table(number)
            for row in range(len(table)):
                if span(table[row].tolist())[1] > size:
                    raise ShardError(self._message(number, row, f"truncated to {size} bytes"))
            raise ShardError(f"{path}: {size} bytes, the index says {entry['bytes']}")

    def _path(self, name: str) -> Path:
        """A file of the folder; ShardError where a link leads out of it."""
        path = self.folder / name
        if path.resolve().parent != self._root:
            raise ShardError(f"{path}: leads out of its folder; copy the file in its place")
        return path

    def _pread(self, number: int, offset: int, length: int) -> bytes:
        descriptor = self._files.get(number)
        if descriptor is not None:
            return os.pread(descriptor, length, offset)
        path = self._path(self.entries[number]["name"])
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{path}: {error.strerror}; make the shards again") from None
        with self._lock:
            keep = number not in self._files and len(self._files) < OPEN_FILES
            if keep:
                self._files[number] = descriptor
        try:
            return os.pread(descriptor, length, offset)
        finally:
            if not keep:
                os.close(descriptor)

    def close(self) -> None:
        """Close the files; reading opens them again."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def __del__(self) -> None:
        # Descriptors, not file objects: an unclosed one would otherwise leak with the set.
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)
