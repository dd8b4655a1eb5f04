"""Exact figures of a model, a tokenizer or samples, each with its split and unit.

    model + tokens    likelihood of each element: nats, bits, perplexity, beside the unigram
                      guess; by position, by class; text: a byte and a word, beside gzip, bzip2,
                      xz and zstd on the same bytes
    tokenizer + data  what encode then decode gives back: PSNR, SSIM, codebook usage
    samples + data    whether a classifier fitted on real images names the class asked for

Every figure of `evaluation.json` is explained in it. Scoring goes on where it was killed.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from chainrule.jobs.sample import Source, open_source
from chainrule.pipeline.artifact import Artifact, ArtifactError, require_same
from chainrule.pipeline.config import Settings, runtime
from chainrule.pipeline.data.reader import Shards
from chainrule.pipeline.data.tokens import TokenSet
from chainrule.pipeline.evaluation import codecs
from chainrule.pipeline.evaluation.agreement import classifier_agreement
from chainrule.pipeline.evaluation.factors import Parts
from chainrule.pipeline.evaluation.figures import Figures
from chainrule.pipeline.evaluation.held_out import Encoded, HeldOut, Stored
from chainrule.pipeline.evaluation.likelihood import (
    Tally,
    position_picture,
    score_documents,
    score_events,
    unigram_nats,
)
from chainrule.pipeline.evaluation.round_trip import measure_audio, measure_images, measure_texts
from chainrule.pipeline.models.made import MADE
from chainrule.pipeline.stage import Input, Stage, StageFailed

INPUTS = {
    "model": Input(("handoff",), optional=True),
    "tokens": Input(("pretokenize",), optional=True),
    "data": Input(("ingest",), optional=True),
    "tokenizer": Input(("train_tokenizer",), optional=True),
    "samples": Input(("sample",), optional=True),
}
LN2 = math.log(2)


class Config(Settings):
    """What is evaluated, and how far."""

    split: Literal["train", "validation"] = "validation"
    limit: int | None = Field(None, ge=1, description="samples of the split, from its first on")
    stride: int | None = Field(
        None, ge=1, description="elements a later window scores; default: half the context"
    )
    unigram_tokens: int = Field(
        2_000_000, ge=1, description="training tokens counted for the context-free guess"
    )
    codecs: bool = Field(True, description="text: gzip, bzip2, xz and zstd on the same bytes")
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
            agree(config, stage, figures)
        figures.write(stage.folder)
        stage.summary.update(figures.numbers)


# --- likelihood ----------------------------------------------------------------------------


def _held_out(config: Config, stage: Stage, source: Source | None) -> HeldOut | None:
    """What is scored: token shards, or raw shards through the model's tokenizer."""
    if stage.optional("tokens") is not None:
        return Stored(TokenSet.open(stage.input("tokens").folder, config.split))
    if source is None or source.tokenizer is None or stage.optional("data") is None:
        return None
    return Encoded(Shards.open(stage.input("data").folder), source.tokenizer, config.split)


def likelihood(
    config: Config, stage: Stage, source: Source, tokens: HeldOut, figures: Figures
) -> None:
    """Score the split, then say what the sums are."""
    _same_tokenizer(source, tokens, stage)
    _same_data(tokens, stage)
    if config.stride is not None and config.stride > source.elements:
        raise StageFailed(
            f"stride {config.stride} is more than the model's context of {source.elements}"
        )
    samples = min(config.limit or tokens.samples, tokens.samples)
    parts = Parts(stage.folder, tokens.lengths[:samples], stage.rank, stage.world_size)
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
    tally = Tally(positions=int(tokens.lengths[:samples].max()) if as_events else 4096)
    labels = _labels(tokens, samples) if tokens.classes else None
    for i, nats in enumerate(parts.samples()):
        tally.add(nats, labels[i] if labels is not None else None)
    _figures_of_tokens(config, source, tokens, tally, as_events, figures)
    if as_events:
        _figures_of_ensemble(config, source, tokens, samples, figures)
    if tokens.modality == "text":
        _figures_of_text(config, stage, tokens, samples, tally, figures)
    elif tokens.modality == "image":
        _figures_of_images(tokens, tally, figures, config.split)
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
    card = source.card.get("tokenizer")
    if card is not None:
        require_same(
            "tokenizers of model and tokens",
            card["fingerprint"],
            f"the model {stage.input('model').name}",
            tokens.tokenizer_fingerprint,
            str(tokens.shards.folder),
        )
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


