"""From any checkpoint to a model folder that needs neither trainer nor DeepSpeed.

    checkpoint (verified) → weights: raw, averaged, of the best step → weights.safetensors +
    card.json → a copy of the tokenizer that made the tokens

Checkpoints hold whole tensors whatever the strategy that trained them, so this runs on one
CPU for all of them.
"""

import shutil
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from chainrule.pipeline.artifact import (
    Artifact,
    ArtifactError,
    LineageError,
    read_json,
    require_same,
)
from chainrule.pipeline.config import RequestError, Settings
from chainrule.pipeline.graph import Pipeline, StageSpec
from chainrule.pipeline.models import folder as model_folder
from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.stage import Input, Stage, say
from chainrule.pipeline.training.checkpoints import (
    Checkpoint,
    average,
    newest,
    step_folder,
    steps_in,
)
from chainrule.tokenizers.interface import TokenizerError, load as load_tokenizer

INPUTS = {
    "decoder": Input(("pretrain",)),
    "tokenizer": Input(("train_tokenizer",), many=True, optional=True),
}


class Config(Settings):
    weights: Literal["raw", "ema", "best", "average"] = Field(
        "raw",
        description="raw: of the newest checkpoint; ema: its averaged weights; best: of the "
        "checkpoint with the lowest validation loss; average: mean of the newest checkpoints",
    )
    average_of: int = Field(3, ge=2, description="average: how many checkpoints, if there are")
    step: int | None = Field(None, ge=1, description="this checkpoint instead of the newest")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    shard_bytes: int = Field(
        model_folder.SHARD_BYTES, ge=1, description="larger weights lie in several files"
    )


def check(pipeline: Pipeline, spec: StageSpec) -> None:
    """Refuse averaged weights of a training that keeps none."""
    [decoder] = spec.inputs["decoder"]
    trained: Any = pipeline.stages[decoder].config if decoder in pipeline.stages else None
    if cast(Config, spec.config).weights == "ema" and trained is not None and trained.ema is None:
        raise RequestError(
            f"stage '{spec.name}': weights: ema, and stage '{decoder}' keeps no averaged weights; "
            "set ema: 0.999 there, or take weights: raw"
        )


def main(config: Config, stage: Stage) -> None:
    decoder = stage.input("decoder")
    description = read_json(decoder.path("model.json"))
    chosen = choose(decoder.folder / "checkpoints", config)
    tokenizers = matching_tokenizers(description, stage.inputs.get("tokenizer", []), decoder)
    if not stage.is_main:
        return
    with stage.progress(3, "parts") as bar:
        model = build(description["model"])
        place(model, chosen, config)
        model.to(getattr(torch, config.dtype))
        bar.update(1)
        card = card_of(description, chosen[0], config, decoder)
        if config.weights == "average":
            card["averaged_steps"] = [checkpoint.step for checkpoint in chosen]
            if len(chosen) < config.average_of:
                say(
                    f"  {stage.name}: average_of {config.average_of}, and {decoder.folder} keeps "
                    f"{len(chosen)}: steps {', '.join(map(str, card['averaged_steps']))}"
                )
        card["tokenizer"], card["tokenizers"] = copy_tokenizers(
            description, tokenizers, stage.folder
        )
        card["captions"] = copy_captions_tokenizer(description, tokenizers, stage.folder)
        bar.update(1)
        card = model_folder.save(model, stage.folder, card, config.shard_bytes)
        bar.update(1)
    stage.summary["fingerprint"] = card["fingerprint"]
    stage.summary["parameters"] = sum(p.numel() for p in model.parameters())
    stage.summary["step"] = card["step"]
    stage.summary["tokens_seen"] = card["tokens_seen"]
    if "loss" in card["validation"]:
        stage.summary["validation_loss"] = card["validation"]["loss"]


def choose(folder: Path, config: Config) -> list[Checkpoint]:
    """The verified checkpoints whose weights are taken, the newest first; ArtifactError."""
    if config.step is not None:
        if config.step not in steps_in(folder):
            raise ArtifactError(
                f"{folder}: no checkpoint of step {config.step}; there are "
                f"{', '.join(map(str, steps_in(folder))) or 'none'}"
            )
        first = Checkpoint.open(step_folder(folder, config.step))
    else:
        found = newest(folder)
        if found is None:
            raise ArtifactError(f"{folder}: no whole checkpoint")
        first = found
    if config.weights == "ema" and not first.names("ema"):
        raise RequestError(
            f"{first.folder}: holds no averaged weights; train with ema: 0.999 or take weights: raw"
        )
    if config.weights == "best":
        best = first.state["best_step"]
        if best is None:
            raise RequestError(
                f"{first.folder}: no validation was made at a saved step; make validate_every and "
                "checkpoint_every meet, or take weights: raw"
            )
        return [Checkpoint.open(step_folder(folder, best))]
    if config.weights == "average":
        steps = [step for step in steps_in(folder) if step < first.step][-(config.average_of - 1) :]
        return [first, *(Checkpoint.open(step_folder(folder, step)) for step in reversed(steps))]
    return [first]


