"""The Fréchet distance of features, and the files of weights that it and LPIPS take."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from chainrule.pipeline.config import RequestError
from chainrule.pipeline.evaluation.figures import Figures
from chainrule.pipeline.evaluation.frechet import Moments, distance, inception
from chainrule.pipeline.evaluation.round_trip import measure_images
from chainrule.tokenizers.pixels import PixelSettings, PixelTokenizer


def moments(features: np.ndarray) -> Moments:
    found = Moments()
    for start in range(0, len(features), 37):
        found.add(features[start : start + 37])
    return found


def test_the_distance_of_gaussians_that_are_known() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20000, 3))
    assert distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-9)
    assert distance(moments(x), moments(x + 2)) == pytest.approx(12, rel=1e-9)
    # along one axis: (s - 1)^2 for a deviation of s instead of 1
    wide = x * np.array([3.0, 1.0, 1.0])
    assert distance(moments(x), moments(wide)) == pytest.approx(4 * x[:, 0].var(ddof=1), rel=1e-2)
    turned = x @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert distance(moments(x), moments(turned)) < 1e-2


def test_moments_are_those_of_all_at_once() -> None:
    x = np.random.default_rng(1).normal(size=(500, 4)) + 7
    found = moments(x)
    np.testing.assert_allclose(found.mean, x.mean(axis=0))
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)


def test_both_are_among_the_figures_of_a_tokenizer(tmp_path: Path) -> None:
    images = [
        np.random.default_rng(i).integers(0, 256, (8, 8, 3)).astype(np.uint8) for i in range(20)
    ]
    figures = {}
    for levels in (256, 4):
        found = Figures()
        measure_images(
            PixelTokenizer(PixelSettings(levels=levels)),
            [images[:10], images[10:]],
            "validation",
            found,
            tmp_path / "sheet.png",
            lambda a, b: sum(
                float(np.abs(x.astype(float) - y).mean()) for x, y in zip(a, b, strict=True)
            ),
            lambda some: np.stack([image.reshape(-1)[:5] for image in some]),
        )
        found.write(tmp_path)
        figures[levels] = json.loads((tmp_path / "evaluation.json").read_text())
    assert figures[256]["lpips"] == 0
    assert figures[256]["rfid"] == pytest.approx(0, abs=1e-6)
    assert figures[4]["lpips"] > 5
    assert figures[4]["rfid"] > 5
    assert math.isfinite(figures[4]["rfid"])


def test_weights_that_are_none_are_named(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    with pytest.raises(RequestError, match="no safetensors of InceptionV3"):
        inception(tmp_path / "missing.safetensors", "cpu")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RequestError, match="other weights"):
        inception(tmp_path / "other.safetensors", "cpu")


def test_without_the_package_the_remedy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(RequestError, match="pip install torch-fidelity"):
        inception(tmp_path / "weights.safetensors", "cpu")
