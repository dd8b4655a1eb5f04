"""What a source of raw samples is: a numbered list of inputs, each read on its own.

A source reads nothing when it is made but what it takes to count its inputs, and input i is
the same whenever and wherever it is asked for: any number of workers, killed and started
again, write the same shards.

The kinds (`source: {kind: ...}` of an ingest stage) are settings that `open` a source:

    images.py   image-folder, sprites                   text.py    text, python-stdlib
    arrays.py   sklearn-digits, sklearn-table, idx, arrays, table   audio.py   audio-folder
    parquet.py  parquet-text, parquet-images
"""

import gzip
import io
import os
import re
import stat
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import AfterValidator

from chainrule.pipeline.config import RequestError, Settings
from chainrule.pipeline.data.order import Permutation

ARCHIVES = (".tar", ".tar.gz", ".tgz")
SPLIT_STREAM = 0x5B117  # keeps the split's permutation apart from those of epochs
NO_FILES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class SourceError(RequestError):
    """A source that is missing, empty or not what its kind says: what, where, remedy."""


class Unreadable(Exception):
    """One input that cannot be used; the message says why. The others go on."""


@dataclass(frozen=True)
class Raw:
    """One input as shard members."""

    members: dict[str, Any]
    raw_bytes: int = 0
    """UTF-8 bytes of a text."""


class Source(ABC):
    """`len(source)` inputs in a fixed order."""

    what: str
    """What one input is, for skipped.jsonl and messages: "image", "document", ..."""
    classes: list[str] | None = None
    columns: list[str] | None = None
    """Names of a table's columns, where it has them."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, i: int) -> str:
        """Where input `i` lies: a relative path, a row, a line."""

    @abstractmethod
    def read(self, i: int) -> Raw:
        """Input `i`. Unreadable where it cannot be used."""

    def split_of(self, i: int) -> str | None:
        """The split that the source itself puts input `i` in, if it does."""
        return None


class SourceSettings(Settings):
    """Base of every kind's settings."""

    modality: ClassVar[str]
    """What the samples are: "image", "text", "audio" or "table"."""
    kind: str

    @property
    def gives_captions(self) -> bool:
        """Whether each input has `captions`, a list of texts, in its metadata."""
        return False

    def open(self) -> Source:
        """The source; SourceError where it is missing or empty."""
        raise NotImplementedError

    def files(self) -> list[Path]:
        """Raw files whose content decides the result. SourceError where they are missing."""
        raise NotImplementedError


def split(source: Source, validation: float | None, seed: int, tail: bool) -> dict[str, np.ndarray]:
    """Numbers of the inputs of each split, rising: {"train": ..., "validation": ...}.

    A share `validation` of all inputs, drawn by `seed` (or the last ones, with `tail`);
    None takes the source's own split, or a tenth where it has none.
    """
    n = len(source)
    if validation is None and source.split_of(0) is not None:
        names = np.array([source.split_of(i) for i in range(n)])
        return {name: np.flatnonzero(names == name) for name in ("train", "validation")}
    share = 0.1 if validation is None else validation
    held_out = min(max(round(share * n), 1 if share > 0 and n > 1 else 0), max(n - 1, 0))
    if tail:
        return {"train": np.arange(n - held_out), "validation": np.arange(n - held_out, n)}
    order = Permutation(n, seed, SPLIT_STREAM)[np.arange(n)]
    return {"train": np.sort(order[held_out:]), "validation": np.sort(order[:held_out])}


