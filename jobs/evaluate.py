"""Exact figures of a model, a tokenizer or samples, each with its split and unit.

    model + tokens    likelihood of each element: nats, bits, perplexity, beside the unigram
                      guess; by position, by class; text: a byte and a word, beside gzip, bzip2,
                      xz and zstd on the same bytes
    tokenizer + data  what encode then decode gives back: PSNR, SSIM, codebook usage; with files
                      of weights LPIPS and the Fréchet distance of Inception features (rFID)
    samples + data    whether a classifier fitted on real images names the class asked for
    probe: true       a linear probe of each layer of an image Transformer, against raw pixels
                      and the same architecture with random weights (tokens and data with labels)

Every figure of `evaluation.json` is explained in it. Scoring goes on where it was killed, in a
pipeline and from the command line.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from chainrule.jobs.sample import open_source, require_tokenizers
from chainrule.pipeline.artifact import (
    ArtifactError,
    require_same,
)
from chainrule.pipeline.bare_stage import bare_stage
from chainrule.pipeline.config import Settings, runtime
from chainrule.pipeline.data.reader import Shards
from chainrule.pipeline.data.tokens import TokenSet
from chainrule.pipeline.devices import chosen_device
from chainrule.pipeline.evaluation import codecs
from chainrule.pipeline.evaluation.agreement import measure_agreement
from chainrule.pipeline.evaluation.factors import Parts
from chainrule.pipeline.evaluation.figures import Figures
from chainrule.pipeline.evaluation.frechet import inception
from chainrule.pipeline.evaluation.held_out import (
    ConditionKind,
    Encoded,
    HeldOut,
    Stored,
    documents,
    event_batches,
    label_of,
    labelled_images,
)
from chainrule.pipeline.evaluation.likelihood import (
    Tally,
    position_picture,
    score_documents,
    score_events,
)
from chainrule.pipeline.evaluation.likelihood_figures import (
    put_audio,
    put_images,
    put_rows,
    put_text,
    put_tokens,
)
from chainrule.pipeline.evaluation.linear_probe import probe_model, probe_picture, put_probes
from chainrule.pipeline.evaluation.round_trip import measure_audio, measure_images, measure_texts
from chainrule.pipeline.models.inputs import has_captions
from chainrule.pipeline.models.made import MADE
from chainrule.pipeline.sampling.request import Source
from chainrule.pipeline.stage import Input, Stage, StageFailed

INPUTS = {
    "model": Input(("handoff",), optional=True),
    "tokens": Input(("pretokenize",), optional=True),
    "data": Input(("ingest",), optional=True),
    "tokenizer": Input(("train_tokenizer",), optional=True),
    "samples": Input(("sample",), optional=True),
}


class ProbeSettings(Settings):
    """The linear probe's training set; its held-out set is the split that is evaluated."""

    train: int = Field(5000, ge=20, description="training images, from all over the split")
    seed: int = Field(0, description="of the random-weight model that is compared with")


class Config(Settings):
    """What is evaluated, and how far."""

    split: Literal["train", "validation"] = "validation"
    limit: int | None = Field(None, ge=1, description="samples, from all over the split")
    stride: int | None = Field(
        None, ge=1, description="elements a later window scores; default: half the context"
    )
    unigram_tokens: int = Field(
        2_000_000, ge=1, description="training tokens counted for the context-free guess"
    )
    codecs: bool = Field(True, description="text: gzip, bzip2, xz and zstd on the same bytes")
    probe: ProbeSettings | None = Field(None, description="linear probe of each layer")
    lpips: Path | None = Field(
        None, description="LPIPS: safetensors of lpips.LPIPS(net='vgg').state_dict()"
    )
    inception: Path | None = Field(
        None, description="rFID: safetensors of torch-fidelity's InceptionV3 weights"
    )
    factors: bool = Field(True, description="keep the nats of every element in factors.zarr")
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = runtime(64, ge=1, description="windows or events scored together")
    device: str = runtime("auto", description="auto, cpu, cuda, cuda:1, …")
    patience_s: float = runtime(3600.0, gt=0, description="how long rank 0 waits for others")


