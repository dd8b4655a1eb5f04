"""Draw samples from a handed-off model: a zarr store, pictures, texts, sound.

    load the model (and the tokenizer it carries) → which rows are missing → draw, decode,
    write whole shards → when every writer is done: manifest, contact sheet, texts, wav files

Any number of ranks work side by side, each on zarr shards of its own. Sample i depends on
(model, settings, seed, i) alone.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from chainrule.pipeline.artifact import Artifact, require_same, sha256_file, write_json
from chainrule.pipeline.config import RequestError, digest, result_settings
from chainrule.pipeline.devices import chosen_device
from chainrule.pipeline.graph import Pipeline, StageSpec
from chainrule.pipeline.models.inputs import drop_rate, has_captions, is_conditioned
from chainrule.pipeline.plan_inputs import foreseen_model
from chainrule.pipeline.sampling.completion import Given, given_of
from chainrule.pipeline.sampling.drafts import (
    Draft,
    ModelDraftSettings,
    NgramDraftSettings,
    make_draft,
)
from chainrule.pipeline.sampling.int8 import quantise
from chainrule.pipeline.sampling.request import (
    Beginning,
    Completion,
    Config,
    Request,
    Source,
    settle,
    vocabulary_size,
)
from chainrule.pipeline.sampling.sampler import Drawn, SamplingError, draw, same_in_any_batch
from chainrule.pipeline.sampling.show import decoded, show
from chainrule.pipeline.sampling.speculative import Statistics, speculate
from chainrule.pipeline.sampling.store import CAPTIONS, Layout, Store
from chainrule.pipeline.sampling.uniforms import sample_seeds
from chainrule.pipeline.stage import Input, Stage, say

if TYPE_CHECKING:
    from chainrule.pipeline.data.tokens import TokenSet
    from chainrule.pipeline.evaluation.held_out import HeldOut

__all__ = ["INPUTS", "Config", "main", "open_source", "sample_folder", "settle"]

INPUTS = {
    "model": Input(("handoff",)),
    "draft": Input(("distill", "handoff"), optional=True),
    "tokens": Input(("pretokenize",), optional=True),
}


def check(pipeline: Pipeline, spec: StageSpec) -> None:
    """Refuse guidance of a model that never learns without its condition."""
    config = cast(Config, spec.config)
    [model] = spec.inputs["model"]
    if config.guidance.scale == 1 or model not in pipeline.stages:
        return
    [decoder] = pipeline.stages[model].inputs.get("decoder", [""])
    if decoder not in pipeline.stages:
        return
    trained = foreseen_model(pipeline, pipeline.stages[decoder])
    if trained is not None and not drop_rate(trained):
        what, setting = "class", "class_dropout"
        if has_captions(trained):
            what, setting = "caption", "captions.dropout"
        raise RequestError(
            f"stage '{spec.name}': guidance: stage '{decoder}' trains with {setting} 0, so that "
            f"the model never sees a sample without its {what}; set model.{setting}: 0.1 there, "
            "or leave guidance at 1"
        )


LOSS_MEASURED_ON = 64
"""Samples on which the loss of int8 weights is measured."""


def open_source(folder: Path, device: str = "auto", dtype: str = "float32") -> Source:
    """The model in a folder and the tokenizer it carries; refused if either was altered."""
    from chainrule.pipeline import load

    chosen = torch.device(chosen_device(device))
    in_memory = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    model = load(folder, device=str(chosen), dtype=in_memory).eval()
    if dtype == "int8":
        quantise(model)
    card = card_of(folder)
    tokenizer = _tokenizer_of(card.get("tokenizer"), folder, str(chosen))
    captioner = _tokenizer_of(card.get("captions"), folder, "cpu")
    return Source(model, card, tokenizer, chosen, captioner)


def _tokenizer_of(entry: dict[str, Any] | None, folder: Path, device: str) -> Any:
    """The tokenizer that a card's entry names, None where the folder does not hold it."""
    from chainrule.tokenizers import interface

    if entry is None or entry.get("path") is None:
        return None
    try:
        tokenizer = interface.load(folder / entry["path"], device=device)
    except interface.TokenizerError as error:
        raise SamplingError(str(error)) from None
    if tokenizer.fingerprint != entry["fingerprint"]:
        raise SamplingError(
            f"{folder / entry['path']}: is {tokenizer.fingerprint[:16]}, the model was trained "
            f"with {entry['fingerprint'][:16]}; hand the model off again"
        )
    return tokenizer


