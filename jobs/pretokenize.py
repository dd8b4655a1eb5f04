"""pretokenize: raw shards and a tokenizer -> token shards.

    shard i of the input --encode--> shard i of the output, and of nothing else

So any number of workers, in any order, killed at any time and started again, leave the
bytes that one leaves. The last step gathers the entries into `index.json` and compares
counts with the input's. A worker is a rank (RANK of WORLD_SIZE, no process group) or one
task of an array that calls `encode_shards` with its part; whoever runs `main` as rank 0
waits for the others' shards and writes the index.

Pictures with captions take a second, textual tokenizer (the input `captions`): each token
sample then has the ids of its captions in its metadata (`caption_ids`), a list a caption.

A collapsed codebook is refused before anything is encoded (`minimum_usage`).
"""

import math
import tempfile
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from pydantic import Field

from chainrule.jobs.piece_decoder import Piece, Submit, decoders
from chainrule.jobs.token_encoder import CaptionEncoder, batches_of, encode, encoded
from chainrule.pipeline.artifact import Artifact, read_json, write_json
from chainrule.pipeline.config import RequestError, Settings, runtime
from chainrule.pipeline.data.reader import Shards
from chainrule.pipeline.data.shards import ShardWriter, finish, finished, key_of
from chainrule.pipeline.data.tokens import OF_ONE_SHAPE
from chainrule.pipeline.devices import chosen_device
from chainrule.pipeline.graph import Pipeline, StageSpec
from chainrule.pipeline.stage import Input, Stage, StageFailed, say
from chainrule.tokenizers import interface
from chainrule.tokenizers.interface import MODALITY, Tokenizer, TokenizerError
from chainrule.tokenizers.text import SentencePieceTokenizer
from chainrule.tokenizers.views import Views

INPUTS: dict[str, Input] = {
    "data": Input(("ingest",)),
    "tokenizer": Input(("train_tokenizer",)),
    "captions": Input(("train_tokenizer",), optional=True),
}


class Config(Settings):
    batch_size: int = Field(64, ge=1, description="samples encoded at once")
    views: Views | None = Field(None, description="augmentations baked in (images)")
    caption_tokens: int = Field(
        128, ge=1, description="captions are cut after so many tokens (of the input `captions`)"
    )
    minimum_usage: float = Field(
        0.25,
        ge=0,
        le=1,
        description="least share of the reachable codes that validation data must use",
    )
    accept_collapsed: bool = runtime(False, description="encode with a collapsed codebook as well")
    max_skipped: float = Field(
        0.01, ge=0, le=1, description="share of unusable samples above which the stage stops"
    )
    device: str = runtime("auto", description="auto: a GPU where there is one")
    workers: int = runtime(
        1,
        ge=1,
        description="who decode: 1 is a thread; more are processes (of pictures)",
    )
    encoder: Literal["sentencepiece", "gigatoken"] = runtime(
        "sentencepiece", description="gigatoken: the same ids faster, checked on a sample first"
    )
    patience_s: float = runtime(3600.0, gt=0, description="rank 0 waits so long for the others")


def check(pipeline: Pipeline, spec: StageSpec) -> None:
    """Refuse a set and tokenizers that are not fit for each other, as far as their stages say."""
    config, where = cast(Config, spec.config), f"stage '{spec.name}'"
    of = {
        role: cast(Any, pipeline.stages[names[0]].config)
        for role, names in spec.inputs.items()
        if names and names[0] in pipeline.stages
    }
    data = of.get("data")
    if data is None:
        return
    set_, holds = f"stage '{spec.inputs['data'][0]}'", data.source.modality
    if "tokenizer" in of:
        kind = of["tokenizer"].tokenizer.kind
        if MODALITY[kind] != holds:
            raise RequestError(
                f"{where}: {set_} holds {holds}; the tokenizer of stage "
                f"'{spec.inputs['tokenizer'][0]}' ({kind}) is one of {MODALITY[kind]}"
            )
    if config.views is not None and holds != "image":
        raise RequestError(f"{where}: views: {set_} holds {holds}; views are for images")
    given = spec.inputs.get("captions", [])
    if data.gives_captions and not given:
        raise RequestError(f"{where}: {set_} {NO_TOKENIZER}")
    if given and not data.gives_captions:
        raise RequestError(f"{where}: {set_} holds no captions, {NO_CAPTIONS}")
    if "captions" in of and MODALITY[of["captions"].tokenizer.kind] != "text":
        kind = of["captions"].tokenizer.kind
        raise RequestError(
            f"{where}: input captions: stage '{given[0]}' is a tokenizer of {MODALITY[kind]}; "
            "captions are text"
        )


