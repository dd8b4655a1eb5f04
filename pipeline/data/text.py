"""Sources of text. A sample is one document, kept character for character."""

import gzip
import io
import json
import mmap
import os
import sysconfig
import tokenize
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from chainrule.pipeline.data.sources import (
    ARCHIVES,
    Raw,
    Source,
    SourceError,
    SourceSettings,
    Tree,
    Unreadable,
    shown,
    tree_files,
)

JSON_LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst")
CHUNK = 1 << 26  # bytes of a file looked at together for line ends

Content = bytes | mmap.mmap


class Text(SourceSettings):
    """A text file, a JSONL file, or a folder (or tar) of either; gzip or Zstandard too.

    Plain files are mapped, not read: they may be larger than memory.
    """

    modality = "text"
    kind: Literal["text"]
    path: Path
    suffixes: list[str] = Field(
        [".txt", ".md", ".rst", *JSON_LINES],
        description="files taken from a folder or tar, also with .gz or .zst behind",
    )
    document: Literal["file", "line", "paragraph"] = Field(
        "file", description="what a document of a plain file is (JSONL: always a line)"
    )
    document_bytes: int | None = Field(
        None, ge=4, description="cut documents at the last line end before this many bytes"
    )
    field: str = Field("text", description="key of the text in a JSONL line")
    invalid: Literal["skip", "replace"] = Field(
        "skip", description="documents that are not UTF-8: left out, or mended with U+FFFD"
    )

    def open(self) -> Source:
        return _Documents(self)

    def files(self) -> list[Path]:
        if self.one_file:
            return [self.path]
        return tree_files(self.path, self.all_suffixes)

    @property
    def one_file(self) -> bool:
        return self.path.is_file() and not self.path.name.endswith(ARCHIVES)

    @property
    def all_suffixes(self) -> list[str]:
        return [suffix + behind for suffix in self.suffixes for behind in ("", *COMPRESSED)]


class _Documents(Source):
    """Documents as (file, start, stop) in bytes; the file at hand is kept, mapped or unpacked."""

    what = "document"

    def __init__(self, settings: Text) -> None:
        self._settings = settings
        path = settings.path
        self._tree = None if settings.one_file else Tree(path, settings.all_suffixes)
        self._names = [path.name] if self._tree is None else self._tree.names
        self._held: tuple[int, Content] | None = None
        cuts = [self._cuts(number) for number in range(len(self._names))]
        self._files = np.repeat(np.arange(len(cuts)), [len(cut) for cut in cuts])
        if not len(self._files):
            raise SourceError(f"{path}: holds no documents (its files are empty)")
        self._starts, self._stops = np.concatenate(cuts).T

    def _content(self, file: int) -> Content:
        if self._held is None or self._held[0] != file:
            name = self._names[file]
            if self._tree is None:
                content = _mapped(self._settings.path)
            elif self._tree.path.is_dir():
                content = _mapped(self._tree.file(name))
            else:
                content = self._tree.read(name)
            self._held = (file, _unpacked(content, name))
        return self._held[1]

    def _is_json(self, file: int) -> bool:
        name = self._names[file]
        for behind in COMPRESSED:
            name = name.removesuffix(behind)
        return name.endswith(JSON_LINES)

    def _cuts(self, file: int) -> np.ndarray:
        """int64 (documents, 2): [start, stop) of each document of a file."""
        try:
            data = self._content(file)
        except Unreadable:
            return np.zeros((1, 2), np.int64)  # read again, and named, when its turn comes
        if self._is_json(file) or self._settings.document == "line":
            cuts = _lines(data)
            cuts = cuts[_not_blank(data, cuts)]
        elif self._settings.document == "paragraph":
            cuts = _paragraphs(data)
        else:
            cuts = np.array([[0, len(data)]] if len(data) else [], np.int64).reshape(-1, 2)
        most = self._settings.document_bytes
        if most is not None and not self._is_json(file):
            pieces = [piece for a, b in cuts.tolist() for piece in _pieces(data, a, b, most)]
            cuts = np.array(pieces, np.int64).reshape(-1, 2)
        return cuts

    def __len__(self) -> int:
        return len(self._files)

    def where(self, i: int) -> str:
        file = int(self._files[i])
        name = shown(self._names[file])
        whole = self._settings.document == "file" and self._settings.document_bytes is None
        if whole and not self._is_json(file):
            return name
        try:
            data, start = self._content(file), int(self._starts[i])
        except Unreadable:
            return name
        before = sum(
            data[at : min(at + CHUNK, start)].count(b"\n") for at in range(0, start, CHUNK)
        )
        return f"{name}, line {before + 1}"

    def read(self, i: int) -> Raw:
        file = int(self._files[i])
        data = self._content(file)[int(self._starts[i]) : int(self._stops[i])]
        meta: dict[str, Any] = {"source": self._names[file]}
        if len(self._files) != len(self._names):
            meta["offset"] = int(self._starts[i])
        if self._is_json(file):
            text = _field(data, self._settings.field)
        else:
            text = _decode(data, self._settings.invalid)
        encoded = text.encode("utf-8")
        return Raw({"txt": encoded, "json": meta | {"bytes": len(encoded)}}, len(encoded))


def _mapped(path: Path) -> Content:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""  # nothing to map
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None