def main(config: Config, stage: Stage) -> None:
    figures = Figures()
    source = None
    if stage.optional("model") is not None:
        source = open_source(stage.input("model").folder, config.device, config.dtype)
        figures.fact("model", str(source.card.get("fingerprint", "")))
    held_out = _held_out(config, stage, source)
    if source is not None and held_out is not None:
        likelihood(config, stage, source, held_out, figures)
    elif not any(stage.optional(role) for role in ("data", "samples")):
        raise StageFailed(
            f"stage '{stage.name}': nothing to evaluate on: give 'tokens' beside 'model', "
            "'data' beside 'tokenizer' or 'model', or 'samples' beside 'data'"
        )
    if stage.is_main:
        if stage.optional("data") is not None:
            reconstruct(config, stage, source, figures)
        if stage.optional("samples") is not None:
            shards = Shards.open(stage.input("data").folder)
            measure_agreement(stage.input("samples").folder, shards, figures)
        if config.probe is not None:
            probe(config, config.probe, stage, source, figures)
        figures.write(stage.folder)
        stage.summary.update(figures.numbers)


# --- likelihood ----------------------------------------------------------------------------


def _held_out(config: Config, stage: Stage, source: Source | None) -> HeldOut | None:
    """What is scored: token shards, or raw shards through the model's tokenizer."""
    if stage.optional("tokens") is not None:
        return Stored(TokenSet.open(stage.input("tokens").folder, config.split), config.limit)
    if source is None or source.tokenizer is None or stage.optional("data") is None:
        return None
    shards = Shards.open(stage.input("data").folder)
    if shards.modality != source.tokenizer.modality:
        raise StageFailed(
            f"{shards.folder}: holds {shards.modality}, the model's tokenizer is one of "
            f"{source.tokenizer.modality}"
        )
    captions = getattr(source.model.config, "captions", None)
    if captions is not None and shards.captioned and source.captioner is None:
        raise StageFailed(
            f"{stage.input('model').folder}: holds no tokenizer of captions; hand the model off "
            "again with it among the inputs `tokenizer`, or evaluate on `tokens`"
        )
    return Encoded(
        shards,
        source.tokenizer,
        config.split,
        config.limit,
        captioner=source.captioner if captions is not None else None,
        caption_tokens=captions.length if captions is not None else 0,
    )


def likelihood(
    config: Config, stage: Stage, source: Source, tokens: HeldOut, figures: Figures
) -> None:
    """Score the split, then say what the sums are."""
    _same_tokenizer(source, tokens, stage)
    _same_data(tokens, stage)
    _same_classes(source, tokens)
    if config.stride is not None and config.stride > source.elements:
        raise StageFailed(
            f"stride {config.stride} is more than the model's context of {source.elements}"
        )
    parts = Parts(stage.folder, tokens.lengths, stage.rank, stage.world_size)
    todo = parts.resume()
    as_events = is_events(source, tokens)
    total = int(parts.offsets[todo.stop] - parts.offsets[todo.start])
    with stage.progress(total, "tokens") as progress:
        for scored in parts.append(_score(config, source, tokens, todo, as_events)):
            progress.update(scored)
    parts.complete()
    if not stage.is_main:
        return
    parts.wait(config.patience_s)
    tally = Tally(positions=int(tokens.lengths.max()) if as_events else 4096)
    for i, nats in enumerate(parts.samples()):
        tally.add(nats, label_of(tokens.meta(i)) if tokens.classes else None)
    condition = condition_kind(source, tokens)
    given = "" if condition is None else f" given its {condition}"
    windows = None if as_events else (source.elements, _stride(config, source))
    if tokens.vocabulary.continuous:
        card = source.tokenizer.card() if source.tokenizer is not None else {}
        put_rows(figures, tokens, tally, given, card.get("log_volume"))
    else:
        put_tokens(figures, tokens, tally, given, windows, config.unigram_tokens)
    if as_events:
        _figures_of_ensemble(config, source, tokens, figures)
    if tokens.modality == "text":
        data = stage.optional("data")
        raw = Shards.open(data.folder) if data is not None else None
        baseline = codecs.Baseline() if config.codecs else None
        with stage.progress(tokens.samples if raw else None, "documents") as progress:
            put_text(figures, tokens, tally, raw, baseline, progress)
    elif tokens.modality == "image":
        put_images(figures, tokens, tally)
    elif tokens.tokenizer_kind == "mulaw" and source.tokenizer is not None:
        put_audio(figures, tokens, tally, source.tokenizer.settings.bits)
    curve = tally.curve()
    with open(stage.folder / "by_position.csv", "w") as file:
        file.write("position,nats\n")
        file.writelines(f"{position},{nats:.6f}\n" for position, nats in curve)
    picture = stage.folder / "by_position.png"
    position_picture(picture, curve, "token", f"{config.split} loss against position")
    stage.picture(picture)
    parts.to_zarr(config.factors)