def place(model: Autoregressive, checkpoints: list[Checkpoint], config: Config) -> None:
    """Put the chosen weights, and the buffers, into a fresh model; ArtifactError by name."""
    first = checkpoints[0]
    kind = "ema" if config.weights == "ema" else "model"
    weights: dict[str, Tensor]
    if len(checkpoints) > 1:
        weights = average(checkpoints, kind)
    else:
        weights = dict(first.tensors(kind))
    weights.update(first.tensors("buffer"))
    model_folder.place_weights(model, weights, first.folder, torch.float32)


def card_of(
    description: dict[str, Any], checkpoint: Checkpoint, config: Config, decoder: Artifact
) -> dict[str, Any]:
    """What the model does not know itself: where it comes from and how good it is."""
    final = checkpoint.state["final"]
    loss = final.get("validation_loss")
    if config.weights == "ema":
        loss = final.get("ema_validation_loss")
    elif config.weights == "best":
        loss = checkpoint.state["best_loss"]
    elif config.weights == "average":
        loss = None
    validation: dict[str, Any] = {"split": "validation", "unit": "nats an element"}
    if loss is not None:
        validation["loss"] = loss
    if "unigram_loss" in decoder.metrics:
        validation["unigram_loss"] = decoder.metrics["unigram_loss"]
    return {
        "modality": description["modality"],
        "vocabulary": description["vocabulary"],
        "grid": description["grid"],
        "classes": description["classes"],
        "step": checkpoint.step,
        "tokens_seen": checkpoint.state["tokens_seen"],
        "weights": config.weights,
        "validation": validation,
        "lineage": {
            "tokens": description["tokens"][0]
            if len(description["tokens"]) == 1
            else description["tokens"],
            "decoder": decoder.fingerprint,
        },
    }


def matching_tokenizers(
    description: dict[str, Any], given: list[Artifact], decoder: Artifact
) -> dict[str, Artifact]:
    """Each tokenizer by its fingerprint; LineageError, with both, where one does not belong."""
    wanted = {entry["fingerprint"]: entry for entry in description["tokenizers"]}
    if description.get("captions") is not None:
        wanted[description["captions"]["fingerprint"]] = description["captions"]
    found = {}
    for artifact in given:
        fingerprint = str(artifact.card["fingerprint"])
        if fingerprint not in wanted:
            same_kind = [f for f, e in wanted.items() if e["kind"] == artifact.card["kind"]]
            if not same_kind:
                kinds = ", ".join(dict.fromkeys(entry["kind"] for entry in wanted.values()))
                raise LineageError(
                    f"{artifact.folder}: a tokenizer of kind {artifact.card['kind']}; "
                    f"{decoder.folder} was trained with {kinds} alone: leave it out of `tokenizer`"
                )
            require_same(
                "tokenizers", same_kind[0], str(decoder.folder), fingerprint, str(artifact.folder)
            )
        found[fingerprint] = artifact
    return found


def copy_tokenizers(
    description: dict[str, Any], given: dict[str, Artifact], folder: Path
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Copies beside the model; the card's `tokenizer` (the only one) and `tokenizers`.

    One lies in `tokenizer/`, several in `tokenizer-<modality>/`.
    """
    entries = []
    several = len(description["tokenizers"]) > 1
    for entry in description["tokenizers"]:
        name = f"tokenizer-{entry['modality']}" if several else "tokenizer"
        path = None
        artifact = given.get(entry["fingerprint"])
        if artifact is not None:
            path = name
            _copy(artifact, folder / name)
        entries.append({**entry, "path": path})
    if several:
        return None, entries
    kept = ("kind", "fingerprint", "path")
    return {name: entries[0][name] for name in kept}, entries


def copy_captions_tokenizer(
    description: dict[str, Any], given: dict[str, Artifact], folder: Path
) -> dict[str, Any] | None:
    """The card's `captions`: the tokenizer of what the model is conditioned on, copied to
    `tokenizer-captions/`; None for a model without captions."""
    captions = description.get("captions")
    if captions is None:
        return None
    artifact = given.get(captions["fingerprint"])
    if artifact is None:
        say(
            "handoff: no tokenizer of captions among the inputs `tokenizer`: the model will take "
            "no prompts"
        )
        return {**captions, "path": None}
    name = "tokenizer-captions"
    _copy(artifact, folder / name)
    return {**captions, "path": name}


def _copy(artifact: Artifact, folder: Path) -> None:
    """A tokenizer, verified on the way."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        load_tokenizer(artifact.folder).save(folder)
    except TokenizerError as error:
        raise ArtifactError(str(error)) from None
    # The card as training left it: codebook health and all.
    shutil.copyfile(artifact.folder / "card.json", folder / "card.json")
