"""Sources whose samples are rows of arrays: pictures (digits, idx, npz) and tables of reals."""

import csv
import gzip
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from chainrule.pipeline.config import nearest
from chainrule.pipeline.data.sources import (
    Raw,
    Source,
    SourceError,
    SourceSettings,
    Unreadable,
)
from chainrule.pipeline.data.stored_images import store


class ArraySource(Source):
    """Pictures uint8 (N, H, W, C) in memory, with class numbers (N,) where there are some."""

    what = "image"

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        classes: list[str] | None = None,
        where: Sequence[str] | None = None,
        first_validation: int | None = None,
    ) -> None:
        """Rows from `first_validation` on are the source's own validation split."""
        self._images, self._labels, self._where = images, labels, where
        self._first_validation = first_validation
        if labels is not None:
            found = int(labels.max()) + 1
            self.classes = classes or [str(i) for i in range(found)]
            if found > len(self.classes) or labels.min() < 0:
                raise SourceError(
                    f"labels {labels.min()}..{labels.max()}, but {len(self.classes)} classes named"
                )

    def __len__(self) -> int:
        return len(self._images)

    def where(self, i: int) -> str:
        return self._where[i] if self._where is not None else f"[{i}]"

    def split_of(self, i: int) -> str | None:
        if self._first_validation is None:
            return None
        return "validation" if i >= self._first_validation else "train"

    def read(self, i: int) -> Raw:
        meta: dict[str, object] = {"source": self.where(i)}
        if self._labels is not None and self.classes is not None:
            label = int(self._labels[i])
            meta |= {"label": label, "class": self.classes[label]}
        return Raw({**store(self._images[i]), "json": meta})


def read_labels(path: Path, count: int) -> np.ndarray:
    """Class numbers, one a line. SourceError."""
    try:
        labels = np.array([int(line) for line in path.read_text().split()], np.int64)
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file") from None
    except ValueError as error:
        raise SourceError(f"{path}: not one class number a line ({error})") from None
    if len(labels) != count:
        raise SourceError(f"{path}: {len(labels)} labels for {count} images")
    return labels


class SklearnDigits(SourceSettings):
    """scikit-learn's 1,797 real 8 x 8 digits (UCI, Alpaydin & Kaynak 1998), 0..16 as 0..255."""

    modality = "image"
    kind: Literal["sklearn-digits"]
    classes: list[str] | None = Field(None, description="names of the digits; default: 0 to 9")

    def open(self) -> Source:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        where = [f"digits[{i}]" for i in range(len(images))]
        return ArraySource(images, digits.target.astype(np.int64), self.classes, where=where)

    def files(self) -> list[Path]:
        path = _sklearn_datasets() / "data" / "digits.csv.gz"
        return [path] if path.is_file() else []


class SklearnTable(SourceSettings):
    """A table of continuous values that scikit-learn holds, its rows in their order.

    breast-cancer: 569 x 30; diabetes: 442 x 10; iris: 150 x 4; wine: 178 x 13. Or
    photograph-patches: the squares of `side` pixels of scikit-learn's two photographs, grey, each
    level made real by noise from [0, 1) drawn from the seed, in units of 256 levels.
    """

    modality = "table"
    kind: Literal["sklearn-table"]
    name: Literal["breast-cancer", "diabetes", "iris", "wine", "photograph-patches"]
    side: int = Field(4, ge=1, le=64, description="photograph-patches: pixels")
    seed: int = Field(0, ge=0, description="photograph-patches: of the noise")

    def open(self) -> Source:
        from sklearn import datasets

        if self.name == "photograph-patches":
            pictures = datasets.load_sample_images().images
            patches = [_squares(picture.mean(axis=2), self.side) for picture in pictures]
            noise = np.random.default_rng(self.seed)
            levels = np.concatenate(patches)
            return _TableSource((levels + noise.random(levels.shape)) / 256, "photographs")
        loaded = getattr(datasets, f"load_{self.name.replace('-', '_')}")()
        names = getattr(loaded, "feature_names", None)
        names = None if names is None else [str(name) for name in names]
        return _TableSource(np.asarray(loaded.data, np.float64), self.name, names)

    def files(self) -> list[Path]:
        _sklearn_datasets()
        return []


