"""Code files under a model, and get the same bytes back: the proof of a likelihood.

    compress_files      MODEL FILE... -> one container, verified before it takes its name
    main                the stage: the documents of a split, coded and decoded, reported

What the model was not made for is stored with zstd or raw, and said so (`coding/forms.py`). The
way back is `decompress.py`.
"""

import math
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from pydantic import Field

from chainrule.jobs.sample import open_source
from chainrule.pipeline.artifact import write_json
from chainrule.pipeline.coding import container
from chainrule.pipeline.coding.archive import (
    Named,
    Report,
    alphabet_of,
    pack,
    promised_bytes,
    total_ideal_bits,
    unpack,
)
from chainrule.pipeline.coding.blocks import Layout
from chainrule.pipeline.coding.entropy import CodingError
from chainrule.pipeline.coding.forms import Adapter, Symbols, write_wav
from chainrule.pipeline.coding.header import ContainerError, Header, Parts
from chainrule.pipeline.config import RequestError, runtime
from chainrule.pipeline.data.reader import Sample, Shards
from chainrule.pipeline.destinations import require_file_place
from chainrule.pipeline.sampling.request import Source
from chainrule.pipeline.stage import Input, Stage, StageFailed
from chainrule.pipeline.whole_file import whole

DType = Literal["float32", "bfloat16"]
DTYPES = get_args(DType)
INPUTS = {"model": Input(("handoff",)), "data": Input(("ingest",))}
SUFFIX = ".cr"
SHOWN = 2 * container.KEPT
"""Digits of a fingerprint that a container keeps and messages show."""


class CompressError(RequestError):
    """A file, model or container that cannot be used as asked."""


class Config(Layout):
    """Which documents are coded, and how sequences are cut into rows."""

    split: Literal["train", "validation"] = "validation"
    limit: int | None = Field(None, ge=1, description="samples, from all over the split")
    dtype: DType = "float32"
    device: str = runtime("auto", description="auto, cpu, cuda, cuda:1, …")

    def for_files(self) -> Self:
        """The same, of files that are named; CompressError where a split's choice was set."""
        wrong = sorted({"split", "limit"} & self.model_fields_set)
        if wrong:
            known = sorted(set(type(self).model_fields) - {"split", "limit"})
            raise CompressError(
                f"--set {wrong[0]}: chooses documents of a split, in a pipeline; files are named. "
                f"Known here: {', '.join(known)}"
            )
        return self

    @property
    def layout(self) -> Layout:
        return Layout(**{name: getattr(self, name) for name in Layout.model_fields})


def open_adapter(source: Source) -> Adapter:
    """How files become symbols for this model. CompressError for a model that cannot code."""
    model, tokenizer = source.model, source.tokenizer
    if tokenizer is None and source.card.get("tokenizers"):
        kinds = ", ".join(str(entry["modality"]) for entry in source.card["tokenizers"])
        raise CompressError(
            f"the model is over the tokens of several tokenizers ({kinds}), and a file has those "
            "of one; compress with a model of one tokenizer"
        )
    if tokenizer is None:
        raise CompressError(
            "the model folder carries no tokenizer, so it says nothing of files; "
            "hand the model off together with its tokenizer"
        )
    try:
        alphabet_of(model)
    except TypeError as error:
        raise CompressError(
            f"the model has no discrete head, and only probabilities can be coded with: {error}"
        ) from None
    except CodingError as error:
        raise CompressError(f"the model cannot code anything: {error}") from None
    classes = len(source.card.get("classes") or [])
    if tokenizer.modality != "image":
        return Adapter(tokenizer, classes=classes)
    grid = tuple(source.card.get("grid") or model.event_shape)
    shape = grid if math.prod(grid) == source.elements else tuple(model.event_shape)

    def to_sequence(tokens: np.ndarray) -> Symbols:
        x = torch.from_numpy(tokens.astype(np.int64)).reshape(1, *model.event_shape)
        sequence: Symbols = model.to_sequence(x)[0].numpy()
        return sequence

    def to_tokens(sequence: Symbols) -> np.ndarray:
        event = model.to_event(torch.from_numpy(sequence)[None].cpu())
        return event.numpy().reshape(shape)

    image = np.asarray(tokenizer.decode([np.zeros(shape, dtype=np.int64)])[0])
    h, w, c = image.shape
    return Adapter(tokenizer, (h, w, c), to_sequence, to_tokens, classes)


