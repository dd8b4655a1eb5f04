"""Learned image tokenizers: any downsampling and resolution, save, load, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from chainrule.tokenizers import interface
from chainrule.tokenizers.health import Health, measure, reachable, sheet
from chainrule.tokenizers.interface import TokenizerError
from chainrule.tokenizers.quantizers import FSQ, LFQ, Cosine, Residual
from chainrule.tokenizers.vqvae import VQVAESettings, VQVAETokenizer

SMALL = {"hidden": 8, "dim": 6, "residual_layers": 1, "residual_width": 4, "codebook_size": 64}


def tokenizer_of(channels: int = 3, side: int = 32, **settings: object) -> VQVAETokenizer:
    torch.manual_seed(0)
    return VQVAETokenizer(VQVAESettings(**{**SMALL, **settings}), channels, (side, side))


def images(n: int, h: int, w: int, c: int = 3) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return list(generator.integers(0, 256, (n, h, w, c), dtype=np.uint8))


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_factor_and_resolution(factor: int, channels: int) -> None:
    tokenizer = tokenizer_of(channels, downsampling=factor)
    for h, w in [(16, 16), (32, 48)]:
        tokens = tokenizer.encode(images(3, h, w, channels))
        assert [t.shape for t in tokens] == [(h // factor, w // factor)] * 3
        assert tokens[0].dtype == np.uint8
        back = tokenizer.decode(tokens)
        assert [b.shape for b in back] == [(h, w, channels)] * 3
        assert back[0].dtype == np.uint8


def test_a_batch_of_mixed_sizes_gives_what_each_gives_alone() -> None:
    tokenizer = tokenizer_of(downsampling=4)
    mixed = [images(1, 16, 32)[0], images(1, 32, 32)[0], images(2, 16, 32)[1]]
    together = tokenizer.encode(mixed)
    for image, tokens in zip(mixed, together, strict=True):
        assert np.array_equal(tokenizer.encode([image])[0], tokens)
    for tokens, back in zip(together, tokenizer.decode(together), strict=True):
        alone = tokenizer.decode([tokens])[0].astype(int)
        assert np.abs(alone - back).max() <= 1  # a rounding of the last float bit


def test_residual_codes_lie_side_by_side_in_the_grid() -> None:
    tokenizer = tokenizer_of(downsampling=4, quantizer=Residual(depth=3))
    [tokens] = tokenizer.encode(images(1, 16, 32))
    assert tokens.shape == (4, 8 * 3)
    assert tokenizer.token_grid(16, 32) == (4, 24)
    assert tokenizer.decode([tokens])[0].shape == (16, 32, 3)
    with pytest.raises(TokenizerError, match="w\\*3"):
        tokenizer.decode([tokens[:, :4]])


@pytest.mark.parametrize("quantizer", [None, Cosine(dim=4), FSQ(), LFQ(), Residual(depth=2)])
def test_saved_and_loaded_it_is_the_same(quantizer: object, tmp_path: Path) -> None:
    settings = {} if quantizer is None else {"quantizer": quantizer}
    tokenizer = tokenizer_of(downsampling=8, **settings)
    tokenizer.facts["health"] = {"codebook_usage": 0.5}
    tokenizer.save(tmp_path)
    again = interface.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.card() == tokenizer.card()
    batch = images(2, 32, 32)
    tokens = tokenizer.encode(batch)
    for one, other in zip(tokens, again.encode(batch), strict=True):
        assert np.array_equal(one, other)
    for one, other in zip(tokenizer.decode(tokens), again.decode(tokens), strict=True):
        assert np.array_equal(one, other)


def test_altered_folders_are_refused_by_fingerprint(tmp_path: Path) -> None:
    tokenizer_of().save(tmp_path)
    weights, card = tmp_path / "weights.safetensors", tmp_path / "card.json"
    good, good_card = weights.read_bytes(), card.read_text()

    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(TokenizerError, match="altered: card.json states fingerprint"):
        interface.load(tmp_path)
    weights.write_bytes(good[:-100])
    with pytest.raises(TokenizerError, match="altered or cut"):
        interface.load(tmp_path)
    weights.unlink()
    with pytest.raises(TokenizerError, match="no weights.safetensors"):
        interface.load(tmp_path)
    weights.write_bytes(good)

    changed = json.loads(good_card)
    changed["resolution"] = [8, 8]
    card.write_text(json.dumps(changed))
    with pytest.raises(TokenizerError, match="altered: it is not what card_sha256"):
        interface.load(tmp_path)
    changed = json.loads(good_card)
    del changed["card_sha256"]  # as cards were before: the fingerprint alone speaks
    changed["settings"]["quantizer"]["commitment"] = 0.5
    card.write_text(json.dumps(changed))
    with pytest.raises(TokenizerError, match="altered"):
        interface.load(tmp_path)
    changed["settings"]["hidden"] = 16
    card.write_text(json.dumps(changed))
    with pytest.raises(TokenizerError, match="size mismatch|RuntimeError"):
        interface.load(tmp_path)
    card.write_text("{")
    with pytest.raises(TokenizerError, match="not JSON"):
        interface.load(tmp_path)
    card.write_text('{"kind": "vqvaes"}')
    with pytest.raises(TokenizerError, match="unknown kind 'vqvaes'"):
        interface.load(tmp_path)
    card.unlink()
    with pytest.raises(TokenizerError, match=r"no card\.json"):
        interface.load(tmp_path)


def test_what_does_not_fit_is_refused_with_the_remedy() -> None:
    tokenizer = tokenizer_of(downsampling=4)
    with pytest.raises(TokenizerError, match=r"30x32: not divisible by the downsampling 4"):
        tokenizer.encode(images(1, 30, 32))
    with pytest.raises(TokenizerError, match=r"takes uint8 \(H, W, 3\)"):
        tokenizer.encode(images(1, 32, 32, 1))
    with pytest.raises(TokenizerError, match="float64"):
        tokenizer.encode([np.zeros((32, 32, 3))])
    with pytest.raises(TokenizerError, match=r"token 64 lies outside the vocabulary \[0, 64\)"):
        tokenizer.decode([np.full((2, 2), 64)])
    with pytest.raises(TokenizerError, match="not integers"):
        tokenizer.decode([np.zeros((2, 2))])
    with pytest.raises(ValidationError, match="downsampling 6 is not a power of two"):
        VQVAESettings(downsampling=6)


def test_health_counts_codes_and_errors() -> None:
    health = Health(8)
    image = np.full((2, 2, 1), 100, np.uint8)
    health.add(image, image + 10, np.array([[0, 1], [1, 1]]))
    health.add(image + 50, image + 50, np.array([[0, 0], [0, 1]]))
    figures = health.figures()
    assert figures["codebook_usage"] == 2 / 8
    assert figures["dead_codes"] == 6
    assert figures["codebook_perplexity"] == pytest.approx(2.0)
    assert figures["mse"] == pytest.approx(50.0)
    assert figures["normalised_mse"] == pytest.approx(50 / 625)
    assert figures["psnr"] == pytest.approx(10 * np.log10(255**2 / 100))
    assert figures["usage_of_reachable"] == pytest.approx(0.25 / reachable(8, 8))


def test_a_collapsed_level_does_not_hide_behind_a_live_one() -> None:
    health = Health(16, depth=2)
    image = np.full((2, 2, 1), 100, np.uint8)
    for first in range(16):  # level 1 uses every code, level 2 code 3 alone
        health.add(image, image, np.array([[first, 3], [first, 3]]))
    figures = health.figures()
    assert figures["tokens"] == 64
    assert figures["worst_level"] == 2
    assert figures["codebook_usage"] == figures["codebook_usage_level_2"] == 1 / 16
    assert figures["codebook_perplexity"] == pytest.approx(1.0)
    assert figures["dead_codes"] == 15
    assert figures["usage_of_reachable"] == pytest.approx(1 / 16 / reachable(16, 32))
    assert figures["codebook_usage_level_1"] == 1.0
    assert figures["codebook_perplexity_level_1"] == pytest.approx(16.0)
    assert figures["usage_of_reachable_level_1"] == 1.0


def test_measure_knows_the_levels_of_a_residual_tokenizer() -> None:
    tokenizer = tokenizer_of(downsampling=4, quantizer={"kind": "residual", "depth": 3})
    batch = images(4, 16, 16)
    figures = measure(tokenizer, [batch])
    tokens = np.stack(tokenizer.encode(batch)).reshape(-1, 3)
    for level in range(3):
        used = len(np.unique(tokens[:, level])) / 64
        assert figures[f"codebook_usage_level_{level + 1}"] == used


def test_reachable_is_the_share_that_uniform_draws_hit() -> None:
    draws = np.random.default_rng(0).integers(0, 100, (2000, 50))
    seen = np.mean([len(np.unique(row)) / 100 for row in draws])
    assert reachable(100, 50) == pytest.approx(seen, abs=0.01)
    assert reachable(1, 1) == 1.0


def test_gradient_energy_falls_with_blur() -> None:
    [image] = images(1, 16, 16, 1)
    blurred = ((image.astype(int) + np.roll(image, 1, 1)) // 2).astype(np.uint8)
    energies = []
    for back in (image, blurred):
        health = Health(4)
        health.add(image, back, np.zeros((2, 2), np.uint8))
        energies.append(health.figures()["gradient_energy"])
    assert energies[0] == 1.0
    assert energies[1] < 0.8


def test_measure_agrees_with_what_encode_and_decode_give() -> None:
    tokenizer = tokenizer_of(downsampling=4)
    batch = images(4, 16, 16)
    figures = measure(tokenizer, [batch[:3], batch[3:]])
    tokens = tokenizer.encode(batch)
    assert figures["tokens"] == 64
    assert figures["codebook_usage"] == len(np.unique(tokens)) / 64


def test_a_sheet_shows_originals_reconstructions_and_error() -> None:
    x, y = images(3, 8, 8, 1), images(3, 8, 8, 1)[::-1]
    picture = sheet(x, y)
    assert picture.shape == (3 * (64 + 2), 3 * (64 + 2), 1)
    assert np.array_equal(picture[:64:8, :64:8], x[0])
    assert np.array_equal(picture[66:130:8, :64:8], y[0])
    error = np.minimum(4 * np.abs(x[0].astype(int) - y[0]), 255)
    assert np.array_equal(picture[132:196:8, :64:8], error)
