"""export: a model folder in another library's form.

model folder → config, generation config, weights → the tokenizer it carries
"""

from pathlib import Path

import torch

from chainrule.pipeline.config import RequestError
from chainrule.pipeline.models import folder as model_folder
from chainrule.pipeline.models.transformers_format import to_transformers
from chainrule.tokenizers import transformers_format as tokenizer_format
from chainrule.tokenizers.interface import TokenizerError, load as load_tokenizer


def export(model: Path, out: Path) -> None:
    """Write the decoder in `model` as a `transformers` folder, with its tokenizer if it is text.

    RequestError where `transformers` has no such model.
    """
    card = model_folder.read_card(model)
    loaded = model_folder.load(model, dtype=torch.float32)
    specials = (card.get("vocabulary") or {}).get("specials", {})
    try:
        to_transformers(loaded, out, specials.get("eos"))
    except ValueError as error:
        raise RequestError(f"{model}: {error}") from None
    entry = card.get("tokenizer")
    if entry is not None and entry["path"] and card.get("modality") == "text":
        try:
            tokenizer_format.to_transformers(load_tokenizer(model / entry["path"]), out)
        except TokenizerError as error:
            raise RequestError(f"{model / entry['path']}: {error}") from None
