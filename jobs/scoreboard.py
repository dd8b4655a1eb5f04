"""Models and codecs on one axis over one set of files: bits, bytes, speed, verified.

    a split of ingest's data → each codec, each way (alone, joined, primed) → each model,
    coded and decoded → scoreboard.json, scoreboard.md, scoreboard.png

A model's row gives its ideal bits (-log2 p) beside its coded bytes, and both with and without
the bytes of the model itself. Coded bytes are those of the whole container, since a codec's are
with its headers too. The unit is a byte of text, a value of an image (a dimension),
a sample of audio.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from chainrule.jobs.compress import (
    CompressError,
    class_chooser,
    named_file,
    open_adapter,
    verify_container,
    write_container,
)
from chainrule.jobs.sample import open_source
from chainrule.pipeline.artifact import Artifact, write_json
from chainrule.pipeline.bare_stage import bare_stage
from chainrule.pipeline.coding.archive import LARGER, Named, pack
from chainrule.pipeline.coding.blocks import Layout
from chainrule.pipeline.coding.forms import Adapter
from chainrule.pipeline.config import runtime
from chainrule.pipeline.data.reader import Sample, Shards
from chainrule.pipeline.evaluation import codecs
from chainrule.pipeline.evaluation.codecs import Codec
from chainrule.pipeline.models.folder import weight_files
from chainrule.pipeline.sampling.request import Source
from chainrule.pipeline.stage import Input, Stage, StageFailed

INPUTS = {
    "model": Input(("handoff",), many=True, optional=True),
    "data": Input(("ingest",)),
}
COLUMNS = {
    "bytes": "coded, with every header: of a codec its own format's, of a model those of the whole "
    "container (names, checksums, numeric contract)",
    "ideal": "-log2 p alone, under the model; what it did not code, as stored",
    "with the model's bytes": "the same and the model's weights once",
}
"""What the figures count, said in `scoreboard.json` and below the table."""
UNITS = {"text": "bits a byte", "image": "bits/dim", "audio": "bits a sample"}


class Config(Layout):
    """Which files, and which ways of giving them to codecs."""

    split: Literal["train", "validation"] = "validation"
    limit: int | None = Field(None, ge=1, description="samples, from all over the split")
    primed: bool = Field(
        False, description="text: byte codecs also after the training split, as a model was"
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = runtime("auto", description="auto, cpu, cuda, cuda:1, …")

    @property
    def layout(self) -> Layout:
        return Layout(**{name: getattr(self, name) for name in Layout.model_fields})


@dataclass(frozen=True)
class Row:
    """One line of the scoreboard."""

    name: str
    way: str
    """How the data were given: alone, joined, primed; of a model: alone, static or adapting."""
    coded_bytes: int
    """With every header: of a model the whole container's size."""
    bits: float
    """A unit (byte, dim, sample), coded: 8 * coded_bytes / units."""
    ideal_bits: float | None = None
    """A unit, -log2 p of the files a model coded plus the rest as stored; None for codecs, and
    where it coded none: every one is smaller without it."""
    model_bytes: int = 0
    bits_with_model: float | None = None
    encode_per_second: float = 0.0
    """Units coded a second."""
    decode_per_second: float | None = None
    """None where a way cannot be decoded by itself (primed), or nothing was by the model."""
    verified: bool = False
    stored: int = 0
    """Files that the model was not made for, stored without it, and why the first of them was."""
    why_stored: str = ""


@dataclass
class Files:
    """The samples of a split, as codecs and as models take them."""

    modality: str
    named: list[Named]
    things: list[Any]
    """bytes, uint8 (H, W, C) or int16 (T,)"""
    units: int
    rate: int | None = None

    @classmethod
    def of(cls, shards: Shards, split: str, limit: int | None) -> "Files":
        if shards.count(split) == 0:
            raise StageFailed(f"{shards.folder}: split '{split}' is empty")
        if shards.modality not in UNITS:
            raise StageFailed(f"{shards.folder}: holds {shards.modality}; no codec is for that")
        found = cls(shards.modality, [], [], 0)
        for sample in shards.pick(split, limit):
            found._add(sample)
        return found

    def _add(self, sample: Sample) -> None:
        self.named.append(named_file(sample))
        if self.modality == "text":
            self.things.append(sample.members["txt"])
        elif self.modality == "image":
            self.things.append(sample.image())
        else:
            samples, self.rate = sample.audio()
            self.things.append(samples)
        self.units += _units(self.things[-1])


