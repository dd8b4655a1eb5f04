"""SentencePiece tokenizers as `tokenizer.json`, the form that Hugging Face `transformers` loads.

The same ids for the same text, but for two cases: U+2581 itself, which SentencePiece uses
as its mark for a space, is escaped as bytes by ours and taken for a space by theirs; and a
unigram model may cut a word into other pieces of the same total score.

A call puts `<bos>` first, as our decoders start on it; `add_special_tokens=False` does not.
"""

import json
from pathlib import Path
from typing import Any

from chainrule.tokenizers.interface import Tokenizer, TokenizerError, write_whole
from chainrule.tokenizers.text import SPACE, SentencePieceTokenizer

BOS, EOS = "<bos>", "<eos>"


def to_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`. TokenizerError for other kinds."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise TokenizerError(f"a tokenizer of kind '{tokenizer.kind}' has no form in transformers")
    if tokenizer.settings.normalization != "identity":
        raise TokenizerError(
            f"normalization '{tokenizer.settings.normalization}' has no form in transformers"
        )
    write_whole(folder / "tokenizer.json", _json(_definition(tokenizer)))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": tokenizer.piece(0),
        "clean_up_tokenization_spaces": False,
    }
    write_whole(folder / "tokenizer_config.json", _json(config))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _definition(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    n = tokenizer.pieces
    pieces = [tokenizer.piece(i) for i in range(n)]
    specials = [(BOS, n, True), (EOS, n + 1, True)]
    symbols = [
        (symbol, pieces.index(symbol.replace(" ", SPACE)), False)
        for symbol in tokenizer.settings.user_symbols
    ]
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
                "normalized": False,
                "special": special,
            }
            for content, number, special in sorted([*specials, *symbols], key=lambda s: s[1])
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [n], "tokens": [BOS]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": _bpe(pieces) if tokenizer.settings.model == "bpe" else _unigram(tokenizer, pieces),
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
