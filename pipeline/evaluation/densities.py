"""Baselines for densities of real vectors: a fitted Gaussian and a kernel density."""

import math

import numpy as np

BANDWIDTHS = np.geomspace(0.02, 1.5, 16)
"""Tried for the kernel density, in deviations of a column."""
MOST_ROWS = 20_000
"""Training rows that the kernel density keeps, at most."""


def gaussian_nats(train: np.ndarray, held_out: np.ndarray) -> float:
    """Nats a row of `held_out` (M, D) under the Gaussian fitted to `train` (N, D)."""
    mean = train.mean(axis=0)
    # a breath of the identity, for columns that others determine
    covariance = np.cov(train, rowvar=False, bias=True).reshape(len(mean), len(mean))
    covariance = covariance + 1e-9 * np.trace(covariance) / len(mean) * np.eye(len(mean))
    factor = np.linalg.cholesky(covariance)
    z = np.linalg.solve(factor, (held_out - mean).T)
    log_determinant = 2 * np.log(np.diag(factor)).sum()
    squares = (z**2).sum(axis=0)
    return float(0.5 * (squares.mean() + log_determinant + len(mean) * math.log(2 * math.pi)))


def independent_gaussian_nats(train: np.ndarray, held_out: np.ndarray) -> float:
    """Nats a row under a Gaussian for each column alone."""
    mean, deviation = train.mean(axis=0), np.maximum(train.std(axis=0), 1e-12)
    z = (held_out - mean) / deviation
    nats = 0.5 * z**2 + np.log(deviation) + 0.5 * math.log(2 * math.pi)
    return float(nats.sum(axis=1).mean())


def kernel_nats(train: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """Nats a row under a Gaussian kernel on each training row, and the kernel's width.

    The width, one for all columns in units of their deviation, is the best of `BANDWIDTHS`
    for the last tenth of the training rows under the others.
    """
    train = train[:MOST_ROWS]
    deviation = np.maximum(train.std(axis=0), 1e-12)
    x, y = train / deviation, held_out / deviation
    cut = max(1, len(x) - max(1, len(x) // 10))
    found = [_kernel(x[:cut], x[cut:], width) for width in BANDWIDTHS]
    width = float(BANDWIDTHS[int(np.argmin(found))])
    return _kernel(x, y, width) + float(np.log(deviation).sum()), width


def _kernel(centres: np.ndarray, points: np.ndarray, width: float) -> float:
    dimensions = centres.shape[1]
    constant = math.log(len(centres)) + dimensions * (math.log(width) + 0.5 * math.log(2 * math.pi))
    norms = (centres**2).sum(axis=1)
    total = 0.0
    for start in range(0, len(points), 256):
        some = points[start : start + 256]
        squares = (some**2).sum(axis=1)[:, None] + norms - 2 * some @ centres.T
        exponents = -0.5 * np.maximum(squares, 0.0) / width**2
        top = exponents.max(axis=1)
        total -= float((top + np.log(np.exp(exponents - top[:, None]).sum(axis=1))).sum())
    return total / len(points) + constant
