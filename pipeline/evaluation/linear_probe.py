"""Linear probes: how much of the class can be read off each layer by a linear classifier.

Chen et al. 2020, "Generative Pretraining from Pixels" (ImageGPT), section 3.3: the features
of a layer, averaged over the positions of the sequence, then logistic regression. Beside it
stand the same regression on the raw pixels and on the same architecture with random weights,
without which a probe's accuracy says little about pretraining.

Features are standardised with the training set's mean and deviation (no information crosses
from the held-out set); the regression is scikit-learn's, with one strength of regularisation
`c` for all of them, or the best of several by a part of the training set that is held back.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from chainrule.pipeline.evaluation.figures import Figures

Features = npt.NDArray[np.float32]
STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Inverse regularisations tried, the best by a fifth of the training set held back."""


class NoFeatures(TypeError):
    """The model offers no features of its layers."""


@torch.no_grad()
def layer_features(model: Any, batches: Iterable[torch.Tensor]) -> list[Features]:
    """Features (N, D) of each layer (the embedding first), averaged over positions.

    `batches` are events (B, *event_shape); the model is asked without a class.
    """
    if not hasattr(model, "features"):
        raise NoFeatures(f"{type(model).__name__} has no features(): a probe needs a Transformer")
    model.eval()
    device = next(model.parameters()).device
    found: list[list[Features]] = []
    for x in batches:
        layers = model.features(x.to(device))
        if not found:
            found = [[] for _ in layers]
        for kept, layer in zip(found, layers, strict=True):
            kept.append(layer.float().mean(dim=1).cpu().numpy())
    return [np.concatenate(kept) for kept in found]


def probe(
    train: Features,
    train_labels: npt.NDArray[np.int64],
    held_out: Features,
    held_out_labels: npt.NDArray[np.int64],
    strengths: Sequence[float] = STRENGTHS,
    iterations: int = 300,
) -> float:
    """Accuracy (0..1) on the held-out set of logistic regression fitted on the training set."""
    from sklearn.linear_model import LogisticRegression

    mean, deviation = train.mean(0), train.std(0)
    deviation = np.where(deviation > 1e-8, deviation, 1)
    x, y = (train - mean) / deviation, (held_out - mean) / deviation

    def fitted(c: float, features: Features, labels: npt.NDArray[np.int64]) -> Any:
        import warnings

        with warnings.catch_warnings():
            # the cap on iterations is deliberate; it acts like a little more regularisation
            warnings.filterwarnings("ignore", message=".*failed to converge", module="sklearn")
            return LogisticRegression(C=c, max_iter=iterations).fit(features, labels)

    best = strengths[0]
    if len(strengths) > 1:
        order = np.random.default_rng(0).permutation(len(x))
        back, kept = order[: len(x) // 5], order[len(x) // 5 :]
        scores = [
            fitted(c, x[kept], train_labels[kept]).score(x[back], train_labels[back])
            for c in strengths
        ]
        best = strengths[int(np.argmax(scores))]
    return float(fitted(best, x, train_labels).score(y, held_out_labels))


@dataclass(frozen=True)
class Probes:
    """Accuracies (0..1) on the held-out set."""

    layers: list[float]
    """Of the model: the embedding, then the output of each block."""
    random_layers: list[float]
    """Of the same architecture with random weights."""
    pixels: float
    """Of the raw pixels, as values 0..1."""


def probe_model(
    model: Any,
    random_model: Any,
    train: tuple[Sequence[torch.Tensor], npt.NDArray[np.uint8], npt.NDArray[np.int64]],
    held_out: tuple[Sequence[torch.Tensor], npt.NDArray[np.uint8], npt.NDArray[np.int64]],
) -> Probes:
    """Probe every layer; each set is (batches of events, raw images (N, H, W, C), labels)."""
    accuracies = []
    for candidate in (model, random_model):
        features = layer_features(candidate, train[0])
        other = layer_features(candidate, held_out[0])
        accuracies.append(
            [probe(a, train[2], b, held_out[2]) for a, b in zip(features, other, strict=True)]
        )

    def flat(images: npt.NDArray[np.uint8]) -> Features:
        return (images.reshape(len(images), -1) / 255).astype(np.float32)

    pixels = probe(flat(train[1]), train[2], flat(held_out[1]), held_out[2])
    return Probes(accuracies[0], accuracies[1], pixels)


def probe_picture(path: Path, probes: Probes, title: str) -> None:
    """Accuracy by layer as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    layers = range(len(probes.layers))
    axes.plot(layers, [100 * a for a in probes.layers], marker="o", label="pretrained")
    axes.plot(layers, [100 * a for a in probes.random_layers], marker="o", label="random weights")
    axes.axhline(100 * probes.pixels, color="gray", linestyle="--", label="raw pixels")
    axes.set_xlabel("layer (0: the embedding)")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title, loc="left", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def put_probes(figures: Figures, probes: Probes, train: int, split: str) -> None:
    """Accuracies as figures; `train` is how many images the regressions were fitted on."""
    how = f"logistic regression fitted on {train} training images"
    best = int(np.argmax(probes.layers))
    where = "features averaged over positions"
    figures.put("probe_accuracy", probes.layers[best], split, f"{how}; layer {best}'s {where}")
    figures.put(
        "probe_accuracy_random",
        max(probes.random_layers),
        split,
        f"{how}; the best layer of the same architecture with random weights",
    )
    figures.put("probe_accuracy_pixels", probes.pixels, split, f"{how}; raw pixels")
    for i, accuracy in enumerate(probes.layers):
        figures.put(f"probe_accuracy.layer.{i}", accuracy, split, f"{how}; layer {i}")
