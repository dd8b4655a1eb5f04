"""Text tokenizers: every string comes back, specials stay apart, altered models are refused."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from chainrule.tokenizers import interface
from chainrule.tokenizers.bytes import ByteTokenizer
from chainrule.tokenizers.characters import CharacterTokenizer
from chainrule.tokenizers.interface import Tokenizer, TokenizerError
from chainrule.tokenizers.text import SentencePieceSettings, SentencePieceTokenizer

CORPUS = [
    f"def f{i}(x):\n    return x + {i}\n\n\nclass C{i % 7}:\n\tname = 'Zoë {i}'\n"
    for i in range(200)
]


def train(**settings: object) -> SentencePieceTokenizer:
    given = SentencePieceSettings.model_validate({"vocabulary_size": 400, **settings})
    return SentencePieceTokenizer.train(given, CORPUS)


@pytest.fixture(scope="module")
def bpe() -> SentencePieceTokenizer:
    return train()


@pytest.fixture(scope="module")
def unigram() -> SentencePieceTokenizer:
    return train(model="unigram", vocabulary_size=320)


TRICKY = [
    "",
    " ",
    "   three  before and after   ",
    "\t\ttabs\tand\r\nlines\r\n\n",
    "▁",
    "a▁b ▁▁ c▁",
    "emoji 👩‍👩‍👧 🏳️‍🌈",
    "e\u0301 and a lone \u0301",
    "ﬁ ① Å ½ ᾳ",  # what NFKC would change
    "\0nul\0",
    "<s></s><unk><pad> <0x41> <0xE2>",
    "\ufeffbom \u200b zero \u2028 line \u00a0 space \u3000",
    "\uffff\U0010ffff\ue000",
    "漢字かな交じり文",
    "x" * 10_000,
]


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_strings_come_back(
    text: str, bpe: SentencePieceTokenizer, unigram: SentencePieceTokenizer
) -> None:
    for tokenizer in (bpe, unigram, ByteTokenizer()):
        [tokens] = tokenizer.encode([text])
        assert tokenizer.decode([tokens]) == [text]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=4))
def test_every_string_comes_back(texts: list[str]) -> None:
    for tokenizer in (_cached("bpe"), _cached("unigram"), ByteTokenizer()):
        tokens = tokenizer.encode(texts)
        assert tokenizer.decode(tokens) == texts
        for one, text in zip(tokens, texts, strict=True):  # the batch does not matter
            assert np.array_equal(one, tokenizer.encode([text])[0])


_trained: dict[str, Tokenizer] = {}


def _cached(model: str) -> Tokenizer:
    if model not in _trained:
        _trained[model] = train(model=model, vocabulary_size=320)
    return _trained[model]


def test_newlines_and_indents_are_learned(bpe: SentencePieceTokenizer) -> None:
    [tokens] = bpe.encode([CORPUS[0]])
    assert len(tokens) < len(CORPUS[0]) / 2


def test_specials_follow_the_pieces_and_decode_to_nothing(bpe: SentencePieceTokenizer) -> None:
    vocabulary = bpe.vocabulary
    assert vocabulary == {
        "size": 402,
        "ranges": {"text": [0, 400], "specials": [400, 402]},
        "specials": {"bos": 400, "eos": 401},
    }
    [tokens] = bpe.encode(["return x"])
    assert tokens.dtype == np.uint16
    framed = np.concatenate([[400], tokens, [401]])
    assert bpe.decode([framed]) == ["return x"]
    with pytest.raises(TokenizerError, match="token 402 lies outside"):
        bpe.decode([np.array([402])])


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character(
    bpe: SentencePieceTokenizer,
) -> None:
    broken = ByteTokenizer().decode([np.array([0x41, 0xFF, 0xE2, 0x96, 0x42])])
    assert broken == ["A\ufffd\ufffdB"]
    [space] = bpe.encode(["▁"])
    assert bpe.decode([space]) == ["▁"]
    assert "\ufffd" in bpe.decode([space[:2]])[0]


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_a_lone_surrogate_is_refused_by_place(kind: str, bpe: SentencePieceTokenizer) -> None:
    tokenizer: Tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    for text in ("ab\udc80", "ab\udc80▁"):
        with pytest.raises(TokenizerError, match=r"U\+DC80 at character 2"):
            tokenizer.encode(["fine", text])


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_training_is_deterministic(model: str) -> None:
    a, b = (train(model=model, vocabulary_size=320) for _ in range(2))
    assert a.model == b.model
    assert a.fingerprint == b.fingerprint


def test_user_symbols_are_one_token_each() -> None:
    tokenizer = train(user_symbols=["<image>", "<|end|>"])
    [tokens] = tokenizer.encode(["a<image><|end|>b"])
    assert len(tokens) == 4
    assert tokenizer.decode([tokens]) == ["a<image><|end|>b"]


def test_nfkc_is_there_for_those_who_ask() -> None:
    tokenizer = train(normalization="nfkc")
    assert tokenizer.decode(tokenizer.encode(["ﬁ①"])) == ["fi1"]


def test_a_vocabulary_too_large_for_the_text_is_refused() -> None:
    with pytest.raises(TokenizerError, match="60000 pieces.*a vocabulary_size of 1313 at"):
        train(vocabulary_size=60_000)


@pytest.mark.parametrize("which", ["bpe", "bytes", "characters"])
def test_saved_and_loaded_it_is_the_same(
    which: str, bpe: SentencePieceTokenizer, tmp_path: Path
) -> None:
    tokenizer: Tokenizer = {
        "bpe": bpe,
        "bytes": ByteTokenizer(),
        "characters": CharacterTokenizer.train(CORPUS),
    }[which]
    tokenizer.save(tmp_path)
    again = interface.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.card() == tokenizer.card()
    for a, b in zip(again.encode(CORPUS), tokenizer.encode(CORPUS), strict=True):
        assert np.array_equal(a, b)
    card = json.loads((tmp_path / "card.json").read_text())
    card["fingerprint"] = "0" * 64
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(TokenizerError, match="altered"):
        interface.load(tmp_path)


def test_an_altered_model_file_is_refused_before_it_is_parsed(
    bpe: SentencePieceTokenizer, tmp_path: Path
) -> None:
    bpe.save(tmp_path)
    path = tmp_path / "sentencepiece.model"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match="altered"):
        interface.load(tmp_path)
    path.unlink()
    with pytest.raises(TokenizerError, match=r"no sentencepiece\.model"):
        interface.load(tmp_path)


def test_characters_are_lossless_on_their_alphabet_and_name_the_rest() -> None:
    tokenizer = CharacterTokenizer.train(["hello wörld\n"])
    assert tokenizer.decode(tokenizer.encode(["hold\nöre"])) == ["hold\nöre"]
    [tokens] = tokenizer.encode(["hex😀"])
    assert tokens.tolist()[2:] == [tokenizer.vocabulary["specials"]["unk"]] * 2
    assert tokenizer.decode([tokens]) == ["he\ufffd\ufffd"]
    with pytest.raises(TokenizerError, match="no character"):
        CharacterTokenizer.train([""])


@pytest.mark.slow
def test_a_line_of_ten_megabytes_comes_back(bpe: SentencePieceTokenizer) -> None:
    line = "return x + 1; Zoë ▁ 👩 " * 400_000
    assert len(line.encode()) > 10_000_000
    assert bpe.decode(bpe.encode([line])) == [line]


def test_gigatoken_gives_the_same_ids(bpe: SentencePieceTokenizer) -> None:
    pytest.importorskip("gigatoken", reason="the extra is not installed")
    fast = SentencePieceTokenizer(bpe.settings, bpe.model)
    fast.use_gigatoken(CORPUS)
    for a, b in zip(fast.encode([*CORPUS, *TRICKY]), bpe.encode([*CORPUS, *TRICKY]), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    with pytest.raises(TokenizerError, match=r"U\+DC80 at character 1"):
        fast.encode(["a\udc80"])


def test_a_faster_encoder_with_other_ids_is_refused(
    bpe: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong:
        @classmethod
        def from_sentencepiece(cls, model: bytes) -> "Wrong":
            return cls()

        def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
            return [np.array(ids[:-1]) for ids in bpe._processor.encode(texts)]

    fast = SentencePieceTokenizer(bpe.settings, bpe.model)
    monkeypatch.setitem(sys.modules, "gigatoken", types.SimpleNamespace(Tokenizer=Wrong))
    with pytest.raises(TokenizerError, match="other ids than SentencePiece on '   '"):
        fast.use_gigatoken([])
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(TokenizerError, match="gigatoken is not installed"):
        fast.use_gigatoken([])
    assert np.array_equal(fast.encode(["return x"])[0], bpe.encode(["return x"])[0])
