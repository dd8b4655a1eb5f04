"""Draw samples from a handed-off model: a zarr store, pictures, texts, sound.

    load the model (and the tokenizer it carries) → which rows are missing → draw, decode,
    write whole shards → when every writer is done: manifest, contact sheet, texts, wav files

Any number of ranks work side by side, each on zarr shards of its own. Sample i depends on
(model, settings, seed, i) alone.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from chainrule.pipeline.artifact import Artifact, sha256_file
from chainrule.pipeline.config import digest, nearest, result_settings, runtime
from chainrule.pipeline.data.vocabulary import Vocabulary
from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.sampling.filters import Filters, Guidance
from chainrule.pipeline.sampling.pictures import (
    contact_sheet,
    save_picture,
    save_wav,
    sheet_rows,
)
from chainrule.pipeline.sampling.sampler import (
    Drawn,
    Plan,
    Rules,
    SamplingError,
    draw,
    pack_prompts,
)
from chainrule.pipeline.sampling.store import Layout, Store
from chainrule.pipeline.sampling.text import StopStrings, cut_at
from chainrule.pipeline.sampling.uniforms import sample_seeds
from chainrule.pipeline.stage import Input, Stage

INPUTS = {"model": Input(("handoff",))}


class Config(Filters):
    """Which samples, and how they are drawn."""

    number: int = Field(8, ge=1, description="how many samples")
    classes: list[int | str] | None = Field(
        None,
        min_length=1,
        description="asked for in turn, by number or name; default: every class of the model",
    )
    prompts: list[str | list[int]] | None = Field(
        None, min_length=1, description="continued in turn: texts, or lists of token ids"
    )
    length: int | None = Field(
        None, ge=1, description="elements drawn after the prompt; default: as many as fit"
    )
    stop: list[str] = Field([], description="strings that end a text; they are left out of it")
    end_at: list[str] = Field(
        ["eos"], description="special tokens that end a sample, where the model has them"
    )
    guidance: Guidance = Guidance()
    seed: int = Field(0, ge=0)
    samples_per_shard: int = Field(1000, ge=1, description="rows of one zarr shard")
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = runtime(50, ge=1, description="samples drawn together")
    device: str = runtime("auto", description="auto, cpu, cuda, cuda:1, …")
    patience_s: float = runtime(
        3600.0, gt=0, description="how long rank 0 waits for other ranks to finish a shard"
    )

    @field_validator("guidance", mode="before")
    @classmethod
    def _scale_alone(cls, value: Any) -> Any:
        return {"scale": value} if isinstance(value, int | float) else value

    @field_validator("stop")
    @classmethod
    def _stop_strings_say_something(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("an empty stop string would end every sample at once")
        return value

    @property
    def filters(self) -> Filters:
        return Filters(**{name: getattr(self, name) for name in Filters.model_fields})


@dataclass
class Source:
    """A model folder, opened: what the samples are drawn with."""

    model: Autoregressive
    card: dict[str, Any]
    tokenizer: Any
    """None for a model of raw elements."""
    device: torch.device

    @property
    def modality(self) -> str | None:
        return self.card.get("modality")

    @property
    def elements(self) -> int:
        return torch.Size(self.model.event_shape).numel()


def open_source(folder: Path, device: str = "auto", dtype: str = "float32") -> Source:
    """The model in a folder and the tokenizer it carries; refused if either was altered."""
    from chainrule.pipeline import load
    from chainrule.tokenizers import interface

    chosen = torch.device(device) if device != "auto" else _best_device()
    model = load(folder, device=str(chosen), dtype=getattr(torch, dtype))
    model.eval()
    card = _card(folder)
    tokenizer = None
    if card.get("tokenizer") is not None:
        try:
            tokenizer = interface.load(folder / card["tokenizer"]["path"], device=str(chosen))
        except interface.TokenizerError as error:
            raise SamplingError(str(error)) from None
        if tokenizer.fingerprint != card["tokenizer"]["fingerprint"]:
            raise SamplingError(
                f"{folder / 'tokenizer'}: is {tokenizer.fingerprint[:16]}, the model was trained "
                f"with {card['tokenizer']['fingerprint'][:16]}; hand the model off again"
            )
    return Source(model, card, tokenizer, chosen)


def _card(folder: Path) -> dict[str, Any]:
    """The card of a model folder; a `transformers` folder gets one of what is known of it."""
    if (folder / "card.json").is_file():
        return Artifact.bare(folder).card
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return {"fingerprint": digest([sha256_file(path) for path in files])}


def _best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Request:
    """The settings, settled against a model: what each sample is asked to be."""

    config: Config
    rules: Rules
    classes: list[int] | None
    """Asked for in turn."""
    prompts: list[list[int]]
    length: int
    """Elements after the prompt."""

    def plan(self, indices: Sequence[int]) -> Plan:
        prompts = [self.prompts[i % len(self.prompts)] for i in indices]
        known, given = pack_prompts(prompts)
        cond = None
        if self.classes is not None:
            cond = torch.tensor([self.classes[i % len(self.classes)] for i in indices])
        return Plan(
            seeds=sample_seeds(self.config.seed, np.asarray(indices)),
            lengths=np.array([len(prompt) + self.length for prompt in prompts]),
            cond=cond,
            known=known if known.shape[1] else None,
            given=given if known.shape[1] else None,
        )

    @property
    def columns(self) -> int:
        return max(len(prompt) for prompt in self.prompts) + self.length


def settle(config: Config, source: Source) -> Request:
    """Compare the settings with the model; SamplingError names what it cannot do."""
    card = source.card
    classes = _classes(config, card)
    if config.guidance.scale != 1 and classes is None:
        raise SamplingError("guidance: the model has no classes; leave guidance at 1")
    prompts = [_prompt(p, source) for p in config.prompts or [[]]]
    longest = max(len(prompt) for prompt in prompts)
    length = config.length if config.length is not None else source.elements - longest
    if length < 1 or longest + length > source.elements:
        raise SamplingError(
            f"length: a prompt of {longest} tokens and {max(length, 1)} more are asked of a model "
            f"of {source.elements} elements; shorten one of them"
        )
    if source.modality == "image" and longest + length != source.elements:
        raise SamplingError(
            f"length: a picture of this model has {source.elements} elements, "
            f"{longest + length} are asked for; leave `length` out"
        )
    end: tuple[int, ...] = ()
    allowed = None
    if card.get("vocabulary"):
        vocabulary = Vocabulary.model_validate(card["vocabulary"])
        end = tuple(
            vocabulary.specials[name] for name in config.end_at if name in vocabulary.specials
        )
        allowed = _allowed(vocabulary, source, end)
    finished = None
    if config.stop:
        if source.modality != "text" or source.tokenizer is None:
            raise SamplingError("stop: stop strings are for text models; leave `stop` out")
        finished = StopStrings(source.tokenizer, config.stop)
    rules = Rules(config.filters, config.guidance, allowed, end, finished)
    return Request(config, rules, classes, prompts, length)


def _classes(config: Config, card: Mapping[str, Any]) -> list[int] | None:
    names = card.get("classes")
    if not names:
        if config.classes is not None:
            raise SamplingError("classes: the model was trained without classes; leave them out")
        return None
    if config.classes is None:
        return list(range(len(names)))
    chosen = []
    for given in config.classes:
        if isinstance(given, str):
            if given not in names:
                raise SamplingError(f"classes: no class '{given}'{nearest(given, list(names))}")
            chosen.append(names.index(given))
        elif 0 <= given < len(names):
            chosen.append(given)
        else:
            raise SamplingError(
                f"classes: no class {given}; the model has {len(names)}, 0 to {len(names) - 1}"
            )
    return chosen


def _prompt(prompt: str | list[int], source: Source) -> list[int]:
    vocabulary = source.card.get("vocabulary")
    if isinstance(prompt, str):
        if source.modality != "text" or source.tokenizer is None:
            raise SamplingError(
                f"prompts: {prompt!r} is text and the model is not one of text; "
                "give token ids, or leave prompts out"
            )
        return [int(token) for token in source.tokenizer.encode([prompt])[0]]
    ranges = vocabulary["ranges"] if vocabulary else {}
    for token in prompt:
        if ranges and not any(start <= token < stop for start, stop in ranges.values()):
            spans = ", ".join(f"{name} [{a}, {b})" for name, (a, b) in ranges.items())
            raise SamplingError(f"prompts: token {token} lies outside the model's ranges: {spans}")
    return prompt


def _allowed(vocabulary: Vocabulary, source: Source, end: Sequence[int]) -> torch.Tensor | None:
    """Tokens that belong in a sample: the modality's range and the end tokens."""
    if source.modality not in vocabulary.ranges:
        return None
    start, stop = vocabulary.ranges[source.modality]
    if start == 0 and stop == vocabulary.size:
        return None
    allowed = torch.zeros(vocabulary.size, dtype=torch.bool)
    allowed[start:stop] = True
    allowed[list(end)] = True
    return allowed


