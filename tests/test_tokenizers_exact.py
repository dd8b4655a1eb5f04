"""Palette, pixels and mu-law: what comes back, and how close."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainrule.tokenizers import interface
from chainrule.tokenizers.bytes import ByteTokenizer
from chainrule.tokenizers.characters import CharacterTokenizer
from chainrule.tokenizers.interface import Tokenizer, TokenizerError
from chainrule.tokenizers.mulaw import MuLawSettings, MuLawTokenizer
from chainrule.tokenizers.palette import PaletteSettings, PaletteTokenizer
from chainrule.tokenizers.pixels import PixelSettings, PixelTokenizer
from chainrule.tokenizers.standardize import StandardizeTokenizer
from chainrule.tokenizers.text import SentencePieceSettings, SentencePieceTokenizer
from chainrule.tokenizers.vqvae import VQVAESettings, VQVAETokenizer


def photograph() -> np.ndarray:
    from sklearn.datasets import load_sample_image

    return np.ascontiguousarray(load_sample_image("flower.jpg")[::2, ::2])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def test_a_palette_of_512_colours_is_close_to_a_photograph() -> None:
    image = photograph()
    settings = PaletteSettings(colours=512, iterations=8, sample_pixels=20_000)
    tokenizer = PaletteTokenizer.train(settings, image.reshape(-1, 3), seed=0)
    [tokens] = tokenizer.encode([image])
    assert tokens.shape == image.shape[:2]
    assert tokens.dtype == np.uint16
    [back] = tokenizer.decode([tokens])
    assert psnr(image, back) > 33
    # each pixel took its nearest colour
    flat, colours = image.reshape(-1, 3)[::997].astype(int), tokenizer.colours.astype(int)
    best = ((flat[:, None] - colours) ** 2).sum(2).min(1)
    taken = ((flat - colours[tokens.reshape(-1)[::997]]) ** 2).sum(1)
    assert np.array_equal(best, taken)


def test_a_palette_is_a_function_of_pixels_and_seed() -> None:
    pixels = photograph().reshape(-1, 3)
    settings = PaletteSettings(colours=16, iterations=3, sample_pixels=5_000)
    a, b, c = (PaletteTokenizer.train(settings, pixels, seed).fingerprint for seed in (0, 0, 1))
    assert a == b != c


def test_a_palette_needs_as_many_colours_as_it_has_entries() -> None:
    with pytest.raises(TokenizerError, match="3 distinct colours, fewer than.*512"):
        PaletteTokenizer.train(PaletteSettings(), np.array([[0], [7], [9]] * 50, np.uint8), 0)


def test_mulaw_is_monotone_and_within_the_quantisation_of_its_law() -> None:
    tokenizer = MuLawTokenizer(MuLawSettings(), 16000)
    samples = np.arange(-32768, 32768).astype(np.int16)
    [tokens] = tokenizer.encode([samples])
    assert tokens.dtype == np.uint8
    assert (np.diff(tokens.astype(int)) >= 0).all()
    assert set(tokens.tolist()) == set(range(256))
    [back] = tokenizer.decode([tokens])
    # half a step is 1/255 of the compressed scale: ln(256)/255 = 2.2 % of |x| + 32768/μ
    error = np.abs(back.astype(float) - samples)
    assert (error <= 0.0225 * np.abs(samples.astype(float)) + 4).all()
    again = tokenizer.encode([back])[0]
    assert np.array_equal(again, tokens)


def test_two_parts_of_16_bits_lose_nothing() -> None:
    tokenizer = MuLawTokenizer(MuLawSettings(bits=16), 16000)
    samples = np.arange(-32768, 32768, 3).astype(np.int16)
    [tokens] = tokenizer.encode([samples])
    assert len(tokens) == 2 * len(samples)
    assert (np.diff(tokens[0::2].astype(int)) >= 0).all()
    assert np.array_equal(tokenizer.decode([tokens])[0], samples)
    with pytest.raises(TokenizerError, match="has two"):
        tokenizer.decode([tokens[:-1]])
    assert tokenizer.decode(tokenizer.encode([samples[:0]]))[0].shape == (0,)


@pytest.mark.parametrize("bits", [8, 16])
def test_audio_of_another_form_is_refused(bits: int) -> None:
    tokenizer = MuLawTokenizer(MuLawSettings.model_validate({"bits": bits}), 16000)
    for wrong in (np.zeros(4, np.float32), np.zeros((4, 2), np.int16)):
        with pytest.raises(TokenizerError, match="mono int16"):
            tokenizer.encode([wrong])


def test_saved_and_loaded_they_are_the_same(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(-1, 1)
    kinds: list[Tokenizer] = [
        MuLawTokenizer(MuLawSettings(bits=16), 8000),
        PaletteTokenizer.train(PaletteSettings(colours=8), grey, 0),
    ]
    for number, tokenizer in enumerate(kinds):
        folder = tmp_path / str(number)
        tokenizer.save(folder)
        again = interface.load(folder)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.card() == tokenizer.card()
        card = json.loads((folder / "card.json").read_text())
        card["fingerprint"] = "0" * 64
        (folder / "card.json").write_text(json.dumps(card))
        with pytest.raises(TokenizerError, match="altered"):
            interface.load(folder)
    assert MuLawTokenizer(MuLawSettings(), 1).fingerprint != kinds[0].fingerprint


def _every_kind() -> list[Tokenizer]:
    grey = np.arange(256, dtype=np.uint8).reshape(-1, 1)
    text = SentencePieceSettings(vocabulary_size=270)
    learned = {"hidden": 8, "dim": 4, "codebook_size": 16, "residual_layers": 1}
    facts = {"health": {"psnr": 20.0, "usage_of_reachable": 0.1}}
    return [
        MuLawTokenizer(MuLawSettings(), 8000),
        PaletteTokenizer.train(PaletteSettings(colours=8), grey, 0),
        SentencePieceTokenizer.train(text, ["to be or not to be"] * 20),
        CharacterTokenizer.train(["to be"]),
        ByteTokenizer(),
        PixelTokenizer(PixelSettings()),
        StandardizeTokenizer.train(np.array([[0.0], [1.0]])),
        VQVAETokenizer(VQVAESettings.model_validate(learned), 1, (8, 8), facts=facts),
    ]


@pytest.fixture(scope="module")
def every_kind() -> list[Tokenizer]:
    return _every_kind()


EDITS: list[dict[str, Any]] = [
    {"kind": ["vqvae"]},
    {"kind": None},
    {"health": {"psnr": 99.0, "usage_of_reachable": 1.0}},
    {"health": "fine"},
    {"vocabulary": {"size": 3}},
    {"settings": None},
    {"settings": {}},
    {"channels": None},
    {"channels": 10**9},
    {"resolution": 5},
    {"resolution": [8]},
    {"sample_rate": None},
    {"alphabet": 3},
    {"mean": None},
    {"columns": 3},
    {"depth": 7},
    {"format": 2},
]


def test_an_altered_card_is_refused_whatever_was_altered(
    every_kind: list[Tokenizer], tmp_path: Path
) -> None:
    for tokenizer in every_kind:
        tokenizer.save(tmp_path)
        path = tmp_path / "card.json"
        good = path.read_bytes()
        for edit in EDITS:
            path.write_text(json.dumps({**json.loads(good), **edit}))
            with pytest.raises(TokenizerError, match=r"card\.json: altered") as caught:
                interface.load(tmp_path)
            assert len(str(caught.value).splitlines()) <= 2
        for content in (
            good.replace(b'"kind"', b'"k\xffnd"'),
            b"\xff" + good[1:],
            good.replace(b'"format": 1', b'"format": NaN'),
            b"[" * 100_000,
            b"[]",
        ):
            path.write_bytes(content)
            with pytest.raises(TokenizerError, match=r"card\.json: (not JSON|no 'kind')"):
                interface.load(tmp_path)
        path.unlink()
        path.mkdir()
        with pytest.raises(TokenizerError, match=r"card\.json: Is a directory"):
            interface.load(tmp_path)
        path.rmdir()


def test_a_card_from_before_cards_had_a_digest_is_read_or_refused_by_name(
    every_kind: list[Tokenizer], tmp_path: Path
) -> None:
    for tokenizer in every_kind:
        tokenizer.save(tmp_path)
        path = tmp_path / "card.json"
        old = json.loads(path.read_text())
        del old["card_sha256"]
        path.write_text(json.dumps(old))
        assert interface.load(tmp_path).card() == tokenizer.card()
        for edit in EDITS:
            path.write_text(json.dumps({**old, **edit}))
            with suppress(TokenizerError):  # no other error, whatever was altered
                interface.load(tmp_path)


def test_weights_that_cannot_be_read_are_named(every_kind: list[Tokenizer], tmp_path: Path) -> None:
    for name, number in (("weights.safetensors", 1), ("sentencepiece.model", 2)):
        every_kind[number].save(tmp_path)
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        with pytest.raises(TokenizerError, match=f"{name}: Is a directory"):
            interface.load(tmp_path)
