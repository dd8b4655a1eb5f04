"""SentencePiece tokenizers in the form that `transformers` loads: the same ids."""

import os
from pathlib import Path

import pytest

from chainrule.tokenizers.bytes import ByteTokenizer
from chainrule.tokenizers.characters import CharacterTokenizer
from chainrule.tokenizers.interface import TokenizerError
from chainrule.tokenizers.pixels import PixelSettings, PixelTokenizer
from chainrule.tokenizers.text import SentencePieceSettings, SentencePieceTokenizer
from chainrule.tokenizers.transformers_format import to_transformers

HARD = ["", " ", "  é漢字\n\n\t  a<|end|>b  ", "no\x00break\r\n", "a" * 40]


@pytest.fixture(scope="module")
def source() -> list[str]:
    paths = sorted(Path(os.__file__).parent.glob("*.py"))[:40]
    return [t for t in (p.read_text("utf-8", "replace") for p in paths) if "\u2581" not in t]


def test_bpe_gives_the_same_ids_and_the_text_again(tmp_path, source):
    transformers = pytest.importorskip("transformers")
    settings = SentencePieceSettings(vocabulary_size=800, user_symbols=("<|end|>",))
    ours = SentencePieceTokenizer.train(settings, source[:20])
    to_transformers(ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*source[20:], *HARD]:
        ids = ours.encode([text])[0].tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert theirs("x")["input_ids"][0] == ours.vocabulary["specials"]["bos"]
    assert theirs.eos_token_id == ours.vocabulary["specials"]["eos"]


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_symbols_with_spaces_keep_their_ids(tmp_path, source, model):
    transformers = pytest.importorskip("transformers")
    symbols = ("the end", "  ", "the")
    settings = SentencePieceSettings(model=model, vocabulary_size=600, user_symbols=symbols)
    ours = SentencePieceTokenizer.train(settings, source[:10])
    theirs = same_ids(transformers, ours, ["at the end", "  ", "the", "a  b"], tmp_path)
    assert len(theirs) == ours.vocabulary["size"]


def test_unigram_gives_the_text_again_in_as_many_pieces(tmp_path, source):
    transformers = pytest.importorskip("transformers")
    settings = SentencePieceSettings(model="unigram", vocabulary_size=500)
    ours = SentencePieceTokenizer.train(settings, source[:10])
    to_transformers(ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in source[20:25]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert theirs.decode(ids) == text
        assert ours.decode([ids]) == [text]
        assert len(ids) == pytest.approx(len(ours.encode([text])[0]), rel=1e-3)


EMOJI = "👩‍👩‍👧 🏳️‍🌈 é漢字\r\n\n\t\x00\U0010ffff ▁<0x41> <unk"


def same_ids(transformers, ours, texts, folder):
    """Theirs, made from ours: the same ids for each text, and the text again."""
    to_transformers(ours, folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = ours.encode([text])[0].tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == text
    return theirs


def test_bytes_give_the_same_ids_and_the_text_again(tmp_path, source):
    transformers = pytest.importorskip("transformers")
    theirs = same_ids(transformers, ByteTokenizer(), [*source[:5], *HARD, EMOJI], tmp_path)
    assert theirs("x")["input_ids"] == [256, ord("x")]
    assert theirs.eos_token_id == 257
    assert len(theirs) == 258


def test_characters_give_the_same_ids_and_the_text_again(tmp_path, source):
    transformers = pytest.importorskip("transformers")
    texts = [*source[:5], *HARD, EMOJI]
    ours = CharacterTokenizer.train(texts)
    theirs = same_ids(transformers, ours, texts, tmp_path)
    specials = ours.vocabulary["specials"]
    unknown = theirs("a한국x", add_special_tokens=False)["input_ids"]
    assert unknown == ours.encode(["a한국x"])[0].tolist()
    assert unknown[1:3] == [specials["unk"]] * 2
    assert theirs("a")["input_ids"][0] == specials["bos"]
    assert (theirs.eos_token_id, theirs.unk_token_id) == (specials["eos"], specials["unk"])
    assert len(theirs) == ours.vocabulary["size"]


def test_what_has_no_such_form_is_refused(tmp_path):
    settings = SentencePieceSettings(vocabulary_size=270, normalization="nfkc")
    trained = SentencePieceTokenizer.train(settings, ["to be or not to be"] * 20)
    with pytest.raises(TokenizerError, match="normalization 'nfkc' has no form in transformers"):
        to_transformers(trained, tmp_path)
    with pytest.raises(TokenizerError, match=r"alphabet has no form .* U\+D800"):
        to_transformers(CharacterTokenizer("a\ud800"), tmp_path)
    with pytest.raises(TokenizerError, match="kind 'pixels' has no form in transformers"):
        to_transformers(PixelTokenizer(PixelSettings()), tmp_path)
    assert list(tmp_path.iterdir()) == []
