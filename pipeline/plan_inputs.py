"""What stages that have not run yet will hand on: vocabularies, grids, images.

With it `plan` reckons, and `run` and `submit` refuse what could only fail later.

Read off what an input published, where it has run, and off its settings where it has not.
"""

from collections.abc import Iterable
from contextlib import closing
from typing import Any

from chainrule.pipeline.artifact import MANIFEST, read_json
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.graph import Pipeline, StageSpec

CHARACTERS = 256
"""Taken for the vocabulary of a text's characters until the text has been read."""


def published(pipeline: Pipeline, stage: str) -> dict[str, Any] | None:
    """index.json of shards that have been made under these settings."""
    folder = pipeline.folder(stage)
    if not ((folder / MANIFEST).is_file() and (folder / "index.json").is_file()):
        return None
    if stage in pipeline.stages and (
        read_json(folder / MANIFEST).get("fingerprint") != pipeline.fingerprint(stage)
    ):
        return None
    index: dict[str, Any] = read_json(folder / "index.json")
    return index


def require_trainable(pipeline: Pipeline, stages: Iterable[str]) -> None:
    """Refuse, before anything runs, a training among `stages` that could only fail when its turn
    comes: its model cannot be built, or its batch cannot be shared out. RequestError."""
    for name in stages:
        spec = pipeline.stages[name]
        if spec.job != "pretrain":
            continue
        rows_of(spec)
        settled = from_tokens(pipeline, spec)
        if unsettled(spec, settled) is None:
            model_of(spec, settled)


def ranks_of(spec: StageSpec) -> int:
    resources = spec.resources
    return resources.nodes * (resources.gpus or resources.processes)