# --- drawing -----------------------------------------------------------------------------


def main(config: Config, stage: Stage) -> None:
    folder = stage.input("model").folder
    source = open_source(folder, config.device, config.dtype)
    request = settle(config, source)
    store = Store.start(
        stage.folder,
        model=source.card["fingerprint"],
        settings=result_settings(config),
        number=config.number,
        samples_per_shard=min(config.samples_per_shard, config.number),
        arrays=layouts(request, source),
    )
    shards = store.mine(stage.rank, stage.world_size)
    began, elements = time.monotonic(), 0
    with stage.progress(sum(len(store.rows(s)) for s in shards), "samples") as progress:
        for shard in shards:
            batches = []
            for indices in _batches(store.rows(shard), config.batch_size):
                drawn = draw_block(request, source, indices, config.batch_size)
                elements += int(drawn.lengths.sum())
                batches.append(drawn)
                progress.update(len(indices))
            values = shard_arrays(request, source, store.rows(shard), batches)
            store.write(shard, values)
            stage.log(shard, log_likelihood=float(values["log_likelihood"].mean()))
    seconds = time.monotonic() - began
    if not stage.is_main:
        return
    if not store.finished:
        store.wait(config.patience_s)
        store.finish()
    show(request, source, store, stage)
    log_likelihood = store.read("log_likelihood")
    stage.summary["samples"] = config.number
    stage.summary["log_likelihood"] = float(log_likelihood.mean())
    stage.summary["nats_per_element"] = float(-log_likelihood.sum() / store.read("length").sum())
    if elements:
        stage.summary["elements_per_second"] = elements / seconds