def class_chooser(source: Source) -> Callable[[Symbols], int] | None:
    """For a model with classes: the class under which an item is cheapest, by its likelihood.

    Costs a teacher-forced pass a class; the class itself is in the container's header.
    """
    names = source.card.get("classes")
    if not names:
        return None
    model, elements = source.model, source.elements

    @torch.no_grad()
    def choose(item: Symbols) -> int:
        head = torch.from_numpy(item[:elements])[None].to(source.device)
        if len(item) >= elements:
            head = model.to_event(head)
        known = torch.arange(len(names), device=source.device)
        nats = -model.log_prob(head.expand(len(names), *head.shape[1:]), known).sum(1)
        return int(nats.argmin())

    return choose


# --- files -------------------------------------------------------------------------------------


def compress_files(
    model_folder: Path,
    files: Sequence[Path],
    out: Path,
    verify: bool = True,
    layout: Layout | None = None,
    device: str = "auto",
    force: bool = False,
    report: Callable[[int], None] = lambda symbols: None,
    dtype: str = "float32",
) -> list[Report]:
    """Write `out`, a container of `files`; a report for each. CompressError and nothing written.

    With `verify` the container is decoded, and every byte compared, before it gets its name.
    The model's folder is kept in it as a hint where it is not for that larger than promised.
    """
    out = Path(out)
    if out.exists() and not force:
        raise CompressError(f"{out}: exists; choose another name or pass --force")
    if not out.parent.is_dir():
        raise CompressError(f"{out.parent}: no such folder")
    require_file_place(out)
    for path in files:
        if out.exists() and Path(path).exists() and os.path.samefile(path, out):
            raise CompressError(f"{out}: is one of the files to compress; name another with --out")
    named = [(name, _read(path)) for name, path in zip(_names(files), files, strict=True)]
    source = open_source(Path(model_folder), device, dtype)
    adapter = open_adapter(source)
    try:
        header, streams, reports = pack(
            source.model,
            adapter,
            named,
            layout or Layout(),
            class_chooser(source),
            report,
        )
    except CodingError as error:
        raise CompressError(str(error)) from None
    try:
        with whole(out) as temporary:
            write_container(temporary, header, streams, reports, source, model_folder)
            if verify:
                verify_container(temporary, source, adapter, named, reports, report)
    except ContainerError as error:
        raise CompressError(str(error)) from None
    return reports


def write_container(
    path: Path,
    header: Header,
    streams: Sequence[Parts],
    reports: Sequence[Report],
    source: Source,
    model_folder: Path,
) -> int:
    """Write what `pack` gave under `source`, and give its size in bytes."""
    header.fingerprint = str(source.card["fingerprint"])[:SHOWN]
    header.folder = str(model_folder)
    size = container.write(path, header, streams)
    names = sum(len(os.fsencode(entry.name)) for entry in header.entries)
    if size > promised_bytes(reports) + names:
        header.folder = ""
        size = container.write(path, header, streams)
    return size


def verify_container(
    path: Path,
    source: Source,
    adapter: Adapter,
    named: Sequence[Named],
    reports: Sequence[Report],
    report: Callable[[int], None] = lambda symbols: None,
) -> None:
    """Decode the container and compare; CompressError names the file that differs."""
    back = unpack(container.read(path), source.model, adapter, report)
    for (name, data), (other, decoded), entry in zip(named, back, reports, strict=True):
        # of a file that is exact in pixels, `unpack` has compared what it restored
        if name != other or (entry.exact == "bytes" and data != decoded):
            raise CompressError(f"{name}: does not come back as it was; nothing was written")


def _names(files: Sequence[Path]) -> list[str]:
    """Names under which files are stored: their last parts, as many as tell them apart."""
    if not files:
        raise CompressError("no files are given")
    names = [Path(path).name for path in files]
    if len(set(names)) == len(names):
        return names
    common = Path(os.path.commonpath([Path(path).resolve().parent for path in files]))
    names = [Path(path).resolve().relative_to(common).as_posix() for path in files]
    if len(set(names)) != len(names):
        raise CompressError("the same file is given twice")
    return names


