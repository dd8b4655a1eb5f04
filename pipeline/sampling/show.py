"""A finished store of samples as files to look at and listen to.

pictures   a contact sheet of all, and one of each class or caption that was asked for
sounds     a WAV file each       texts   a text file each       tables   one CSV
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from chainrule.pipeline.sampling.pictures import (
    MOST_ROWS,
    contact_sheet,
    file_stems,
    save_picture,
    save_wav,
    sheet_rows,
)
from chainrule.pipeline.sampling.request import Request, Source
from chainrule.pipeline.sampling.store import Store
from chainrule.pipeline.sampling.text import cut_at
from chainrule.pipeline.stage import Stage

DECODED_TOGETHER = 16
"""Samples that the tokenizer decodes at once: bounds the memory of large pictures. A constant:
a sample must not depend on how it is drawn, and decoders round differently in other batches."""
SHEET_OF_A_CLASS = 100
"""Pictures on the contact sheet of one class."""
SHEETS = 1000
"""Classes or captions that have a sheet of their own: as many as ImageNet has."""
TRACKED = 8
"""Texts and sounds that go to the tracking server: the first."""


def decoded(source: Source, tokens: np.ndarray) -> np.ndarray:
    """What the tokenizer makes of samples (N, ...), a few at a time."""
    parts = [
        np.stack(source.tokenizer.decode(list(tokens[start : start + DECODED_TOGETHER])))
        for start in range(0, len(tokens), DECODED_TOGETHER)
    ]
    return np.concatenate(parts)


def show(request: Request, source: Source, store: Store, stage: Stage) -> None:
    """Pictures, texts and sound files of a finished store."""
    if "images" in store.arrays:
        path = stage.folder / "sheet.png"
        save_picture(sheet(request, source, store), path)
        stage.picture(path)
        if asked_names(request, source, store) is not None and request.begun is None:
            for path in asked_sheets(request, source, store, stage.folder / "sheets"):
                stage.picture(path)
    elif "audio" in store.arrays:
        (stage.folder / "audio").mkdir(exist_ok=True)
        rate = int(source.tokenizer.card()["sample_rate"])
        for shard in range(store.shards):
            rows = store.rows(shard)
            for i, audio in zip(rows, store.read("audio", rows), strict=True):
                path = stage.folder / "audio" / f"{i:05d}.wav"
                save_wav(audio, rate, path)
                if i < TRACKED:
                    stage.picture(path)
    elif "rows" in store.arrays:
        save_table(store.read("rows"), source.tokenizer.card().get("columns"), stage.folder)
    elif source.modality == "text" and source.tokenizer is not None:
        (stage.folder / "text").mkdir(exist_ok=True)
        for i, text in enumerate(texts(request, source, store)):
            path = stage.folder / "text" / f"{i:05d}.txt"
            path.write_text(text, encoding="utf-8", newline="")
            if i < TRACKED:
                stage.picture(path)


def save_table(rows: np.ndarray, columns: Sequence[str] | None, folder: Path) -> None:
    """rows.csv of (N, D): a line of names, then numbers that read back as they were, so that
    `ingest` takes it as a table again."""
    names = columns or [f"column{i}" for i in range(rows.shape[1])]
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows.tolist())


def sheet(request: Request, source: Source, store: Store) -> Image.Image:
    """A row a class or caption, or, of completed pictures, the real one and then what was made
    of it."""
    if request.begun is None:
        names = asked_names(request, source, store)
        rows, note = sheet_rows(store.number, names)
        before = None
        if request.given is not None:
            before = np.stack([request.given.picture] * len(rows))
        return _sheet_of(store, rows, before, note)
    sequences = torch.from_numpy(np.stack([b.tokens for b in request.begun]))
    real = source.model.to_event(sequences).reshape(len(sequences), *store.arrays["tokens"].shape)
    shown = range(min(len(sequences), MOST_ROWS))
    pictures = decoded(source, real.numpy()[: len(shown)])
    made = [range(k, store.number, len(sequences))[:9] for k in shown]
    rows = [("real, completed", list(indices)) for indices in made]
    return _sheet_of(store, rows, pictures)


def asked_sheets(request: Request, source: Source, store: Store, folder: Path) -> list[Path]:
    """A sheet a class or caption that was asked for, with its first samples: sheets/CLASS.png."""
    folder.mkdir(exist_ok=True)
    asked = np.array(asked_names(request, source, store))
    places = store.read("class" if request.captions is None else "caption")
    in_order = asked[np.argsort(places, kind="stable")]
    names = list(dict.fromkeys(in_order.tolist()))[:SHEETS]
    paths = []
    for name, stem in zip(names, file_stems(names), strict=True):
        of_class = np.flatnonzero(asked == name)
        indices = of_class[:SHEET_OF_A_CLASS].tolist()
        rows = [("", indices[start : start + 10]) for start in range(0, len(indices), 10)]
        left = len(of_class) - len(indices)
        note = f"{left:,} more samples of it in the store" if left else ""
        paths.append(folder / f"{stem}.png")
        save_picture(_sheet_of(store, rows, note=note), paths[-1])
    return paths


def asked_names(request: Request, source: Source, store: Store) -> list[str] | None:
    """The class or caption that each sample was drawn for; None without."""
    if request.captions is not None:
        return [request.captions.texts[i] for i in store.read("caption")]
    if request.classes is not None:
        return [_class_name(source, i) for i in store.read("class")]
    return None


def _class_name(source: Source, index: int) -> str:
    return str(source.card["classes"][index])


def _sheet_of(
    store: Store,
    rows: Sequence[tuple[str, Sequence[int]]],
    before: np.ndarray | None = None,
    note: str = "",
) -> Image.Image:
    """A sheet that reads the pictures it shows; `before` are put first, one into each row."""
    indices = sorted({int(i) for _, row in rows for i in row[:10]})
    images = store.read("images", indices)
    at = {index: place for place, index in enumerate(indices)}
    places = [[at[int(i)] for i in row[:10]] for _, row in rows]
    if before is not None:
        places = [[len(images) + r, *row] for r, row in enumerate(places)]
        images = np.concatenate([images, before])
    labels = [label for label, _ in rows]
    return contact_sheet(images, list(zip(labels, places, strict=True)), note=note)


def texts(request: Request, source: Source, store: Store) -> list[str]:
    """The text of each sample, prompt included, up to its end or stop string."""
    tokens, lengths = store.read("tokens"), store.read("length")
    found = []
    for i, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
        prompt = request.prompts[i % len(request.prompts)]
        ids = row[:length]
        if len(ids) > len(prompt) and int(ids[-1]) in request.rules.end:
            ids = ids[:-1]
        text = source.tokenizer.decode([ids])[0]
        if request.config.stop:
            said = len(source.tokenizer.decode([ids[: len(prompt)]])[0])
            text = cut_at(text, request.config.stop, said)
        found.append(text)
    return found
