"""Writing shards: deterministic webdataset tars, their offsets, and `index.json`.

    shard-000000.tar            members `key.ext` of one sample adjacent, in order of ext;
                                mtime, uid, gid 0, no names, mode 0444: bytes depend on content only
    shard-000000.offsets.npy    where each sample lies, so that sample i is one read
    index.json                  the shards in order, train before validation, with their sha256
    skipped.jsonl               one JSON object for each input that could not be used

The offsets table is int64 (samples, 3 + 2 * members), in Fortran order so that one column
is one contiguous read of the mapped file:

    0  number of the sample's key
    1  tokens of the sample (0 in raw shards)
    2  crc32 of its bytes in the tar, from its first header to the end of its last member
    3, 4, 5, 6, ...  offset and length of each member, in the order of the shard entry's
                     "members"; -1 and 0 where the sample lacks it

The entry of a shard of token ids also has its "largest_id", to be held against a vocabulary.

While shards are being made each whole one has a `shard-000000.entry.json`, written last: its
presence is what "finished" means, so any number of workers can be killed and started again.
`finish` gathers the entries into the index and removes them.
"""

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from chainrule.pipeline.artifact import ArtifactError, read_json, write_json
from chainrule.pipeline.data.tar import BLOCK, Tar
from chainrule.pipeline.whole_file import write_whole

FORMAT = 1
SPLITS = ("train", "validation")
NUMBER, TOKENS, CRC, MEMBERS = 0, 1, 2, 3  # columns of the offsets table
BUFFER = 1 << 20  # bytes written at once
NAME = re.compile(r"shard-\d{6}\.tar")
EXTENSION = re.compile(r"[a-z0-9]+(\.[a-z0-9]+)*")
OFFSETS_DTYPE = np.int64


def key_of(number: int) -> str:
    """The key of the sample made from input `number`: zero-padded, so that keys sort."""
    return f"{number:08d}"


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def offsets_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".offsets.npy"


def entry_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".entry.json"