def _squares(picture: np.ndarray, side: int) -> np.ndarray:
    """Squares (N, side * side) of a grey picture (H, W), side by side, raster order."""
    height, width = (n - n % side for n in picture.shape)
    cut = picture[:height, :width].reshape(height // side, side, width // side, side)
    return cut.transpose(0, 2, 1, 3).reshape(-1, side * side)


def _sklearn_datasets() -> Path:
    """Where scikit-learn keeps its data, without the second its import takes; SourceError."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise SourceError("scikit-learn is not installed, and the data are part of it")
    return Path(found.origin).parent / "datasets"


class Idx(SourceSettings):
    """MNIST's format (LeCun, Cortes & Burges): idx-ubyte files, gzipped or not.

    With t10k files in the folder these are the validation split, unless `validation` is set.
    """

    modality = "image"
    kind: Literal["idx"]
    path: Path = Field(description="folder with train-images-idx3-ubyte(.gz) and so on")
    classes: list[str] | None = None

    def _find(self, name: str) -> Path | None:
        for candidate in (self.path / name, self.path / f"{name}.gz"):
            if candidate.is_file():
                return candidate
        return None

    def _pairs(self) -> list[tuple[Path, Path | None]]:
        if not self.path.is_dir():
            raise SourceError(f"{self.path}: no such folder")
        pairs = []
        for part in ("train", "t10k"):
            images = self._find(f"{part}-images-idx3-ubyte")
            if images is not None:
                pairs.append((images, self._find(f"{part}-labels-idx1-ubyte")))
            elif part == "train":
                raise SourceError(f"{self.path}: no train-images-idx3-ubyte or .gz")
        return pairs

    def open(self) -> Source:
        images, labels, where = [], [], []
        for path, label_path in self._pairs():
            images.append(read_idx(path, 3))
            where += [f"{path.name}[{i}]" for i in range(len(images[-1]))]
            if label_path is not None:
                labels.append(read_idx(label_path, 1))
                if len(labels[-1]) != len(images[-1]):
                    raise SourceError(
                        f"{label_path}: {len(labels[-1])} labels for {len(images[-1])} images"
                    )
        return ArraySource(
            np.concatenate(images)[..., None],
            np.concatenate(labels).astype(np.int64) if len(labels) == len(images) else None,
            self.classes,
            where,
            first_validation=len(images[0]) if len(images) > 1 else None,
        )

    def files(self) -> list[Path]:
        return [path for pair in self._pairs() for path in pair if path is not None]


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """uint8 array of an idx file. SourceError where it is not one, or not whole."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise SourceError(f"{path}: cannot be read ({error})") from None
    if data[:4] != bytes([0, 0, 8, dimensions]):
        raise SourceError(f"{path}: not an idx file of unsigned bytes in {dimensions} dimensions")
    head = 4 + 4 * dimensions
    shape = [int(side) for side in np.frombuffer(data[4:head], ">u4")]
    if len(data) != head + int(np.prod(shape)):
        raise SourceError(f"{path}: {len(data) - head} bytes for shape {shape}; copy it again")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


class Arrays(SourceSettings):
    """Pictures in a `.npz` or `.npy`: uint8 (N, H, W) or (N, H, W, 1 or 3)."""

    modality = "image"
    kind: Literal["arrays"]
    path: Path
    images: str = Field("images", description="key of the pictures in a .npz")
    labels: str | None = Field(None, description="key of the class numbers in a .npz")
    classes: list[str] | None = None

    def open(self) -> Source:
        arrays = _load_arrays(self.path)
        images = _member(arrays, self.images, self.path)
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise SourceError(f"{self.path}: images are {images.dtype} {images.shape}, not uint8")
        if images.ndim == 3:
            images = images[..., None]
        if images.shape[3] not in (1, 3) or len(images) == 0:
            raise SourceError(f"{self.path}: images of shape {images.shape}: 1 or 3 channels")
        labels = None
        if self.labels is not None:
            labels = _member(arrays, self.labels, self.path).astype(np.int64)
            if labels.shape != images.shape[:1]:
                raise SourceError(f"{self.path}: labels {labels.shape} for {len(images)} images")
        where = [f"{self.path.name}[{i}]" for i in range(len(images))]
        return ArraySource(images, labels, self.classes, where)

    def files(self) -> list[Path]:
        return [_present(self.path)]


class Table(SourceSettings):
    """Rows of real numbers: a `.csv` with a line of names, or `.npy`/`.npz` (N, D) of floats.

    A sample is `key.f64`: little-endian float64 (D,). For the continuous densities.
    """

    modality = "table"
    kind: Literal["table"]
    path: Path
    columns: list[str] | None = Field(None, description="columns of a .csv; null takes all")
    array: str = Field("values", description="key of the array in a .npz")
    standardize: bool = Field(
        False, description="subtract each column's mean over all rows, divide by its deviation"
    )

    def open(self) -> Source:
        if self.path.suffix.lower() == ".csv":
            names: list[str] | None
            names, values = _read_csv(_present(self.path), self.columns)
        else:
            if self.path.suffix.lower() not in (".npy", ".npz"):
                raise SourceError(f"{self.path}: a table is a .csv, .npy or .npz")
            values = _member(_load_arrays(self.path), self.array, self.path)
            if values.ndim != 2 or values.dtype.kind not in "fiu" or len(values) == 0:
                raise SourceError(f"{self.path}: {values.dtype} {values.shape}, not (N, D) reals")
            names = None
        values = values.astype(np.float64)
        if self.standardize:
            deviation = np.nanstd(values, axis=0)
            if not deviation.all():
                at = int(np.argmin(deviation))
                name = f"'{names[at]}'" if names is not None else at
                raise SourceError(f"{self.path}: column {name} is constant; leave it out")
            values = (values - np.nanmean(values, axis=0)) / deviation
        return _TableSource(values, self.path.name, names)

    def files(self) -> list[Path]:
        return [_present(self.path)]


class _TableSource(Source):
    what = "row"

    def __init__(self, values: np.ndarray, name: str, columns: list[str] | None = None) -> None:
        self._values, self._name = values, name
        self.columns = columns

    def __len__(self) -> int:
        return len(self._values)

    def where(self, i: int) -> str:
        return f"{self._name}[{i}]"

    def read(self, i: int) -> Raw:
        row = self._values[i]
        if not np.isfinite(row).all():
            raise Unreadable("holds a value that is missing or not finite")
        return Raw({"f64": row.astype("<f8").tobytes(), "json": {"source": self.where(i)}})


def _present(path: Path) -> Path:
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    return path


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(_present(path), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError) as error:
        raise SourceError(f"{path}: cannot be read without pickle ({error})") from None


def _member(arrays: dict[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    if set(arrays) == {""}:
        return arrays[""]
    if name not in arrays:
        raise SourceError(f"{path}: no array '{name}'; it holds {', '.join(sorted(arrays))}")
    return arrays[name]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


MISSING = ("", "na", "n/a", "nan", "null", "none", "?")
"""What stands for a value that is not there, in any case."""


def _read_csv(path: Path, columns: list[str] | None) -> tuple[list[str], np.ndarray]:
    """Names (D,) and values float64 (N, D), NaN where one is missing; SourceError."""
    try:
        # spreadsheets begin a file with a mark
        with open(path, newline="", encoding="utf-8-sig") as file:
            return _table(csv.reader(file), path, columns)
    except UnicodeDecodeError:
        raise SourceError(f"{path}: not UTF-8; save it as CSV in UTF-8") from None


def _table(reader: Any, path: Path, columns: list[str] | None) -> tuple[list[str], np.ndarray]:
    header: list[str] = next(reader, [])
    if not header:
        raise SourceError(f"{path}: is empty")
    if all(_is_number(name) for name in header):
        raise SourceError(
            f"{path}: the first line is numbers; a table needs a line of column names"
        )
    if len(header) == 1 and header[0].count(";") + header[0].count("\t"):
        raise SourceError(f"{path}: columns are to be separated by commas, not '{header[0]}'")
    names = columns or header
    for name in names:
        if name not in header:
            raise SourceError(f"{path}: no column '{name}'{nearest(name, header)}")
        if header.count(name) > 1:
            raise SourceError(f"{path}: {header.count(name)} columns are named '{name}'")
    at = [header.index(name) for name in names]
    rows = []
    for row in reader:
        if not row and len(header) > 1:  # a blank line
            continue
        where = f"{path}, line {reader.line_num}"
        row = row or [""]
        while len(row) > len(header) and not row[-1].strip():  # commas at the end
            row.pop()
        if len(row) != len(header):
            raise SourceError(f"{where}: {len(row)} values, the first line names {len(header)}")
        rows.append([_value(row[i], header[i], where) for i in at])
    if not rows:
        raise SourceError(f"{path}: no rows below its first line")
    return list(names), np.array(rows)


def _value(text: str, column: str, where: str) -> float:
    if text.strip().lower() in MISSING:
        return np.nan
    try:
        return float(text)
    except ValueError:
        raise SourceError(
            f"{where}: column '{column}' holds '{text[:40]}', no number; name those that do in "
            "`columns`"
        ) from None