NO_TOKENIZER = (
    "holds captions: give the stage a tokenizer of text as its input `captions`, or ingest "
    "without them"
)
NO_CAPTIONS = "the stage has a tokenizer for them; set `captions` of ingest's source, or drop it"


@dataclass
class Opened:
    """The stage's inputs, fit for each other."""

    shards: Shards
    tokenizer: Tokenizer
    captions: CaptionEncoder | None
    """None where the samples have no captions."""


def main(config: Config, stage: Stage) -> None:
    opened = open_inputs(config, stage)
    encode_shards(config, stage, opened, stage.rank, stage.world_size)
    if stage.is_main:
        wait_for_all(stage.folder, len(opened.shards.entries), config.patience_s)
        write_index(config, stage, opened)


def part(config: Config, stage: Stage, part: int, parts: int) -> None:
    """One task of an array: its shards and no index. `main`, run after all, writes that."""
    encode_shards(config, stage, open_inputs(config, stage), part, parts)


def open_inputs(config: Config, stage: Stage) -> Opened:
    """The raw shards and the tokenizers; StageFailed where they are not fit for each other."""
    raw, folder = stage.input("data"), stage.input("tokenizer").folder
    shards = Shards.open(raw.folder)
    device = chosen_device(config.device)
    try:
        tokenizer = interface.load(folder, device)
    except TokenizerError as error:
        raise StageFailed(str(error)) from None
    if shards.modality != tokenizer.modality:
        raise StageFailed(
            f"{raw.folder}: holds {shards.modality}; the tokenizer of {folder} is one of "
            f"{tokenizer.modality}"
        )
    if config.views is not None and shards.modality != "image":
        raise StageFailed(f"{raw.folder}: holds {shards.modality}; views are for images")
    if config.encoder == "gigatoken":
        _use_gigatoken(shards, tokenizer, folder)
    _require_rate(raw.folder, shards, folder, tokenizer)
    _require_columns(raw.folder, shards, folder, tokenizer)
    health = tokenizer.card().get("health", {})
    usage = health.get("usage_of_reachable")
    if usage is not None and usage < config.minimum_usage and not config.accept_collapsed:
        level = f"level {health['worst_level']}: " if "worst_level" in health else ""
        raise StageFailed(
            f"{folder}: collapsed codebook: {level}{health['codebook_usage']:.1%} of "
            f"{health['codebook_size']} codes used (perplexity {health['codebook_perplexity']:.1f})"
            f", minimum_usage is {config.minimum_usage:g}\n"
            f"{MORE_CODES.get(tokenizer.kind, LEARNED_BETTER)}; "
            "or run with --accept-collapsed (accept_collapsed: true)"
        )
    return Opened(shards, tokenizer, _caption_encoder(config, stage, shards))


LEARNED_BETTER = "train it with a smaller codebook_size, longer, or with quantizer ema or fsq"
MORE_CODES = {"palette": "train it with fewer colours"}
"""What brings more of the codes into use, by kind of tokenizer."""


def _caption_encoder(config: Config, stage: Stage, shards: Shards) -> CaptionEncoder | None:
    """StageFailed where captions and a tokenizer for them do not come together."""
    given, raw = stage.optional("captions"), stage.input("data").folder
    if given is None and not shards.captioned:
        return None
    if given is None:
        raise StageFailed(f"{raw}: {NO_TOKENIZER}")
    if not shards.captioned:
        raise StageFailed(f"{raw}: holds no captions, {NO_CAPTIONS}")
    try:
        tokenizer = interface.load(given.folder)
    except TokenizerError as error:
        raise StageFailed(str(error)) from None
    if tokenizer.modality != "text":
        raise StageFailed(f"{given.folder}: a tokenizer of {tokenizer.modality}; captions are text")
    return CaptionEncoder(tokenizer, config.caption_tokens)


