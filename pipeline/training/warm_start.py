"""A training that begins with a handed-off model's weights: on other data, or for more steps."""

from typing import Any

from chainrule.pipeline.artifact import Artifact, require_same
from chainrule.pipeline.config import RequestError, changed_settings, result_settings
from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.models.folder import load

REGULARISATION = "dropout"
"""What a name holds of settings that shape no weight: they may be others than in the model."""


def take_weights(model: Autoregressive, given: Artifact, description: dict[str, Any]) -> None:
    """Give `model` the weights of a handed-off one, on the CPU.

    `description` is that of the training (`model.json`). LineageError where the tokens are of
    other tokenizers than the given model's, RequestError where it is another model.
    """
    card = given.card
    one = [card["tokenizer"]] if card.get("tokenizer") else []
    theirs = {entry["fingerprint"] for entry in card.get("tokenizers") or one}
    ours = {entry["fingerprint"] for entry in description["tokenizers"]}
    require_same(
        "tokenizers of the model to begin with and of the tokens",
        min(theirs - ours, default="none"),  # of several, one that the other side has not
        str(given.folder),
        min(ours - theirs, default="none"),
        "the input tokens",
        "pretokenize with the model's own",
    )
    if card.get("vocabulary") != description["vocabulary"]:
        raise RequestError(
            f"{given.folder}: has another joint vocabulary than the tokens; give the same sets in "
            "the same order"
        )
    found = load(given.folder)
    if type(found.config) is not type(model.config):
        raise RequestError(f"{given.folder}: is of another family than `model` asks for")
    changed = [
        change
        for change in changed_settings(model.config, result_settings(found.config))
        if REGULARISATION not in change.split(":")[0]
    ]
    if changed:
        raise RequestError(
            f"{given.folder}: is another model than `model` asks for: {'; '.join(changed[:3])}"
        )
    model.load_state_dict(found.state_dict())