def sample_folder(model_folder: Path, out_folder: Path, config: Config) -> Path:
    """Samples of a bare model folder into a folder of one's own; nothing there is overwritten."""
    stage = Stage(
        name="sample",
        pipeline="",
        job="sample",
        folder=Path(out_folder),
        fingerprint="",
        inputs={"model": [Artifact.bare(model_folder)]},
    )
    main(config, stage)
    return Path(out_folder)


def _batches(rows: range, size: int) -> list[range]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def draw_block(request: Request, source: Source, indices: range, size: int) -> Drawn:
    """Samples of `indices`, drawn as a batch of exactly `size` rows where the run has so many.

    Kernels round alike only for like shapes. The last batch of a shard is therefore filled up
    (with samples that are thrown away), so that neither ranks nor resuming change a bit.
    """
    wanted = list(indices)
    rows = min(size, request.config.number, request.config.samples_per_shard)
    filled = wanted + [wanted[-1]] * (rows - len(wanted))
    drawn = draw(source.model, request.plan(filled), request.rules)
    n = len(wanted)
    return Drawn(drawn.x[:n], drawn.lengths[:n], drawn.log_likelihood[:n])


# --- what is stored ------------------------------------------------------------------------


def layouts(request: Request, source: Source) -> dict[str, Layout]:
    """The arrays of the store, a row each: their shapes and dtypes."""
    size = vocabulary_size(source)
    dtype = str(np.min_scalar_type(size - 1)) if size is not None else "float32"
    shape = token_shape(request, source)
    arrays = {
        "tokens": Layout(shape, dtype),
        "length": Layout((), "int64"),
        "log_likelihood": Layout((), "float64"),
        "seed": Layout((), "int64"),
    }
    if request.classes is not None:
        arrays["class"] = Layout((), "int64")
    if source.tokenizer is not None and source.modality in ("image", "audio"):
        blank = np.full(shape, _offset(source), dtype=dtype)
        decoded = np.asarray(source.tokenizer.decode([blank])[0])
        arrays["images" if source.modality == "image" else "audio"] = Layout(
            decoded.shape, str(decoded.dtype)
        )
    return arrays