def _use_gigatoken(shards: Shards, tokenizer: Tokenizer, folder: Path, sample: int = 100) -> None:
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise StageFailed(
            f"{folder}: a tokenizer of kind {tokenizer.kind}; encoder gigatoken "
            "is for kind sentencepiece"
        )
    split = shards.entries[0]["split"]
    try:
        tokenizer.use_gigatoken([s.text() for s in islice(shards.iterate(split), sample)])
    except TokenizerError as error:
        raise StageFailed(f"{folder}: {error}") from None


def _require_rate(data: Path, shards: Shards, folder: Path, tokenizer: Tokenizer) -> None:
    """Recordings must be at the tokenizer's sampling rate (ingest resamples)."""
    wanted = tokenizer.card().get("sample_rate")
    first = next(shards.iterate(shards.entries[0]["split"]), None) if wanted else None
    if first is not None and first.meta.get("sample_rate", wanted) != wanted:
        raise StageFailed(
            f"{data}: recordings at {first.meta['sample_rate']} Hz, the tokenizer of {folder} "
            f"takes {wanted} Hz; set sample_rate: {wanted} in ingest"
        )


def _require_columns(data: Path, shards: Shards, folder: Path, tokenizer: Tokenizer) -> None:
    """A table must have the columns that were standardised, in their order."""
    learned = tokenizer.card().get("columns")
    if learned is not None and shards.columns is not None and shards.columns != learned:
        raise StageFailed(
            f"{data}: columns {', '.join(shards.columns)}; the tokenizer of {folder} takes "
            f"{', '.join(learned)}; set `columns` in ingest"
        )


# --- encoding ---------------------------------------------------------------------------


def encode_shards(config: Config, stage: Stage, opened: Opened, part: int, parts: int) -> None:
    """Encode every shard of this part (`part` of `parts`) that is not whole yet."""
    shards = opened.shards
    mine = range(part, len(shards.entries), parts)
    with decoders(shards, config.views, config.workers) as submit:
        _encode_shards(config, stage, opened, mine, submit)


def _encode_shards(
    config: Config, stage: Stage, opened: Opened, mine: range, submit: Submit
) -> None:
    shards = opened.shards
    allowed = _allowed(config, shards)
    skipped = tokens = encoded = 0
    began = time.monotonic()
    with stage.progress(sum(shards.entries[i]["samples"] for i in mine), "samples") as progress:
        for number in mine:
            entry = finished(stage.folder, number)
            if entry is None:
                entry = _encode_shard(config, stage.folder, opened, number, allowed, submit)
                encoded += entry["samples"]
                tokens += entry["tokens"]
            skipped += len(entry["skipped"])
            if skipped > allowed:
                raise _too_many(config, shards, entry["skipped"][-1], skipped)
            progress.update(shards.entries[number]["samples"], skipped=skipped)
    seconds = time.monotonic() - began
    if encoded:
        stage.summary["samples_per_second"] = encoded / seconds
        stage.summary["tokens_per_second"] = tokens / seconds


def _samples(shards: Shards) -> int:
    return sum(entry["samples"] for entry in shards.entries)


def _allowed(config: Config, shards: Shards) -> int:
    """Samples that may be unusable, over all parts together."""
    return math.floor(config.max_skipped * _samples(shards))


def _too_many(config: Config, shards: Shards, last: dict[str, Any], skipped: int) -> StageFailed:
    total = _samples(shards)
    return StageFailed(
        f"{last['where']}: {last['reason']}\n{skipped} of {total} samples could not be used so "
        f"far, max_skipped is {config.max_skipped:g}; mend the data, or raise it"
    )


