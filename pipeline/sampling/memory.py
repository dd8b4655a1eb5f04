"""Did the model only memorise? Nearest training pictures, and text copied word for word.

A distance says little by itself. It is held against the distances of validation pictures, which
the model cannot have copied: samples that are much nearer to the training set than real
pictures are to it are copies.

Legend: N samples, M training pictures, D numbers a picture.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

RUNS = (16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Lengths, in characters, at which a text is looked for in the training texts."""
_BASE = np.uint64(1_000_003)


@dataclass
class Neighbours:
    index: np.ndarray
    """(N, k) which training pictures, the nearest first."""
    distance: np.ndarray
    """(N, k) root mean square difference, in grey levels (0 to 255)."""


def nearest(
    samples: np.ndarray, training: np.ndarray | Iterable[np.ndarray], k: int = 3
) -> Neighbours:
    """The k nearest training pictures to each of `samples` (N, ...) uint8, exactly.

    `training` is (M, ...) uint8, or parts of it one after another, counted on: they need not
    be in memory together.
    """
    if isinstance(training, np.ndarray):
        training = [training[start : start + 4096] for start in range(0, len(training), 4096)]
    a = torch.from_numpy(samples.reshape(len(samples), -1)).float()
    best = torch.zeros(len(a), 0)
    index = torch.zeros(len(a), 0, dtype=torch.long)
    start = 0
    for part in training:
        b = torch.from_numpy(part.reshape(len(part), -1)).float()
        squared = (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)
        both = torch.cat([best, squared], dim=1)
        where = torch.cat([index, (start + torch.arange(len(b))).expand(len(a), -1)], dim=1)
        best, order = both.topk(min(k, both.shape[1]), dim=1, largest=False)
        index = where.gather(1, order)
        start += len(b)
    return Neighbours(index.numpy(), (best / a.shape[1]).sqrt().numpy())


@dataclass
class Copied:
    longest: int
    """The longest of RUNS at which a part of the text stands in the training texts; 0: none."""
    spans: list[tuple[int, int]]
    """Characters [start, stop) that belong to such parts, of the shortest run or longer."""


def copied(texts: Sequence[str], training: Sequence[str]) -> list[Copied]:
    """What each text has verbatim in common with the training texts, in runs of RUNS characters.

    Windows are compared by a 64-bit polynomial hash: a chance match has odds of 1 in 1e11 even
    over millions of windows.
    """
    corpus = _codes("\x00".join(training))
    found = [Copied(0, []) for _ in texts]
    covered = [np.zeros(len(text), dtype=bool) for text in texts]
    hashes = [_codes(text) for text in texts]
    sums = _prefix_sums(corpus)
    mine = [_prefix_sums(codes) for codes in hashes]
    for run in RUNS:
        windows = [_windows(s, run) for s in mine]
        wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *windows]))
        if not len(wanted) or len(corpus) < run:
            break
        there = _which_occur(wanted, _windows(sums, run))
        any_hit = False
        for row, own in enumerate(windows):
            hits = np.flatnonzero(there[np.searchsorted(wanted, own)])
            if len(hits):
                any_hit = True
                found[row].longest = run
                if run == RUNS[0]:
                    for at in hits:
                        covered[row][at : at + run] = True
        if not any_hit:
            break
    for row, mask in enumerate(covered):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
        found[row].spans = [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
    return found


def _codes(text: str) -> np.ndarray:
    """Characters as numbers, spread over 64 bits."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return (points.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def _prefix_sums(codes: np.ndarray) -> np.ndarray:
    """sum over i < n of code_i * base^i, modulo 2^64, for each n."""
    powers = np.full(len(codes), _BASE, dtype=np.uint64)
    if len(powers):
        powers[0] = 1
    terms = codes * np.multiply.accumulate(powers)
    return np.concatenate([np.zeros(1, np.uint64), np.add.accumulate(terms)])


def _windows(sums: np.ndarray, run: int) -> np.ndarray:
    """The hash of every window of `run` characters, independent of where it stands."""
    count = len(sums) - run
    if count <= 0:
        return np.zeros(0, np.uint64)
    # The base is odd, so it has an inverse modulo 2^64 that undoes the window's position.
    inverse = np.full(count, np.uint64(pow(int(_BASE), -1, 2**64)), dtype=np.uint64)
    inverse[0] = 1
    return (sums[run:] - sums[:-run]) * np.multiply.accumulate(inverse)


def _which_occur(wanted: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """For sorted `wanted`, which of them are among `windows`."""
    at = np.searchsorted(wanted, windows).clip(max=len(wanted) - 1)
    there = np.zeros(len(wanted), dtype=bool)
    there[at[wanted[at] == windows]] = True
    return there