def card_of(folder: Path) -> dict[str, Any]:
    """The card of a model folder; a `transformers` folder gets one of what is known of it."""
    if (folder / "card.json").is_file():
        return Artifact.bare(folder).card
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return {"fingerprint": digest([sha256_file(path) for path in files])}


# --- drawing -----------------------------------------------------------------------------


def main(config: Config, stage: Stage) -> None:
    work = Work.open(config, stage)
    work.fill(stage.rank, stage.world_size)
    if not stage.is_main:
        return
    store = work.store
    if not store.finished:
        store.wait(config.patience_s)
        store.finish()
    if work.request.captions is not None:
        write_json(stage.folder / CAPTIONS, work.request.captions.texts)
    show(work.request, work.source, store, stage)
    log_likelihood = store.read("log_likelihood")
    stage.summary["samples"] = config.number
    stage.summary["log_likelihood"] = float(log_likelihood.mean())
    stage.summary["nats_per_element"] = float(-log_likelihood.sum() / store.read("length").sum())
    if work.elements:
        stage.summary["elements_per_second"] = work.elements / work.seconds
    if work.statistics.tested:
        stage.summary["acceptance"] = work.statistics.acceptance
    if config.dtype == "int8":
        stage.summary["bits_lost_per_element"] = work.bits_lost()


def part(config: Config, stage: Stage, part: int, parts: int) -> None:
    """Draw one part of `parts`: a task of an array. `main` gathers what the parts have drawn."""
    Work.open(config, stage).fill(part, parts)


