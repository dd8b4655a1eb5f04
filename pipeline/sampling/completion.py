"""A picture of one's own, of which a part is kept and the rest is drawn.

    file -> (H, W, C) as ingest makes it -> tokens (h, w) -> which of them are kept

A position of the grid is kept where its whole cell is. The codes of an autoencoder have seen
some pixels around their cell, so that those at the border carry a trace of what is replaced.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator

from chainrule.pipeline.config import Settings
from chainrule.pipeline.data.images import Pictures
from chainrule.pipeline.data.sources import Unreadable
from chainrule.pipeline.sampling.sampler import SamplingError

FORMS = "top:SHARE, left:SHARE or outside:X0,Y0,X1,Y1, in shares of the sides from 0 to 1"


class Picture(Settings):
    """A picture file, and what of it is kept."""

    file: Path
    keep: str = Field("top:0.5", description=FORMS)

    @field_validator("keep")
    @classmethod
    def _a_known_form(cls, value: str) -> str:
        kept_cells(value, 1, 1)
        return value


@dataclass
class Given:
    """Elements given from outside, in generation order."""

    tokens: torch.Tensor
    """(T,)"""
    kept: torch.Tensor
    """(T,) bool"""
    picture: np.ndarray
    """(H, W, C) uint8: all of it, as the tokenizer gives it back."""

    @property
    def late(self) -> int:
        """Kept elements that come after a drawn one: what is drawn before has not seen them."""
        return int(self.kept.sum() - self.kept.long().cumprod(dim=0).sum())


def kept_cells(keep: str, height: int, width: int) -> np.ndarray:
    """(height, width) bool: cells of a grid that lie in what is kept. ValueError."""
    form, _, raw = keep.partition(":")
    try:
        shares = [float(part) for part in raw.split(",")]
    except ValueError:
        shares = []
    if len(shares) != {"top": 1, "left": 1, "outside": 4}.get(form):
        raise ValueError(f"keep '{keep}': write it as {FORMS}")
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"keep '{keep}': shares go from 0 to 1")
    # 0.3 of 10 cells are 3, whatever the rounding of 0.3.
    y, x = (np.arange(n + 1) / n for n in (height, width))
    slack = 1e-9
    if form == "top":
        return np.broadcast_to((y[1:] <= shares[0] + slack)[:, None], (height, width))
    if form == "left":
        return np.broadcast_to(x[1:] <= shares[0] + slack, (height, width))
    x0, y0, x1, y1 = shares
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"keep '{keep}': X0 < X1 and Y0 < Y1 are the corners of the hole")
    rows = (y[1:] > y0 + slack) & (y[:-1] < y1 - slack)
    columns = (x[1:] > x0 + slack) & (x[:-1] < x1 - slack)
    return ~(rows[:, None] & columns)


def given_of(asked: Picture, source: Any, shape: tuple[int, ...], size: tuple[int, ...]) -> Given:
    """The picture of a file as a model's elements; `shape` its tokens', `size` (H, W, C).

    SamplingError where there is no such picture, or nothing to keep or to draw.
    """
    height, width, channels = size
    made: Any = {"kind": "picture", "channels": channels, "size": (height, width)}
    try:
        image = Pictures(**made).decode(asked.file.read_bytes())
    except OSError as error:
        raise SamplingError(f"picture: {asked.file}: {error.strerror}") from None
    except Unreadable as error:
        raise SamplingError(f"picture: {asked.file}: {error}") from None
    tokens = np.asarray(source.tokenizer.encode([image])[0])
    if tokens.shape != shape:
        raise SamplingError(
            f"picture: {asked.file}: gives tokens {tokens.shape}, the model has {shape}"
        )
    # Several codes of one cell stand side by side; planes of colours share their cells.
    depth = int(getattr(source.tokenizer, "depth", 1))
    cells = kept_cells(asked.keep, shape[-2], shape[-1] // depth).repeat(depth, axis=1)
    kept = np.broadcast_to(cells, shape)
    if kept.all() or not kept.any():
        what = "every" if kept.all() else "no"
        raise SamplingError(
            f"picture: keep '{asked.keep}' holds {what} position of a grid of "
            f"{shape[-2]} x {shape[-1] // depth}; move its edges"
        )

    def in_order(values: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(values.astype(np.int64)).reshape(1, *source.model.event_shape)
        return source.model.to_sequence(x).reshape(math.prod(shape))

    back = np.asarray(source.tokenizer.decode([tokens])[0])
    return Given(in_order(tokens), in_order(kept).bool(), back)