def is_events(source: Source, tokens: HeldOut) -> bool:
    """Whether a sample is one event of the model (an image), not a sequence of any length."""
    if tokens.grid is None and len(source.model.event_shape) == 1:
        return False
    if len(set(tokens.lengths.tolist())) != 1 or int(tokens.lengths[0]) != source.elements:
        raise StageFailed(
            f"{tokens.shards.folder}: samples of {int(tokens.lengths[0])} tokens; "
            f"the model's events have {source.elements}; evaluate on the tokens it was trained on"
        )
    return True


def _same_tokenizer(source: Source, tokens: HeldOut, stage: Stage) -> None:
    require_tokenizers(source, tokens, f"the model {stage.input('model').name}")
    size = (source.card.get("vocabulary") or {}).get("size", tokens.vocabulary.size)
    if size < tokens.vocabulary.size:
        raise StageFailed(
            f"{tokens.shards.folder}: a vocabulary of {tokens.vocabulary.size}, "
            f"the model's has {size}; pretokenize with the model's tokenizer"
        )


def _same_data(tokens: HeldOut, stage: Stage) -> None:
    """The raw data, where given, is what the tokens were made from."""
    data = stage.optional("data")
    if data is None:
        return
    if data.index["modality"] != tokens.modality:
        raise StageFailed(
            f"{data.folder}: holds {data.index['modality']}, the tokens are of {tokens.modality}"
        )
    made_from = tokens.shards.index.get("source")
    if made_from and data.fingerprint:
        require_same(
            "raw data and tokens",
            made_from,
            str(tokens.shards.folder),
            data.fingerprint,
            str(data.folder),
        )


def _same_classes(source: Source, tokens: HeldOut) -> None:
    """Classes go by their names: those of other data may have other numbers. StageFailed where
    the model does not know one."""
    known, given = source.card.get("classes"), tokens.classes
    if condition_kind(source, tokens) != "class" or known is None or given is None:
        return
    unknown = [name for name in given if name not in known]
    if unknown:
        raise StageFailed(
            f"{tokens.shards.folder}: has a class '{unknown[0]}', which the model does not know "
            f"(it knows {', '.join(map(str, known[:8]))}{', …' if len(known) > 8 else ''})"
        )
    tokens.known_as = [known.index(name) for name in given]


def _score(
    config: Config, source: Source, tokens: HeldOut, todo: range, as_events: bool
) -> Iterator[np.ndarray]:
    model, given = source.model, condition_kind(source, tokens)
    if as_events:
        batches = event_batches(tokens, todo, model.event_shape, given, config.batch_size)
        yield from score_events(model, batches)
    else:
        found = documents(tokens, todo, given)
        yield from score_documents(model, found, _stride(config, source), config.batch_size)


