"""Text tokenizers: every string comes back, specials stay apart, altered models are refused."""

import io
import json
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError

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


def _dna() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices("ACGT", k=2000)) + "\n" for _ in range(40)]


def _chinese() -> list[str]:
    """Characters without words between them, and two spaces in all."""
    draw = random.Random(0)
    letters = [chr(0x4E00 + i) for i in range(100)]
    documents = ["".join(draw.choices(letters, k=3000)) for _ in range(20)]
    documents[3] = documents[3][:1500] + " " + documents[3][1500:2000] + " " + documents[3][2000:]
    return documents


SPACELESS = {"dna": _dna, "chinese": _chinese}
_spaceless: dict[tuple[str, str], SentencePieceTokenizer] = {}


def spaceless(corpus: str, model: str) -> SentencePieceTokenizer:
    if (corpus, model) not in _spaceless:
        given = SentencePieceSettings.model_validate({"model": model, "vocabulary_size": 360})
        trained = SentencePieceTokenizer.train(given, SPACELESS[corpus]())
        _spaceless[corpus, model] = trained
    return _spaceless[corpus, model]


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@pytest.mark.parametrize("corpus", SPACELESS)
def test_spaces_come_back_where_none_were_learned(corpus: str, model: str) -> None:
    tokenizer = spaceless(corpus, model)
    for text in [*TRICKY, "AC GT", "A▁C G", "一 丁", *SPACELESS[corpus]()[:5]]:
        assert tokenizer.decode(tokenizer.encode([text])) == [text]
    space, mark = tokenizer.encode([" ", "▁"])
    assert (len(space), len(mark)) == (1, 3)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(SPACELESS)),
    st.sampled_from(["bpe", "unigram"]),
    st.lists(st.text(st.sampled_from("ACGT \n▁一丁é") | st.characters(), max_size=40)),
)
def test_every_string_comes_back_where_no_space_was_learned(
    corpus: str, model: str, texts: list[str]
) -> None:
    texts = [text for text in texts if not any("\ud800" <= c <= "\udfff" for c in text)]
    tokenizer = spaceless(corpus, model)
    assert tokenizer.decode(tokenizer.encode(texts)) == texts


def test_a_model_without_a_piece_for_a_space_gives_spaces_back_and_refuses_their_mark() -> None:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(_dna()),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        byte_fallback=True,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(SentencePieceSettings(), model.getvalue())
    text = " AC  GT \n"
    assert tokenizer.decode(tokenizer.encode([text])) == [text]
    with pytest.raises(TokenizerError, match=r"holds U\+2581.*no piece for a space.*train"):
        tokenizer.encode(["AC", "A▁C"])


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


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@pytest.mark.parametrize("normalization", ["identity", "nfkc"])
def test_user_symbols_with_spaces_are_one_token_each(model: str, normalization: str) -> None:
    symbols = ["the end", "  ", " ", "x y", "x"]
    for chosen in (symbols, symbols[:2]):
        tokenizer = train(
            model=model, vocabulary_size=320, normalization=normalization, user_symbols=chosen
        )
        for symbol, tokens in zip(chosen, tokenizer.encode(chosen), strict=True):
            assert len(tokens) == 1
            assert tokenizer.decode([tokens]) == [symbol]
        for text in ("at the end  ", "a  b   c", "the▁end", "x y x  y"):
            assert tokenizer.decode(tokenizer.encode([text])) == [text]
        [parted] = tokenizer.encode(["the▁end"])
        assert len(parted) >= 5  # U+2581 is no space, and its bytes are three tokens


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"user_symbols": ["<unk>"]}, "'<unk>' is a piece of every model"),
        ({"user_symbols": ["<0x41>"]}, "'<0x41>' is a piece of every model"),
        ({"user_symbols": ["a\0b"]}, r"holds U\+0000"),
        ({"user_symbols": ["\ud800"]}, r"U\+D800|unicode"),
        ({"user_symbols": ["ﬁ x"], "normalization": "nfkc"}, "write 'fi x'"),
        ({"character_coverage": 0.5}, "greater than or equal to 0.98"),
        ({"max_piece_length": 600}, "less than or equal to 512"),
    ],
)
def test_settings_that_can_never_work_are_refused(given_settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SentencePieceSettings.model_validate(given_settings)


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_what_cannot_be_learned_is_refused_in_one_plain_line(model: str) -> None:
    def refused(size: int, documents: list[str]) -> str:
        given = SentencePieceSettings.model_validate({"model": model, "vocabulary_size": size})
        with pytest.raises(TokenizerError) as caught:
            SentencePieceTokenizer.train(given, documents)
        return str(caught.value)

    start = "SentencePiece cannot learn 260 pieces from this text: "
    assert refused(260, []) == start + "it is empty; give it documents with text in them"
    assert refused(260, CORPUS) == (
        start + "bytes, user_symbols and its characters take 293; take a vocabulary_size of that "
        "at least, or lower character_coverage (0.98 at least)"
    )
    assert "take a vocabulary_size of" in refused(60_000, CORPUS)


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
