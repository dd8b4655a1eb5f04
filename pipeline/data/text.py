"""Sources of text. A sample is one document, kept character for character."""

import io
import json
import sysconfig
import tokenize
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
    tree_files,
)

JSON_LINES = (".jsonl", ".ndjson")


class Text(SourceSettings):
    """A text file, a JSONL file, or a folder (or tar) of either."""

    kind: Literal["text"]
    path: Path
    suffixes: list[str] = Field(
        [".txt", ".md", ".rst", *JSON_LINES], description="files taken from a folder or tar"
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
        if self.path.is_file() and not self.path.name.endswith(ARCHIVES):
            return [self.path]
        return tree_files(self.path, self.suffixes)


class _OneFile:
    """A single file, with the interface of a Tree."""

    def __init__(self, path: Path) -> None:
        self.path, self.names = path, [path.name]

    def read(self, name: str) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from None


class _Documents(Source):
    """Documents as (file, start, stop) in bytes; reading one reads its file's bytes once."""

    modality, what = "text", "document"

    def __init__(self, settings: Text) -> None:
        self._settings = settings
        path = settings.path
        self._tree: Tree | _OneFile
        if path.is_file() and not path.name.endswith(ARCHIVES):
            self._tree = _OneFile(path)
        else:
            self._tree = Tree(path, settings.suffixes)
        self._held: tuple[int, bytes] | None = None
        files, starts, stops = [], [], []
        for number in range(len(self._tree.names)):
            for start, stop in self._cuts(number):
                files.append(number)
                starts.append(start)
                stops.append(stop)
        if not files:
            raise SourceError(f"{path}: holds no documents (its files are empty)")
        self._files = np.array(files, np.int64)
        self._starts, self._stops = np.array(starts, np.int64), np.array(stops, np.int64)

    def _content(self, file: int) -> bytes:
        if self._held is None or self._held[0] != file:
            self._held = (file, self._tree.read(self._tree.names[file]))
        return self._held[1]

    def _cuts(self, file: int) -> list[tuple[int, int]]:
        try:
            data = self._content(file)
        except Unreadable:
            return [(0, 0)]  # read again, and named, when its turn comes
        name = self._tree.names[file]
        if name.endswith(JSON_LINES) or self._settings.document == "line":
            cuts = [(a, b) for a, b in _lines(data) if data[a:b].strip()]
        elif self._settings.document == "paragraph":
            cuts = _paragraphs(data)
        else:
            cuts = [(0, len(data))] if data else []
        if self._settings.document_bytes is not None and not name.endswith(JSON_LINES):
            cuts = [c for a, b in cuts for c in _pieces(data, a, b, self._settings.document_bytes)]
        return cuts

    def __len__(self) -> int:
        return len(self._files)

    def where(self, i: int) -> str:
        name = self._tree.names[self._files[i]]
        whole = self._settings.document == "file" and self._settings.document_bytes is None
        if whole and not name.endswith(JSON_LINES):
            return name
        line = self._content(int(self._files[i])).count(b"\n", 0, int(self._starts[i])) + 1
        return f"{name}, line {line}"

    def read(self, i: int) -> Raw:
        file = int(self._files[i])
        data = self._content(file)[self._starts[i] : self._stops[i]]
        name = self._tree.names[file]
        meta: dict[str, Any] = {"source": name}
        if len(self._files) != len(self._tree.names):
            meta["offset"] = int(self._starts[i])
        if name.endswith(JSON_LINES):
            text = _field(data, self._settings.field)
        else:
            text = _decode(data, self._settings.invalid)
        encoded = text.encode("utf-8")
        return Raw({"txt": encoded, "json": meta | {"bytes": len(encoded)}}, len(encoded))


def _decode(data: bytes, invalid: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if invalid == "replace":
            return data.decode("utf-8", errors="replace")
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


def _lines(data: bytes) -> list[tuple[int, int]]:
    """(start, stop) of each line, without its line end."""
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 10).tolist()
    if not data.endswith(b"\n") and data:
        ends.append(len(data))
    return list(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=False)) if ends else []


def _paragraphs(data: bytes) -> list[tuple[int, int]]:
    """Runs of lines that are not blank, with their line ends."""
    cuts: list[tuple[int, int]] = []
    start = None
    for a, b in _lines(data):
        if data[a:b].strip():
            start = a if start is None else start
        elif start is not None:
            cuts.append((start, a))
            start = None
    if start is not None:
        cuts.append((start, len(data)))
    return cuts


def _pieces(data: bytes, start: int, stop: int, most: int) -> list[tuple[int, int]]:
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
    modality, what = "text", "document"

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
