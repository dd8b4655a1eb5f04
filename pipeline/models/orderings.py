"""The order in which the elements of an event are generated.

p(x) = prod_t p(x_t | x_<t) holds for every order of the elements; which one is a setting
of the model. Orders over a grid follow VQ-GAN (Esser et al. 2021, section D): raster,
column, Hilbert curve, spiral, subsampled (coarse to fine), and any seeded permutation.

An order is a tensor (T,): entry t is the flat (row-major) index of the element generated
at step t. An event (C, H, W) is ordered pixel by pixel, the channels of a pixel together:
R, G, B of one pixel, then those of the next.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from chainrule.pipeline.config import Settings

GRID_KINDS = ("column", "hilbert", "spiral", "spiral-out", "subsampled")


class Ordering(Settings):
    """``ordering: hilbert`` or ``ordering: {kind: permutation, seed: 3}``."""

    kind: Literal[
        "raster", "column", "hilbert", "spiral", "spiral-out", "subsampled", "permutation"
    ] = "raster"
    seed: int = Field(0, ge=0, lt=2**32, description="of the permutation; other kinds have none")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _seed_has_a_reader(self) -> "Ordering":
        if self.seed and self.kind != "permutation":
            raise ValueError(f"a seed ({self.seed}) is for kind 'permutation', not '{self.kind}'")
        return self

    def indices(self, event_shape: tuple[int, ...]) -> Tensor:
        """(T,) long: the flat index of the element generated at each step.

        ValueError where a grid order is asked for of an event without a grid.
        """
        # numpy throughout: a model built on the meta device has real orders too.
        return torch.from_numpy(self._indices(event_shape).astype(np.int64))

    def _indices(self, event_shape: tuple[int, ...]) -> np.ndarray:
        length = math.prod(event_shape)
        if self.kind == "permutation":
            # RandomState's stream is frozen for ever (NEP 19), so that an order drawn from
            # a seed is the same one under any version of numpy or torch.
            return np.random.RandomState(self.seed).permutation(length)
        if len(event_shape) == 1:
            if self.kind in GRID_KINDS:
                raise ValueError(
                    f"ordering '{self.kind}' needs a grid: event_shape is {tuple(event_shape)}, "
                    "give (H, W) or (C, H, W)"
                )
            return np.arange(length)
        height, width = event_shape[-2:]
        channels = length // (height * width)
        pixels = _GRIDS[self.kind](height, width)
        return (np.arange(channels) * (height * width) + pixels[:, None]).ravel()


def inverse(order: Tensor) -> Tensor:
    """The step at which each flat index is generated: inverse(order)[order] = 0..T-1."""
    steps = torch.empty_like(order)
    steps[order] = torch.arange(len(order), device=order.device)
    return steps


def _raster(height: int, width: int) -> np.ndarray:
    return np.arange(height * width)


def _column(height: int, width: int) -> np.ndarray:
    return np.arange(height * width).reshape(height, width).T.ravel()


def _hilbert(height: int, width: int) -> np.ndarray:
    """The curve over the smallest power-of-two square that holds the grid, cells outside it
    left out; neighbours in order are neighbours in the grid where the grid is that square."""
    side = 1
    while side < max(height, width):
        side *= 2
    step = np.arange(side * side)
    x, y = np.zeros_like(step), np.zeros_like(step)
    scale = 1
    rest = step.copy()
    while scale < side:  # Hamilton's d2xy: one quadrant a round, from the finest
        right = 1 & (rest // 2)
        down = 1 & (rest ^ right)
        flip = (down == 0) & (right == 1)
        x, y = np.where(flip, scale - 1 - x, x), np.where(flip, scale - 1 - y, y)
        x, y = np.where(down == 0, y, x), np.where(down == 0, x, y)
        x, y = x + scale * right, y + scale * down
        rest //= 4
        scale *= 2
    inside = (x < width) & (y < height)
    return y[inside] * width + x[inside]


def _spiral(height: int, width: int) -> np.ndarray:
    """From the top left corner clockwise to the middle."""
    grid = np.arange(height * width).reshape(height, width)
    turns = []
    while grid.size:
        turns.append(grid[0])
        grid = np.rot90(grid[1:])
    return np.concatenate(turns)


def _spiral_out(height: int, width: int) -> np.ndarray:
    """The inward spiral backwards: from the middle to the top left corner."""
    return _spiral(height, width)[::-1].copy()


def _subsampled(height: int, width: int) -> np.ndarray:
    """Coarse to fine: each grid is its even rows and columns first, then the three other
    quarters, each in the same way."""

    def quarters(grid: np.ndarray) -> np.ndarray:
        if grid.size <= 1:
            return grid.ravel()
        parts = [grid[row::2, column::2] for row in (0, 1) for column in (0, 1)]
        return np.concatenate([quarters(part) for part in parts])

    return quarters(np.arange(height * width).reshape(height, width))


_GRIDS = {
    "raster": _raster,
    "column": _column,
    "hilbert": _hilbert,
    "spiral": _spiral,
    "spiral-out": _spiral_out,
    "subsampled": _subsampled,
}
