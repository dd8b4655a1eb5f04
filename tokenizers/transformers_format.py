"""Tokenizers of text as `tokenizer.json`, the form that Hugging Face `transformers` loads.

    sentencepiece   BPE with its merges, or unigram; byte fallback
    bytes           BPE without merges, of which only the byte fallback is used
    characters      BPE without merges over the alphabet; another character is `<unk>`

The same ids for the same text, but for these cases: U+2581 itself, which SentencePiece uses
as its mark for a space, is escaped as bytes by ours and taken for a space by theirs; a
unigram model may cut a word into other pieces of the same total score; and "<bos>", "<eos>"
or "<unk>" written out in a text are theirs for the special token.

Normalisation by SentencePiece's nfkc has no such form: it differs both from `NFKC` there (new
characters, stacked marks) and from `Precompiled` (half-width katakana with a voicing mark).

A call puts `<bos>` first, as our decoders start on it; `add_special_tokens=False` does not.
"""

import json
from pathlib import Path
from typing import Any

from chainrule.tokenizers.bytes import ByteTokenizer
from chainrule.tokenizers.characters import CharacterTokenizer
from chainrule.tokenizers.interface import Tokenizer, TokenizerError, write_whole
from chainrule.tokenizers.text import SPACE, SentencePieceTokenizer
from chainrule.tokenizers.utf8 import to_utf8

BOS, EOS, UNK = "<bos>", "<eos>", "<unk>"


def check_expressible(tokenizer: Tokenizer) -> None:
    """TokenizerError where there is no form that gives the same ids."""
    if not isinstance(tokenizer, SentencePieceTokenizer | ByteTokenizer | CharacterTokenizer):
        raise TokenizerError(f"a tokenizer of kind '{tokenizer.kind}' has no form in transformers")
    if isinstance(tokenizer, SentencePieceTokenizer):
        normalization = tokenizer.settings.normalization
        if normalization != "identity":
            raise TokenizerError(f"normalization '{normalization}' has no form in transformers")
    if isinstance(tokenizer, CharacterTokenizer):
        try:
            to_utf8(tokenizer.alphabet)
        except TokenizerError as error:
            raise TokenizerError(f"its alphabet has no form in transformers ({error})") from None


def to_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`. TokenizerError as above."""
    check_expressible(tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        definition = _sentencepiece(tokenizer)
        config["unk_token"] = tokenizer.piece(0)
    elif isinstance(tokenizer, CharacterTokenizer):
        definition = _characters(tokenizer)
        config["unk_token"] = UNK
    else:
        assert isinstance(tokenizer, ByteTokenizer)  # check_expressible knows no other
        definition = _bytes(tokenizer)
    write_whole(folder / "tokenizer.json", _json(definition))
    write_whole(folder / "tokenizer_config.json", _json(config))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    pieces = [tokenizer.piece(i) for i in range(tokenizer.pieces)]
    symbols = [symbol.replace(" ", SPACE) for symbol in tokenizer.settings.user_symbols]
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {
        **_frame(tokenizer, {symbol: pieces.index(symbol) for symbol in symbols}),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": _bpe(pieces) if tokenizer.settings.model == "bpe" else _unigram(tokenizer, pieces),
    }


def _bytes(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """No character is in the vocabulary, so each falls back to its bytes."""
    return {
        **_frame(tokenizer),
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {f"<0x{byte:02X}>": byte for byte in range(256)},
            "merges": [],
        },
    }


def _characters(tokenizer: CharacterTokenizer) -> dict[str, Any]:
    vocabulary = {character: number for number, character in enumerate(tokenizer.alphabet)}
    vocabulary |= {f"<{name}>": i for name, i in tokenizer.vocabulary["specials"].items()}
    return {
        **_frame(tokenizer),
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "unk_token": UNK,
            "fuse_unk": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def _frame(tokenizer: Tokenizer, symbols: dict[str, int] | None = None) -> dict[str, Any]:
    """What all have: the special tokens and `symbols`, and `<bos>` before a text."""
    specials = tokenizer.vocabulary["specials"]
    added = [(f"<{name}>", number, True) for name, number in specials.items()]
    added += [(symbol, number, False) for symbol, number in (symbols or {}).items()]
    # a symbol must be a piece of the model to keep its id: with a space in one, all are looked
    # for in the text whose spaces are marked, so that the longest is found
    marked = any(SPACE in symbol for symbol in symbols or {})
    first = {"SpecialToken": {"id": BOS, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": marked and not special,
                "special": special,
            }
            for content, number, special in sorted(added, key=lambda token: token[1])
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [specials["bos"]], "tokens": [BOS]}},
        },
    }


def _bpe(pieces: list[str]) -> dict[str, Any]:
    """SentencePiece merges the neighbours whose piece has the best score, which for BPE is the
    lowest id: every way to make a piece of two others is a merge, in the order of ids."""
    ids = {piece: number for number, piece in enumerate(pieces)}
    merges: list[list[str]] = []
    for piece in pieces:
        if piece.startswith("<0x") and piece.endswith(">") and len(piece) == 6:
            continue
        ways = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [way for way in ways if way[0] in ids and way[1] in ids]
        merges += [list(way) for way in sorted(known, key=lambda w: (ids[w[0]], ids[w[1]]))]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[0],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": ids,
        "merges": merges,
    }


def _unigram(tokenizer: SentencePieceTokenizer, pieces: list[str]) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": 0,
        "byte_fallback": True,
        "vocab": [[piece, tokenizer.score(number)] for number, piece in enumerate(pieces)],
    }
