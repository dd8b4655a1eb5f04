"""How close reconstructions come: PSNR, SSIM, and how much of a codebook is used.

SSIM is that of Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error
visibility to structural similarity", IEEE TIP 13(4), 2004: Gaussian window of 11 x 11 with
sigma 1.5 (section III-B), K1 = 0.01, K2 = 0.03, C = (K L)**2 with L the range of values; the
mean of the map over the places where the whole window fits, over channels and images. An
image smaller than the window gets the largest odd window that fits, with the same sigma.

Images are uint8 arrays (N, H, W, C) unless said otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

K1, K2 = 0.01, 0.03
WINDOW, SIGMA = 11, 1.5


def psnr(original: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8], peak: float = 255) -> float:
    """Decibels of one pair (or stack) from its mean squared error; infinite if they are equal."""
    error = float(np.mean((original.astype(np.float64) - other.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def ssim(
    original: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8], peak: float = 255
) -> npt.NDArray[np.float64]:
    """Mean structural similarity (N,) of each pair, 1 where they are equal."""
    if original.shape != other.shape or original.ndim != 4:
        raise ValueError(f"images of shapes {original.shape} and {other.shape}; (N, H, W, C) twice")
    x = original.astype(np.float64).transpose(0, 3, 1, 2)
    y = other.astype(np.float64).transpose(0, 3, 1, 2)
    window = gaussian_window(min(WINDOW, *x.shape[2:]))
    mean_x, mean_y = smooth(x, window), smooth(y, window)
    var_x = smooth(x * x, window) - mean_x**2
    var_y = smooth(y * y, window) - mean_y**2
    covariance = smooth(x * y, window) - mean_x * mean_y
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    result: npt.NDArray[np.float64] = (luminance * structure).mean(axis=(1, 2, 3))
    return result


def gaussian_window(size: int) -> npt.NDArray[np.float64]:
    """Weights (k,) of the separable window, summing to 1; k is the largest odd number <= size."""
    k = size if size % 2 else size - 1
    offsets = np.arange(k) - k // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    total: npt.NDArray[np.float64] = weights / weights.sum()
    return total


def smooth(x: npt.NDArray[np.float64], window: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Weighted means of (..., H, W) under the separable window, where it fits whole."""
    view = np.lib.stride_tricks.sliding_window_view(x, len(window), axis=-2) @ window
    out: npt.NDArray[np.float64] = (
        np.lib.stride_tricks.sliding_window_view(view, len(window), axis=-1) @ window
    )
    return out


@dataclass
class Reconstruction:
    """Running sums over pairs of images: errors in float64, SSIM a pair."""

    squared: float = 0.0
    values: int = 0
    ssim_sum: float = 0.0
    psnr_sum: float = 0.0
    pairs: int = 0
    exact: int = 0

    def add(self, originals: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> None:
        for original, other in zip(originals, others, strict=True):
            error = float(np.sum((original.astype(np.float64) - other.astype(np.float64)) ** 2))
            self.squared += error
            self.values += original.size
            self.ssim_sum += float(ssim(original[None], other[None])[0])
            self.pairs += 1
            if error == 0:
                self.exact += 1
            else:
                self.psnr_sum += psnr(original, other)

    @property
    def mse(self) -> float:
        """Mean squared error a value, on the scale 0..255."""
        return self.squared / max(self.values, 1)

    @property
    def psnr(self) -> float:
        """Mean of the pairs' PSNR, over the pairs that are not exact; infinite if all are."""
        inexact = self.pairs - self.exact
        return self.psnr_sum / inexact if inexact else math.inf

    @property
    def ssim(self) -> float:
        return self.ssim_sum / max(self.pairs, 1)


@dataclass
class Usage:
    """Which codes of a vocabulary range [start, stop) data use, and how evenly.

    Of tokens with `depth` codes a position (side by side along the last axis), each level has
    a codebook of its own: one that collapsed must not hide behind another that lives.
    """

    start: int
    stop: int
    depth: int = 1
    counts: npt.NDArray[np.int64] = field(init=False)
    """(depth, stop - start)"""

    def __post_init__(self) -> None:
        self.counts = np.zeros((self.depth, self.stop - self.start), dtype=np.int64)

    def add(self, tokens: npt.NDArray[np.integer]) -> None:
        for level, codes in enumerate(np.asarray(tokens).reshape(-1, self.depth).T):
            codes = codes.astype(np.int64)
            codes = codes[(codes >= self.start) & (codes < self.stop)] - self.start
            self.counts[level] += np.bincount(codes, minlength=self.counts.shape[1])

    @property
    def levels(self) -> list[tuple[float, float]]:
        """`used` and `perplexity` of each level."""
        found = []
        for counts in self.counts:
            p = counts[counts > 0] / max(counts.sum(), 1)
            perplexity = float(np.exp(-(p * np.log(p)).sum()))
            found.append((float((counts > 0).mean()), perplexity))
        return found

    @property
    def used(self) -> float:
        """Part of the codes that occur at all, 0..1; of several levels, that of the worst."""
        return min(self.levels)[0]

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the codes' frequencies: how many are used in effect.

        Of several levels that of the worst: the one with fewest codes used.
        """
        return min(self.levels)[1]