def _units(thing: Any) -> int:
    return len(thing) if isinstance(thing, bytes) else int(thing.size)


def main(config: Config, stage: Stage) -> None:
    if not stage.is_main:
        return
    shards = Shards.open_raw(stage.input("data").folder)
    models = stage.inputs.get("model", [])
    for artifact in models:  # before the first is measured, which may take hours
        open_coder(config, artifact, shards.modality)
    files = Files.of(shards, config.split, config.limit)
    rows: list[Row] = []
    with stage.progress(None, "entries") as progress:
        for row in codec_rows(files):
            rows.append(row)
            progress.update(1)
        if config.primed and files.modality == "text":
            training = b"".join(s.members["txt"] for s in shards.iterate("train"))
            rows += primed_rows(files, training)
        for artifact in models:
            rows.append(model_row(config, artifact, files, stage.folder))
            progress.update(1)
    rows.sort(key=lambda row: row.bits)
    unit = UNITS[files.modality]
    about = {
        "split": config.split,
        "files": len(files.things),
        "unit": unit,
        "units": files.units,
        "columns": COLUMNS,
        "rows": [asdict(row) for row in rows],
    }
    write_json(stage.folder / "scoreboard.json", about)
    (stage.folder / "scoreboard.md").write_text(table(rows, unit))
    picture(stage.folder / "scoreboard.png", rows, unit)
    stage.picture(stage.folder / "scoreboard.png")
    for row in rows:
        stage.summary[f"{row.name}.{row.way}"] = row.bits


def codecs_for(files: Files) -> list[Codec]:
    if files.modality == "text":
        return codecs.byte_codecs()
    if files.modality == "image":
        return codecs.image_codecs()
    assert files.rate is not None
    return codecs.audio_codecs(files.rate)


def codec_rows(files: Files) -> list[Row]:
    """Every codec, the files alone and joined."""
    rows = [_codec_row(codec, "alone", files.things, files.units) for codec in codecs_for(files)]
    joined: Any = None
    if files.modality == "text":
        joined = b"".join(files.things)
    elif files.modality == "audio":
        joined = np.concatenate(files.things)
    elif len({image.shape for image in files.things}) == 1:
        joined = codecs.atlas(files.things)
    if joined is not None:
        rows += [_codec_row(codec, "joined", [joined], files.units) for codec in codecs_for(files)]
    return rows


def _codec_row(codec: Codec, way: str, things: Sequence[Any], units: int) -> Row:
    began = time.monotonic()
    coded = [codec.encode(thing) for thing in things]
    encoded = time.monotonic()
    back = [codec.decode(data) for data in coded]
    decoded = time.monotonic()
    if not all(codecs.same(a, b) for a, b in zip(things, back, strict=True)):
        raise StageFailed(f"{codec.name}: does not give back what it was given")
    size = sum(len(data) for data in coded)
    return Row(
        codec.name,
        way,
        size,
        8 * size / units,
        encode_per_second=units / max(encoded - began, 1e-9),
        decode_per_second=units / max(decoded - encoded, 1e-9),
        verified=True,
    )


def primed_rows(files: Files, training: bytes) -> list[Row]:
    """Byte codecs on the joined documents after the training split, which is not counted."""
    held_out = b"".join(files.things)
    rows = []
    for codec in codecs.byte_codecs():
        before = len(codec.encode(training))
        began = time.monotonic()
        size = len(codec.encode(training + held_out)) - before
        seconds = time.monotonic() - began
        speed = (len(training) + len(held_out)) / max(seconds, 1e-9)
        rows.append(
            Row(codec.name, "primed", size, 8 * size / files.units, encode_per_second=speed)
        )
    return rows