def _encode_shard(
    config: Config, folder: Path, opened: Opened, number: int, allowed: int, submit: Submit
) -> dict[str, Any]:
    """Write token shard `number`; its entry. Batches begin anew in each shard.

    While a batch is written here, the next are decoded and encoded (token_encoder.py).
    """
    shards, tokenizer, captions = opened.shards, opened.tokenizer, opened.captions
    modality = shards.modality
    eos = tokenizer.vocabulary["specials"].get("eos") if modality == "text" else None
    shapes: set[tuple[int, ...]] = set()
    longest = cut = 0  # of the captions
    with (
        ShardWriter(folder, number, shards.entries[number]["split"]) as writer,
        closing(_batches(config, shards, number, submit)) as batches,
        closing(encoded(tokenizer, batches)) as done,
    ):
        for pieces, of_pieces in done:
            for piece, tokens in zip(pieces, of_pieces, strict=True):
                if tokens is None:
                    last = writer.skip("sample", piece.where, str(piece.fault))
                    continue
                shapes.add(tokens.shape)
                if eos is not None:
                    tokens = np.append(tokens, np.array(eos, tokens.dtype))
                meta = piece.meta
                if captions is not None:
                    ids, shortened = captions(meta["captions"])
                    longest, cut = max(longest, *map(len, ids)), cut + shortened
                    meta = {**meta, "caption_ids": ids}
                members = {"tokens.npy": tokens, "json": meta}
                writer.write(key_of(piece.number), members, tokens.size, piece.raw_bytes)
            if writer.skipped > allowed:  # inside the `with`: the cut shard is dropped
                raise _too_many(config, shards, last, writer.skipped)
        shards.check(number)
        # inside the `with`: whoever finds the shard whole finds what is known of it as well
        if modality in OF_ONE_SHAPE:
            found: dict[str, Any] = {"shapes": sorted(map(list, shapes))}
            if captions is not None:
                found |= {"longest_caption": longest, "captions_cut": cut}
            write_json(_found_path(folder, number), found)
    entry = finished(folder, number)
    assert entry is not None, f"shard {number} vanished from {folder}"
    return entry


def _batches(
    config: Config, shards: Shards, number: int, submit: Submit
) -> Generator[list[Piece], None, None]:
    samples = shards.entries[number]["samples"]
    return batches_of(submit, number, samples, config.batch_size, config.workers)


# --- the index --------------------------------------------------------------------------


def wait_for_all(folder: Path, shards: int, patience_s: float) -> None:
    """Until every shard is whole; StageFailed naming one that is not."""
    if (folder / "index.json").is_file():
        return
    until = time.monotonic() + patience_s
    while True:
        missing = [number for number in range(shards) if finished(folder, number) is None]
        if not missing:
            return
        if time.monotonic() > until:
            raise StageFailed(
                f"{folder}: shard {missing[0]} (one of {len(missing)}) was not written by its "
                f"worker within patience_s {patience_s:g}; run the same command again"
            )
        time.sleep(0.2)


def _most_views(config: Config) -> int:
    """Samples that one unreadable image takes with it, at most."""
    return config.views.count("train") if config.views is not None else 1


def _found_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.found.json"


def _gathered(
    folder: Path, shards: Shards, captions: CaptionEncoder | None
) -> tuple[list[int] | None, dict[str, Any] | None]:
    """The index's `grid`, the shape that all samples have (None where they differ, or are
    sequences), and its `captions` (see TokenSet; None without)."""
    if (folder / "index.json").is_file():  # an earlier attempt was killed after this was settled
        index = read_json(folder / "index.json")
        return index["grid"], index.get("captions")
    if shards.modality not in OF_ONE_SHAPE:
        return None, None
    found = [read_json(_found_path(folder, number)) for number in range(len(shards.entries))]
    shapes = {tuple(shape) for of_shard in found for shape in of_shard["shapes"]}
    grid = list(shapes.pop()) if len(shapes) == 1 else None
    if captions is None:
        return grid, None
    return grid, {
        "fingerprint": captions.tokenizer.fingerprint,
        "kind": captions.tokenizer.kind,
        "vocabulary_size": captions.tokenizer.vocabulary["size"],
        "longest": max(of_shard["longest_caption"] for of_shard in found),
        "cut": sum(of_shard["captions_cut"] for of_shard in found),
    }


def _require_few_skipped(config: Config, folder: Path, shards: Shards) -> None:
    """StageFailed where all parts together skipped too many, or all there was to train on: each
    saw its own shards alone."""
    if (folder / "index.json").is_file():  # an earlier attempt was killed after this was settled
        return
    entries = (finished(folder, number) for number in range(len(shards.entries)))
    whole = [entry for entry in entries if entry is not None]
    skipped = [line for entry in whole for line in entry["skipped"]]
    if len(skipped) > _allowed(config, shards):
        raise _too_many(config, shards, skipped[-1], len(skipped))
    if skipped and not sum(entry["samples"] for entry in whole if entry["split"] == "train"):
        raise StageFailed(
            f"{skipped[-1]['where']}: {skipped[-1]['reason']}\n"
            f"no training sample of {shards.folder} could be used; mend the data"
        )