def encode_member(extension: str, value: Any) -> bytes:
    """Bytes of a member: dicts as canonical JSON, arrays as .npy, str as UTF-8."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, np.ndarray):
        return _npy_header(value.dtype, value.shape) + value.tobytes()
    if isinstance(value, Mapping):
        text = json.dumps(
            value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
        )
        return text.encode("utf-8")
    raise TypeError(f"member '{extension}' is a {type(value).__name__}, not bytes")


@lru_cache(maxsize=1024)
def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """What stands before the bytes of an array in C order; TypeError for one of objects."""
    if dtype.hasobject:
        raise TypeError(f"an array of {dtype} would be pickled")
    buffer = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(buffer, {**described, "shape": shape})
    return buffer.getvalue()


class ShardWriter:
    """Writes shard `number` of `folder`; on a clean exit it is there, otherwise it is not.

    with ShardWriter(folder, 3, "train") as shard:
        shard.write(key_of(17), {"png": png, "json": {"label": 4}})
        shard.skip("image", "cats/7.png", "truncated")
    """

    def __init__(self, folder: Path, number: int, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
        self.folder, self.number, self.split = folder, number, split
        self.name = shard_name(number)
        self._temporary = folder / f".{self.name}.tmp"
        self._rows: list[tuple[int, int, int, dict[str, tuple[int, int]]]] = []
        self._skipped: list[dict[str, Any]] = []
        self._raw_bytes = 0
        self._last = -1
        self._largest_id: int | None = None

    def __enter__(self) -> "ShardWriter":
        (self.folder / entry_name(self.name)).unlink(missing_ok=True)
        self._file = open(self._temporary, "wb", buffering=BUFFER)
        self._tar = Tar(self._file)
        return self

    def write(
        self, key: str, members: Mapping[str, Any], tokens: int = 0, raw_bytes: int = 0
    ) -> None:
        """Append a sample. `members` maps extensions to bytes, str (UTF-8), dict (JSON) or array.

        `tokens` is its number of tokens; `raw_bytes` what it counts for in the index's
        "raw_bytes" (UTF-8 bytes of a text). Keys are numbers that rise within a shard.
        """
        number = int(key)
        if key != key_of(number) or number <= self._last:
            raise ValueError(f"{self.name}: key {key!r} after {key_of(max(self._last, 0))!r}")
        if not members:
            raise ValueError(f"{self.name}: sample {key} has no members")
        self._last = number
        for extension in members:
            if not EXTENSION.fullmatch(extension):
                raise ValueError(f"{self.name}: {extension!r} is no member extension")
        array = members.get("tokens.npy")
        if isinstance(array, np.ndarray) and array.dtype.kind in "iu" and array.size:
            self._largest_id = max(int(array.max()), self._largest_id or 0)
        encoded = [(name, encode_member(name, members[name])) for name in sorted(members)]
        starts, crc = self._tar.write([(f"{key}.{name}", data) for name, data in encoded])
        where = {
            name: (start, len(data)) for (name, data), start in zip(encoded, starts, strict=True)
        }
        self._rows.append((number, tokens, crc, where))
        self._raw_bytes += raw_bytes

    def skip(self, what: str, where: str, reason: str) -> dict[str, Any]:
        """Note an input that could not be used; the line of skipped.jsonl."""
        line = {"what": what, "where": where, "reason": reason}
        self._skipped.append(line)
        return line

    @property
    def skipped(self) -> int:
        return len(self._skipped)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):  # a full disk has been reported already
                self._file.close()
            self._temporary.unlink(missing_ok=True)
            return
        sha256 = self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._publish(sha256)

    def _publish(self, sha256: str) -> None:
        extensions = sorted({extension for *_, where in self._rows for extension in where})
        table = np.zeros((len(self._rows), MEMBERS + 2 * len(extensions)), OFFSETS_DTYPE, order="F")
        table[:, NUMBER] = [number for number, *_ in self._rows]
        table[:, TOKENS] = [tokens for _, tokens, *_ in self._rows]
        table[:, CRC] = [crc for _, _, crc, _ in self._rows]
        for column, extension in enumerate(extensions):
            places = [where.get(extension, (-1, 0)) for *_, where in self._rows]
            table[:, MEMBERS + 2 * column : MEMBERS + 2 * column + 2] = places
        offsets = self.folder / offsets_name(self.name)
        temporary = offsets.with_name(f".{offsets.name}.tmp")
        with open(temporary, "wb") as file:
            np.save(file, table, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        entry = {
            "name": self.name,
            "split": self.split,
            "samples": len(self._rows),
            "tokens": int(table[:, TOKENS].sum()),
            "bytes": self._temporary.stat().st_size,
            "sha256": sha256,
            "offsets": offsets.name,
            "offsets_sha256": hashlib.sha256(temporary.read_bytes()).hexdigest(),
            "members": extensions,
            "raw_bytes": self._raw_bytes,
            "skipped": self._skipped,
        }
        if self._largest_id is not None:
            entry["largest_id"] = self._largest_id
        os.replace(temporary, offsets)
        os.replace(self._temporary, self.folder / self.name)
        write_json(self.folder / entry_name(self.name), entry)


def span(row: Sequence[int]) -> tuple[int, int]:
    """Bytes [start, stop) of a sample in its tar, its first header included."""
    start = stop = -1
    for offset, length in zip(row[MEMBERS::2], row[MEMBERS + 1 :: 2], strict=True):
        if offset >= 0:  # members lie in the order of their columns
            start = offset - BLOCK if start < 0 else start
            stop = offset + length
    return start, stop


def finished(folder: Path, number: int) -> dict[str, Any] | None:
    """The entry of shard `number` if an earlier attempt left it whole."""
    path = folder / entry_name(shard_name(number))
    if not path.is_file():
        return None
    entry: dict[str, Any] = read_json(path)
    shard = folder / entry["name"]
    if not shard.is_file() or shard.stat().st_size != entry["bytes"]:
        return None
    return entry if (folder / entry["offsets"]).is_file() else None


def read_skipped_again(folder: Path, number: int) -> None:
    """Have shard `number` made again if it skipped inputs: they may have been mended."""
    entry = finished(folder, number)
    if entry is not None and entry["skipped"]:
        (folder / entry_name(entry["name"])).unlink()


def finish(
    folder: Path,
    *,
    kind: str,
    modality: str,
    shards: int,
    classes: list[str] | None = None,
    **header: Any,
) -> dict[str, Any]:
    """Gather the entries of `shards` whole shards into index.json and skipped.jsonl.

    `header` goes into the index as it is (vocabulary, tokenizer, grid, source, ...).
    Returns the index. ArtifactError where a shard is missing or train does not come first.
    """
    index_path = folder / "index.json"
    if not index_path.is_file():
        entries = []
        for number in range(shards):
            entry = finished(folder, number)
            if entry is None:
                raise ArtifactError(f"{folder / shard_name(number)}: not finished; run it again")
            entries.append(entry)
        splits = [SPLITS.index(entry["split"]) for entry in entries]
        if splits != sorted(splits):
            raise ArtifactError(f"{folder}: a train shard comes after a validation shard")
        skipped = [line for entry in entries for line in entry.pop("skipped")]
        write_whole(
            folder / "skipped.jsonl",
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped),
        )
        raw_bytes = dict.fromkeys(SPLITS, 0)
        for entry in entries:
            raw_bytes[entry["split"]] += entry.pop("raw_bytes")
            if kind == "raw":
                del entry["tokens"]
        index = {
            "format": FORMAT,
            "kind": kind,
            "modality": modality,
            "classes": classes,
            "raw_bytes": raw_bytes,
            "skipped": len(skipped),
            **header,
            "shards": entries,
        }
        write_json(index_path, index)
    for pattern in ("shard-*.entry.json", ".shard-*.tmp", ".index.json.*.tmp", ".skipped*.tmp"):
        for path in folder.glob(pattern):  # also what killed attempts left half-written
            path.unlink()
    index = read_json(index_path)
    return dict(index)