def _read(path: Path) -> bytes:
    """A file's bytes; CompressError if it is no regular file (a pipe might never end), cannot be
    read, or changes meanwhile."""
    try:
        with open(
            path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise CompressError(f"{path}: not a regular file")
            data = file.read()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise CompressError(f"{path}: cannot be read ({error.strerror})") from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or len(
        data
    ) != after.st_size:
        raise CompressError(f"{path}: changed while it was being read; try again")
    return data


def printed(reports: Sequence[Report], container_bytes: int) -> Iterator[str]:
    """A line a file, and one for the whole container."""
    for r in reports:
        ideal = f", the model's own {r.ideal_bytes:,.1f}" if r.ideal_bytes is not None else ""
        if r.cut_bytes >= 1:
            ideal += f" ({r.cut_bytes:,.0f} of it for cutting into rows)"
        why = f" ({r.why})" if r.why else ""
        exact = "" if r.exact == "bytes" else f"; comes back with the same {r.exact}, not bytes"
        yield (
            f"{r.name}: {r.original_bytes:,} -> {r.coded_bytes:,} bytes{ideal}, "
            f"{r.bits_per_byte:.3f} bits a byte, {r.how}{why}{exact}"
        )
    coded = sum(r.coded_bytes for r in reports)
    yield (
        f"container: {container_bytes:,} bytes, of which {container_bytes - coded:,} are header "
        "(names, checksums, numeric contract); the model's own bytes are not counted"
    )


def named_file(sample: Sample) -> Named:
    """A sample as a file that models code: of the FLAC that shards hold, its samples as WAV."""
    suffix = next(name for name in sample.members if name != "json")
    if suffix == "flac":
        return f"{sample.key}.wav", write_wav(*sample.audio())
    return f"{sample.key}.{suffix}", sample.members[suffix]


# --- the stage -----------------------------------------------------------------------------------


def main(config: Config, stage: Stage) -> None:
    """Code the samples of a split, decode them, compare, and report sizes and speeds."""
    if not stage.is_main:
        return
    source = open_source(stage.input("model").folder, config.device, config.dtype)
    adapter = open_adapter(source)
    shards = Shards.open(stage.input("data").folder)
    named = [named_file(sample) for sample in shards.pick(config.split, config.limit)]
    if not named:
        raise StageFailed(f"{shards.folder}: split '{config.split}' is empty")
    began = time.monotonic()
    with stage.progress(None, "symbols coded") as progress:
        try:
            header, streams, reports = pack(
                source.model, adapter, named, config.layout, class_chooser(source), progress.update
            )
        except CodingError as error:
            raise StageFailed(str(error)) from None
    encoded = time.monotonic()
    path = stage.folder / f"{config.split}{SUFFIX}"
    size = write_container(path, header, streams, reports, source, stage.input("model").folder)
    with stage.progress(None, "symbols decoded") as progress:
        verify_container(path, source, adapter, named, reports, progress.update)
    decoded = time.monotonic()
    _report(config, stage, reports, size, encoded - began, decoded - encoded)


def _report(
    config: Config,
    stage: Stage,
    reports: Sequence[Report],
    size: int,
    encode_s: float,
    decode_s: float,
) -> None:
    original = sum(r.original_bytes for r in reports)
    modelled = [r for r in reports if r.ideal_bytes is not None]
    original_modelled = sum(r.original_bytes for r in modelled)
    coded = sum(r.coded_bytes for r in modelled)
    ideal = total_ideal_bits(reports) / 8
    summary: dict[str, Any] = {
        "split": config.split,
        "files": len(reports),
        "files_by_model": len(modelled),
        "original_bytes": original,
        "container_bytes": size,
        "bits_per_byte": 8 * size / max(original, 1),
        "coded_bits_per_byte": 8 * coded / max(original_modelled, 1),
        "ideal_bits_per_byte": 8 * ideal / max(original_modelled, 1),
        "overhead": coded / ideal - 1 if ideal else 0.0,
        "verified": "every file decoded and compared",
    }
    units = {
        "bits_per_byte": "bits of the whole container a byte of the originals",
        "coded_bits_per_byte": "bits of the coded streams a byte, of the files the model coded",
        "ideal_bits_per_byte": "bits of -log2 p a byte, of the same files: the model's own claim",
        "overhead": "coded over ideal, less one",
    }
    write_json(
        stage.folder / "compression.json",
        {**summary, "units": units, "per_file": [asdict(r) for r in reports]},
    )
    speeds = {
        "encode_bytes_per_second": original / max(encode_s, 1e-9),
        "decode_bytes_per_second": original / max(decode_s, 1e-9),
    }
    stage.summary.update({**summary, **speeds})
    for i, r in enumerate(reports):
        stage.log(i, coded_bytes=r.coded_bytes, original_bytes=r.original_bytes)
