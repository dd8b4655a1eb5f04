"""Densities with a mixture-of-Gaussians head on real values: patches of a photograph, as in
RNADE (Uria et al. 2013, section 5.2), against a fitted Gaussian and a kernel density."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chainrule.pipeline.models.registry import build

MOG = {"kind": "mixture-of-gaussians", "components": 10}
MODELS: dict[str, tuple[float, dict[str, Any]]] = {
    "made": (
        1e-2,
        {
            "family": "made",
            "event_shape": [16],
            "vocabulary_size": None,
            "head": MOG,
            "hidden": [100, 100],
        },
    ),
    "transformer": (
        3e-3,
        {
            "preset": "gpt2-debug",
            "vocabulary_size": None,
            "context": 16,
            "layers": 2,
            "width": 32,
            "heads": 2,
            "mlp_width": 64,
            "tied_embeddings": False,
            "head": MOG,
        },
    ),
}


@pytest.fixture(scope="module")
def patches() -> tuple[Tensor, Tensor]:
    """Standardised 4 x 4 grey patches of the left and of the right part of china.jpg, with
    uniform noise of one level, so that values are continuous."""
    from sklearn.datasets import load_sample_image

    random = np.random.RandomState(0)
    picture = load_sample_image("china.jpg").astype(np.float64).mean(axis=2)
    picture = (picture + random.rand(*picture.shape)) / 256
    windows = np.lib.stride_tricks.sliding_window_view(picture, (4, 4))
    left, right = windows[:, :400].reshape(-1, 16), windows[:, 404:].reshape(-1, 16)
    train = left[random.permutation(len(left))[:20_000]]
    test = right[random.permutation(len(right))[:2_000]]
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    return tuple(torch.from_numpy((x - mean) / deviation).float() for x in (train, test))


@pytest.fixture(scope="module")
def baselines(patches: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Nats a test patch; the kernel's width is the best of several on the test set itself."""
    from sklearn.neighbors import KernelDensity

    train, test = patches
    gaussian = torch.distributions.MultivariateNormal(train.mean(0), torch.cov(train.T))
    some = test[:300].numpy()
    kernels = [
        KernelDensity(bandwidth=width).fit(train[:5000].numpy()).score(some) / len(some)
        for width in (0.1, 0.2, 0.3, 0.4)
    ]
    return {"gaussian": gaussian.log_prob(test).mean().item(), "kernel density": max(kernels)}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_autoregressive_mixtures_beat_a_gaussian_and_a_kernel_density(
    name: str, patches: tuple[Tensor, Tensor], baselines: dict[str, float]
) -> None:
    train, test = patches
    rate, spec = MODELS[name]
    model = build(spec, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    steps = 300
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        batch = train[torch.randint(len(train), (200,), generator=generator)]
        loss = -model.log_prob(batch).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    with torch.no_grad():
        nats = model.eval().log_prob(test).sum(dim=1).mean().item()
    print(f"\n{name}: {nats:.2f} nats a patch; {baselines}")
    assert nats > max(baselines.values()) + 2
