"""Pictures of any kind as uint8 (H, W, C), and the sources that hold pictures.

What is done to a picture, in this order:

    animated          its first frame
    EXIF orientation  turned upright
    transparent       laid over white (RGBA, LA, a palette or one value of them transparent)
    16-bit grey       scaled to 8 bits (65535 becomes 255)
    palette, CMYK     converted to RGB
    `channels`        1: grey (ITU-R 601-2 luma); 3: RGB; None: as the picture is, grey or RGB
    `size`            resized, with Lanczos' filter

Truncated files, floating-point pictures, pictures past `max_pixels` (decompression bombs)
and formats outside FORMATS are Unreadable.
"""

import contextlib
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.PngImagePlugin import PngImageFile
from pydantic import AfterValidator, Field, field_validator

from chainrule.pipeline.data.captions import (
    BESIDE_SUFFIX,
    LISTS,
    Captions,
    caption_files,
    check_captions,
)
from chainrule.pipeline.data.sources import (
    Labels,
    Pattern,
    Raw,
    Source,
    SourceError,
    SourceSettings,
    Tree,
    Unreadable,
    require_file,
    shown,
    split_folders,
    tree_files,
)
from chainrule.pipeline.data.stored_images import store

# Without EPS and its like, which hand the file to another program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# What Pillow's readers raise on damaged files.
FAULTS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error),
    *(TypeError, ArithmeticError),  # a tag of TIFF that is of another type, or past 64 bits
)
Transpose = Image.Transpose
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What undoes each orientation of EXIF."""

_PROCESS_WIDE = threading.Lock()
"""Held while a picture is decoded: Pillow's limit and the filters of warnings are those of all
threads."""


def _sides(size: Any) -> Any:
    if any(side < 1 for side in np.atleast_1d([] if size is None else size)):
        raise ValueError("a side has at least one pixel")
    return size


@contextlib.contextmanager
def _pillow_takes(pixels: int) -> Iterator[None]:
    """Pillow's own limit is no less than `pixels`. It refuses what is past twice the limit before
    it makes room for it, where a size that is looked at afterwards comes too late."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max(pixels, before or 0)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


class Pictures(SourceSettings):
    """What pictures are made into; shared by the kinds that read picture files."""

    modality = "image"
    channels: Literal[1, 3] | None = Field(3, description="1 grey, 3 RGB, null as they are")
    size: Annotated[int | tuple[int, int] | None, AfterValidator(_sides)] = Field(
        None, description="side, or (height, width), in pixels; null keeps each picture's own"
    )
    resize: Literal["crop", "stretch"] = Field(
        "crop", description="crop: keep proportions, cut the middle; stretch: do not"
    )
    max_pixels: int = Field(100_000_000, ge=1, description="larger pictures are refused")

    def decode(self, data: bytes) -> np.ndarray:
        """uint8 (H, W, C) of an encoded picture. Unreadable."""
        try:
            with _PROCESS_WIDE, _pillow_takes(self.max_pixels), warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                warnings.filterwarnings("ignore", category=UserWarning)  # broken EXIF and the like
                with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                    self._refuse_large(picture)
                    picture.load()
                    return self._convert(picture)
        except Image.DecompressionBombError:
            raise Unreadable(f"too large: over twice max_pixels {self.max_pixels}") from None
        except UnidentifiedImageError:
            raise Unreadable(f"not a picture of a known format ({', '.join(FORMATS)})") from None
        except FAULTS as error:
            raise Unreadable(f"damaged: {error}") from None

    def _refuse_large(self, picture: Image.Image) -> None:
        width, height = picture.size
        if width * height > self.max_pixels:
            raise Unreadable(f"too large: {width} x {height} pixels, max_pixels {self.max_pixels}")

    def _convert(self, picture: Image.Image) -> np.ndarray:
        # Not by exif_transpose: it writes all of the EXIF anew, and fails where some is damaged.
        turn = UPRIGHT.get(picture.getexif().get(Base.Orientation, 1))
        upright = _to_8_bits(picture if turn is None else picture.transpose(turn))
        if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
            upright = _over_white(upright)
        if upright.mode == "1":
            upright = upright.convert("L")
        if upright.mode not in ("L", "RGB"):
            upright = upright.convert("RGB")
        if self.channels is not None:
            upright = upright.convert("L" if self.channels == 1 else "RGB")
        if self.size is not None:
            height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
            lanczos = Image.Resampling.LANCZOS
            if self.resize == "crop":
                upright = ImageOps.fit(upright, (width, height), lanczos)
            elif upright.size != (width, height):
                upright = upright.resize((width, height), lanczos)
        array = np.asarray(upright)
        return array[:, :, None] if array.ndim == 2 else array


