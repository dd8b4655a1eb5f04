"""What encode then decode keeps of a whole set of images, and how much of the codebook lives.

Usage is the share of codes that occur at all. A small set cannot use a large codebook
whole, so it is also given against what as many draws from a uniform law would reach:
`usage_of_reachable` near 1 is as good as can be seen, near 0 a collapse.

A residual quantizer has a codebook a level, and one that collapsed hides behind another that
lives. Codes are counted a level; the figures of the codebook are those of the worst level
(`worst_level`, from 1), and each level's stand beside them (`codebook_usage_level_2`).

`gradient_energy` is the sharpness of reconstructions: their squared differences between
neighbouring pixels over the originals'; below 1 they are blurred.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from chainrule.tokenizers.interface import Tokenizer
from chainrule.tokenizers.quantizers import distributed, sum_over_ranks

SUMS = (
    "images",
    "squared",
    "values",
    "psnr_sum",
    "exact",
    "edges",
    "edges_back",
    "sum",
    "sum_of_squares",
)
"""What of a `Health` adds up over images, besides the counts of codes."""


def reachable(codes: int, tokens: int) -> float:
    """Expected share of `codes` that `tokens` uniform draws hit: 1 - (1 - 1/K)^N."""
    return 1.0 if codes == 1 else -math.expm1(tokens * math.log1p(-1 / codes))


@dataclass
class Health:
    """Counts of codes and sums of errors over images.

    Token arrays hold `depth` codes a position, side by side along the last axis.
    """

    codebook_size: int
    depth: int = 1
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
        self.counts = np.zeros((self.depth, self.codebook_size), dtype=np.int64)

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
        for level, codes in enumerate(tokens.reshape(-1, self.depth).T):
            self.counts[level] += np.bincount(codes, minlength=self.codebook_size)

    def sum_over_ranks(self) -> None:
        """Take in what the other ranks saw; nothing on a single one."""
        device = "cuda" if distributed() and dist.get_backend() == "nccl" else "cpu"
        sums = [float(getattr(self, name)) for name in SUMS]
        # float64 holds counts and squared errors of bytes exactly: n ranks sum what one sums
        whole = sum_over_ranks(torch.tensor(sums, dtype=torch.float64, device=device))
        for name, value in zip(SUMS, whole.tolist(), strict=True):
            setattr(self, name, type(getattr(self, name))(value))
        self.counts = sum_over_ranks(torch.from_numpy(self.counts).to(device)).cpu().numpy()

    def figures(self) -> dict[str, Any]:
        """Flat, for the card and the log. PSNR: mean over the images that differ at all."""
        mse = self.squared / max(self.values, 1)
        mean = self.sum / max(self.values, 1)
        variance = self.sum_of_squares / max(self.values, 1) - mean**2
        levels = [of_codes(counts) for counts in self.counts]
        worst = worst_level(levels)
        figures: dict[str, Any] = {
            "images": self.images,
            "tokens": int(self.counts.sum()),
            "codebook_size": self.codebook_size,
            **levels[worst],
            "mse": mse,
            "normalised_mse": mse / variance if variance > 0 else 0.0,
        }
        if self.edges > 0:
            figures["gradient_energy"] = self.edges_back / self.edges
        if self.images > self.exact:
            figures["psnr"] = self.psnr_sum / (self.images - self.exact)
        if self.depth > 1:
            figures["worst_level"] = worst + 1
            figures |= of_levels(levels)
        return figures


def of_codes(counts: np.ndarray) -> dict[str, Any]:
    """Figures of one codebook from how often each code occurs."""
    total = int(counts.sum())
    p = counts[counts > 0] / max(total, 1)
    usage = float((counts > 0).mean())
    reached = reachable(len(counts), total)
    return {
        "codebook_usage": usage,
        "codebook_perplexity": float(np.exp(-(p * np.log(p)).sum())),
        "dead_codes": int((counts == 0).sum()),
        "usage_of_reachable": min(1.0, usage / reached) if total else 0.0,
    }


def worst_level(levels: Sequence[dict[str, Any]]) -> int:
    """Which of several codebooks uses fewest codes; of equals, the least evenly used."""
    health = [(level["codebook_usage"], level["codebook_perplexity"]) for level in levels]
    return health.index(min(health))


def of_levels(levels: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of each level, named after it (counted from 1)."""
    return {
        f"{name}_level_{number}": value
        for number, level in enumerate(levels, start=1)
        for name, value in level.items()
    }


def _gradient_energy(image: np.ndarray) -> float:
    """Sum of squared differences between neighbouring pixels."""
    return float((np.diff(image, axis=0) ** 2).sum() + (np.diff(image, axis=1) ** 2).sum())


def measure(tokenizer: Tokenizer, batches: Iterable[Sequence[np.ndarray]]) -> dict[str, Any]:
    """Health of an image tokenizer over batches of uint8 images (H, W, C).

    Where ranks of `torch.distributed` call it each with its own batches, over all of them.
    """
    health = Health(tokenizer.vocabulary["size"], tokenizer.depth)
    for images in batches:
        tokens = tokenizer.encode(images)
        for image, back, codes in zip(images, tokenizer.decode(tokens), tokens, strict=True):
            health.add(image, back, codes)
    health.sum_over_ranks()
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