def open_coder(config: Config, artifact: Artifact, modality: str) -> tuple[Source, Adapter]:
    """A model and how files become its symbols; StageFailed where it is one of other files."""
    source = open_source(artifact.folder, config.device, config.dtype)
    try:
        adapter = open_adapter(source)
    except CompressError as error:
        raise StageFailed(f"{artifact.folder}: {error}") from None
    if adapter.tokenizer.modality != modality:
        raise StageFailed(
            f"{artifact.folder}: a model of {adapter.tokenizer.modality}, the data are "
            f"{modality}; leave it out of this scoreboard"
        )
    return source, adapter


def model_row(config: Config, artifact: Artifact, files: Files, folder: Path) -> Row:
    """A model, every file alone (or in blocks), coded, decoded and compared."""
    source, adapter = open_coder(config, artifact, files.modality)
    began = time.monotonic()
    header, streams, reports = pack(
        source.model, adapter, files.named, config.layout, class_chooser(source)
    )
    encoded = time.monotonic()
    stored = [report for report in reports if report.ideal_bytes is None]
    if len(stored) == len(reports) and not stored[0].why.startswith(LARGER):
        raise StageFailed(
            f"{artifact.folder}: codes none of the {len(reports)} files; "
            f"{stored[0].name}: {stored[0].why}"
        )
    path = folder / ".scoreboard.cr"
    try:
        size = write_container(path, header, streams, reports, source, artifact.folder)
        verify_container(path, source, adapter, files.named, reports)
    finally:
        path.unlink(missing_ok=True)
    decoded = time.monotonic()
    ideal = sum(r.coded_bytes if r.ideal_bytes is None else r.ideal_bytes for r in reports)
    none_coded = len(stored) == len(reports)
    model_bytes = sum(path.stat().st_size for path in weight_files(artifact.folder))
    return Row(
        artifact.name,
        "static" if config.adapt is None else "adapting",
        size,
        8 * size / files.units,
        None if none_coded else 8 * ideal / files.units,
        model_bytes,
        8 * (size + model_bytes) / files.units,
        files.units / max(encoded - began, 1e-9),
        None if none_coded else files.units / max(decoded - encoded, 1e-9),
        True,
        len(stored),
        stored[0].why if stored else "",
    )


def table(rows: Sequence[Row], unit: str) -> str:
    """The scoreboard as a Markdown table, best first."""
    lines = [
        f"| coder | way | {unit} | ideal | with the model's bytes | bytes | encode/s | decode/s "
        "| stored |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        ideal = f"{row.ideal_bits:.3f}" if row.ideal_bits is not None else ""
        heavy = f"{row.bits_with_model:.3f}" if row.bits_with_model is not None else ""
        decode = f"{row.decode_per_second:,.0f}" if row.decode_per_second else ""
        lines.append(
            f"| {row.name} | {row.way} | {row.bits:.3f} | {ideal} | {heavy} | "
            f"{row.coded_bytes:,} | {row.encode_per_second:,.0f} | {decode} | {row.stored or ''} |"
        )
    lines += ["", *(f"- {name}: {meaning}" for name, meaning in COLUMNS.items())]
    return "\n".join(lines) + "\n"


def picture(path: Path, rows: Sequence[Row], unit: str) -> None:
    """Bars, best first; models in colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 0.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = list(reversed(rows))
    labels = [
        f"{row.name}, {row.way}" + (f" ({row.stored} stored)" if row.stored else "")
        for row in shown
    ]
    colours = ["tab:blue" if row.model_bytes else "silver" for row in shown]
    bars = axes.barh(labels, [row.bits for row in shown], color=colours)
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.set_xlabel(f"{unit} (shorter is better; the models' own bytes not counted)")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def scoreboard(
    models: Sequence[Path], data: Path, out: Path, config: Config | None = None
) -> list[str]:
    """Bare model folders and a folder of raw shards; the table's lines. RequestError."""
    config = config or Config()
    Shards.open_raw(data)
    with bare_stage("scoreboard", config, {"model": models, "data": data}, out) as stage:
        main(config, stage)
    return (out / "scoreboard.md").read_text().splitlines()
