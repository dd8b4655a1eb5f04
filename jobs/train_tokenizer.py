"""train_tokenizer: raw shards -> a tokenizer folder. A tokenizer of text also takes pictures that
have captions, and learns from those.

    learned   vqvae, vqgan     the loop below: steps, checkpoints, codebook health at the end
    fitted    sentencepiece, characters, palette     one pass over a sample of the data
    fixed     bytes, pixels, mulaw                   nothing to learn: the card alone

A learned tokenizer resumes from its last checkpoint with the losses and the weights of a
run that was never stopped: batch s is a function of (seed, s), and the state holds all else.
`card.json` is written last; where it is there, the work is done.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import Field, model_validator

from chainrule.jobs.tokenizer_plan import on_paper
from chainrule.jobs.tokenizer_trainer import LEARNED, Trainer
from chainrule.pipeline.config import RequestError, Settings, runtime
from chainrule.pipeline.data.image_batches import ImageBatches
from chainrule.pipeline.data.order import Permutation
from chainrule.pipeline.data.reader import Sample, Shards
from chainrule.pipeline.graph import Pipeline, StageSpec
from chainrule.pipeline.heartbeat import beat
from chainrule.pipeline.stage import Input, Stage, StageFailed
from chainrule.pipeline.training.schedules import ScheduleSettings
from chainrule.tokenizers.autoencoder import AutoencoderTokenizer
from chainrule.tokenizers.bytes import ByteSettings, ByteTokenizer
from chainrule.tokenizers.characters import CharacterSettings, CharacterTokenizer
from chainrule.tokenizers.health import measure, sheet
from chainrule.tokenizers.interface import MODALITY, Tokenizer, TokenizerError, read_card
from chainrule.tokenizers.losses import Adversarial, Perceptual
from chainrule.tokenizers.mulaw import MuLawSettings, MuLawTokenizer
from chainrule.tokenizers.palette import PaletteSettings, PaletteTokenizer
from chainrule.tokenizers.pixels import PixelSettings, PixelTokenizer
from chainrule.tokenizers.standardize import StandardizeSettings, StandardizeTokenizer
from chainrule.tokenizers.text import SentencePieceSettings, SentencePieceTokenizer
from chainrule.tokenizers.vqgan import VQGANSettings
from chainrule.tokenizers.vqvae import VQVAESettings

__all__ = ["INPUTS", "Config", "is_learned", "main", "on_paper"]

INPUTS: dict[str, Input] = {"data": Input(("ingest",), many=True)}
"""Several sets for tokenizers of text, which are to share one; one for the others."""

AnySettings = Annotated[
    VQVAESettings
    | VQGANSettings
    | PaletteSettings
    | SentencePieceSettings
    | ByteSettings
    | CharacterSettings
    | MuLawSettings
    | PixelSettings
    | StandardizeSettings,
    Field(discriminator="kind"),
]
SHOWN = 16
"""Pictures on a sheet of reconstructions."""


class Config(Settings):
    tokenizer: AnySettings
    seed: int = 0
    steps: int = Field(1000, ge=1)
    batch_size: int = Field(32, ge=1, description="images a step, over all ranks")
    learning_rate: float = Field(3e-4, gt=0)
    betas: tuple[float, float] = Field((0.9, 0.999), description="of Adam")
    schedule: ScheduleSettings = ScheduleSettings(name="wsd", decay=0.3, floor=0.01)
    clip: float | None = Field(
        None, gt=0, description="norm that gradients are clipped to, the discriminator's as well"
    )
    accumulate: int = Field(
        1, ge=1, description="micro-batches an update; a codebook's statistics move with each"
    )
    consecutive_faults: int = Field(
        5, ge=1, description="steps in a row without a finite loss and gradient that stop the stage"
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    pixel_loss: Literal["l2", "l1"] = Field(
        "l2", description="of the variance (l2) or the standard deviation (l1) of the pixels"
    )
    perceptual: Perceptual | None = None
    adversarial: Adversarial | None = Field(
        None, description="a discriminator; kind vqgan has one unless this is null"
    )
    ema: float | None = Field(None, gt=0, lt=1, description="decay of averaged weights, published")
    crop: int | None = Field(None, ge=1, description="train on random windows of this side")
    flip: bool = Field(False, description="mirror training images at random")
    checkpoint_every: int = runtime(500, ge=1, description="steps")
    validate_every: int = runtime(1000, ge=1, description="steps")
    validation_samples: int | None = runtime(
        None,
        ge=1,
        description="of the split while training, from all over it; at the end all are taken",
    )
    log_every: int = runtime(50, ge=1, description="steps")
    device: str = runtime("auto", description="auto: a GPU where there is one")
    workers: int = runtime(1, ge=1, description="threads that decode images")
    cache_bytes: int = runtime(1 << 30, ge=0, description="decoded images kept in memory")

    @model_validator(mode="before")
    @classmethod
    def _vqgan_is_adversarial(cls, given: Any) -> Any:
        if isinstance(given, dict) and "adversarial" not in given:
            tokenizer = given.get("tokenizer")
            if isinstance(tokenizer, dict) and tokenizer.get("kind") == "vqgan":
                return {**given, "adversarial": {}}
        return given

    @model_validator(mode="after")
    def _only_what_is_read(self) -> "Config":
        if not isinstance(self.tokenizer, VQVAESettings | VQGANSettings):
            unread = sorted(self.model_fields_set & _OF_LEARNED)
            if unread:
                raise ValueError(
                    f"'{unread[0]}' has no meaning for tokenizer kind {self.tokenizer.kind}: "
                    "remove it"
                )
        elif self.crop is not None and self.crop % self.tokenizer.downsampling:
            raise ValueError(
                f"crop {self.crop} is not divisible by downsampling {self.tokenizer.downsampling}"
            )
        elif self.adversarial is not None:
            self.adversarial.check(self.steps)
        return self


_OF_LEARNED = {
    "steps",
    "batch_size",
    "learning_rate",
    "betas",
    "schedule",
    "clip",
    "accumulate",
    "consecutive_faults",
    "precision",
    "pixel_loss",
    "perceptual",
    "adversarial",
    "ema",
    "crop",
    "flip",
    "checkpoint_every",
    "validate_every",
    "validation_samples",
    "log_every",
}


def is_learned(config: Config) -> bool:
    """Whether the tokenizer is trained in steps, not fitted or fixed."""
    return config.tokenizer.kind in LEARNED


def check(pipeline: Pipeline, spec: StageSpec) -> None:
    """Refuse several sets for a tokenizer that learns from one, and sets of another modality."""
    kind = cast(Config, spec.config).tokenizer.kind
    for name in spec.inputs["data"]:
        if name in pipeline.stages:
            data: Any = pipeline.stages[name].config
            misfit = _misfit(data.source.modality, data.gives_captions, kind)
            if misfit is not None:
                raise RequestError(f"stage '{spec.name}': input data: stage '{name}' {misfit}")
    if len(spec.inputs["data"]) > 1 and MODALITY[kind] != "text":
        raise RequestError(
            f"stage '{spec.name}': input data: a tokenizer of kind {kind} learns from one set, "
            "tokenizers of text from several"
        )


def _misfit(modality: str, captioned: bool, kind: str) -> str | None:
    """Why samples are none that a kind of tokenizer encodes; None where they are."""
    if modality == MODALITY[kind] or (MODALITY[kind] == "text" and captioned):
        return None
    return f"holds {modality}; a tokenizer of kind {kind} is for {MODALITY[kind]}"


class Together:
    """Raw sets one after another, with what tokenizers of text read of `Shards`."""

    def __init__(self, sets: Sequence[Shards]) -> None:
        self._sets = sets

    def count(self, split: str) -> int:
        return sum(shards.count(split) for shards in self._sets)

    def iterate(self, split: str) -> Iterator[Sample]:
        for shards in self._sets:
            yield from shards.iterate(split)

    def read(self, split: str, number: int) -> Sample | None:
        for shards in self._sets:
            if number < shards.count(split):
                return shards.read(split, number)
            number -= shards.count(split)
        raise IndexError(number)


def main(config: Config, stage: Stage) -> None:
    data = stage.inputs["data"]
    if (stage.folder / "card.json").is_file():
        _summarise(stage, read_card(stage.folder))
        Trainer.forget(stage)
        return
    sets = [Shards.open(found.folder) for found in data]
    kind = config.tokenizer.kind
    for shards in sets:
        misfit = _misfit(shards.modality, shards.captioned, kind)
        if misfit is not None:
            raise StageFailed(f"{shards.folder}: {misfit}")
    health = None
    if is_learned(config):
        tokenizer, health = train(config, stage, sets[0])
    elif not stage.is_main:
        return
    else:
        try:
            tokenizer = fit(config, sets)
        except TokenizerError as error:
            raise StageFailed(f"{sets[0].folder}: {error}") from None
    if stage.is_main:
        finish(config, stage, sets, tokenizer, health)
        Trainer.forget(stage)


# --- learned ----------------------------------------------------------------------------


def train(config: Config, stage: Stage, shards: Shards) -> tuple[Tokenizer, dict[str, Any]]:
    """The loop: one step is one optimiser update (two with a discriminator).

    Returns the tokenizer and its health over the whole validation split. Ranks share what is
    measured: while one measured alone, the others would wait for it longer than they may.
    """
    batches = ImageBatches(
        shards,
        config.batch_size,
        config.seed,
        crop=config.crop,
        flip=config.flip,
        cache_bytes=config.cache_bytes,
        rank=stage.rank,
        world_size=stage.world_size,
    )
    ranks = stage.rank, stage.world_size
    with Trainer(config, stage, batches, pixel_variance(shards)) as trainer:
        require_encodable(trainer.tokenizer(), shards)
        start = trainer.resume()
        with stage.progress(config.steps, "steps", start) as progress:
            for step, images in enumerate(
                batches.iterate(start, config.steps, config.workers), start + 1
            ):
                figures = trainer.step(step, images)
                progress.update(1, loss=figures["loss"])
                if step % config.log_every == 0 or step == config.steps:
                    stage.log(step, **figures, **trainer.window())
                if step % config.validate_every == 0 and step < config.steps:
                    with trainer.averaged():
                        health = measured(
                            trainer.tokenizer(), shards, config.validation_samples, *ranks
                        )
                    stage.log(step, **{f"validation_{k}": v for k, v in health.items()})
                trainer.watch(step, figures["psnr"])
                if step % config.checkpoint_every == 0 and step < config.steps:
                    trainer.save(step)
                trainer.stop_if_asked(step)
        trainer.take_average()
        if trainer.skipped:
            stage.summary["skipped_steps"] = trainer.skipped
        tokenizer = trainer.tokenizer()
        return tokenizer, measured(tokenizer, shards, None, *ranks)


def require_encodable(tokenizer: AutoencoderTokenizer, shards: Shards) -> None:
    """StageFailed where a picture that will be measured cannot be encoded, by its header: a crop
    lets training take pictures of any size."""
    split = validation_split(shards)
    seen: set[tuple[int, int, int]] = set()
    for i in range(shards.count(split)):
        if i % 4096 == 0:
            beat()
        shape = shards.picture_shape(split, i)
        if shape is None or shape in seen:
            continue
        seen.add(shape)
        try:
            tokenizer.check_shape(shape)
        except TokenizerError as error:
            raise StageFailed(f"{shards.folder}: split '{split}', picture {i}: {error}") from None


def measured(
    tokenizer: Tokenizer,
    shards: Shards,
    most: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any]:
    """Health over the validation split (see `validation`); StageFailed where it cannot be."""
    try:
        return measure(tokenizer, validation(shards, 64, most, rank, world_size))
    except TokenizerError as error:
        raise StageFailed(f"{shards.folder}: validation split: {error}") from None


def pixel_variance(shards: Shards, images: int = 1024) -> float:
    """Variance of training pixels on the scale [-1, 1], from evenly spaced images.

    It puts the reconstruction error on the scale of the papers (normalised MSE).
    """
    n = shards.count("train")
    total = squares = 0.0
    count = 0
    for i in np.unique(np.linspace(0, n - 1, min(n, images)).astype(int)).tolist():
        sample = shards.read("train", i)
        if sample is None:
            continue
        x = sample.image().astype(np.float64) / 127.5 - 1
        total, squares, count = total + x.sum(), squares + (x**2).sum(), count + x.size
    variance = squares / count - (total / count) ** 2
    return float(max(variance, 1e-6))


def validation_split(shards: Shards | Together) -> str:
    return "validation" if shards.count("validation") else "train"


def validation(
    shards: Shards, batch: int = 64, most: int | None = None, rank: int = 0, world_size: int = 1
) -> Iterator[list[np.ndarray]]:
    """Validation images in batches, those of train where there is no validation.

    All of them, or `most` from all over the split. Of several ranks each has every
    `world_size`-th batch, so that a batch holds what it holds on one rank.
    """
    split = validation_split(shards)
    samples: Iterable[Sample | None] = shards.pick(split, most)
    if world_size > 1:
        places = enumerate(shards.spread(split, most))
        mine = (i for n, i in places if n // batch % world_size == rank)
        samples = (shards.read(split, i) for i in mine)
    images: list[np.ndarray] = []
    for sample in samples:
        if sample is None:  # damaged, and counted by the shards
            continue
        images.append(sample.image())
        if len(images) == batch:
            beat()  # a large split takes longer than a step may, on every rank
            yield images
            images = []
    if images:
        yield images


# --- fitted and fixed -------------------------------------------------------------------


def fit(config: Config, sets: Sequence[Shards]) -> Tokenizer:
    settings = config.tokenizer
    if isinstance(settings, SentencePieceSettings):
        return SentencePieceTokenizer.train(
            settings, texts(Together(sets), config.seed, settings.sample_bytes)
        )
    if isinstance(settings, CharacterSettings):
        return CharacterTokenizer.train(
            text for sample in Together(sets).iterate("train") for text in texts_of(sample)
        )
    shards = sets[0]
    if isinstance(settings, PaletteSettings):
        pixels = sample_pixels(shards, config.seed, settings.sample_pixels)
        return PaletteTokenizer.train(settings, pixels, config.seed)
    if isinstance(settings, MuLawSettings):
        return MuLawTokenizer(settings, next(shards.iterate("train")).audio()[1])
    if isinstance(settings, StandardizeSettings):
        rows = (sample.values() for sample in shards.iterate("train"))
        return StandardizeTokenizer.train(rows, shards.columns)
    if isinstance(settings, PixelSettings):
        return PixelTokenizer(settings)
    assert isinstance(settings, ByteSettings)
    return ByteTokenizer()


def texts(shards: Together, seed: int, limit: int) -> Iterator[str]:
    """Training documents in an order drawn by the seed, until `limit` UTF-8 bytes."""
    n, taken = shards.count("train"), 0
    order = Permutation(n, seed)
    for position in range(n):
        sample = shards.read("train", int(order[np.array(position)]))
        if sample is None:
            continue
        for text in texts_of(sample):
            yield text
            taken += len(text.encode("utf-8"))
        if taken >= limit:
            return


def texts_of(sample: Sample) -> list[str]:
    """The document of a sample of text, the captions of a picture."""
    if "txt" in sample.members:
        return [sample.text()]
    return [str(caption) for caption in sample.meta["captions"]]


def sample_pixels(shards: Shards, seed: int, limit: int) -> np.ndarray:
    """uint8 (N, C): pixels of training images, each image giving about the same number."""
    n = shards.count("train")
    order = Permutation(n, seed)
    share = math.ceil(limit / n)
    taken = []
    left = limit
    for position in range(n):
        sample = shards.read("train", int(order[np.array(position)]))
        if sample is None or left <= 0:
            continue
        pixels = sample.image().reshape(-1, sample.image().shape[2])
        if len(pixels) > share:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + position) % 2**64)
            keep = torch.randperm(len(pixels), generator=generator)[:share]
            pixels = pixels[keep.numpy()]
        taken.append(pixels)
        left -= len(pixels)
    if len({pixels.shape[1] for pixels in taken}) > 1:
        raise TokenizerError("grey and RGB images in one set; set channels in ingest")
    return np.concatenate(taken)


# --- the end ----------------------------------------------------------------------------


def finish(
    config: Config,
    stage: Stage,
    sets: Sequence[Shards],
    tokenizer: Tokenizer,
    health: dict[str, Any] | None,
) -> None:
    """Measure on the whole validation split, draw the sheet, write the folder, card last.

    `health`: what a learned tokenizer's ranks measured together.
    """
    prints = [found.fingerprint for found in stage.inputs["data"]]
    facts: dict[str, Any] = {"data": prints[0] if len(prints) == 1 else prints}
    shards = sets[0]
    if tokenizer.modality == "image":
        facts["health"] = health if health is not None else measured(tokenizer, shards)
        draw_reconstructions(tokenizer, shards, stage.folder / "reconstructions.png")
        stage.picture(stage.folder / "reconstructions.png")
    elif tokenizer.modality == "text":
        facts["health"] = text_health(tokenizer, Together(sets))
    if is_learned(config):
        facts["steps"] = config.steps
    if hasattr(tokenizer, "facts"):
        tokenizer.facts.update(facts)
    tokenizer.save(stage.folder)
    _summarise(stage, {**tokenizer.card(), **facts})


def draw_reconstructions(tokenizer: Tokenizer, shards: Shards, path: Path) -> None:
    from PIL import Image

    first = next(validation(shards, SHOWN))
    alike = [image for image in first if image.shape == first[0].shape]
    picture = sheet(alike, tokenizer.decode(tokenizer.encode(alike)))
    Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(path)


def text_health(tokenizer: Tokenizer, shards: Together, limit: int = 20_000_000) -> dict[str, Any]:
    """Bytes a token, vocabulary usage and lossless share over the validation documents.

    At most `limit` bytes of them, in order.
    """
    split = validation_split(shards)
    counts = np.zeros(tokenizer.vocabulary["size"], dtype=np.int64)
    size = documents = exact = 0
    for sample in shards.iterate(split):
        for text in texts_of(sample):
            [tokens] = tokenizer.encode([text])
            counts += np.bincount(tokens, minlength=len(counts))
            exact += tokenizer.decode([tokens]) == [text]
            size += len(text.encode("utf-8"))
            documents += 1
        if size >= limit:
            break
    total = int(counts.sum())
    return {
        "documents": documents,
        "tokens": total,
        "bytes_per_token": size / max(total, 1),
        "vocabulary_usage": float((counts > 0).mean()),
        "exact": exact / max(documents, 1),
    }


def _summarise(stage: Stage, card: dict[str, Any]) -> None:
    stage.summary["vocabulary_size"] = card["vocabulary"]["size"]
    stage.summary["tokenizer_fingerprint"] = card["fingerprint"]
    stage.summary |= card.get("health", {})
