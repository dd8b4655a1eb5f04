"""Fréchet distance of features: how far reconstructions are from originals as a set (rFID).

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", section 3: the distance of
Gaussians fitted to the features of two sets, on the pooling layer of the Inception network of
2015. The network is that of the `torch-fidelity` package, its weights a file by path.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chainrule.pipeline.config import RequestError

Features = Callable[[Sequence[np.ndarray]], np.ndarray]
"""uint8 images (H, W, C) to features (N, F)."""


class Moments:
    """Mean and covariance of features, gathered batch by batch in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: np.ndarray = np.zeros(0)
        self._products: np.ndarray = np.zeros((0, 0))

    def add(self, features: np.ndarray) -> None:
        x = features.astype(np.float64)
        if self.count == 0:
            self._sum = np.zeros(x.shape[1])
            self._products = np.zeros((x.shape[1], x.shape[1]))
        self.count += len(x)
        self._sum += x.sum(axis=0)
        self._products += x.T @ x

    @property
    def mean(self) -> np.ndarray:
        return self._sum / self.count

    @property
    def covariance(self) -> np.ndarray:
        """With N - 1 below, as the published code has it."""
        products = self._products - self.count * np.outer(self.mean, self.mean)
        return products / max(self.count - 1, 1)


def distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½)."""
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    inner = np.linalg.eigvalsh(root @ b.covariance @ root)
    crossed = np.sqrt(np.maximum(inner, 0)).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(((a.mean - b.mean) ** 2).sum() + traces - 2 * crossed)


def inception(weights: Path, device: str) -> Features:
    """Features (N, 2048) of torch-fidelity's InceptionV3 with the weights of a file.

    The file is a safetensors one: `save_file(torch.load(pth, weights_only=True), path)` makes it
    of the package's .pth. RequestError where package or file is missing, or another network's.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise RequestError(
            f"inception: needs the package torch-fidelity ({error}); pip install torch-fidelity"
        ) from None
    state = _state(weights)
    with tempfile.TemporaryDirectory() as folder:
        # The package reads its file with pickle: it is given one that was written here.
        path = Path(folder) / "inception.pth"
        torch.save(state, path)
        try:
            network: Any = FeatureExtractorInceptionV3(
                "inception", ["2048"], feature_extractor_weights_path=str(path)
            )
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise RequestError(f"inception: {weights}: other weights ({first})") from None
    network = network.to(device).eval()

    def features(images: Sequence[np.ndarray]) -> np.ndarray:
        found = []
        with torch.inference_mode():
            for image in images:
                x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
                (row,) = network(x.expand(3, -1, -1)[None].to(device))
                found.append(row[0].float().cpu().numpy())
        return np.stack(found)

    return features


def _state(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        first = (str(error).splitlines() or ["empty"])[0]
        raise RequestError(f"inception: {path}: no safetensors of InceptionV3 ({first})") from None