@dataclass
class Work:
    """One process at work on a store."""

    config: Config
    stage: Stage
    source: Source
    request: Request
    draft: Draft | None
    store: Store
    statistics: Statistics = field(default_factory=Statistics)
    elements: int = 0
    seconds: float = 0.0

    @classmethod
    def open(cls, config: Config, stage: Stage) -> "Work":
        """Everything that can be wrong with the request is found here, before a draw."""
        source = open_source(stage.input("model").folder, config.device, config.dtype)
        tokens = stage.optional("tokens")
        if tokens is not None and config.complete is None and not _searches(config):
            raise SamplingError(
                "tokens: the input is for `complete` and for `corpus` of an n-gram draft; "
                "set one of them, or drop the input"
            )
        begun = None
        if tokens is not None and config.complete is not None:
            begun = beginnings(config.complete, source, tokens)
        request = settle(config, source, begun, pictured(config, source))
        draft = open_draft(config, source, stage.optional("draft"), tokens)
        settings = result_settings(config)
        if config.picture is not None and request.given is not None:
            settings["input picture"] = sha256_file(config.picture.file)
            if request.given.late and stage.is_main:
                say(
                    f"sample: {request.given.late} of the {int(request.given.kept.sum())} kept "
                    "elements come after drawn ones in the model's order: what is drawn before "
                    "them has not seen them (exact: what is kept first in that order)"
                )
        if config.recording is not None:
            settings["input recording"] = sha256_file(config.recording.file)
        for role in ("draft", "tokens"):
            given = stage.optional(role)
            if given is not None:
                settings[f"input {role}"] = given.identity
        if config.dtype != "float32" and not same_in_any_batch(source.model):
            settings["rows drawn together"] = together(config)
        store = Store.start(
            stage.folder,
            model=source.card["fingerprint"],
            settings=settings,
            number=config.number,
            samples_per_shard=min(config.samples_per_shard, config.number),
            arrays=layouts(request, source),
        )
        return cls(config, stage, source, request, draft, store)

    def fill(self, part: int, parts: int) -> None:
        """Draw and write the shards of this part that are missing."""
        store = self.store
        shards = store.mine(part, parts)
        began = time.monotonic()
        with self.stage.progress(sum(len(store.rows(s)) for s in shards), "samples") as progress:
            for shard in shards:
                rows, batches = store.rows(shard), []
                for start in range(0, len(rows), self.config.batch_size):
                    indices = rows[start : start + self.config.batch_size]
                    batches.append(self.draw_block(indices))
                    self.elements += int(batches[-1].lengths.sum())
                    progress.update(len(indices))
                values = shard_arrays(self.request, self.source, self.store.arrays, rows, batches)
                store.write(shard, values)
                mean = float(values["log_likelihood"].mean())
                self.stage.log(shard, log_likelihood=mean)
        self.seconds = time.monotonic() - began

    def draw_block(self, indices: range) -> Drawn:
        """Samples of `indices`, drawn as a batch of exactly `batch_size` rows (or all there are).

        Kernels round alike only for like shapes. The last batch of a shard is therefore filled
        up (with samples that are thrown away), so that neither ranks nor resuming change a bit.
        """
        config, model = self.config, self.source.model
        rows = together(config)
        wanted = list(indices)
        plan = self.request.plan(wanted + [wanted[-1]] * (rows - len(wanted)))
        if self.draft is None:
            drawn = draw(model, plan, self.request.rules)
        else:
            drawn, found = speculate(model, self.draft, plan, self.request.rules, config.gamma)
            self.statistics.join(found)
        n = len(wanted)
        return Drawn(drawn.x[:n], drawn.lengths[:n], drawn.log_likelihood[:n])

    def bits_lost(self) -> float:
        """Bits an element that int8 weights cost: log2 of int8's likelihood over float32's.

        Of the first samples, which int8 drew: an estimate of KL(int8 || float32).
        """
        exact = open_source(self.stage.input("model").folder, self.config.device)
        exact.make_room(self.source.elements)
        n = min(self.config.number, LOSS_MEASURED_ON)
        tokens = self.store.read("tokens")[:n]
        lengths = torch.from_numpy(self.store.read("length")[:n])
        x = torch.from_numpy(tokens.astype(np.int64)).to(self.source.device)
        if tokens[0].size == self.source.elements:
            x = x.reshape(n, *self.source.model.event_shape)
        cond = self.request.cond(range(n))
        cond = None if cond is None else cond.to(self.source.device)
        with torch.no_grad():
            difference = self.source.model.log_prob(x, cond) - exact.model.log_prob(x, cond)
        counts = torch.arange(difference.shape[1]) < lengths.unsqueeze(1)
        return float(difference.cpu()[counts].double().mean()) / math.log(2)


def together(config: Config) -> int:
    """Rows of each batch: `batch_size`, or all of a shard."""
    return min(config.batch_size, config.number, config.samples_per_shard)


def source_files(config: Config) -> list[Path]:
    """Files whose content enters the stage's fingerprint. SamplingError for a missing one."""
    asked = {"picture": config.picture, "recording": config.recording}
    files = {name: of.file for name, of in asked.items() if of is not None}
    for name, file in files.items():
        if not file.is_file():
            raise SamplingError(f"{name}: {file}: no such file")
    return list(files.values())


def pictured(config: Config, source: Source) -> Given | None:
    """The picture that is completed, if one is asked for."""
    if config.picture is None:
        return None
    if source.modality != "image" or source.tokenizer is None:
        raise SamplingError("picture: the model is not one of pictures; leave it out")
    shape = picture_shape(source)
    dtype = str(np.min_scalar_type((vocabulary_size(source) or 1) - 1))
    size = _decoded_layout(source, shape, dtype).shape
    return given_of(config.picture, source, shape, size)


def _searches(config: Config) -> bool:
    return isinstance(config.draft, NgramDraftSettings) and config.draft.corpus > 0


