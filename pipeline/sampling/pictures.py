"""Samples as files to look at and listen to: contact sheets, WAV files."""

import re
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from chainrule.pipeline.whole_file import whole

CELL = 64
"""Small pictures are enlarged (whole pixels, nearest) to at least this many on a side."""
GAP = 4
NOTE = 24
"""Height of a line of words below a sheet."""
MOST_ROWS = 40
INK, PAPER = (40, 40, 40), (255, 255, 255)


def contact_sheet(
    images: np.ndarray,
    rows: Sequence[tuple[str, Sequence[int]]],
    columns: int = 10,
    note: str = "",
) -> Image.Image:
    """A sheet of `images` (N, H, W, C) uint8, C 1 or 3.

    Each row is (what was asked for, indices of its pictures); the label stands before it and
    at most `columns` pictures are shown. Empty labels take no room. A `note` stands below.
    """
    height, width, channels = images.shape[1:]
    scale = max(1, -(-CELL // max(height, width)))
    cell_h, cell_w = height * scale, width * scale
    font = _font(14)
    margin = max(int(font.getlength(label)) for label, _ in rows)
    margin = margin + 3 * GAP if margin else GAP
    shown = min(columns, max(len(indices) for _, indices in rows))
    width_px, height_px = margin + shown * (cell_w + GAP), GAP + len(rows) * (cell_h + GAP)
    if note:
        width_px = max(width_px, int(font.getlength(note)) + 2 * GAP)
    sheet = Image.new("RGB", (width_px, height_px + (NOTE if note else 0)), PAPER)
    pen = ImageDraw.Draw(sheet)
    if note:
        pen.text((GAP, height_px + NOTE / 2 - GAP), note, fill=INK, font=font, anchor="lm")
    for r, (label, indices) in enumerate(rows):
        top = GAP + r * (cell_h + GAP)
        if label:
            pen.text((GAP, top + cell_h / 2), label, fill=INK, font=font, anchor="lm")
        for c, index in enumerate(indices[:columns]):
            picture = images[index]
            if channels == 1:
                picture = picture.repeat(3, axis=-1)
            tile = Image.fromarray(picture).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + c * (cell_w + GAP), top))
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which Matplotlib brings along: Pillow's own font has Latin letters alone."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(path, size)


def sheet_rows(
    number: int, classes: Sequence[str] | None, columns: int = 10
) -> tuple[list[tuple[str, list[int]]], str]:
    """What a sheet shows: a row a condition asked for, or rows of `columns` without conditions;
    at most MOST_ROWS of them. The second is a note on those left out, empty where none is."""
    if classes is None:
        starts = range(0, number, columns)[:MOST_ROWS]
        rows = [("", list(range(start, min(start + columns, number)))) for start in starts]
        left = max(0, number - MOST_ROWS * columns)
        return rows, f"{left:,} more samples in the store" if left else ""
    grouped: dict[str, list[int]] = {}
    for index, name in enumerate(classes):
        grouped.setdefault(name, []).append(index)
    left = max(0, len(grouped) - MOST_ROWS)
    return list(grouped.items())[:MOST_ROWS], f"{left:,} more in sheets/" if left else ""


def file_stems(names: Sequence[str]) -> list[str]:
    """Names as names of files: no separators, no two alike on any file system."""
    stems = [re.sub(r"[^\w.-]+", "_", name).strip("._")[:80] or "_" for name in names]
    if len({stem.casefold() for stem in stems}) == len(stems):
        return stems
    return [f"{i:04d}_{stem}" for i, stem in enumerate(stems)]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    with whole(path) as temporary:
        picture.save(temporary, format="PNG")


def save_wav(audio: np.ndarray, sample_rate: int, path: Path) -> None:
    """Write `audio` (T,) int16 as mono WAV, whole or not at all."""
    with whole(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(audio.astype("<i2").tobytes())
