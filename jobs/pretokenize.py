"""pretokenize: raw shards and a tokenizer -> token shards.

    shard i of the input --encode--> shard i of the output, and of nothing else

So any number of workers, in any order, killed at any time and started again, leave the
bytes that one leaves. The last step gathers the entries into `index.json` and compares
counts with the input's. A worker is a rank (RANK of WORLD_SIZE, no process group) or one
task of an array that calls `encode_shards` with its part; whoever runs `main` as rank 0
waits for the others' shards and writes the index.

A collapsed codebook is refused before anything is encoded (`minimum_usage`).
"""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from chainrule.pipeline.artifact import read_json, write_json
from chainrule.pipeline.config import Settings, runtime
from chainrule.pipeline.data.reader import Sample, Shards
from chainrule.pipeline.data.shards import ShardWriter, finish, finished
from chainrule.pipeline.stage import Input, Stage, StageFailed
from chainrule.tokenizers import interface
from chainrule.tokenizers.interface import Tokenizer, TokenizerError

INPUTS: dict[str, Input] = {
    "data": Input(("ingest",)),
    "tokenizer": Input(("train_tokenizer",)),
}


class Config(Settings):
    batch_size: int = Field(64, ge=1, description="samples encoded at once")
    minimum_usage: float = Field(
        0.25,
        ge=0,
        le=1,
        description="least share of the reachable codes that validation data must use",
    )
    accept_collapsed: bool = Field(False, description="encode with a collapsed codebook as well")
    max_skipped: float = Field(
        0.01, ge=0, le=1, description="share of unusable samples above which the stage stops"
    )
    device: str = runtime("auto", description="auto: a GPU where there is one")
    workers: int = runtime(1, ge=1, description="threads that decode raw samples")
    patience_s: float = runtime(3600.0, gt=0, description="rank 0 waits so long for the others")


def main(config: Config, stage: Stage) -> None:
    shards, tokenizer = open_inputs(config, stage)
    encode_shards(config, stage, shards, tokenizer, stage.rank, stage.world_size)
    if stage.is_main:
        wait_for_all(stage.folder, len(shards.entries), config.patience_s)
        write_index(config, stage, shards, tokenizer)


def part(config: Config, stage: Stage, part: int, parts: int) -> None:
    """One task of an array: its shards and no index. `main`, run after all, writes that."""
    shards, tokenizer = open_inputs(config, stage)
    encode_shards(config, stage, shards, tokenizer, part, parts)


def open_inputs(config: Config, stage: Stage) -> tuple[Shards, Tokenizer]:
    """The raw shards and the tokenizer, fit for each other; StageFailed, TokenizerError."""
    raw, folder = stage.input("data"), stage.input("tokenizer").folder
    shards = Shards.open(raw.folder)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = interface.load(folder, device)
    except TokenizerError as error:
        raise StageFailed(str(error)) from None
    if shards.modality != tokenizer.modality:
        raise StageFailed(
            f"{raw.folder}: holds {shards.modality}; the tokenizer of {folder} is one of "
            f"{tokenizer.modality}"
        )
    _require_rate(raw.folder, shards, folder, tokenizer)
    health = tokenizer.card().get("health", {})
    usage = health.get("usage_of_reachable")
    if usage is not None and usage < config.minimum_usage and not config.accept_collapsed:
        raise StageFailed(
            f"{folder}: collapsed codebook: {health['codebook_usage']:.1%} of "
            f"{health['codebook_size']} codes used (perplexity {health['codebook_perplexity']:.1f})"
            f", minimum_usage is {config.minimum_usage:g}\n"
            "train it with a smaller codebook_size, longer, or with quantizer ema or fsq; "
            "or set accept_collapsed: true"
        )
    return shards, tokenizer


def _require_rate(data: Path, shards: Shards, folder: Path, tokenizer: Tokenizer) -> None:
    """Recordings must be at the tokenizer's sampling rate (ingest resamples)."""
    wanted = tokenizer.card().get("sample_rate")
    first = next(shards.iterate(shards.entries[0]["split"]), None) if wanted else None
    if first is not None and first.meta.get("sample_rate", wanted) != wanted:
        raise StageFailed(
            f"{data}: recordings at {first.meta['sample_rate']} Hz, the tokenizer of {folder} "
            f"takes {wanted} Hz; set sample_rate: {wanted} in ingest"
        )


# --- encoding ---------------------------------------------------------------------------


def encode_shards(
    config: Config, stage: Stage, shards: Shards, tokenizer: Tokenizer, part: int, parts: int
) -> None:
    """Encode every shard of this part (`part` of `parts`) that is not whole yet."""
    mine = range(part, len(shards.entries), parts)
    total = sum(entry["samples"] for entry in shards.entries)
    allowed = math.floor(config.max_skipped * total)
    skipped = tokens = encoded = 0
    began = time.monotonic()
    with stage.progress(sum(shards.entries[i]["samples"] for i in mine), "samples") as progress:
        for number in mine:
            entry = finished(stage.folder, number)
            if entry is None:
                entry = _encode_shard(config, stage.folder, shards, tokenizer, number, allowed)
                encoded += entry["samples"]
                tokens += entry["tokens"]
            skipped += len(entry["skipped"])
            if skipped > allowed:
                last = entry["skipped"][-1]
                raise StageFailed(
                    f"{last['where']}: {last['reason']}\n{skipped} of {total} samples could not "
                    f"be used, max_skipped is {config.max_skipped:g}; mend the data, or raise it"
                )
            progress.update(shards.entries[number]["samples"], skipped=skipped)
    seconds = time.monotonic() - began
    if encoded:
        stage.summary["samples_per_second"] = encoded / seconds
        stage.summary["tokens_per_second"] = tokens / seconds


