"""A page to look through the samples of a run: `chainrule gallery RUN`.

    every `sample` artifact of the run → each element's surprise under its model → nearest
    training pictures, or text copied word for word → one self-contained HTML page

It follows the artifacts' lineage to the training data (sample → model → decoder → tokens →
raw data); where a link is missing, the page says so and shows the rest.
"""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from chainrule.jobs.sample import card_of, open_source
from chainrule.pipeline.artifact import MANIFEST, Artifact, ArtifactError, read_json, require_same
from chainrule.pipeline.data.reader import Shards
from chainrule.pipeline.data.tokens import TokenSet
from chainrule.pipeline.destinations import require_file_place
from chainrule.pipeline.sampling.memory import copied, nearest
from chainrule.pipeline.sampling.request import Captioned, Source
from chainrule.pipeline.sampling.store import CAPTIONS, MANIFEST as STORE, Store
from chainrule.pipeline.whole_file import write_whole

TEMPLATE = Path(__file__).parents[1] / "pipeline" / "gallery_template.html"
SHOWN = 300
"""Samples of a stage that the page holds."""
TRAINING_PICTURES = 20_000
"""Training pictures that neighbours are looked for among, from all over the training sets: each
has to be decoded. The page says how many there are."""
VALIDATION_PICTURES = 200
BATCH = 50


def write_gallery(run: Path, out: Path | None = None, model: Path | None = None) -> Path:
    """Write the page of a run folder (or of one sample artifact); `gallery.html` in it.

    `model`: that of a folder which `chainrule sample --out` wrote, and which names it by its
    fingerprint alone. ArtifactError where there is no sample artifact, RequestError where `out`
    cannot be written.
    """
    out = out if out is not None else run / "gallery.html"
    found = [_of_command(run, model)] if _is_commands(run) else _of_stages(run, model)
    require_file_place(out)
    root = found[0].artifact.folder.parent
    stages = [stage_data(samples) for samples in found]
    stages.sort(key=lambda stage: stage["modality"] != "image")  # pictures come first
    data = json.dumps({"run": root.name, "stages": stages}, separators=(",", ":"))
    page = TEMPLATE.read_text(encoding="utf-8")
    # "</" would end the script element that holds the data.
    page = page.replace("/*DATA*/null", data.replace("</", "<\\/"))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page)
    return out


@dataclass(frozen=True)
class Samples:
    """Samples, and where the page finds what it tells of them."""

    artifact: Artifact
    model: Artifact
    root: Path
    """The run folder that the model's lineage leads through."""
    settings: dict[str, Any]


def _is_commands(run: Path) -> bool:
    """Whether `chainrule sample --out` wrote it, and no stage."""
    return (run / STORE).is_file() and not (run / MANIFEST).is_file()


def _of_command(folder: Path, model: Path | None) -> Samples:
    if model is None:
        raise ArtifactError(
            f"{folder}: was written by `chainrule sample`, and does not say where its model lies; "
            "name the model with --model"
        )
    given = Artifact.bare(model)
    header = Store.open(folder, verify=False).header
    made_by = str(card_of(model)["fingerprint"])
    require_same("samples and model", header["model"], str(folder), made_by, str(model))
    return Samples(Artifact.bare(folder), given, model.absolute().parent, header["settings"])


def _of_stages(run: Path, model: Path | None) -> list[Samples]:
    artifacts = sample_artifacts(run)
    if model is not None:
        raise ArtifactError(f"{run}: its stages know their models; leave --model out")
    root = artifacts[0].folder.parent
    return [
        Samples(
            artifact,
            _inputs(artifact, "model", root)[0],
            root,
            yaml.safe_load((artifact.folder / "config.yaml").read_text()),
        )
        for artifact in artifacts
    ]


def sample_artifacts(run: Path) -> list[Artifact]:
    if not run.is_dir():
        raise ArtifactError(f"{run}: no such folder")
    folders = (
        [run] if (run / MANIFEST).is_file() else sorted(p.parent for p in run.glob(f"*/{MANIFEST}"))
    )
    found = [Artifact.open(folder) for folder in folders]
    samples = [artifact for artifact in found if artifact.manifest.get("job") == "sample"]
    if not samples:
        raise ArtifactError(f"{run}: no samples there; run a pipeline with a stage of job sample")
    return samples