def rows_of(spec: StageSpec) -> int:
    """Rows that a rank of a training takes at a time; RequestError where the batch does not
    divide."""
    config: Any = spec.config
    ranks = ranks_of(spec)
    parts = ranks * config.accumulate
    if config.batch_size % parts:
        raise RequestError(
            f"stage '{spec.name}': batch_size {config.batch_size} does not divide by {ranks} ranks "
            f"x accumulate {config.accumulate}; take a multiple of {parts}"
        )
    return int(config.batch_size // parts)


def from_tokens(pipeline: Pipeline, spec: StageSpec) -> dict[str, Any]:
    """What the token stages settle of a model: from their index, else from their settings."""
    settled: dict[str, Any] = {}
    sizes: list[int | None] = []
    shapes: set[tuple[int, ...]] = set()
    whole = True  # every sample is a row, as far as is known
    captions: list[dict[str, Any]] = []
    real = False
    for name in spec.inputs.get("tokens", []):
        index = published(pipeline, name)
        if index is not None:
            sizes.append(index["vocabulary"]["size"])
            real = real or not sizes[-1]
            settled["image"] = index["modality"] == "image"
            whole = whole and bool(index["grid"])
            if index["grid"]:
                settled["event_shape"] = tuple(index["grid"])
                shapes.add(settled["event_shape"])
            if index["classes"]:
                settled["classes"] = len(index["classes"])
            if index.get("captions"):
                captions.append(index["captions"])
        elif name in pipeline.stages:
            foreseen = _foreseen(pipeline, pipeline.stages[name])
            sizes.append(foreseen.pop("vocabulary_size", None))
            real = real or foreseen.pop("real", False)
            whole = whole and foreseen.get("image", False)
            if "event_shape" in foreseen:
                shapes.add(foreseen["event_shape"])
            if "captions" in foreseen:
                captions.append(foreseen.pop("captions"))
            settled |= foreseen
    if captions and whole and len(shapes) <= 1:
        longest = max(given["longest"] for given in captions)
        settled["captions"] = {**captions[0], "longest": longest}
    if real:
        settled["vocabulary_size"] = None  # numbers are no tokens: a density
    elif sizes and None not in sizes:
        settled["vocabulary_size"] = sum(size for size in sizes if size is not None)
    return settled


def _foreseen(pipeline: Pipeline, tokens: StageSpec) -> dict[str, Any]:
    """Vocabulary and grid of token shards that are not made yet, from the settings above them."""
    found: dict[str, Any] = {}
    [source] = tokens.inputs["tokenizer"]
    if source not in pipeline.stages:
        return found
    tokenizer: Any = pipeline.stages[source].config.tokenizer  # type: ignore[attr-defined]
    found["real"] = tokenizer.kind == "standardize"
    found["image"] = tokenizer.kind in ("vqvae", "vqgan", "palette", "pixels")
    if tokenizer.kind == "characters":
        found["guessed"] = ("vocabulary_size",)
    size = _vocabulary(tokenizer)
    if size is not None:
        found["vocabulary_size"] = size
    for name in tokens.inputs.get("captions", []):
        if name in pipeline.stages:
            words: Any = pipeline.stages[name].config.tokenizer  # type: ignore[attr-defined]
            found["captions"] = {
                "vocabulary_size": _vocabulary(words) or CHARACTERS,
                "longest": tokens.config.caption_tokens,  # type: ignore[attr-defined]
            }
            found["guessed"] = (*found.get("guessed", ()), "captions")
    [data] = tokens.inputs["data"]
    side = None
    if data in pipeline.stages:
        side = getattr(pipeline.stages[data].config.source, "size", None)  # type: ignore[attr-defined]
    factor = getattr(tokenizer, "downsampling", 1)
    views: Any = tokens.config.views  # type: ignore[attr-defined]
    if views is not None and views.size is not None:
        side = views.size
    if isinstance(side, int):
        side = (side, side)
    if side is not None:
        found["event_shape"] = (side[0] // factor, side[1] // factor)
    return found


def _vocabulary(tokenizer: Any) -> int | None:
    """Ids of a tokenizer of these settings, None where they do not say."""
    fixed = {"bytes": 258, "mulaw": 256, "characters": CHARACTERS}
    if tokenizer.kind in fixed:
        return fixed[tokenizer.kind]
    extra = 2 if tokenizer.kind == "sentencepiece" else 0  # bos, eos
    for field in ("codebook_size", "vocabulary_size", "colours", "levels"):
        size = getattr(tokenizer, field, None)
        if isinstance(size, int):
            return size + extra
    return None


def _asked(spec: StageSpec) -> dict[str, Any]:
    """A training's `model`, by settings even where it is a preset's name."""
    model: Any = spec.config.model  # type: ignore[attr-defined]
    return {"preset": model} if isinstance(model, str) else dict(model)


def assumed(spec: StageSpec, settled: dict[str, Any]) -> list[str]:
    """What is taken from the model's preset, or guessed, because no token shards settle it yet."""
    asked = _asked(spec)
    open_still = {"vocabulary_size"}
    if settled.get("image") and "context" not in asked:
        open_still.add("event_shape")
    open_still = (open_still - settled.keys()) | {*settled.get("guessed", ())}
    given = {key for key in asked if key != "captions" or asked[key] is None}
    return sorted(open_still - given)


def unsettled(spec: StageSpec, settled: dict[str, Any]) -> dict[str, Any] | None:
    """What is said of a model whose length only the tokens can tell (rows of a table)."""
    if settled.get("vocabulary_size", 0) is not None or "event_shape" in settled:
        return None
    if {"preset", "context", "event_shape"} & _asked(spec).keys():
        return None
    tokens = ", ".join(spec.inputs["tokens"])
    return {"note": f"planned once {tokens} has run: how many numbers a row has is not known yet"}


def model_of(spec: StageSpec, settled: dict[str, Any]) -> Any:
    """The model's config: what was asked for, and what the tokens settle (or will)."""
    from chainrule.pipeline.models.registry import FAMILIES, PRESETS, resolve
    from chainrule.pipeline.training.assembly import condition_settings

    asked = _asked(spec)
    family = asked.get("family") or PRESETS[asked["preset"]]["family"]
    fields = FAMILIES[family][0].model_fields
    try:
        condition = condition_settings(
            asked, fields, settled.get("classes"), settled.get("captions")
        )
    except RequestError as error:
        raise RequestError(f"stage '{spec.name}': {error}") from None
    settled = {
        key: value
        for key, value in settled.items()
        if key in fields and key not in asked and key not in ("classes", "captions")
    }
    settled |= condition
    if "event_shape" in settled and "context" in asked:
        settled.pop("event_shape")
    # a preset's `bos` belongs to its own vocabulary
    if "bos" in fields and "vocabulary_size" in settled and "bos" not in asked:
        settled["bos"] = None
    try:
        return resolve(asked, **settled)
    except ValueError as error:
        raise RequestError(f"stage '{spec.name}': {error}") from None


def image_shape(pipeline: Pipeline, data: str, crop: int | None) -> tuple[int, int, int] | None:
    """Height, width and channels of the images of an ingest stage; None where nothing says it."""
    side: Any = None
    channels = 3
    if published(pipeline, data) is not None:
        from chainrule.pipeline.data.reader import Shards

        with closing(Shards.open(pipeline.folder(data))) as shards:
            first = shards.read("train", 0) if shards.modality == "image" else None
        if first is not None:
            height, width, channels = first.image().shape
            side = (height, width)
    elif data in pipeline.stages:
        source: Any = pipeline.stages[data].config.source  # type: ignore[attr-defined]
        side = getattr(source, "size", None)
        channels = getattr(source, "channels", None) or 3
    if crop is not None:
        side = crop
    if isinstance(side, int):
        side = (side, side)
    return None if side is None else (*side, channels)