def _unpacked(content: Content, name: str) -> Content:
    try:
        if name.endswith(".gz"):
            return gzip.decompress(content)
        if name.endswith(".zst"):
            return _unpack_zstandard(content[:])
    except (OSError, EOFError, zlib.error) as error:
        raise Unreadable(f"damaged: {error}") from None
    return content


def _unpack_zstandard(data: bytes) -> bytes:
    import zstandard

    unpacked = []
    try:
        while data:  # frame by frame
            unpacker = zstandard.ZstdDecompressor().decompressobj()
            unpacked.append(unpacker.decompress(data))
            if not unpacker.eof:
                raise Unreadable("damaged: the last frame is cut")
            data = unpacker.unused_data
    except zstandard.ZstdError as error:
        raise Unreadable(f"damaged: {error}") from None
    return b"".join(unpacked)


def _decode(data: bytes, invalid: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if invalid == "replace":
            return data.decode("utf-8", errors="replace")
        if data[:4] == b"PAR1":
            raise Unreadable("Parquet; that is read by source.kind parquet-text") from None
        raise Unreadable(f"not UTF-8 ({error.reason} at byte {error.start})") from None


def _field(line: bytes, field: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise Unreadable(f"not JSON ({error})") from None
    if not isinstance(record, dict) or field not in record:
        keys = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise Unreadable(f"no field '{field}' (it has: {keys})")
    text = record[field]
    if not isinstance(text, str):
        raise Unreadable(f"field '{field}' is a {type(text).__name__}, not a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Unreadable(f"field '{field}' holds a lone surrogate") from None
    return text


def _lines(data: Content) -> np.ndarray:
    """int64 (lines, 2): [start, stop) of each line, without its line end."""
    found = [
        np.flatnonzero(np.frombuffer(data[at : at + CHUNK], np.uint8) == ord("\n")) + at
        for at in range(0, len(data), CHUNK)
    ]
    stops = np.concatenate([np.zeros(0, np.int64), *found])
    if len(data) and data[-1:] != b"\n":
        stops = np.append(stops, len(data))
    starts = np.concatenate([np.zeros(min(len(stops), 1), np.int64), stops[:-1] + 1])
    return np.stack([starts, stops], axis=1)


def _not_blank(data: Content, cuts: np.ndarray) -> np.ndarray:
    """Which of the spans hold more than white space."""
    solid = np.zeros(len(cuts), np.bool_)
    for at in range(0, len(cuts), 1 << 20):  # as lists of numbers they are large
        part = cuts[at : at + (1 << 20)].tolist()
        solid[at : at + len(part)] = [bool(data[a:b].strip()) for a, b in part]
    return solid


def _paragraphs(data: Content) -> np.ndarray:
    """int64 (paragraphs, 2): runs of lines that are not blank, with their line ends."""
    lines = _lines(data)
    solid = np.concatenate([[False], _not_blank(data, lines), [False]])
    first = np.flatnonzero(~solid[:-1] & solid[1:])
    behind = np.flatnonzero(solid[:-1] & ~solid[1:])  # the line after the last
    ends = np.append(lines[:, 0], len(data))
    return np.stack([lines[first, 0], ends[behind]], axis=1)


def _pieces(data: Content, start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """[start, stop) in pieces of at most `most` bytes, cut after a line end where there is one.

    A line longer than `most` is cut between characters.
    """
    pieces = []
    while stop - start > most:
        end = data.rfind(b"\n", start, start + most) + 1
        if end <= start:
            end = start + most
            while end > start + 1 and data[end] & 0xC0 == 0x80:  # inside a character of UTF-8
                end -= 1
        pieces.append((start, end))
        start = end
    if stop > start:
        pieces.append((start, stop))
    return pieces


TESTS = frozenset({"test", "tests", "idle_test"})  # 19 of the library's 31 MB
INSTALLED = frozenset({"site-packages", "dist-packages", "__pycache__"})


class PythonStdlib(SourceSettings):
    """The `.py` files of the running interpreter's standard library, tests left out."""

    modality = "text"
    kind: Literal["python-stdlib"]

    def open(self) -> Source:
        return _Stdlib()

    def files(self) -> list[Path]:
        root, names = _stdlib()
        return [root / name for name in names]


def _stdlib() -> tuple[Path, list[str]]:
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not (TESTS | INSTALLED) & set(path.relative_to(root).parts[:-1]) and path.stat().st_size
    )
    if not names:
        raise SourceError(f"{root}: no .py files: this Python keeps no source of its library")
    return root, names


class _Stdlib(Source):
    what = "document"

    def __init__(self) -> None:
        self._root, self._names = _stdlib()

    def __len__(self) -> int:
        return len(self._names)

    def where(self, i: int) -> str:
        return self._names[i]

    def read(self, i: int) -> Raw:
        try:
            data = (self._root / self._names[i]).read_bytes()
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from None
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)  # PEP 263
            encoded = data.decode(encoding).encode("utf-8")
        except (SyntaxError, UnicodeError, LookupError) as error:
            raise Unreadable(f"not in the encoding it declares ({error})") from None
        meta = {"source": self.where(i), "bytes": len(encoded)}
        return Raw({"txt": encoded, "json": meta}, len(encoded))