def vocabulary_size(source: Source) -> int | None:
    """Values of an element; None for real numbers."""
    if source.card.get("vocabulary"):
        return Vocabulary.model_validate(source.card["vocabulary"]).size
    return getattr(source.model.config, "vocabulary_size", None)


def token_shape(request: Request, source: Source) -> tuple[int, ...]:
    """A sample's tokens: the grid of a picture, else the sequence."""
    if source.card.get("grid"):
        grid = tuple(source.card["grid"])
        if int(np.prod(grid)) == source.elements:
            return grid
        return tuple(source.model.event_shape)
    if len(source.model.event_shape) > 1:
        return tuple(source.model.event_shape)
    return (request.columns,)


def _offset(source: Source) -> int:
    vocabulary = source.card.get("vocabulary") or {"ranges": {}}
    return int(vocabulary["ranges"].get(source.modality, (0, 0))[0])


def shard_arrays(
    request: Request, source: Source, rows: range, batches: Sequence[Drawn]
) -> dict[str, np.ndarray]:
    """The arrays of one shard, from the batches drawn for it."""
    shape = token_shape(request, source)
    columns = int(np.prod(shape))
    sequences = torch.zeros(len(rows), columns, dtype=batches[0].x.dtype)
    at = 0
    for batch in batches:
        sequences[at : at + len(batch.x), : batch.x.shape[1]] = batch.x
        at += len(batch.x)
    if columns == source.elements:
        sequences = source.model.to_event(sequences).flatten(1)
    layout = layouts(request, source)
    tokens = sequences.numpy().reshape(len(rows), *shape).astype(layout["tokens"].dtype)
    arrays = {
        "tokens": tokens,
        "length": np.concatenate([batch.lengths for batch in batches]),
        "log_likelihood": np.concatenate([batch.log_likelihood for batch in batches]),
        "seed": sample_seeds(request.config.seed, np.asarray(rows)),
    }
    if request.classes is not None:
        arrays["class"] = np.array([request.classes[i % len(request.classes)] for i in rows])
    for name in ("images", "audio"):
        if name in layout:
            arrays[name] = np.stack(source.tokenizer.decode(list(tokens)))
    return arrays


def show(request: Request, source: Source, store: Store, stage: Stage) -> None:
    """Pictures, texts and sound files of a finished store."""
    if "images" in store.arrays:
        names = None
        if request.classes is not None:
            names = [str(source.card["classes"][c]) for c in store.read("class")]
        path = stage.folder / "sheet.png"
        images = store.read("images")
        save_picture(contact_sheet(images, sheet_rows(len(images), names)), path)
        stage.picture(path)
    elif "audio" in store.arrays:
        (stage.folder / "audio").mkdir(exist_ok=True)
        rate = int(source.tokenizer.card()["sample_rate"])
        for i, audio in enumerate(store.read("audio")):
            save_wav(audio, rate, stage.folder / "audio" / f"{i:05d}.wav")
    elif source.modality == "text" and source.tokenizer is not None:
        (stage.folder / "text").mkdir(exist_ok=True)
        for i, text in enumerate(texts(request, source, store)):
            path = stage.folder / "text" / f"{i:05d}.txt"
            path.write_text(text, encoding="utf-8", newline="")


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
