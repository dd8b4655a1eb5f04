"""SentencePiece tokenizers in the form that `transformers` loads: the same ids."""

import os
from pathlib import Path

import pytest

from chainrule.tokenizers.bytes import ByteTokenizer
from chainrule.tokenizers.interface import TokenizerError
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


def test_other_kinds_are_refused(tmp_path):
    with pytest.raises(TokenizerError, match="kind 'bytes' has no form in transformers"):
        to_transformers(ByteTokenizer(), tmp_path)