def open_draft(
    config: Config, source: Source, given: Artifact | None, tokens: Artifact | None = None
) -> Draft | None:
    """What drafts, if anything; a draft of another tokenizer's tokens is refused."""
    settings = config.draft
    if given is None and settings is None:
        return None
    model = None
    if given is not None:
        settings = settings or ModelDraftSettings()
        if not isinstance(settings, ModelDraftSettings):
            raise SamplingError(f"draft: kind '{settings.kind}' takes no model; drop the input")
        ours, theirs = source.card.get("tokenizer"), given.card.get("tokenizer")
        if ours and theirs:
            require_same(
                "tokenizers of model and draft",
                ours["fingerprint"],
                "the model",
                theirs["fingerprint"],
                str(given.folder),
            )
        draft = open_source(given.folder, str(source.device), config.dtype)
        model = draft.model
        _require_same_condition(source, draft, given.folder)
    assert settings is not None
    corpus: list[list[int]] = []
    if isinstance(settings, NgramDraftSettings) and settings.corpus:
        if tokens is None:
            raise SamplingError("draft: `corpus` takes a pretokenize artifact as input `tokens`")
        corpus = _corpus(settings.corpus, source, tokens)
    return make_draft(settings, source.model, model, corpus)


def _require_same_condition(source: Source, draft: Source, folder: Path) -> None:
    """A draft is given what the model is given, or nothing. SamplingError, LineageError."""
    ours, theirs = source.model.config, draft.model.config
    if not is_conditioned(theirs):
        return
    if has_captions(ours) != has_captions(theirs):
        raise SamplingError(
            f"draft: {folder} is conditioned on {'captions' if has_captions(theirs) else 'classes'}"
            ", the model is not; take another"
        )
    if has_captions(ours):
        require_same(
            "tokenizers of the captions of model and draft",
            str((source.card.get("captions") or {}).get("fingerprint")),
            "the model",
            str((draft.card.get("captions") or {}).get("fingerprint")),
            str(folder),
        )
        if theirs.captions.length < ours.captions.length:
            raise SamplingError(
                f"draft: {folder} takes captions of {theirs.captions.length} tokens, the model "
                f"{ours.captions.length}; take another"
            )


def _corpus(elements: int, source: Source, tokens: Artifact) -> list[list[int]]:
    """About so many elements of the training split, in the model's order of generation."""
    found = token_set(source, tokens, "train")
    return [_in_order(source, found[i][0]).tolist() for i in found.spread(elements)]


def token_set(source: Source, tokens: Artifact, split: str) -> "TokenSet":
    """A split of the `tokens` input; LineageError for another tokenizer's than the model's."""
    from chainrule.pipeline.data.tokens import TokenSet

    found = TokenSet.open(tokens.folder, split)
    require_tokenizers(source, found, "the model")
    return found


def require_tokenizers(source: Source, tokens: "TokenSet | HeldOut", model: str) -> None:
    """LineageError where tokens, or the captions beside them, are not of the tokenizers that
    the model was trained with."""
    where = str(tokens.shards.folder)
    if source.card.get("tokenizer"):
        require_same(
            "tokenizers of model and tokens",
            source.card["tokenizer"]["fingerprint"],
            model,
            tokens.tokenizer_fingerprint,
            where,
        )
    captions = source.card.get("captions")
    if captions is None or tokens.captions is None:
        return
    require_same(
        "tokenizers of the captions of model and tokens",
        captions["fingerprint"],
        model,
        tokens.captions["fingerprint"],
        where,
    )
    longest, length = tokens.captions["longest"], source.model.config.captions.length
    if longest > length:
        raise SamplingError(
            f"{where}: captions of up to {longest} tokens, the model takes {length}; pretokenize "
            f"with caption_tokens: {length}"
        )


def _in_order(source: Source, ids: np.ndarray) -> torch.Tensor:
    """Tokens of a sample (...) in the model's order of generation, (t,)."""
    x = torch.from_numpy(ids.astype(np.int64)).reshape(1, -1)
    if x.shape[1] == source.elements:
        x = source.model.to_sequence(x.reshape(1, *source.model.event_shape))
    return x[0]


def beginnings(complete: Completion, source: Source, tokens: Artifact) -> list[Beginning]:
    """The first samples of the validation split, in the model's order of generation."""
    found = token_set(source, tokens, "validation")
    if found.classes is not None and source.card.get("classes") not in (None, found.classes):
        raise SamplingError(
            f"complete: the classes of {tokens.folder} are not the model's; take tokens of its own"
        )
    begun = []
    for i in range(min(complete.of, len(found))):
        ids, meta = found[i]
        x = _in_order(source, ids.reshape(-1)[: source.elements])
        caption = (meta["captions"][0], meta["caption_ids"][0]) if "caption_ids" in meta else None
        begun.append(Beginning(x.numpy(), meta.get("label"), caption))
    return begun


