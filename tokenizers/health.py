"""What encode then decode keeps of a whole set of images, and how much of the codebook lives.

Usage is the share of codes that occur at all. A small set cannot use a large codebook
whole, so it is also given against what as many draws from a uniform law would reach:
`usage_of_reachable` near 1 is as good as can be seen, near 0 a collapse.

`gradient_energy` is the sharpness of reconstructions: their squared differences between
neighbouring pixels over the originals'; below 1 they are blurred.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chainrule.tokenizers.interface import Tokenizer


def reachable(codes: int, tokens: int) -> float:
    """Expected share of `codes` that `tokens` uniform draws hit: 1 - (1 - 1/K)^N."""
    return 1.0 if codes == 1 else -math.expm1(tokens * math.log1p(-1 / codes))


@dataclass
class Health:
    """Counts of codes and sums of errors over images."""

    codebook_size: int
    counts: np.ndarray = field(init=False)
    images: int = 0
    squared: float = 0.0
    values: int = 0
    psnr_sum: float = 0.0
    exact: int = 0
    edges: float = 0.0
    edges_back: float = 0.0
    sum: float = 0.0
    sum_of_squares: float = 0.0

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.codebook_size, dtype=np.int64)

    def add(self, image: np.ndarray, back: np.ndarray, tokens: np.ndarray) -> None:
        """One uint8 image, its reconstruction and its tokens."""
        x = image.astype(np.float64)
        squared = float(((x - back) ** 2).sum())
        self.squared += squared
        if squared == 0:
            self.exact += 1
        else:
            self.psnr_sum += 10 * math.log10(255**2 * x.size / squared)
        self.edges += _gradient_energy(x)
        self.edges_back += _gradient_energy(back.astype(np.float64))
        self.values += x.size
        self.sum += float(x.sum())
        self.sum_of_squares += float((x**2).sum())
        self.images += 1
        self.counts += np.bincount(tokens.reshape(-1), minlength=self.codebook_size)

    def figures(self) -> dict[str, Any]:
        """Flat, for the card and the log. PSNR: mean over the images that differ at all."""
        total = int(self.counts.sum())
        p = self.counts[self.counts > 0] / max(total, 1)
        mse = self.squared / max(self.values, 1)
        mean = self.sum / max(self.values, 1)
        variance = self.sum_of_squares / max(self.values, 1) - mean**2
        usage = float((self.counts > 0).mean())
        figures: dict[str, Any] = {
            "images": self.images,
            "tokens": total,
            "codebook_size": self.codebook_size,
            "codebook_usage": usage,
            "codebook_perplexity": float(np.exp(-(p * np.log(p)).sum())),
            "dead_codes": int((self.counts == 0).sum()),
            "usage_of_reachable": min(1.0, usage / reachable(self.codebook_size, total)),
            "mse": mse,
            "normalised_mse": mse / variance if variance > 0 else 0.0,
        }
        if self.edges > 0:
            figures["gradient_energy"] = self.edges_back / self.edges
        if self.images > self.exact:
            figures["psnr"] = self.psnr_sum / (self.images - self.exact)
        return figures


def _gradient_energy(image: np.ndarray) -> float:
    """Sum of squared differences between neighbouring pixels."""
    return float((np.diff(image, axis=0) ** 2).sum() + (np.diff(image, axis=1) ** 2).sum())


def measure(tokenizer: Tokenizer, batches: Iterable[Sequence[np.ndarray]]) -> dict[str, Any]:
    """Health of an image tokenizer over batches of uint8 images (H, W, C)."""
    health = Health(tokenizer.vocabulary["size"])
    for images in batches:
        tokens = tokenizer.encode(images)
        for image, back, codes in zip(images, tokenizer.decode(tokens), tokens, strict=True):
            health.add(image, back, codes)
    return health.figures()


def sheet(originals: Sequence[np.ndarray], backs: Sequence[np.ndarray]) -> np.ndarray:
    """Originals over reconstructions over the absolute error (times 4), uint8 (H, W, C).

    Small images are shown enlarged; all must be of one shape.
    """
    x = np.stack([*originals]).astype(np.int32)
    y = np.stack([*backs]).astype(np.int32)
    error = np.minimum(4 * np.abs(x - y), 255)
    scale = max(1, 64 // x.shape[1])
    bands = []
    for images in (x, y, error):
        images = images.astype(np.uint8).repeat(scale, axis=1).repeat(scale, axis=2)
        # a white line between neighbours: digits on black run together without it
        framed = np.pad(images, ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=255)
        bands.append(np.concatenate(list(framed), axis=1))
    return np.concatenate(bands, axis=0)
