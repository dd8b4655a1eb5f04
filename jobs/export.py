"""export: a model folder in another library's form.

model folder → config, generation config, weights → the tokenizer it carries

Written beside and renamed: the folder is there whole, or not at all.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from chainrule.pipeline.config import RequestError
from chainrule.pipeline.destinations import require_folder_place
from chainrule.pipeline.models import folder as model_folder
from chainrule.pipeline.models.transformers_format import to_transformers
from chainrule.tokenizers import transformers_format as tokenizer_format
from chainrule.tokenizers.interface import Tokenizer, TokenizerError, load as load_tokenizer

CLASSES_SHOWN = 10


def export(model: Path, out: Path) -> list[str]:
    """Write the decoder in `model` as a `transformers` folder, with its tokenizer if it is text.

    `out` is empty or not there yet. Lines that are to be said: why it goes without its tokenizer,
    how a class is asked for.
    RequestError where `transformers` has no such model, or `out` cannot be made.
    """
    require_folder_place(out)
    card = model_folder.read_card(model)
    loaded = model_folder.load(model, dtype=torch.float32)
    specials = (card.get("vocabulary") or {}).get("specials", {})
    tokenizer, left_out = _tokenizer(model, card)
    out = out.resolve()
    beside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)  # of an attempt that was killed
    try:
        to_transformers(loaded, beside, specials.get("eos"))
        if tokenizer is not None:
            tokenizer_format.to_transformers(tokenizer, beside)
        beside.rename(out)
    except ValueError as error:
        raise RequestError(f"{model}: {error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return [*([left_out] if left_out is not None else []), *_start_tokens(loaded, card)]


def _start_tokens(model: Any, card: dict[str, Any]) -> list[str]:
    """Which token stands first for which class, of a model that has classes."""
    classes = getattr(model.config, "classes", None)
    if classes is None:
        return []
    first = model.config.vocabulary_size
    names = [str(name) for name in card.get("classes") or range(classes)]
    shown = [f"{first + i} for {name}" for i, name in enumerate(names[:CLASSES_SHOWN])]
    if len(names) > CLASSES_SHOWN:
        shown.append(f"… {first + classes - 1} for {names[-1]}")
    return [
        f"start with the token of a class: {', '.join(shown)}; "
        f"{first + classes} (bos_token_id) for none"
    ]


def _tokenizer(model: Path, card: dict[str, Any]) -> tuple[Tokenizer | None, str | None]:
    """What is to be written of the tokenizer; None, and why, where it has no such form."""
    entry = card.get("tokenizer")
    if entry is None and card.get("tokenizers"):
        kinds = ", ".join(str(one["modality"]) for one in card["tokenizers"])
        return None, (
            f"{model}: its tokenizers are left out, encode and decode with chainrule: a vocabulary "
            f"of several ({kinds}) has no form in transformers"
        )
    if entry is None:
        return None, None
    if not entry["path"]:
        return None, f"{model}: goes without a tokenizer: the model folder holds none"
    if card.get("modality") != "text":
        return None, (
            f"{model / entry['path']}: left out, encode and decode with chainrule: a tokenizer of "
            f"{card.get('modality')} has no form in transformers"
        )
    try:
        tokenizer = load_tokenizer(model / entry["path"])
    except TokenizerError as error:
        raise RequestError(f"{model / entry['path']}: {error}") from None
    try:
        tokenizer_format.check_expressible(tokenizer)
    except TokenizerError as error:
        return None, f"{model / entry['path']}: left out, encode with chainrule: {error}"
    return tokenizer, None