def _label(tokens: HeldOut, source: Source, meta: dict[str, Any]) -> int | None:
    """The class a sample is scored under: its own, where the model has classes."""
    if source.card.get("classes") is None or tokens.classes is None:
        return None
    return int(meta["label"]) if meta.get("label") is not None else -1


def _labels(tokens: HeldOut, samples: int) -> list[int | None]:
    return [tokens.meta(i).get("label") for i in range(samples)]


def _score(
    config: Config, source: Source, tokens: HeldOut, todo: range, as_events: bool
) -> Iterator[np.ndarray]:
    model = source.model
    if not as_events:
        stride = config.stride or max(source.elements // 2, 1)

        def documents() -> Iterator[tuple[np.ndarray, int | None]]:
            for i in todo:
                document, meta = tokens[i]
                yield document.ravel(), _label(tokens, source, meta)

        yield from score_documents(model, documents(), stride, config.batch_size)
        return

    yield from score_events(model, _event_batches(config, source, tokens, todo))


def _event_batches(
    config: Config, source: Source, tokens: HeldOut, todo: range
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """(B, *event_shape) tokens and (B,) classes of the samples, in order."""
    for start in range(todo.start, todo.stop, config.batch_size):
        pairs = [tokens[i] for i in range(start, min(start + config.batch_size, todo.stop))]
        x = torch.from_numpy(np.stack([t.ravel() for t, _ in pairs]).astype(np.int64))
        known = [_label(tokens, source, meta) for _, meta in pairs]
        cond = None if known[0] is None else torch.tensor(known)
        yield x.reshape(len(pairs), *source.model.event_shape), cond


@torch.inference_mode()
def _figures_of_ensemble(
    config: Config, source: Source, tokens: HeldOut, samples: int, figures: Figures
) -> None:
    """A MADE of several masks as the mixture of them all: one likelihood a sample."""
    model = source.model
    if not isinstance(model, MADE) or model.config.masks == 1:
        return
    device = next(model.parameters()).device
    nats = 0.0
    for x, cond in _event_batches(config, source, tokens, range(samples)):
        given = None if cond is None else cond.to(device)
        nats -= float(model.ensemble_log_prob(x.to(device), given).double().sum())
    figures.put(
        "ensemble_nats_per_sample",
        nats / max(samples, 1),
        config.split,
        f"nats of -log of the mean of p(sample) over the model's {model.config.masks} masks",
    )


def _figures_of_tokens(
    config: Config,
    source: Source,
    tokens: HeldOut,
    tally: Tally,
    as_events: bool,
    figures: Figures,
) -> None:
    split = config.split
    given = " given its class" if source.card.get("classes") and tokens.classes else ""
    context = source.elements
    how = (
        f"; windows of {context} tokens, each element after the first window with at least "
        f"{context - (config.stride or max(context // 2, 1))} before it"
        if not as_events
        else ""
    )
    mean = tally.mean
    figures.put("nats", mean, split, f"nats of -log p(token | the tokens before it{given}){how}")
    figures.put("nats_per_token", mean, split, "the same as `nats`")
    figures.put("bits_per_token", mean / LN2, split, "bits of -log2 p a token")
    figures.put("perplexity", math.exp(mean), split, "exp(nats a token)")
    figures.put(
        "nats_per_sample",
        tally.nats / max(tally.samples, 1),
        split,
        f"nats of -log p(sample{given}), mean over samples",
    )
    figures.put("tokens", tally.elements, split, "tokens scored")
    figures.put("samples", tally.samples, split, "samples scored")
    counts, used = _counts(config, tokens)
    guess = unigram_nats(counts, _held_out_counts(tokens, tally.samples))
    figures.put(
        "unigram_nats_per_token",
        guess,
        split,
        f"nats a token of the context-free guess: frequencies (add-one) of {used:,} training "
        "tokens, scored on this split",
    )
    figures.put("unigram_perplexity", math.exp(guess), split, "exp(unigram_nats_per_token)")
    for label, (nats, elements) in sorted(tally.by_class.items()):
        name = tokens.classes[label] if tokens.classes else str(label)
        figures.put(
            f"nats_per_token.class.{name}", nats / elements, split, f"nats a token, class {name}"
        )


def _counts(config: Config, tokens: HeldOut) -> tuple[np.ndarray, int]:
    """Counts (V,) of the first `unigram_tokens` training tokens, and how many those were."""
    counts = np.zeros(tokens.vocabulary.size, dtype=np.int64)
    used = 0
    for ids in tokens.training():
        if used >= config.unigram_tokens:
            break
        counts += np.bincount(ids, minlength=len(counts))
        used += len(ids)
    return counts, used


def _held_out_counts(tokens: HeldOut, samples: int) -> np.ndarray:
    counts = np.zeros(tokens.vocabulary.size, dtype=np.int64)
    for i in range(samples):
        counts += np.bincount(tokens[i][0].ravel(), minlength=len(counts))
    return counts


def _figures_of_text(
    config: Config,
    stage: Stage,
    tokens: HeldOut,
    samples: int,
    tally: Tally,
    figures: Figures,
) -> None:
    split = config.split
    size = sum(int(tokens.meta(i)["bytes"]) for i in range(samples))
    ends = "its end (eos) included" if "eos" in tokens.vocabulary.specials else "without its end"
    figures.put(
        "bits_per_byte",
        tally.nats / LN2 / max(size, 1),
        split,
        f"bits of -log2 p(document, {ends}) a UTF-8 byte of it; each document alone, the "
        "model's own bytes not counted",
    )
    figures.put("bytes", size, split, "UTF-8 bytes of the documents scored")
    figures.put("bytes_per_token", size / max(tally.elements, 1), split, "UTF-8 bytes a token")
    data = stage.optional("data")
    if data is None:
        return
    shards = Shards.open(data.folder)
    words = 0
    baseline = codecs.Baseline() if config.codecs else None
    with stage.progress(samples, "documents") as progress:
        for i in range(samples):
            sample = shards.read(split, i)
            if sample is None:
                continue
            document = sample.members["txt"]
            words += len(document.split())
            if baseline is not None:
                baseline.add(document)
            progress.update(1)
    figures.put(
        "perplexity_per_word",
        math.exp(min(tally.nats / max(words, 1), 700.0)),
        split,
        "exp(nats a word); words are what white space separates",
    )
    if baseline is None:
        return
    if baseline.bytes != size:
        raise StageFailed(
            f"{data.folder}: its first {samples} documents of {split} hold {baseline.bytes} bytes, "
            f"those of {tokens.shards.folder} {size}; give the data that the tokens were made from"
        )
    for way, sizes in baseline.finish().items():
        what = "every document alone" if way == "alone" else "all documents joined into one"
        for name, compressed in sizes.items():
            figures.put(
                f"{name}_bits_per_byte" if way == "alone" else f"{name}_joined_bits_per_byte",
                8 * compressed / max(size, 1),
                split,
                f"bits a byte of {name} at its strongest setting on the same bytes, {what}",
            )


def _figures_of_images(tokens: HeldOut, tally: Tally, figures: Figures, split: str) -> None:
    if tokens.tokenizer_kind == "pixels" and tokens.vocabulary.size == 256:
        figures.put(
            "bits_per_dim",
            tally.mean / LN2,
            split,
            "bits of -log2 p a value (pixel and channel) of 256 levels: pixel space",
        )
        return
    figures.fact(
        "bits_per_dim.note",
        f"not given: the likelihood is of {tokens.tokenizer_kind} codes (token space), and a "
        "code's likelihood is not a pixel's",
    )


# --- reconstruction --------------------------------------------------------------------------


def reconstruct(config: Config, stage: Stage, source: Source | None, figures: Figures) -> None:
    """encode then decode on the raw samples of the split."""
    tokenizer = _tokenizer(stage, source)
    if tokenizer is None:
        return
    shards = Shards.open(stage.input("data").folder)
    if shards.modality != tokenizer.modality:
        raise StageFailed(
            f"{shards.folder}: holds {shards.modality}, the tokenizer is one of "
            f"{tokenizer.modality}"
        )
    samples = min(config.limit or shards.count(config.split), shards.count(config.split))
    if samples == 0:
        raise StageFailed(f"{shards.folder}: split '{config.split}' is empty")
    figures.fact("tokenizer", tokenizer.fingerprint)
    figures.fact("tokenizer.kind", tokenizer.kind)
    with stage.progress(samples, "samples") as progress:
        batches = _raw_batches(config, shards, samples, progress)
        if tokenizer.modality == "image":
            picture = stage.folder / "reconstructions.png"
            measure_images(tokenizer, batches, config.split, figures, picture)
            stage.picture(picture)
        elif tokenizer.modality == "text":
            measure_texts(tokenizer, batches, config.split, figures)
        else:
            measure_audio(tokenizer, batches, config.split, figures)


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
    config: Config, shards: Shards, samples: int, progress: Any
) -> Iterator[list[Any]]:
    for start in range(0, samples, config.batch_size):
        stop = min(start + config.batch_size, samples)
        found = [shards.read(config.split, i) for i in range(start, stop)]
        yield [sample.raw(shards.modality) for sample in found if sample is not None]
        progress.update(stop - start)


# --- samples ---------------------------------------------------------------------------------


def agree(config: Config, stage: Stage, figures: Figures) -> None:
    """Whether class-conditional samples are named by a classifier as what was asked for."""
    import zarr

    store = zarr.open_group(str(stage.input("samples").path("samples.zarr")), mode="r")
    if "images" not in store or "class" not in store:
        raise StageFailed(
            f"{stage.input('samples').folder}: no images with classes in samples.zarr; "
            "leave 'samples' out of this evaluation"
        )
    shards = Shards.open(stage.input("data").folder)
    real, labels = _labelled(shards, "train")
    held_out, held_out_labels = _labelled(shards, "validation")
    images, asked = np.asarray(store["images"]), np.asarray(store["class"])
    found = classifier_agreement(real, labels, held_out, held_out_labels, images, asked)
    fitted = f"an SVC (RBF) fitted on {len(real)} real training images"
    figures.put(
        "classifier_agreement",
        found.agreement,
        "samples",
        f"share of {len(images)} samples that {fitted} names as the class asked for",
    )
    figures.put(
        "classifier_accuracy",
        found.accuracy,
        "validation",
        f"share of {len(held_out)} real held-out images that the same SVC names right",
    )
    for label, (right, of) in sorted(found.by_class.items()):
        name = shards.classes[label] if shards.classes else str(label)
        figures.put(
            f"classifier_agreement.class.{name}", right / of, "samples", f"of {of} asked for"
        )


def _labelled(shards: Shards, split: str) -> tuple[np.ndarray, np.ndarray]:
    samples = list(shards.iterate(split))
    if not samples:
        raise StageFailed(f"{shards.folder}: split '{split}' is empty; the classifier needs it")
    if any(sample.meta.get("label") is None for sample in samples):
        raise StageFailed(f"{shards.folder}: images without labels; the classifier needs them")
    images = np.stack([sample.image() for sample in samples])
    return images, np.array([int(sample.meta["label"]) for sample in samples])


def evaluate_folder(
    model: Path,
    out: Path,
    config: Config,
    tokens: Path | None = None,
    data: Path | None = None,
    samples: Path | None = None,
) -> Path:
    """Figures of a bare model folder on the given artifacts, into a folder of one's own."""
    given = {"model": model, "tokens": tokens, "data": data, "samples": samples}
    stage = Stage(
        name="evaluate",
        pipeline="",
        job="evaluate",
        folder=Path(out),
        fingerprint="",
        inputs={role: [Artifact.bare(path)] for role, path in given.items() if path is not None},
    )
    main(config, stage)
    return Path(out)