def stage_data(samples: Samples) -> dict[str, Any]:
    """What the page knows of one sample stage."""
    artifact, config = samples.artifact, samples.settings
    store = Store.open(artifact.folder)
    source = open_source(samples.model.folder, "cpu")
    number = min(store.number, SHOWN)
    tokens = store.read("tokens")[:number]
    lengths = store.read("length")[:number]
    asked, names, cond = asked_for(artifact.folder, store, source, number)
    nats = surprise(source, tokens, lengths, cond)
    data: dict[str, Any] = {
        "name": artifact.name,
        "modality": source.modality,
        "settings": {
            key: config.get(key)
            for key in ("temperature", "top_k", "top_p", "min_p", "seed")
            if config.get(key) is not None
        },
        "guidance": (config.get("guidance") or {}).get("scale", 1.0),
        "classes": names or None,
        "of": store.number,
        "samples": [
            {
                "number": i,
                "class": None if asked is None or asked[i] < 0 else names[asked[i]],
                "nats": -float(store_nats),
                "seed": str(seed),
                "surprise": np.round(nats[i], 2).tolist(),
            }
            for i, (store_nats, seed) in enumerate(
                zip(store.read("log_likelihood")[:number], store.read("seed")[:number], strict=True)
            )
        ],
    }
    if "images" in store.arrays:
        _pictures(data, store, source, samples, tokens)
    elif source.modality == "text" and source.tokenizer is not None:
        _texts(data, source, samples, tokens, lengths)
    return data


def asked_for(
    folder: Path, store: Store, source: Source, number: int
) -> tuple[np.ndarray | None, list[str], torch.Tensor | None]:
    """Of the first samples: which class or caption each is of (None where there are none), the
    names of all, and what the model takes for it."""
    if "caption" in store.arrays:
        captions = Captioned.of(read_json(folder / CAPTIONS), source)
        asked = store.read("caption")[:number]
        return asked, captions.texts, captions.ids[asked]
    names = [str(name) for name in source.card.get("classes") or []]
    if "class" not in store.arrays:
        return None, names, None
    asked = store.read("class")[:number]
    return asked, names, torch.from_numpy(asked)


@torch.no_grad()
def surprise(
    source: Source, tokens: np.ndarray, lengths: np.ndarray, condition: torch.Tensor | None
) -> list[np.ndarray]:
    """-log p of each element given those before it, in nats, laid out as the tokens are."""
    if tokens.ndim == 2:
        source.make_room(tokens.shape[1])
    model = source.model
    found: list[np.ndarray] = []
    whole = tokens[0].size == source.elements
    for start in range(0, len(tokens), BATCH):
        part = slice(start, start + BATCH)
        x = torch.from_numpy(tokens[part].astype(np.int64 if tokens.dtype.kind in "iu" else float))
        shape = (len(x), *model.event_shape) if whole else (len(x), -1)
        cond = None if condition is None else condition[part]
        nats = -model.log_prob(x.reshape(shape), cond)
        if whole:
            nats = model.to_event(nats)
        found.extend(nats.reshape(x.shape).numpy())
    if tokens.ndim == 2:
        return [row[:n] for row, n in zip(found, lengths, strict=True)]
    return found


# --- pictures ------------------------------------------------------------------------------


def _pictures(
    data: dict[str, Any],
    store: Store,
    source: Source,
    samples: Samples,
    tokens: np.ndarray,
) -> None:
    images = store.read("images", range(len(tokens)))
    for i, sample in enumerate(data["samples"]):
        sample["picture"] = _uri(images[i])
        sample["tokens"] = tokens[i].tolist()
    folders = _training_tokens(samples)
    if not folders:
        data["neighbours"] = "the training tokens are not in this run folder"
        return
    training = _Pictures.of(source, folders, "train", TRAINING_PICTURES)
    if not training.places:
        data["neighbours"] = "the model's training tokens are not of its tokenizer"
        return
    validation = _Pictures.of(source, folders, "validation", VALIDATION_PICTURES)
    real = [part for part, _, _ in validation.parts()]
    found = nearest(np.concatenate([images, *real]), (part for part, _, _ in training.parts()))
    if real:
        distances = found.distance[len(images) :, 0]
        data["real"] = {"median": float(np.median(distances)), "least": float(distances.min())}
    data["among"], data["trained_on"] = len(training.places), training.total
    data["training"] = {}
    near: dict[int, tuple[np.ndarray, str | None]] = {}
    numbers = sorted({int(j) for j in found.index[: len(images)].ravel()})
    shown = replace(training, places=[training.places[j] for j in numbers])
    rows = (row for part in shown.parts() for row in zip(*part, strict=True))
    for j, (picture, of_training, name) in zip(numbers, rows, strict=True):
        data["training"][str(j)] = _uri(picture)
        near[j] = of_training, name
    for i, sample in enumerate(data["samples"]):
        sample["near"] = [
            {
                "training": int(j),
                "class": near[int(j)][1],
                "distance": round(float(d), 2),
                "same": float((tokens[i] == near[int(j)][0]).mean()),
            }
            for j, d in zip(found.index[i], found.distance[i], strict=True)
        ]


