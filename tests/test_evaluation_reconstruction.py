"""PSNR and SSIM against their definitions, written out; codebook usage; classifier; codecs."""

import bz2
import lzma
import math

import numpy as np
import pytest

from chainrule.pipeline.evaluation import codecs
from chainrule.pipeline.evaluation.agreement import classifier_agreement
from chainrule.pipeline.evaluation.reconstruction import Reconstruction, Usage, psnr, ssim


def reference_ssim(x: np.ndarray, y: np.ndarray, size: int) -> float:
    """Wang et al. 2004, equations 13-16, one window at a time, one channel."""
    r = size // 2
    g = np.array([[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-r, r + 1)]
                  for i in range(-r, r + 1)])  # fmt: skip
    g /= g.sum()
    x, y = x.astype(float), y.astype(float)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for i in range(r, x.shape[0] - r):
        for j in range(r, x.shape[1] - r):
            a = x[i - r : i + r + 1, j - r : j + r + 1]
            b = y[i - r : i + r + 1, j - r : j + r + 1]
            mu_a, mu_b = (g * a).sum(), (g * b).sum()
            var_a, var_b = (g * (a - mu_a) ** 2).sum(), (g * (b - mu_b) ** 2).sum()
            cov = (g * (a - mu_a) * (b - mu_b)).sum()
            values.append(
                (2 * mu_a * mu_b + c1) * (2 * cov + c2)
                / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
            )  # fmt: skip
    return float(np.mean(values))


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (3, 24, 17, 3), dtype=np.uint8)
    noise = rng.normal(0, 30, x.shape)
    return x, np.clip(x + noise, 0, 255).astype(np.uint8)


def test_ssim_is_the_papers(pair):
    x, y = pair
    expected = [
        np.mean([reference_ssim(a[:, :, c], b[:, :, c], 11) for c in range(3)])
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(ssim(x, y), expected, rtol=1e-9)
    np.testing.assert_allclose(ssim(x, x), 1.0)
    np.testing.assert_allclose(ssim(x, y), ssim(y, x))


def test_ssim_of_a_small_image_uses_the_largest_odd_window():
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    y = rng.integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    assert ssim(x, y)[0] == pytest.approx(reference_ssim(x[0, :, :, 0], y[0, :, :, 0], 7))
    with pytest.raises(ValueError, match="shapes"):
        ssim(x, y[:, :4])


def test_psnr_and_sums(pair):
    x, y = pair
    expected = [
        10 * math.log10(255**2 / np.mean((a.astype(float) - b) ** 2))
        for a, b in zip(x, y, strict=True)
    ]
    pairs = Reconstruction()
    pairs.add(list(x[:1]), list(y[:1]))
    pairs.add(list(x[1:]), list(y[1:]))
    assert pairs.psnr == pytest.approx(np.mean(expected))
    assert pairs.ssim == pytest.approx(ssim(x, y).mean())
    assert pairs.mse == pytest.approx(np.mean((x.astype(float) - y) ** 2))
    assert psnr(x, x) == math.inf
    pairs.add([x[0]], [x[0]])
    assert (pairs.exact, pairs.pairs) == (1, 4)
    assert pairs.psnr == pytest.approx(np.mean(expected))  # an exact pair has no PSNR


def test_usage_counts_codes_of_its_range():
    usage = Usage(10, 14)
    usage.add(np.array([[10, 11], [11, 10]], dtype=np.uint8))
    usage.add(np.array([3, 99]))  # other ranges: not codes
    assert usage.used == 0.5
    assert usage.perplexity == pytest.approx(2.0)


def test_usage_is_that_of_the_worst_level():
    usage = Usage(10, 14, depth=2)
    usage.add(np.array([[10, 12, 11, 12], [12, 12, 13, 12]]))
    assert usage.levels == [(1.0, pytest.approx(4.0)), (0.25, pytest.approx(1.0))]
    assert usage.used == 0.25
    assert usage.perplexity == pytest.approx(1.0)


def test_codecs_alone_and_joined():
    documents = [b"the same sentence over and over. " * 30] * 8 + [b"", b"x"]
    baseline = codecs.Baseline()
    for document in documents:
        baseline.add(document)
    sizes = baseline.finish()
    joined = b"".join(documents)
    assert baseline.bytes == len(joined)
    assert sizes["joined"]["bzip2"] == len(bz2.compress(joined, 9))
    assert sizes["joined"]["xz"] == len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME))
    assert sizes["alone"]["xz"] == sum(
        len(lzma.compress(d, preset=9 | lzma.PRESET_EXTREME)) for d in documents
    )
    for name in ("gzip", "bzip2", "xz", "zstd"):
        assert sizes["joined"][name] < sizes["alone"][name]


def test_a_classifier_agrees_with_real_digits_and_not_with_noise():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    train, held, asked = slice(0, 1000), slice(1000, 1400), slice(1400, 1797)
    good = classifier_agreement(
        images[train], labels[train], images[held], labels[held], images[asked], labels[asked]
    )
    assert good.accuracy > 0.93
    assert good.agreement > 0.9
    assert sum(of for _, of in good.by_class.values()) == 397
    noise = np.random.default_rng(0).integers(0, 256, images[asked].shape, dtype=np.uint8)
    bad = classifier_agreement(
        images[train], labels[train], images[held], labels[held], noise, labels[asked]
    )
    assert bad.agreement < 0.3
    with pytest.raises(ValueError, match="against real images"):
        classifier_agreement(
            images[train], labels[train], images[held], labels[held], noise[:, :4], labels[asked]
        )