def _to_8_bits(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Unreadable("damaged: 32-bit grey values outside 0..65535")
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        transparent = picture.info.get("transparency")  # one of the 65536 values
        if transparent is not None:
            grey[values == transparent] = 255
        return Image.fromarray(grey)
    if picture.mode == "F":
        raise Unreadable("a floating-point picture has no stated range; convert it to 8 or 16 bits")
    return picture


def _over_white(picture: Image.Image) -> Image.Image:
    grey = picture.mode in ("L", "LA", "La", "1")
    rgba = picture.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("L" if grey else "RGB")


class ImageFolder(Pictures):
    """A folder (or tar) of pictures; the class of a picture is its first subfolder."""

    kind: Literal["image-folder"]
    path: Path
    class_pattern: Pattern | None = Field(
        None, description="regular expression on the relative path; its first group is the class"
    )
    splits: dict[str, Literal["train", "validation"]] | None = Field(
        None, description="top folders that are splits: {train: train, test: validation}"
    )
    captions: Literal["beside"] | list[Path] | None = Field(
        None,
        description="texts to condition on, in place of classes: beside (cat.jpg, cat.txt), or "
        "files: COCO's .json, or .jsonl of file_name and text",
    )

    @property
    def gives_captions(self) -> bool:
        return self.captions is not None

    @field_validator("captions", mode="before")
    @classmethod
    def _captions_of_a_known_form(cls, value: Any) -> Any:
        return check_captions(value)

    def open(self) -> Source:
        return _PictureFiles(self)

    def files(self) -> list[Path]:
        pictures = tree_files(self.path, SUFFIXES)
        if self.captions is None:
            return pictures
        return [*pictures, *caption_files(self.captions, self.path)]


class _PictureFiles(Source):
    what = "image"

    def __init__(self, settings: ImageFolder) -> None:
        self._settings = settings
        texts = () if settings.captions is None else (BESIDE_SUFFIX, *LISTS)
        self._tree = Tree(settings.path, (*SUFFIXES, *texts), required=SUFFIXES)
        self._names = names = self._tree.ending(SUFFIXES)
        self._splits: list[str] | None = None
        if settings.splits is not None:
            pairs = split_folders(names, dict(settings.splits), settings.path)
            self._splits = [split for split, _ in pairs]
            names = [rest for _, rest in pairs]
        self._labels: Labels | None = None
        self._captions: Captions | None = None
        if settings.captions is not None:
            self._captions = Captions(settings.captions, self._tree, self._names)
        else:
            self._labels = Labels(names, settings.path, settings.class_pattern)
            self.classes = self._labels.classes

    def __len__(self) -> int:
        return len(self._names)

    def where(self, i: int) -> str:
        return shown(self._names[i])

    def split_of(self, i: int) -> str | None:
        return self._splits[i] if self._splits is not None else None

    def read(self, i: int) -> Raw:
        name = self._names[i]
        meta: dict[str, Any] = {"source": name}
        if self._captions is not None:
            meta["captions"] = self._captions[name]
        if self._labels is not None:
            meta |= self._labels.meta(i)
        image = self._settings.decode(self._tree.read(name))
        return Raw({**store(image), "json": meta})


class Sprites(SourceSettings):
    """Sheets in which each row of pixels is one whole picture (ConvNetJS' CIFAR-10)."""

    modality = "image"
    kind: Literal["sprites"]
    path: Path = Field(description="folder of the sheets")
    pattern: str = Field("*.png", description="the sheets, taken in order of name")
    size: Annotated[tuple[int, int], AfterValidator(_sides)] = Field(
        (32, 32), description="(height, width) of one picture"
    )
    labels: str | None = Field(None, description="text file in the folder, a class number a line")
    classes: list[str] | None = None

    @field_validator("pattern")
    @classmethod
    def _pattern_within_the_folder(cls, value: str) -> str:
        if not value or value.startswith("/"):
            raise ValueError("a file name with * and ?, below the folder")
        return value

    def _sheets(self) -> list[Path]:
        if not self.path.is_dir():
            raise SourceError(f"{self.path}: no such folder")
        sheets = sorted(self.path.glob(self.pattern))
        if not sheets:
            raise SourceError(f"{self.path}: no files match '{self.pattern}'")
        return sheets

    def open(self) -> Source:
        from chainrule.pipeline.data.arrays import ArraySource, read_labels

        arrays, where = [], []
        height, width = self.size
        for path in self._sheets():
            try:
                with PngImageFile(require_file(path)) as sheet:  # of any size: it is no bomb
                    rows = np.asarray(sheet.convert("RGB"))
            except (Unreadable, *FAULTS) as error:
                raise SourceError(f"{path}: not a whole PNG ({error})") from None
            if rows.shape[1] != height * width:
                raise SourceError(
                    f"{path}: rows of {rows.shape[1]} pixels, size {height} x {width} needs "
                    f"{height * width}"
                )
            arrays.append(rows.reshape(len(rows), height, width, 3))
            where += [f"{path.name}[{row}]" for row in range(len(rows))]
        labels: Any = None
        if self.labels is not None:
            labels = read_labels(self.path / self.labels, len(where))
        return ArraySource(np.concatenate(arrays), labels, self.classes, where=where)

    def files(self) -> list[Path]:
        return [*self._sheets(), *([self.path / self.labels] if self.labels else [])]