def shown(name: str) -> str:
    """A file's name as text: that of one that is not UTF-8 has its bytes as `\\xe9` (and then
    a backslash of its own as two)."""
    if _is_utf8(name):
        return name
    return os.fsencode(name.replace("\\", "\\\\")).decode("utf-8", "backslashreplace")


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def require_file(path: Path) -> Path:
    """`path`, if it is a file. Unreadable for a pipe, a socket or a device, which could keep the
    reader for ever, and for a link that leads nowhere."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        broken = isinstance(error, FileNotFoundError) and path.is_symlink()
        reason = f"a link to {shown(os.readlink(path))}, which is not there" if broken else None
        raise Unreadable(reason or error.strerror or str(error)) from None
    if not stat.S_ISREG(mode):
        raise Unreadable(f"{NO_FILES.get(stat.S_IFMT(mode), 'something')}, not a file")
    return path


class Tree:
    """The files below a folder, or in a tar, by relative path, sorted. Never unpacked.

    Hidden files and folders are left out. A compressed tar is held in memory, unpacked.

    Links to files and folders are followed, those in a tar left out. A folder is read once,
    where it lies in the tree if it does, or else by the first link to it in order of name: links
    that lead in a circle end there. What ends as a file should and is none (a link that leads
    nowhere, a pipe, a device), or has a name that is not UTF-8, has its place in `names` and is
    Unreadable.
    """

    def __init__(
        self, path: Path, suffixes: Iterable[str], required: Sequence[str] | None = None
    ) -> None:
        """SourceError where no file ends in one of `required` (default: of `suffixes`)."""
        self.path = path
        wanted = tuple(suffix.lower() for suffix in suffixes)
        required = wanted if required is None else required
        if path.is_dir():
            found = list(_below(path))
        elif path.is_file() and path.name.endswith(ARCHIVES):
            self._members, self._data = _tar_members(path)
            found = list(self._members)
        elif path.is_file():
            raise SourceError(f"{path}: neither a folder nor a tar ({', '.join(ARCHIVES)})")
        else:
            raise SourceError(f"{path}: no such file or folder")
        self.names = sorted(name for name in found if name.lower().endswith(wanted))
        if required and not self.ending(required):
            raise SourceError(
                f"{path}: no files that end in {', '.join(required)}"
                + (f" (there are {_kinds(found)})" if found else ": the folder is empty")
            )

    def ending(self, suffixes: Sequence[str]) -> list[str]:
        """The names that end in one of these."""
        return [name for name in self.names if name.lower().endswith(tuple(suffixes))]

    def read(self, name: str) -> bytes:
        """Content of a file. Unreadable where the system refuses."""
        try:
            if self.path.is_dir():
                return self.file(name).read_bytes()
            _require_utf8(name)
            offset, size = self._members[name]
            if self._data is not None:
                return self._data[offset : offset + size]
            with open(self.path, "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from None

    def file(self, name: str) -> Path:
        """Where a file of a folder lies. Unreadable where it is none."""
        _require_utf8(name)
        return require_file(self.path / name)


def _require_utf8(name: str) -> None:
    if not _is_utf8(name):
        raise Unreadable("its name is not UTF-8; rename it")


def _kinds(names: Iterable[str]) -> str:
    """How many files of which suffix, the three commonest."""
    counts = Counter(PurePosixPath(name).suffix.lower() or "none" for name in names)
    return ", ".join(f"{count} of {suffix}" for suffix, count in counts.most_common(3))


def tree_files(path: Path, suffixes: Iterable[str]) -> list[Path]:
    """Files on disk that a `Tree` reads."""
    if path.is_dir():
        return [path / name for name in Tree(path, suffixes).names]
    if not path.is_file():
        raise SourceError(f"{path}: no such file or folder")
    return [path]


def _below(path: Path) -> Iterable[str]:
    seen: set[str] = set()
    starts = [""]  # the folder itself; then links in it, links in what those lead to, and so on
    while starts:
        links: list[str] = []
        for start in sorted(starts):
            real = os.path.realpath(path / start)
            for folder, folders, files in os.walk(real):
                if folder in seen:
                    folders.clear()
                    continue
                seen.add(folder)
                within = os.path.relpath(folder, real)
                base = start if within == "." else os.path.join(start, within)
                folders[:] = [name for name in folders if not name.startswith(".")]
                for name in folders:
                    if os.path.islink(os.path.join(folder, name)):
                        links.append(os.path.join(base, name))
                for name in files:
                    if not name.startswith("."):
                        yield os.path.join(base, name)
        starts = links


def _tar_members(path: Path) -> tuple[dict[str, tuple[int, int]], bytes | None]:
    plain = path.name.endswith(".tar")
    try:
        data = None if plain else gzip.decompress(path.read_bytes())
        stream = io.BytesIO(data) if data is not None else None
        with tarfile.open(path, "r:", fileobj=stream) as archive:
            members = {
                member.name.removeprefix("./"): (member.offset_data, member.size)
                for member in archive
                if member.isreg()
            }
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SourceError(f"{path}: not a whole tar ({error}); copy it again") from None
    hidden = [n for n in members if any(part.startswith(".") for part in PurePosixPath(n).parts)]
    for name in hidden:
        del members[name]
    return members, data


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression as a setting."""


class Labels:
    """The class of each file: its first subfolder, or what a pattern finds in its path."""

    def __init__(self, names: list[str], root: Path, pattern: str | None) -> None:
        if pattern is not None:
            expression = re.compile(pattern)
            found = [expression.search(name) for name in names]
            for name, match in zip(names, found, strict=True):
                if match is None or not match.groups() or match.group(1) is None:
                    raise SourceError(
                        f"{root / shown(name)}: class_pattern {pattern!r} finds no group in "
                        f"'{shown(name)}'"
                    )
            of = [shown(match.group(1)) for match in found if match is not None]
        else:
            of = [shown(name.split("/", 1)[0]) if "/" in name else "" for name in names]
            if any(of) and not all(of):
                stray = names[of.index("")]
                raise SourceError(
                    f"{root / shown(stray)}: lies beside the class folders; move it into one, or "
                    "remove it"
                )
        self.classes: list[str] | None = sorted(set(of)) if any(of) else None
        self._of = of

    def meta(self, i: int) -> dict[str, Any]:
        """{"label": number, "class": name} of file `i`; empty without classes."""
        if self.classes is None:
            return {}
        return {"label": self.classes.index(self._of[i]), "class": self._of[i]}


def split_folders(names: list[str], mapping: dict[str, str], root: Path) -> list[tuple[str, str]]:
    """(split, path below the split's folder) of each file, for folders named by `mapping`."""
    result = []
    for name in names:
        top, _, rest = name.partition("/")
        if top not in mapping or not rest:
            raise SourceError(
                f"{root / shown(name)}: not below one of the split folders "
                f"{', '.join(sorted(mapping))}"
            )
        result.append((mapping[top], rest))
    return result
