"""ingest: raw files -> raw shards, split into train and validation.

    source -> list of inputs -> split by seed -> samples_per_shard inputs a shard -> index.json

Shard i is a function of its inputs alone, so a killed run goes on from its last whole shard
and any number of workers writes the same bytes. An input that cannot be used is named in
`skipped.jsonl`; more than a share `max_skipped` of them stops the stage.
"""

import math
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from chainrule.pipeline.config import Settings, runtime
from chainrule.pipeline.data import sources
from chainrule.pipeline.data.arrays import Arrays, Idx, SklearnDigits, SklearnTable, Table
from chainrule.pipeline.data.audio import AudioFolder
from chainrule.pipeline.data.captions import tidy
from chainrule.pipeline.data.images import ImageFolder, Sprites
from chainrule.pipeline.data.parquet import ParquetImages, ParquetText
from chainrule.pipeline.data.shards import (
    SPLITS,
    ShardWriter,
    finish,
    finished,
    key_of,
    read_skipped_again,
)
from chainrule.pipeline.data.text import PythonStdlib, Text
from chainrule.pipeline.processes import worker_processes
from chainrule.pipeline.stage import Input, Stage, StageFailed, say

INPUTS: dict[str, Input] = {}

SourceSettings = Annotated[
    ImageFolder
    | Sprites
    | ParquetImages
    | SklearnDigits
    | SklearnTable
    | Idx
    | Arrays
    | Table
    | Text
    | PythonStdlib
    | ParquetText
    | AudioFolder,
    Field(discriminator="kind"),
]


CLASS = "{class}"
NAMED = 5
"""Unreadable inputs that are named where there are too many."""


class Config(Settings):
    source: SourceSettings
    validation: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="share held out; null: the source's own split, or a tenth where it has none",
    )
    validation_tail: bool = Field(False, description="hold out the last inputs, not random ones")
    caption_templates: list[str] | None = Field(
        None,
        min_length=1,
        description='captions made of classes: ["a {class}", "a photo of a {class}"]; models are '
        "then conditioned on texts, not on classes",
    )
    seed: int = Field(0, description="of the split")
    samples_per_shard: int = Field(1000, ge=1)
    max_skipped: float = runtime(
        0.01, ge=0, le=1, description="share of unreadable inputs above which the stage stops"
    )
    workers: int = runtime(0, ge=0, description="processes that read; 0 reads in this one")

    @property
    def gives_captions(self) -> bool:
        return self.caption_templates is not None or self.source.gives_captions

    @field_validator("caption_templates")
    @classmethod
    def _templates_name_the_class(cls, value: list[str] | None) -> list[str] | None:
        for template in value or []:
            if CLASS not in template:
                raise ValueError(f"'{template}' has no {CLASS}")
        return value

    @model_validator(mode="after")
    def _one_split(self) -> "Config":
        if self.validation is not None and getattr(self.source, "splits", None):
            raise ValueError(
                f"validation: {self.validation}: the source's `splits` say what is held out; "
                "leave one of them out"
            )
        return self


def source_files(config: Config) -> list[Path]:
    """Raw files whose content enters the stage's fingerprint."""
    return config.source.files()


def main(config: Config, stage: Stage) -> None:
    if not stage.is_main:
        return
    source = config.source.open()
    if config.caption_templates is not None:
        fault = None
        if config.source.gives_captions:
            fault = "the source has captions of its own; give one of them"
        elif config.source.modality != "image":
            holds = config.source.modality
            fault = f"they are for pictures, the source holds {holds}; leave them out"
        elif source.classes is None:
            fault = "they are made of classes and the source has none; leave them out"
        if fault is not None:
            raise StageFailed(f"stage '{stage.name}': caption_templates: {fault}")
    splits = sources.split(source, config.validation, config.seed, config.validation_tail)
    if config.validation != 0 and not len(splits["validation"]):
        cut = " (source.document: paragraph, source.document_bytes)"
        remedy = f"cut it{cut}" if config.source.modality == "text" else "add others"
        fault = f"{len(source)} {source.what} leaves none for validation; {remedy}"
        if config.validation is not None:
            raise StageFailed(f"stage '{stage.name}': validation {config.validation:g}: {fault}")
        say(f"  {stage.name}: {fault} if a model is to be trained on it")
    shards = list(_shards(splits, config.samples_per_shard))
    skipped: list[dict[str, Any]] = []
    with stage.progress(len(source), source.what + "s") as progress:
        for number, entry in _write_all(config, stage.folder, shards, source):
            skipped += entry["skipped"]
            if len(skipped) > _allowed(config, source):
                for other in range(len(shards)):
                    read_skipped_again(stage.folder, other)
                raise _too_many(config, source, skipped)
            progress.update(len(shards[number][1]), skipped=len(skipped))
    index = finish(
        stage.folder,
        kind="raw",
        modality=config.source.modality,
        classes=source.classes,
        captioned=config.gives_captions,
        shards=len(shards),
        **({"columns": source.columns} if source.columns is not None else {}),
    )
    counts = {name: _samples(index, name) for name in SPLITS}
    if counts["train"] == 0:
        raise StageFailed(f"stage '{stage.name}': no input could be read; see skipped.jsonl")
    stage.summary |= counts
    stage.summary |= {"skipped": index["skipped"], "shards": len(shards)}
    if config.source.modality == "text":
        stage.summary["train_bytes"] = index["raw_bytes"]["train"]
        stage.summary["validation_bytes"] = index["raw_bytes"]["validation"]