Part = tuple[np.ndarray, np.ndarray, list[str | None]]
"""Pictures (n, H, W, C) as the tokenizer gives them back, their tokens and class names."""


@dataclass
class _Pictures:
    """Pictures of a split from all over several token sets, decoded a few at a time."""

    source: Source
    sets: list[TokenSet]
    places: list[tuple[int, int]]
    """(set, sample) of each."""
    total: int
    """Pictures that the sets hold in all."""

    @classmethod
    def of(cls, source: Source, folders: Sequence[Path], split: str, most: int) -> "_Pictures":
        """About `most` of the pictures of those sets that are of the model's tokenizer."""
        held = [f for f in folders if Shards.open(f).count(split)]
        sets = [TokenSet.open(folder, split) for folder in held]
        sets = [s for s in sets if s.tokenizer_fingerprint == source.tokenizer.fingerprint]
        total = sum(len(s) for s in sets)
        share = min(1.0, most / max(total, 1))
        places = [
            (number, i)
            for number, found in enumerate(sets)
            for i in found.shards.spread(split, max(1, round(share * len(found))))
        ]
        return cls(source, sets, places, total)

    def parts(self) -> Iterator[Part]:
        for start in range(0, len(self.places), BATCH):
            places = self.places[start : start + BATCH]
            rows = [self.sets[number][i] for number, i in places]
            tokens = np.stack([row[0] for row in rows])
            pictures = np.stack(self.source.tokenizer.decode(list(tokens)))
            yield pictures, tokens, [row[1].get("class") for row in rows]


def _uri(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- texts ---------------------------------------------------------------------------------


def _texts(
    data: dict[str, Any],
    source: Source,
    samples: Samples,
    tokens: np.ndarray,
    lengths: np.ndarray,
) -> None:
    prompts = samples.settings.get("prompts") or [""]
    written = []
    for i, sample in enumerate(data["samples"]):
        asked = prompts[i % len(prompts)]
        prompt = asked if isinstance(asked, str) else source.tokenizer.decode([np.array(asked)])[0]
        sample["pieces"] = pieces(source, tokens[i, : lengths[i]])
        sample["prompt"] = len(prompt)
        written.append("".join(sample["pieces"])[len(prompt) :])
    training = _training_texts(samples)
    if not training:
        data["neighbours"] = "the training texts are not in this run folder"
        return
    for sample, found in zip(data["samples"], copied(written, training), strict=True):
        sample["copied"] = found.longest
        sample["spans"] = [[sample["prompt"] + a, sample["prompt"] + b] for a, b in found.spans]
    data["among"] = len(training)


def pieces(source: Source, ids: np.ndarray) -> list[str]:
    """The text that each token adds; a character of several tokens comes with its last."""
    found, shown = [], ""
    for n in range(1, len(ids) + 1):
        text = source.tokenizer.decode([ids[:n]])[0]
        whole = text if n == len(ids) else text.rstrip("�")
        found.append(whole[len(shown) :])
        shown = whole if len(whole) > len(shown) else shown
    return found


# --- lineage -------------------------------------------------------------------------------


def _inputs(artifact: Artifact, role: str, root: Path) -> list[Artifact]:
    entries = artifact.manifest.get("inputs", {}).get(role, [])
    if not entries:
        raise ArtifactError(f"{artifact.folder / MANIFEST}: names no input '{role}'")
    return [Artifact.open(root / entry["path"]) for entry in entries]


def _training_tokens(samples: Samples) -> list[Path]:
    """The token shards that the model was trained on; none if any of them is not there."""
    try:
        decoder = _inputs(samples.model, "decoder", samples.root)[0]
        return [tokens.folder for tokens in _inputs(decoder, "tokens", samples.root)]
    except ArtifactError:
        return []


def _training_texts(samples: Samples) -> list[str]:
    """All training texts; none if any of the raw shards is not there."""
    try:
        raw = [
            data.folder
            for folder in _training_tokens(samples)
            for data in _inputs(Artifact.open(folder), "data", samples.root)
        ]
    except ArtifactError:
        return []
    shards = [Shards.open(folder) for folder in raw]
    return [sample.text() for s in shards if s.modality == "text" for sample in s.iterate("train")]
