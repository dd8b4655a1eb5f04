"""Sources in Parquet, as data sets are handed around: a text or a picture a row.

    path            one file, or a folder of them (read in order of name)
    text            a column of strings
    picture         a column of encoded pictures: bytes, or Hugging Face's {bytes, path}
    label           a column of strings or whole numbers; their names from Hugging Face's notes
                    in the file, where it has any
    caption         a column of strings, or of lists of them

Only the columns asked for are read, a row group at a time.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from chainrule.pipeline.data.images import Pictures
from chainrule.pipeline.data.sources import (
    Raw,
    Source,
    SourceError,
    SourceSettings,
    Unreadable,
    require_file,
    shown,
    tree_files,
)
from chainrule.pipeline.data.stored_images import store

SUFFIXES = (".parquet",)
Splits = dict[str, Literal["train", "validation"]]
SPLITS = Field(
    None,
    description="files by how their names (below the folder) begin: {train: train, test: "
    "validation}; null: a share is held out",
)


class ParquetText(SourceSettings):
    """A document a row."""

    modality = "text"
    kind: Literal["parquet-text"]
    path: Path
    text: str = Field("text", description="column of the texts")
    splits: Splits | None = SPLITS

    def open(self) -> Source:
        return _Texts(self)

    def files(self) -> list[Path]:
        return tree_files(self.path, SUFFIXES)


class ParquetImages(Pictures):
    """A picture a row, with a class or captions."""

    kind: Literal["parquet-images"]
    path: Path
    image: str = Field("image", description="column of the pictures")
    label: str | None = Field(None, description="column of the classes")
    caption: str | None = Field(None, description="column of texts to condition on")
    splits: Splits | None = SPLITS

    @property
    def gives_captions(self) -> bool:
        return self.caption is not None

    @model_validator(mode="after")
    def _one_condition(self) -> "ParquetImages":
        if self.label is not None and self.caption is not None:
            raise ValueError("label and caption: a model is given one of them; leave one out")
        return self

    def open(self) -> Source:
        return _PictureRows(self)

    def files(self) -> list[Path]:
        return tree_files(self.path, SUFFIXES)


class _Rows(Source):
    """Rows of several files, numbered through; the columns of one row group are held."""

    def __init__(self, files: list[Path], root: Path, splits: Splits | None) -> None:
        import pyarrow.parquet as pq

        names = [str(f.relative_to(root)) if root.is_dir() else f.name for f in files]
        self._names = [shown(name) for name in names]
        self._splits = None if splits is None else [_split(n, splits, root) for n in self._names]
        self._files = []
        for file in files:
            try:
                self._files.append(pq.ParquetFile(require_file(file), memory_map=True))
            except Unreadable as error:
                raise SourceError(f"{file}: {error}; mend or remove it") from None
            except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
                raise SourceError(f"{file}: not whole Parquet ({_line(error)})") from None
        groups = [
            (number, group, of.metadata.row_group(group).num_rows)
            for number, of in enumerate(self._files)
            for group in range(of.num_row_groups)
        ]
        self._groups = [(number, group) for number, group, _ in groups]
        self._starts = np.cumsum([0, *(rows for *_, rows in groups)])
        before = np.cumsum([0, *(of.metadata.num_rows for of in self._files)])
        self._first_of_file = before[:-1]
        self._held: tuple[int, Any] | None = None
        if len(self) == 0:
            raise SourceError(f"{root}: holds no rows")

    def check(self, setting: str, column: str, *kinds: str) -> None:
        """SourceError where a file lacks the column that a setting names, or it is of no kind that
        Arrow calls so."""
        for name, file in zip(self._names, self._files, strict=True):
            schema = file.schema_arrow
            if column not in schema.names:
                there = ", ".join(schema.names)
                raise SourceError(
                    f"{name}: no column '{column}' (it has: {there}); name another by "
                    f"source.{setting}"
                )
            kind = str(schema.field(column).type)
            if not kind.startswith(kinds):
                raise SourceError(
                    f"{name}: column '{column}' is {kind}; wanted is {' or '.join(kinds)}"
                )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, i: int) -> str:
        number = self._file(i)
        return f"{self._names[number]}, row {i - int(self._first_of_file[number])}"

    def split_of(self, i: int) -> str | None:
        return None if self._splits is None else self._splits[self._file(i)]

    def _file(self, i: int) -> int:
        return self._groups[self._group(i)][0]

    def _group(self, i: int) -> int:
        return int(np.searchsorted(self._starts, i, side="right")) - 1

    def row(self, i: int, columns: list[str]) -> dict[str, Any]:
        """The values of row `i`. Unreadable where the file is damaged there."""
        group = self._group(i)
        try:
            if self._held is None or self._held[0] != group:
                number, within = self._groups[group]
                self._held = None  # before the next is read
                self._held = (group, self._files[number].read_row_group(within, columns))
            table, at = self._held[1], i - int(self._starts[group])
            return {column: table.column(column)[at].as_py() for column in columns}
        except UnicodeDecodeError as error:
            raise Unreadable(f"not UTF-8 ({error.reason} at byte {error.start})") from None
        except (OSError, ValueError) as error:
            raise Unreadable(f"damaged: {_line(error)}") from None

    def column(self, name: str) -> list[Any]:
        """All values of a column. SourceError."""
        try:
            return [v for file in self._files for v in file.read([name]).column(name).to_pylist()]
        except (OSError, ValueError) as error:
            raise SourceError(f"column '{name}': {_line(error)}") from None


class _Texts(_Rows):
    what = "document"

    def __init__(self, settings: ParquetText) -> None:
        super().__init__(settings.files(), settings.path, settings.splits)
        self._column = settings.text
        self.check("text", settings.text, "string", "large_string")

    def read(self, i: int) -> Raw:
        text = self.row(i, [self._column])[self._column]
        if text is None:
            raise Unreadable(f"column '{self._column}' is null")
        encoded = text.encode("utf-8")
        meta = {"source": self.where(i), "bytes": len(encoded)}
        return Raw({"txt": encoded, "json": meta}, len(encoded))


class _PictureRows(_Rows):
    what = "image"

    def __init__(self, settings: ParquetImages) -> None:
        super().__init__(settings.files(), settings.path, settings.splits)
        self._settings = settings
        self.check("image", settings.image, "struct<bytes: binary", "binary", "large_binary")
        self._columns = [settings.image]
        if settings.label is not None:
            self.check("label", settings.label, "int", "uint", "string", "large_string")
            self._columns.append(settings.label)
            self.classes = self._classes(settings.label)
        if settings.caption is not None:
            self.check("caption", settings.caption, "string", "large_string", "list<")
            self._columns.append(settings.caption)

    def _classes(self, label: str) -> list[str]:
        values = self.column(label)
        if None in values:
            raise SourceError(
                f"{self.where(values.index(None))}: column '{label}' is null; every picture needs "
                "a class"
            )
        if isinstance(values[0], str):
            return sorted(set(values))
        if min(values) < 0:
            raise SourceError(
                f"{self.where(values.index(min(values)))}: column '{label}' is {min(values)}; "
                "classes count from 0"
            )
        names = _names_of(self._files[0], label)
        return names if len(names) > max(values) else [str(n) for n in range(max(values) + 1)]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes or [])}

    def read(self, i: int) -> Raw:
        settings, row = self._settings, self.row(i, self._columns)
        data = row[settings.image]
        meta: dict[str, Any] = {"source": self.where(i)}
        if isinstance(data, dict):
            data = data["bytes"]
        if data is None:
            raise Unreadable(f"column '{settings.image}' holds no bytes")
        if settings.label is not None and self.classes is not None:
            label = row[settings.label]
            number = self._numbers[label] if isinstance(label, str) else label
            meta |= {"label": number, "class": self.classes[number]}
        if settings.caption is not None:
            texts = row[settings.caption]
            meta["captions"] = [texts] if isinstance(texts, str) else texts
            if not texts or not all(isinstance(text, str) for text in meta["captions"]):
                raise Unreadable(f"column '{settings.caption}' holds no text")
        return Raw({**store(settings.decode(data)), "json": meta})


def _split(name: str, splits: Splits, root: Path) -> str:
    for start, split in splits.items():
        if name.startswith(start):
            return split
    raise SourceError(f"{root / name}: begins with none of splits ({', '.join(sorted(splits))})")


def _names_of(file: Any, label: str) -> list[str]:
    """Names of classes in what Hugging Face's `datasets` notes in a file's schema."""
    notes = (file.schema_arrow.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(notes or b"{}")["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