def _shards(splits: dict[str, np.ndarray], size: int) -> Iterator[tuple[str, np.ndarray]]:
    """(split, numbers of its inputs) of each shard, train first."""
    for name in SPLITS:
        for start in range(0, len(splits[name]), size):
            yield name, splits[name][start : start + size]


def _write_all(
    config: Config, folder: Path, shards: list[tuple[str, np.ndarray]], source: sources.Source
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, entry) of every shard, as each becomes whole; those found whole come first."""
    missing = []
    for number in range(len(shards)):
        entry = finished(folder, number)
        if entry is None:
            missing.append(number)
        else:
            yield number, entry
    if config.workers < 2 or len(missing) < 2:
        for number in missing:
            yield number, _write(config, source, folder, number, *shards[number])
        return
    with worker_processes(config.workers, _open, config) as pool:
        pending: dict[Future[dict[str, Any]], int] = {}
        while missing or pending:
            while missing and len(pending) < 2 * config.workers:
                number = missing.pop(0)
                pending[pool.submit(_write_opened, folder, number, *shards[number])] = number
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield pending.pop(future), future.result()


def _write(
    config: Config,
    source: sources.Source,
    folder: Path,
    number: int,
    split: str,
    inputs: np.ndarray,
) -> dict[str, Any]:
    """Write one shard; its entry. StageFailed where it alone skips too many inputs."""
    skipped = []
    with ShardWriter(folder, number, split) as shard:
        for i in inputs.tolist():
            try:
                raw = source.read(i)
            except sources.Unreadable as error:
                skipped.append(shard.skip(source.what, source.where(i), str(error)))
                if shard.skipped > _allowed(config, source):
                    raise _too_many(config, source, skipped) from None
                continue
            members = raw.members
            if config.caption_templates is not None:
                meta = members["json"]
                captions = [tidy(t.replace(CLASS, meta["class"])) for t in config.caption_templates]
                members = {**members, "json": {**meta, "captions": captions}}
            shard.write(key_of(i), members, raw_bytes=raw.raw_bytes)
    entry = finished(folder, number)
    assert entry is not None, f"shard {number} vanished from {folder}"
    return entry


_opened: tuple[Config, sources.Source]  # of a worker process


def _open(config: Config) -> None:
    global _opened
    _opened = config, config.source.open()


def _write_opened(folder: Path, number: int, split: str, inputs: np.ndarray) -> dict[str, Any]:
    return _write(*_opened, folder, number, split, inputs)


def _allowed(config: Config, source: sources.Source) -> int:
    return math.floor(config.max_skipped * len(source))


def _too_many(config: Config, source: sources.Source, skipped: list[dict[str, Any]]) -> StageFailed:
    path = getattr(config.source, "path", None)
    *others, last = (entry["where"] for entry in skipped[-NAMED:])
    where = f"{path}: {last}" if path is not None else last
    if len(skipped) > NAMED:
        others.append(f"{len(skipped) - NAMED} more")
    named = f" (also {', '.join(others)})" if others else ""
    return StageFailed(
        f"{where}: {skipped[-1]['reason']}\n{len(skipped)} of {len(source)} {source.what}s could "
        f"not be used so far{named}, max_skipped is {config.max_skipped:g}; mend or remove them, "
        "or raise max_skipped"
    )


def _samples(index: dict[str, Any], split: str) -> int:
    return sum(entry["samples"] for entry in index["shards"] if entry["split"] == split)
