"""The probe reads what is linearly there, and nothing from the held-out set."""

import numpy as np
import pytest
import torch

from chainrule.pipeline.evaluation.linear_probe import (
    NoFeatures,
    layer_features,
    probe,
    probe_model,
    probe_picture,
)
from chainrule.pipeline.models.registry import build


def clouds(n: int, seed: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    centres = np.array([[0, 0, 5], [4, 0, 5], [0, 4, 5]])  # the last value says nothing
    x = centres[labels] + noise * rng.normal(size=(n, 3))
    x[:, 2] = 5
    return (1000 * x).astype(np.float32), labels  # of a scale that needs standardising


def test_accuracy_is_that_of_the_problem():
    train, held_out = clouds(400, 0, 0.5), clouds(300, 1, 0.5)
    assert probe(*train, *held_out) > 0.98
    hard = probe(*clouds(400, 0, 8.0), *clouds(300, 1, 8.0))
    assert 0.2 < hard < 0.7
    shuffled = np.random.default_rng(0).permutation(train[1])
    assert probe(train[0], shuffled, *held_out) < 0.6


def test_features_are_means_over_positions_in_order():
    model = build("imagegpt-debug", seed=0, vocabulary_size=8, event_shape=(4, 4), context=16)
    x = torch.randint(0, 8, (5, 4, 4), generator=torch.Generator().manual_seed(0))
    found = layer_features(model, x.split(2))
    assert len(found) == model.config.layers + 1
    with torch.no_grad():
        expected = [layer.mean(1).numpy() for layer in model.eval().features(x)]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(NoFeatures, match="MADE"):
        layer_features(build("made-debug", seed=0), [x])


def test_pixels_and_a_random_model_stand_beside(tmp_path):
    """Bright against dark: raw pixels tell them apart, so the probe of pixels must."""
    rng = np.random.default_rng(0)

    def images(n):
        labels = rng.integers(0, 2, n)
        pixels = (labels[:, None, None, None] * 120 + rng.integers(0, 100, (n, 4, 4, 1))).astype(
            np.uint8
        )
        codes = torch.from_numpy(pixels[..., 0].astype(np.int64) // 32)
        return codes.split(16), pixels, labels

    model = build("imagegpt-debug", seed=0, vocabulary_size=8, event_shape=(4, 4), context=16)
    other = build("imagegpt-debug", seed=1, vocabulary_size=8, event_shape=(4, 4), context=16)
    found = probe_model(model, other, images(80), images(60))
    assert found.pixels > 0.95
    assert len(found.layers) == len(found.random_layers) == model.config.layers + 1
    assert min(found.layers) > 0.8  # the embedding alone says how bright
    probe_picture(tmp_path / "probe.png", found, "bright or dark")
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")
