"""A page to look through the samples of a run: `chainrule gallery RUN`.

    every `sample` artifact of the run → each element's surprise under its model → nearest
    training pictures, or text copied word for word → one self-contained HTML page

It follows the artifacts' lineage to the training data (sample → model → decoder → tokens →
raw data); where a link is missing, the page says so and shows the rest.
"""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from chainrule.jobs.sample import open_source
from chainrule.pipeline.artifact import MANIFEST, Artifact, ArtifactError
from chainrule.pipeline.data.reader import Shards
from chainrule.pipeline.data.tokens import TokenSet
from chainrule.pipeline.sampling.memory import Neighbours, copied, nearest
from chainrule.pipeline.sampling.request import Source
from chainrule.pipeline.sampling.store import Store

TEMPLATE = Path(__file__).parents[1] / "pipeline" / "gallery_template.html"
SHOWN = 300
"""Samples of a stage that the page holds."""
TRAINING_PICTURES = 20_000
"""Training pictures that neighbours are looked for among: the first so many."""
VALIDATION_PICTURES = 200
BATCH = 50


def write_gallery(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run folder (or of one sample artifact); `gallery.html` in it.

    ArtifactError where there is no sample artifact.
    """
    artifacts = sample_artifacts(run)
    root = artifacts[0].folder.parent
    stages = [stage_data(artifact, root) for artifact in artifacts]
    stages.sort(key=lambda stage: stage["modality"] != "image")  # pictures come first
    out = out if out is not None else run / "gallery.html"
    data = json.dumps({"run": root.name, "stages": stages}, separators=(",", ":"))
    page = TEMPLATE.read_text(encoding="utf-8")
    # "</" would end the script element that holds the data.
    page = page.replace("/*DATA*/null", data.replace("</", "<\\/"))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(out)
    return out


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


def stage_data(artifact: Artifact, root: Path) -> dict[str, Any]:
    """What the page knows of one sample stage."""
    store = Store.open(artifact.folder)
    config = yaml.safe_load((artifact.folder / "config.yaml").read_text())
    source = open_source(_input(artifact, "model", root).folder, "cpu")
    number = min(store.number, SHOWN)
    tokens = store.read("tokens")[:number]
    lengths = store.read("length")[:number]
    classes = store.read("class")[:number] if "class" in store.arrays else None
    nats = surprise(source, tokens, lengths, classes)
    names = source.card.get("classes") or []
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
                "class": None if classes is None or classes[i] < 0 else names[classes[i]],
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
        _pictures(data, store, source, artifact, root, tokens)
    elif source.modality == "text" and source.tokenizer is not None:
        _texts(data, source, artifact, root, tokens, lengths, config)
    return data


@torch.no_grad()
def surprise(
    source: Source, tokens: np.ndarray, lengths: np.ndarray, classes: np.ndarray | None
) -> list[np.ndarray]:
    """-log p of each element given those before it, in nats, laid out as the tokens are."""
    model = source.model
    found: list[np.ndarray] = []
    whole = tokens[0].size == source.elements
    for start in range(0, len(tokens), BATCH):
        part = slice(start, start + BATCH)
        x = torch.from_numpy(tokens[part].astype(np.int64 if tokens.dtype.kind in "iu" else float))
        shape = (len(x), *model.event_shape) if whole else (len(x), -1)
        cond = None if classes is None else torch.from_numpy(classes[part])
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
    artifact: Artifact,
    root: Path,
    tokens: np.ndarray,
) -> None:
    images = store.read("images")[: len(tokens)]
    for i, sample in enumerate(data["samples"]):
        sample["picture"] = _uri(images[i])
        sample["tokens"] = tokens[i].tolist()
    training_tokens = _training_tokens(artifact, root)
    if training_tokens is None:
        data["neighbours"] = "the training tokens are not in this run folder"
        return
    training, of_training, labels = _decoded(source, training_tokens, "train", TRAINING_PICTURES)
    validation, _, _ = _decoded(source, training_tokens, "validation", VALIDATION_PICTURES)
    found = nearest(images, training)
    if len(validation):
        real = nearest(validation, training, 1).distance[:, 0]
        data["real"] = {"median": float(np.median(real)), "least": float(real.min())}
    shown = sorted({int(i) for i in found.index.ravel()})
    data["training"] = {str(i): _uri(training[i]) for i in shown}
    _note_neighbours(data, found, tokens, of_training, labels)
    data["among"] = len(training)


def _note_neighbours(
    data: dict[str, Any],
    found: Neighbours,
    tokens: np.ndarray,
    of_training: np.ndarray,
    labels: Sequence[str | None],
) -> None:
    for i, sample in enumerate(data["samples"]):
        sample["near"] = [
            {
                "training": int(j),
                "class": labels[j],
                "distance": round(float(d), 2),
                "same": float((tokens[i] == of_training[j]).mean()),
            }
            for j, d in zip(found.index[i], found.distance[i], strict=True)
        ]


def _decoded(
    source: Source, folder: Path, split: str, most: int
) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
    """Pictures of a split as the tokenizer gives them back, their tokens and class names."""
    found = TokenSet.open(folder, split)
    rows = [found[i] for i in found.shards.spread(split, most)]
    if not rows:
        return np.zeros((0,)), np.zeros((0,)), []
    tokens = np.stack([row[0] for row in rows])
    pictures: list[np.ndarray] = []
    for start in range(0, len(rows), BATCH):
        pictures += source.tokenizer.decode(list(tokens[start : start + BATCH]))
    return np.stack(pictures), tokens, [row[1].get("class") for row in rows]


def _uri(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- texts ---------------------------------------------------------------------------------


def _texts(
    data: dict[str, Any],
    source: Source,
    artifact: Artifact,
    root: Path,
    tokens: np.ndarray,
    lengths: np.ndarray,
    config: dict[str, Any],
) -> None:
    prompts = config.get("prompts") or [""]
    written = []
    for i, sample in enumerate(data["samples"]):
        asked = prompts[i % len(prompts)]
        prompt = asked if isinstance(asked, str) else source.tokenizer.decode([np.array(asked)])[0]
        sample["pieces"] = pieces(source, tokens[i, : lengths[i]])
        sample["prompt"] = len(prompt)
        written.append("".join(sample["pieces"])[len(prompt) :])
    training = _training_texts(artifact, root)
    if training is None:
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


def _input(artifact: Artifact, role: str, root: Path) -> Artifact:
    entries = artifact.manifest.get("inputs", {}).get(role, [])
    if not entries:
        raise ArtifactError(f"{artifact.folder / MANIFEST}: names no input '{role}'")
    return Artifact.open(root / entries[0]["path"])


def _training_tokens(artifact: Artifact, root: Path) -> Path | None:
    """The token shards that the model was trained on, if they are still there."""
    try:
        model = _input(artifact, "model", root)
        return _input(_input(model, "decoder", root), "tokens", root).folder
    except ArtifactError:
        return None


def _training_texts(artifact: Artifact, root: Path) -> list[str] | None:
    folder = _training_tokens(artifact, root)
    if folder is None:
        return None
    try:
        raw = _input(Artifact.open(folder), "data", root).folder
    except ArtifactError:
        return None
    return [sample.text() for sample in Shards.open(raw).iterate("train")]
