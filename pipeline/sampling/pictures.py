"""Samples as files to look at and listen to: a contact sheet, WAV files."""

import os
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 64
"""Small pictures are enlarged (whole pixels, nearest) to at least this many on a side."""
GAP = 4
INK, PAPER = (40, 40, 40), (255, 255, 255)


def contact_sheet(
    images: np.ndarray, rows: Sequence[tuple[str, Sequence[int]]], columns: int = 10
) -> Image.Image:
    """A sheet of `images` (N, H, W, C) uint8, C 1 or 3.

    Each row is (what was asked for, indices of its pictures); the label stands before it and
    at most `columns` pictures are shown. Empty labels take no room.
    """
    height, width, channels = images.shape[1:]
    scale = max(1, -(-CELL // max(height, width)))
    cell_h, cell_w = height * scale, width * scale
    font = ImageFont.load_default(size=14)
    margin = max(int(font.getlength(label)) for label, _ in rows)
    margin = margin + 3 * GAP if margin else GAP
    shown = min(columns, max(len(indices) for _, indices in rows))
    sheet = Image.new(
        "RGB", (margin + shown * (cell_w + GAP), GAP + len(rows) * (cell_h + GAP)), PAPER
    )
    pen = ImageDraw.Draw(sheet)
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


def sheet_rows(
    number: int, classes: Sequence[str] | None, columns: int = 10, most_rows: int = 40
) -> list[tuple[str, list[int]]]:
    """What a sheet shows: a row a condition asked for, or rows of `columns` without conditions."""
    if classes is None:
        starts = range(0, number, columns)[:most_rows]
        return [("", list(range(start, min(start + columns, number)))) for start in starts]
    grouped: dict[str, list[int]] = {}
    for index, name in enumerate(classes):
        grouped.setdefault(name, []).append(index)
    return list(grouped.items())[:most_rows]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    picture.save(temporary, format="PNG")
    os.replace(temporary, path)


def save_wav(audio: np.ndarray, sample_rate: int, path: Path) -> None:
    """Write `audio` (T,) int16 as mono WAV, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with wave.open(str(temporary), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(audio.astype("<i2").tobytes())
    os.replace(temporary, path)