def _encode_shard(
    config: Config, folder: Path, shards: Shards, tokenizer: Tokenizer, number: int, allowed: int
) -> dict[str, Any]:
    """Write token shard `number`; its entry. Batches begin anew in each shard."""
    modality = shards.modality
    eos = tokenizer.vocabulary["specials"].get("eos") if modality == "text" else None
    shapes: set[tuple[int, ...]] = set()
    with ShardWriter(folder, number, shards.entries[number]["split"]) as writer:
        for samples, raws in _decoded(shards, number, config):
            good, values = [], []
            for sample, raw in zip(samples, raws, strict=True):
                if isinstance(raw, Exception):
                    writer.skip("sample", _where(sample), str(raw))
                else:
                    good.append(sample)
                    values.append(raw)
            for sample, tokens in _encoded(tokenizer, good, values, writer):
                meta, raw_bytes = dict(sample.meta), 0
                if modality == "text":
                    raw_bytes = len(sample.members["txt"])
                    meta["bytes"] = raw_bytes
                shapes.add(tokens.shape)
                if eos is not None:
                    tokens = np.append(tokens, np.array(eos, tokens.dtype))
                writer.write(
                    sample.key, {"tokens.npy": tokens, "json": meta}, tokens.size, raw_bytes
                )
            if writer.skipped > allowed:
                break
        # inside the `with`: whoever finds the shard whole finds its shapes as well
        if modality == "image":
            write_json(_shapes_path(folder, number), sorted(map(list, shapes)))
    entry = finished(folder, number)
    assert entry is not None, f"shard {number} vanished from {folder}"
    return entry


def _decoded(
    shards: Shards, number: int, config: Config
) -> Iterator[tuple[list[Sample], list[Any]]]:
    """Samples of a shard in batches, each with its decoded form or the reason why there is none.

    The next batches are read and decoded in threads while the one at hand is encoded.
    """

    def decode(sample: Sample) -> Any:
        try:
            return sample.raw(shards.modality)
        except (OSError, ValueError, KeyError, SyntaxError) as error:
            return TokenizerError(f"{type(error).__name__}: {error}")

    with ThreadPoolExecutor(config.workers, "decode") as pool:
        pending: list[tuple[list[Sample], list[Any]]] = []
        for samples in _batches(shards.iterate_shard(number), config.batch_size):
            pending.append((samples, [pool.submit(decode, sample) for sample in samples]))
            if len(pending) > 2:
                ready, futures = pending.pop(0)
                yield ready, [future.result() for future in futures]
        for ready, futures in pending:
            yield ready, [future.result() for future in futures]


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _encoded(
    tokenizer: Tokenizer, samples: Sequence[Sample], values: Sequence[Any], writer: ShardWriter
) -> Iterator[tuple[Sample, np.ndarray]]:
    """Each sample with its tokens; one that the tokenizer refuses is skipped by name."""
    try:
        encoded = tokenizer.encode(values)
    except TokenizerError:
        # one of them is at fault: find which, and keep the rest
        for sample, value in zip(samples, values, strict=True):
            try:
                [tokens] = tokenizer.encode([value])
            except TokenizerError as error:
                writer.skip("sample", _where(sample), str(error))
            else:
                yield sample, tokens
        return
    yield from zip(samples, encoded, strict=True)


def _where(sample: Sample) -> str:
    return str(sample.meta.get("source", sample.key))


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


def _shapes_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.shapes.json"


def _grid(folder: Path, shards: Shards) -> list[int] | None:
    """The shape that the tokens of all images have; None where they differ, or are no images."""
    if (folder / "index.json").is_file():  # an earlier attempt was killed after this was settled
        found: list[int] | None = read_json(folder / "index.json")["grid"]
        return found
    if shards.modality != "image":
        return None
    shapes = {
        tuple(shape)
        for number in range(len(shards.entries))
        for shape in read_json(_shapes_path(folder, number))
    }
    return list(shapes.pop()) if len(shapes) == 1 else None


def write_index(config: Config, stage: Stage, shards: Shards, tokenizer: Tokenizer) -> None:
    """Gather the shards into index.json; StageFailed where a count is not the input's."""
    index = finish(
        stage.folder,
        kind="tokens",
        modality=shards.modality,
        shards=len(shards.entries),
        classes=shards.classes,
        vocabulary=tokenizer.vocabulary,
        tokenizer={"fingerprint": tokenizer.fingerprint, "kind": tokenizer.kind},
        grid=_grid(stage.folder, shards),
        source=stage.input("data").fingerprint,
    )
    written = sum(entry["samples"] for entry in index["shards"])
    given = sum(entry["samples"] for entry in shards.entries)
    if written + index["skipped"] != given:
        raise StageFailed(
            f"{stage.folder}: {written} samples written and {index['skipped']} skipped, the input "
            f"has {given}; run the stage again with --force {stage.name}"
        )
    for path in stage.folder.glob("shard-*.shapes.json"):
        path.unlink()
    made = Shards.open(stage.folder)
    for number in range(len(made.entries)):
        made.check(number)
    made.close()
    for split in ("train", "validation"):
        entries = [entry for entry in index["shards"] if entry["split"] == split]
        stage.summary[f"{split}_samples"] = sum(entry["samples"] for entry in entries)
        stage.summary[f"{split}_tokens"] = sum(entry["tokens"] for entry in entries)
    stage.summary["skipped"] = index["skipped"]
    stage.summary["tokenizer_fingerprint"] = tokenizer.fingerprint