def write_index(config: Config, stage: Stage, opened: Opened) -> None:
    """Gather the shards into index.json; StageFailed where a count is not the input's."""
    shards, tokenizer = opened.shards, opened.tokenizer
    _require_few_skipped(config, stage.folder, shards)
    grid, of_captions = _gathered(stage.folder, shards, opened.captions)
    index = finish(
        stage.folder,
        kind="tokens",
        modality=shards.modality,
        shards=len(shards.entries),
        classes=shards.classes,
        vocabulary=tokenizer.vocabulary,
        tokenizer={"fingerprint": tokenizer.fingerprint, "kind": tokenizer.kind},
        grid=grid,
        captions=of_captions,
        source=stage.input("data").fingerprint,
        views=config.views.model_dump(mode="json") if config.views is not None else None,
    )
    written = sum(entry["samples"] for entry in index["shards"])
    given = sum(
        entry["samples"] * (config.views.count(entry["split"]) if config.views is not None else 1)
        for entry in shards.entries
    )
    lost = index["skipped"]
    if not given - lost * _most_views(config) <= written <= given - lost:
        raise StageFailed(
            f"{stage.folder}: {written} samples written and {lost} skipped, the input gives "
            f"{given}; run the stage again with --force {stage.name}"
        )
    for path in stage.folder.glob("shard-*.found.json"):
        path.unlink()
    made = Shards.open(stage.folder)
    for number in range(len(made.entries)):
        made.check(number)
    made.close()
    for split in ("train", "validation"):
        entries = [entry for entry in index["shards"] if entry["split"] == split]
        stage.summary[f"{split}_samples"] = sum(entry["samples"] for entry in entries)
        stage.summary[f"{split}_tokens"] = sum(entry["tokens"] for entry in entries)
    if index.get("captions") is not None:
        stage.summary["longest_caption"] = index["captions"]["longest"]
        stage.summary["captions_cut"] = index["captions"]["cut"]
        if index["captions"]["cut"]:
            say(
                f"  {stage.name}: {index['captions']['cut']} captions were cut after "
                f"{config.caption_tokens} tokens (caption_tokens)"
            )
    stage.summary["skipped"] = index["skipped"]
    stage.summary["tokenizer_fingerprint"] = tokenizer.fingerprint


# --- chainrule bench pretokenize --------------------------------------------------------


def bench(
    data: Path, tokenizer: Path, config: Config, samples: int, rounds: int
) -> list[dict[str, Any]]:
    """The job against its bare encoder on ready batches: the same samples, turn about.

    As many whole training shards as hold `samples` samples. Median of `rounds`, worker processes
    being there (0.6 s each).
    """
    # a collapsed codebook encodes as fast as another
    config = config.model_copy(update={"accept_collapsed": True})
    inputs = {"data": [Artifact.bare(data)], "tokenizer": [Artifact.bare(tokenizer)]}
    speeds: dict[str, list[float]] = {"bare": [], "job": []}
    with tempfile.TemporaryDirectory() as top:
        stage = Stage("bench", "", "pretokenize", Path(top), "", inputs)
        opened = open_inputs(config, stage)
        shards = opened.shards
        counts = [0, *accumulate(entry["samples"] for entry in shards.entries)]
        enough = next((i for i, n in enumerate(counts) if n >= samples), len(counts) - 1)
        del shards.entries[enough:]
        with decoders(shards, config.views, config.workers) as submit:
            batches = [
                [piece for piece in batch if piece.fault is None]
                for number in range(enough)
                for batch in _batches(config, shards, number, submit)
            ]
            ready = sum(map(len, batches))
            encode(opened.tokenizer, batches[0])  # what is loaded or built at the first call
            for turn in range(rounds):
                began = time.perf_counter()
                for batch in batches:
                    encode(opened.tokenizer, batch)
                speeds["bare"].append(ready / (time.perf_counter() - began))
                stage.folder = Path(top) / str(turn)
                stage.folder.mkdir()
                began = time.perf_counter()
                _encode_shards(config, stage, opened, range(enough), submit)
                speeds["job"].append(ready / (time.perf_counter() - began))
    bare, job = (float(np.median(speeds[name])) for name in ("bare", "job"))
    return [{"samples": ready, "bare/s": bare, "job/s": job, "job/bare": job / bare}]