def sample_folder(model_folder: Path, out_folder: Path, config: Config) -> Path:
    """Samples of a bare model folder into a folder of one's own; nothing there is overwritten."""
    stage = Stage(
        name="sample",
        pipeline="",
        job="sample",
        folder=Path(out_folder),
        fingerprint="",
        inputs={"model": [Artifact.bare(model_folder)]},
    )
    main(config, stage)
    return Path(out_folder)


# --- what is stored ------------------------------------------------------------------------


DECODED = {"image": "images", "audio": "audio", "table": "rows"}
"""The array that holds the decoded samples of a modality."""


def layouts(request: Request, source: Source) -> dict[str, Layout]:
    """The arrays of the store, a row each: their shapes and dtypes."""
    size = vocabulary_size(source)
    dtype = str(np.min_scalar_type(size - 1)) if size is not None else "float32"
    shape = token_shape(request, source)
    arrays = {
        "tokens": Layout(shape, dtype),
        "length": Layout((), "int64"),
        "log_likelihood": Layout((), "float64"),
        "seed": Layout((), "int64"),
    }
    if request.classes is not None:
        arrays["class"] = Layout((), "int64")
    if request.captions is not None:
        arrays["caption"] = Layout((), "int64")
    if source.tokenizer is not None and source.modality in DECODED:
        arrays[DECODED[source.modality]] = _decoded_layout(source, shape, dtype)
    return arrays


def _decoded_layout(source: Source, shape: tuple[int, ...], dtype: str) -> Layout:
    """What the tokenizer makes of one sample's tokens."""
    blank = np.full(shape, _offset(source), dtype=dtype)
    decoded = np.asarray(source.tokenizer.decode([blank])[0])
    return Layout(decoded.shape, str(decoded.dtype))


def token_shape(request: Request, source: Source) -> tuple[int, ...]:
    """A sample's tokens: the grid of a picture, else the sequence."""
    return picture_shape(source) or (request.columns,)


def picture_shape(source: Source) -> tuple[int, ...]:
    """The grid of a picture's tokens, empty for a model of sequences."""
    if source.card.get("grid"):
        grid = tuple(source.card["grid"])
        if int(np.prod(grid)) == source.elements:
            return grid
        return tuple(source.model.event_shape)
    return tuple(source.model.event_shape) if len(source.model.event_shape) > 1 else ()


def _offset(source: Source) -> int:
    vocabulary = source.card.get("vocabulary") or {"ranges": {}}
    return int(vocabulary["ranges"].get(source.modality, (0, 0))[0])


def shard_arrays(
    request: Request,
    source: Source,
    layout: Mapping[str, Layout],
    rows: range,
    batches: Sequence[Drawn],
) -> dict[str, np.ndarray]:
    """The arrays of one shard, of these layouts, from the batches drawn for it."""
    shape = token_shape(request, source)
    columns = int(np.prod(shape))
    sequences = torch.zeros(len(rows), columns, dtype=batches[0].x.dtype)
    at = 0
    for batch in batches:
        sequences[at : at + len(batch.x), : batch.x.shape[1]] = batch.x
        at += len(batch.x)
    if columns == source.elements:
        sequences = source.model.to_event(sequences).flatten(1)
    tokens = sequences.numpy().reshape(len(rows), *shape).astype(layout["tokens"].dtype)
    arrays = {
        "tokens": tokens,
        "length": np.concatenate([batch.lengths for batch in batches]),
        "log_likelihood": np.concatenate([batch.log_likelihood for batch in batches]),
        "seed": sample_seeds(request.config.seed, np.asarray(rows)),
    }
    if request.classes is not None:
        arrays["class"] = np.array([request.classes[i % len(request.classes)] for i in rows])
    if request.captions is not None:
        arrays["caption"] = np.array([request.captions.asked(i) for i in rows])
    for name in DECODED.values():
        if name in layout:
            arrays[name] = decoded(source, tokens)
    return arrays