def _stride(config: Config, source: Source) -> int:
    return config.stride or max(source.elements // 2, 1)


def condition_kind(source: Source, tokens: HeldOut) -> ConditionKind | None:
    """What samples are scored under, if anything: their own class or caption."""
    if has_captions(source.model.config):
        return None if tokens.captions is None else "caption"
    return "class" if source.card.get("classes") and tokens.classes is not None else None


@torch.inference_mode()
def _figures_of_ensemble(config: Config, source: Source, tokens: HeldOut, figures: Figures) -> None:
    """A MADE of several masks as the mixture of them all: one likelihood a sample."""
    model = source.model
    if not isinstance(model, MADE) or model.config.masks == 1:
        return
    device = next(model.parameters()).device
    nats = 0.0
    given = condition_kind(source, tokens)
    for x, cond in event_batches(
        tokens, range(tokens.samples), model.event_shape, given, config.batch_size
    ):
        cond = None if cond is None else cond.to(device)
        nats -= float(model.ensemble_log_prob(x.to(device), cond).double().sum())
    figures.put(
        "ensemble_nats_per_sample",
        nats / tokens.samples,
        config.split,
        f"nats of -log of the mean of p(sample) over the model's {model.config.masks} masks",
    )


# --- reconstruction --------------------------------------------------------------------------


def reconstruct(config: Config, stage: Stage, source: Source | None, figures: Figures) -> None:
    """encode then decode on the raw samples of the split."""
    from chainrule.tokenizers.interface import TokenizerError

    tokenizer = _tokenizer(stage, source)
    if tokenizer is None:
        return
    shards = Shards.open(stage.input("data").folder)
    if shards.modality != tokenizer.modality:
        raise StageFailed(
            f"{shards.folder}: holds {shards.modality}, the tokenizer is one of "
            f"{tokenizer.modality}"
        )
    samples = shards.spread(config.split, config.limit)
    if not samples:
        raise StageFailed(f"{shards.folder}: split '{config.split}' is empty")
    figures.fact("tokenizer", tokenizer.fingerprint)
    figures.fact("tokenizer.kind", tokenizer.kind)
    with stage.progress(len(samples), "samples") as progress:
        batches = _raw_batches(config, shards, samples, progress)
        try:
            _measure(config, stage, tokenizer, batches, figures)
        except TokenizerError as error:
            raise StageFailed(f"{shards.folder}: split '{config.split}': {error}") from None


def _measure(
    config: Config, stage: Stage, tokenizer: Any, batches: Iterator[list[Any]], figures: Figures
) -> None:
    if tokenizer.modality == "image":
        picture = stage.folder / "reconstructions.png"
        device = chosen_device(config.device)
        perceptual = _lpips(config.lpips, device) if config.lpips is not None else None
        features = inception(config.inception, device) if config.inception else None
        measure_images(tokenizer, batches, config.split, figures, picture, perceptual, features)
        stage.picture(picture)
    elif tokenizer.modality == "text":
        measure_texts(tokenizer, batches, config.split, figures)
    elif tokenizer.modality == "audio":
        measure_audio(tokenizer, batches, config.split, figures)


def _lpips(weights: Path, device: str) -> Any:
    from chainrule.tokenizers.interface import TokenizerError
    from chainrule.tokenizers.losses import lpips_of_images

    try:
        return lpips_of_images(weights, device)
    except TokenizerError as error:
        raise StageFailed(f"lpips: {error}") from None


def _tokenizer(stage: Stage, source: Source | None) -> Any:
    from chainrule.tokenizers import interface

    given = stage.optional("tokenizer")
    if given is None:
        return source.tokenizer if source is not None else None
    try:
        return interface.load(given.folder)
    except interface.TokenizerError as error:
        raise ArtifactError(str(error)) from None


def _raw_batches(
    config: Config, shards: Shards, samples: list[int], progress: Any
) -> Iterator[list[Any]]:
    for start in range(0, len(samples), config.batch_size):
        batch = samples[start : start + config.batch_size]
        found = [shards.read(config.split, i) for i in batch]
        yield [sample.raw(shards.modality) for sample in found if sample is not None]
        progress.update(len(batch))


# --- linear probe ----------------------------------------------------------------------------


def probe(
    config: Config,
    settings: ProbeSettings,
    stage: Stage,
    source: Source | None,
    figures: Figures,
) -> None:
    """Accuracy by layer, as figures and a picture."""
    from chainrule.pipeline.models.registry import build

    if source is None or stage.optional("data") is None or source.modality != "image":
        raise StageFailed("probe: needs a 'model' of images and its labelled 'data'")
    if not hasattr(source.model, "features"):
        raise StageFailed(
            f"probe: a {source.card['family']} offers no features of its layers; "
            "give a Transformer, or leave probe out"
        )
    shards = Shards.open(stage.input("data").folder)
    sets = []
    for split, most in (("train", settings.train), (config.split, config.limit)):
        images, labels = labelled_images(shards, split, most)
        codes = source.tokenizer.encode(list(images))
        events = torch.from_numpy(np.stack([c.ravel() for c in codes]).astype(np.int64))
        events = events.reshape(len(images), *source.model.event_shape)
        sets.append((events.split(config.batch_size), images, labels))
    random_model = build(source.card["model"], seed=settings.seed).to(source.device)
    found = probe_model(source.model, random_model, sets[0], sets[1])
    put_probes(figures, found, len(sets[0][2]), config.split)
    picture = stage.folder / "probe.png"
    probe_picture(picture, found, f"linear probe, {config.split} accuracy by layer")
    stage.picture(picture)


# --- outside a pipeline ------------------------------------------------------------------------


def evaluate_folder(
    model: Path,
    out: Path,
    config: Config,
    tokens: Path | None = None,
    data: Path | None = None,
) -> Path:
    """Figures of a bare model folder on the given artifacts, in the folder `out`.

    The work is done in `<out>.partial`, which a killed run leaves behind: the same request goes
    on there, another one is refused. RequestError.
    """
    if data is not None:
        Shards.open_raw(data, " (--tokens for these)")
    inputs = {"model": model, "tokens": tokens, "data": data}
    with bare_stage("evaluate", config, inputs, out) as stage:
        main(config, stage)
    return out
