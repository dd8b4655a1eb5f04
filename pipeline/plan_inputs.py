"""What stages that have not run yet will hand on: vocabularies, grids, images.

With it `plan` reckons, and jobs refuse (`check`) what could only fail later.

Read off what an input published, where it has run, and off its settings where it has not.
"""

from contextlib import closing
from pathlib import Path
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
    if stage in pipeline.stages:
        try:
            wanted = pipeline.fingerprint(stage)
        except RequestError:  # its raw data are gone: what was made of them is all there is
            wanted = None
        if wanted is not None and read_json(folder / MANIFEST).get("fingerprint") != wanted:
            return None
    index: dict[str, Any] = read_json(folder / "index.json")
    return index


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
    sizes: dict[str, int | None] = {}  # by tokenizer: sets of one share its ids
    shapes: set[tuple[int, ...]] = set()
    whole = True  # every sample is a row, as far as is known
    captions: list[dict[str, Any]] = []
    real = False
    for name in spec.inputs.get("tokens", []):
        index = published(pipeline, name)
        [tokenizer] = pipeline.stages[name].inputs["tokenizer"] if name in pipeline.stages else [""]
        if index is not None:
            tokenizer = tokenizer or index["tokenizer"]["fingerprint"]
            sizes[tokenizer] = index["vocabulary"]["size"]
            real = real or not sizes[tokenizer]
            settled["image"] = index["modality"] == "image"
            whole = whole and bool(index["grid"])
            settled["audio"] = index["modality"] == "audio"
            if index["grid"]:
                settled["event_shape"] = tuple(index["grid"])
                shapes.add(settled["event_shape"])
            if index["classes"] and (index["grid"] or _make_rows(pipeline.folder(name), settled)):
                settled["classes"] = len(index["classes"])
            if index.get("captions"):
                captions.append(index["captions"])
        elif name in pipeline.stages:
            foreseen = _foreseen(pipeline, pipeline.stages[name])
            sizes[tokenizer] = foreseen.pop("vocabulary_size", None)
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
    elif sizes and None not in sizes.values():
        settled["vocabulary_size"] = sum(size for size in sizes.values() if size is not None)
    return settled


def _foreseen(pipeline: Pipeline, tokens: StageSpec) -> dict[str, Any]:
    """Vocabulary and grid of token shards that are not made yet, from the settings above them."""
    found: dict[str, Any] = {}
    [source] = tokens.inputs["tokenizer"]
    if source not in pipeline.stages:
        return found
    tokenizer: Any = pipeline.stages[source].config.tokenizer  # type: ignore[attr-defined]
    found["real"] = tokenizer.kind == "standardize"
    found["audio"] = tokenizer.kind == "mulaw"
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
    ingest: Any = pipeline.stages[data].config if data in pipeline.stages else None
    shape = _shape(ingest, tokenizer, tokens.config.views)  # type: ignore[attr-defined]
    if shape is not None:
        found["event_shape"] = shape
        if found["audio"]:  # only of recordings with classes
            found["guessed"] = (*found.get("guessed", ()), "event_shape")
    return found


def _make_rows(folder: Path, settled: dict[str, Any]) -> bool:
    """Whether samples without a grid make a row each, as recordings of one length may; their
    shape is settled then."""
    from chainrule.pipeline.data.rows import LONGEST_EVENT, one_length
    from chainrule.pipeline.data.tokens import TokenSet

    length = one_length(TokenSet.open(folder)) if settled["audio"] else None
    if length is not None and length <= LONGEST_EVENT:
        settled["event_shape"] = (length,)
        return True
    return not settled["audio"]


def _shape(ingest: Any, tokenizer: Any, views: Any) -> tuple[int, ...] | None:
    """That of every sample's tokens, as far as settings tell; `ingest` None says nothing."""
    if tokenizer.kind == "mulaw":
        from chainrule.pipeline.data.rows import LONGEST_EVENT

        seconds = getattr(ingest and ingest.source, "seconds", None)
        if seconds is None:
            return None
        length = round(seconds * ingest.source.sample_rate) * (tokenizer.bits // 8)
        return (length,) if length <= LONGEST_EVENT else None
    side = None if ingest is None else _side(ingest)
    if views is not None and views.size is not None:
        side = views.size
    if isinstance(side, int):
        side = (side, side)
    if side is None:
        return None
    factor = getattr(tokenizer, "downsampling", 1)
    return (side[0] // factor, side[1] // factor)


def _side(ingest: Any) -> Any:
    """Side, or sides, of an ingest's pictures, as far as its settings tell."""
    source = ingest.source
    return 8 if source.kind == "sklearn-digits" else getattr(source, "size", None)


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
    if _classes_to_come(asked, settled):
        open_still.add("classes")
    open_still = (open_still - settled.keys()) | {*settled.get("guessed", ())}
    given = {key for key in asked if key != "captions" or asked[key] is None}
    return sorted(open_still - given)


def _classes_to_come(asked: dict[str, Any], settled: dict[str, Any]) -> bool:
    """Whether the model is to have classes, of which only the data know the number."""
    given = {*asked, *settled}
    return bool(asked.get("class_dropout")) and not given & {"classes", "captions"}


def unsettled(spec: StageSpec, settled: dict[str, Any]) -> dict[str, Any] | None:
    """What is said of a model whose length only the tokens can tell (rows of a table)."""
    if settled.get("vocabulary_size", 0) is not None or "event_shape" in settled:
        return None
    if {"preset", "context", "event_shape"} & _asked(spec).keys():
        return None
    tokens = ", ".join(spec.inputs["tokens"])
    return {"note": f"planned once {tokens} has run: how many numbers a row has is not known yet"}


def foreseen_model(pipeline: Pipeline, spec: StageSpec) -> Any:
    """The config of the model that a training will build, None where that cannot be told before
    the data are there. RequestError where it cannot be built."""
    settled = from_tokens(pipeline, spec)
    if unsettled(spec, settled) is not None or "event_shape" in assumed(spec, settled):
        return None
    says_length = {"preset", "context", "event_shape"} & _asked(spec).keys()
    if settled.get("audio") and "event_shape" not in settled and not says_length:
        return None
    return model_of(spec, settled)


def model_of(spec: StageSpec, settled: dict[str, Any]) -> Any:
    """The model's config: what was asked for, and what the tokens settle (or will)."""
    from chainrule.pipeline.models.registry import FAMILIES, PRESETS, resolve
    from chainrule.pipeline.training.assembly import condition_settings

    asked = _asked(spec)
    family = asked.get("family") or PRESETS[asked["preset"]]["family"]
    fields = FAMILIES[family][0].model_fields
    captions = settled.get("captions")
    if captions is not None and "captions" in settled.get("guessed", ()):
        given = asked.get("captions") or {}  # what was asked for knows better than a guess
        captions = {
            **captions,
            "vocabulary_size": given.get("vocabulary_size", captions["vocabulary_size"]),
            "longest": given.get("length", captions["longest"]),
        }
    try:
        condition = condition_settings(asked, fields, settled.get("classes"), captions)
    except RequestError as error:
        raise RequestError(f"stage '{spec.name}': {error}") from None
    settled = {
        key: value
        for key, value in settled.items()
        if key in fields and key not in asked and key not in ("classes", "captions")
    }
    settled |= condition
    if _classes_to_come(asked, settled):
        settled["classes"] = 1
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
        side = _side(pipeline.stages[data].config)
        channels = getattr(source, "channels", None) or 3
    if crop is not None:
        side = crop
    if isinstance(side, int):
        side = (side, side)
    return None if side is None else (*side, channels)
