"""What is asked for: the settings of `sample`, settled against a model.

    Config (asked) + Source (a model and its tokenizer) --settle--> Request --plan--> rows

Everything that a model cannot do is refused here, by name, before an element is drawn.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from chainrule.pipeline.config import Settings, nearest, runtime
from chainrule.pipeline.data.captions import tidy
from chainrule.pipeline.data.vocabulary import Vocabulary
from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.models.inputs import drop_rate, has_captions, is_conditioned
from chainrule.pipeline.sampling.completion import Given, Picture
from chainrule.pipeline.sampling.drafts import DraftSettings
from chainrule.pipeline.sampling.filters import Filters, Guidance
from chainrule.pipeline.sampling.recording import Recording, beginning_of
from chainrule.pipeline.sampling.sampler import Plan, Rules, SamplingError, pack_prompts
from chainrule.pipeline.sampling.speculative import Gamma
from chainrule.pipeline.sampling.text import StopStrings
from chainrule.pipeline.sampling.uniforms import sample_seeds
from chainrule.pipeline.stage import say


class Completion(Settings):
    """Pictures (or sounds, or texts) of the validation split, of which a part is given."""

    share: float = Field(0.5, gt=0, lt=1, description="what is given, from the start on")
    of: int = Field(10, ge=1, description="how many different ones, completed in turn")


class Config(Filters):
    """Which samples, and how they are drawn."""

    number: int = Field(8, ge=1, description="how many samples")
    classes: list[int | str] | None = Field(
        None,
        min_length=1,
        description="asked for in turn, by name or number; default: every class of the model",
    )
    prompts: list[str | list[int]] | None = Field(
        None,
        min_length=1,
        description="continued in turn: texts, or lists of token ids; for a model of pictures that "
        "takes captions, the captions",
    )
    complete: Completion | None = Field(
        None, description="complete samples of the `tokens` input, given their beginnings"
    )
    picture: Picture | None = Field(
        None, description="a picture file of which a part is kept and the rest is drawn"
    )
    recording: Recording | None = Field(
        None, description="a sound file whose beginning is kept and whose continuation is drawn"
    )
    length: int | None = Field(
        None,
        ge=1,
        description="elements drawn after the prompt; default: as many as fit (a WaveNet: any)",
    )
    stop: list[str] = Field([], description="strings that end a text; they are left out of it")
    end_at: list[str] | None = Field(
        None, description="special tokens that end a sample; default: eos, where the model has it"
    )
    guidance: Guidance = Guidance()
    draft: DraftSettings | None = Field(
        None, description="speculative decoding: what drafts; the distribution stays the same"
    )
    gamma: Gamma = Gamma()
    seed: int = Field(0, ge=0)
    samples_per_shard: int = Field(1000, ge=1, description="rows of one zarr shard")
    dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "float32", description="int8: weights of 8 bits, a scale a row; the rest bfloat16"
    )
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
    captioner: Any = None
    """The tokenizer of captions, for a model that takes them."""

    @property
    def modality(self) -> str | None:
        return self.card.get("modality")

    @property
    def elements(self) -> int:
        return torch.Size(self.model.event_shape).numel()

    def make_room(self, elements: int) -> None:
        """Let samples have so many elements. SamplingError where the model is bound to fewer."""
        if elements > self.elements:
            try:
                self.model = self.model.lengthened(elements)
            except ValueError as error:
                raise SamplingError(f"length: {error}; shorten it, or the prompt") from None


@dataclass
class Beginning:
    """A real sample that is completed."""

    tokens: np.ndarray
    """(T,) in generation order."""
    label: int | None
    """Its class."""
    caption: tuple[str, list[int]] | None = None
    """Its first caption and the tokens of that."""


@dataclass
class Captioned:
    """Captions that samples are drawn for."""

    texts: list[str]
    ids: torch.Tensor
    """(captions, n) token ids, -1 past the end of each."""

    @classmethod
    def of(cls, texts: Sequence[str], source: Source) -> "Captioned":
        """As the captions of training were: single spaces, cut where the longest of them end
        (which is said). SamplingError for one without words."""
        length = source.model.config.captions.length
        texts = [tidy(text) for text in texts]
        encoded = [_encoded(text, source.captioner) for text in texts]
        for text, tokens in zip(texts, encoded, strict=True):
            if not tokens:
                raise SamplingError("prompts: a caption without words; write some, or leave it out")
            if len(tokens) > length:
                say(
                    f"sample: the caption '{text[:40]}…' is cut from {len(tokens)} tokens to "
                    f"{length}, as many as the longest has that the model learned from"
                )
        return cls.of_ids(texts, [tokens[:length] for tokens in encoded], source)

    @classmethod
    def beside(cls, begun: Sequence["Beginning"], source: Source) -> "Captioned | None":
        """The captions of real samples, None where one has none."""
        given = [b.caption for b in begun if b.caption is not None]
        if len(given) < len(begun):
            return None
        return cls.of_ids([text for text, _ in given], [ids for _, ids in given], source)

    @classmethod
    def of_ids(
        cls, texts: Sequence[str], tokens: Sequence[Sequence[int]], source: Source
    ) -> "Captioned":
        """Of captions that are tokens already, no longer than the model's."""
        ids = torch.full((len(texts), source.model.config.captions.length), -1)
        for row, of_caption in enumerate(tokens):
            ids[row, : len(of_caption)] = torch.tensor(of_caption)
        return cls(list(texts), ids)

    def asked(self, i: int) -> int:
        """Which caption sample `i` is drawn for."""
        return i % len(self.texts)


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
    begun: list[Beginning] | None = None
    """What the prompts are the beginnings of, where real samples are completed."""
    given: Given | None = None
    """A picture of which a part is kept in every sample."""
    captions: Captioned | None = None
    """Texts asked for in turn."""

    def plan(self, indices: Sequence[int]) -> Plan:
        prompts = [self.prompts[i % len(self.prompts)] for i in indices]
        known, given = pack_prompts(prompts)
        if self.given is not None:
            known = self.given.tokens.expand(len(prompts), -1)
            given = self.given.kept.expand(len(prompts), -1)
        return Plan(
            seeds=sample_seeds(self.config.seed, np.asarray(indices)),
            lengths=np.array([len(prompt) + self.length for prompt in prompts]),
            cond=self.cond(indices),
            known=known if known.shape[1] else None,
            given=given if known.shape[1] else None,
        )

    def cond(self, indices: Sequence[int]) -> torch.Tensor | None:
        """What the samples are conditioned on, as the model takes it; None without."""
        if self.captions is not None:
            return self.captions.ids[[self.captions.asked(i) for i in indices]]
        if self.classes is not None:
            return torch.tensor([self.classes[i % len(self.classes)] for i in indices])
        return None

    @property
    def columns(self) -> int:
        return max(len(prompt) for prompt in self.prompts) + self.length


def settle(
    config: Config,
    source: Source,
    begun: Sequence[Beginning] | None = None,
    given: Given | None = None,
    captions: Captioned | None = None,
) -> Request:
    """Compare the settings with the model; SamplingError names what it cannot do.

    `begun` are the real samples that `config.complete` asks for; they bring their own class.
    `given` is the picture that `config.picture` asks for. `captions` are used where the prompts
    are none.
    """
    card = source.card
    classes = _classes(config, card)
    if begun is not None and classes is not None:
        if config.classes is not None:
            raise SamplingError("classes: completed samples have their own; leave them out")
        classes = [-1 if b.label is None else b.label for b in begun]
    if has_captions(source.model.config):
        captions = _captions(config, source, begun) or captions
        if captions is None and not drop_rate(source.model.config):
            raise SamplingError(
                "prompts: the model was trained with captions.dropout 0 and has never seen a "
                "picture without a caption; give some"
            )
    if config.guidance.scale != 1:
        _require_guidable(source, classes is not None or captions is not None)
    asked = None if captions is not None else config.prompts
    prompts = [_prompt(p, source) for p in asked or [[]]]
    if (begun is not None) != (config.complete is not None):
        raise SamplingError("complete: takes a pretokenize artifact as the input `tokens`")
    if begun is not None:
        assert config.complete is not None
        if asked is not None:
            raise SamplingError("prompts, complete: give one of them")
        share = config.complete.share
        prompts = [b.tokens[: max(1, round(share * len(b.tokens)))].tolist() for b in begun]
    if given is not None and (asked is not None or begun is not None):
        raise SamplingError("picture, prompts, complete: give one of them")
    if config.recording is not None:
        if asked is not None or begun is not None:
            raise SamplingError("recording, prompts, complete: give one of them")
        prompts = [beginning_of(config.recording, source, config.length)]
    longest = max(len(prompt) for prompt in prompts)
    length = config.length if config.length is not None else source.elements - longest
    if length < 1:
        raise SamplingError(
            f"length: a prompt of {longest} tokens leaves nothing to draw of the {source.elements} "
            "elements that the model makes; shorten it"
        )
    source.make_room(longest + length)
    if source.modality == "image" and longest + length != source.elements:
        raise SamplingError(
            f"length: a picture of this model has {source.elements} elements, "
            f"{longest + length} are asked for; leave `length` out"
        )
    end: tuple[int, ...] = ()
    allowed = None
    if card.get("vocabulary"):
        vocabulary = Vocabulary.model_validate(card["vocabulary"])
        end = _ends(config, vocabulary.specials)
        allowed = _allowed(vocabulary, source, end)
    elif config.end_at:
        raise SamplingError("end_at: the model has no special tokens; leave it out")
    finished = None
    if config.stop:
        if source.modality != "text" or source.tokenizer is None:
            raise SamplingError("stop: stop strings are for text models; leave `stop` out")
        finished = StopStrings(source.tokenizer, config.stop)
    rules = Rules(config.filters, config.guidance, allowed, end, finished)
    begun = None if begun is None else list(begun)
    return Request(config, rules, classes, prompts, length, begun, given, captions)


def _captions(
    config: Config, source: Source, begun: Sequence[Beginning] | None
) -> Captioned | None:
    """What a model of captions is asked for: the prompts that are texts, or the captions of the
    real samples that are completed."""
    texts = [prompt for prompt in config.prompts or [] if isinstance(prompt, str)]
    if texts and begun is not None:
        raise SamplingError("prompts, complete: give one of them")
    if not texts:
        return None if begun is None else Captioned.beside(begun, source)
    if len(texts) != len(config.prompts or []):
        raise SamplingError("prompts: captions are texts; leave lists of token ids out")
    if source.captioner is None:
        raise SamplingError(
            "prompts: the model folder holds no tokenizer of captions; hand the model off again "
            "with it among the inputs `tokenizer`"
        )
    return Captioned.of(texts, source)


def _require_guidable(source: Source, conditioned: bool) -> None:
    config = source.model.config
    if not is_conditioned(config):
        raise SamplingError("guidance: the model has no classes; leave guidance at 1")
    what = "caption" if has_captions(config) else "class"
    if not conditioned:
        raise SamplingError("guidance: no caption is asked for; give prompts, or leave it at 1")
    if not drop_rate(config):
        setting = "captions.dropout" if what == "caption" else "class_dropout"
        raise SamplingError(
            f"guidance: the model was trained with {setting} 0 and has never seen a sample "
            f"without its {what}; leave guidance at 1, or train with {setting} 0.1"
        )


def _classes(config: Config, card: Mapping[str, Any]) -> list[int] | None:
    names = card.get("classes")
    if not names:
        if config.classes is not None:
            raise SamplingError("classes: the model was trained without classes; leave them out")
        return None
    if config.classes is None:
        return list(range(len(names)))
    return [_class(given, [str(name) for name in names]) for given in config.classes]


def _class(given: int | str, names: Sequence[str]) -> int:
    """The index of a class asked for by name or by number. A name that reads as a number goes
    before the number; a bare number that could mean either is refused."""
    name = str(given)
    number = int(name) if re.fullmatch(r"-?[0-9]+", name) else None
    if name in names:
        index = names.index(name)
        if isinstance(given, int) and given != index and 0 <= given < len(names):
            raise SamplingError(
                f"classes: {given} is the name of class number {index} and the number of class "
                f"'{names[given]}'; write the name of the one that is meant, in quotes"
            )
        return index
    if number is None:
        raise SamplingError(f"classes: no class '{given}'{nearest(name, list(names))}")
    if not 0 <= number < len(names):
        raise SamplingError(
            f"classes: no class {number}; the model has {len(names)}, 0 to {len(names) - 1}"
        )
    return number


def _ends(config: Config, specials: Mapping[str, int]) -> tuple[int, ...]:
    """The tokens that end a sample."""
    if config.end_at is None:
        return (specials["eos"],) if "eos" in specials else ()
    for name in config.end_at:
        if name not in specials:
            known = nearest(name, list(specials)) if specials else "; it has none"
            raise SamplingError(f"end_at: the model has no special token '{name}'{known}")
    return tuple(specials[name] for name in config.end_at)


def _prompt(prompt: str | list[int], source: Source) -> list[int]:
    vocabulary = source.card.get("vocabulary")
    if isinstance(prompt, str):
        if source.modality != "text" or source.tokenizer is None:
            raise SamplingError(
                f"prompts: {prompt!r} is text and the model is not one of text; give lists of "
                "token ids (--set prompts=[[1, 2]]), or leave prompts out"
            )
        return _encoded(prompt, source.tokenizer)
    ranges = vocabulary["ranges"] if vocabulary else {}
    for token in prompt:
        if ranges and not any(start <= token < stop for start, stop in ranges.values()):
            spans = ", ".join(f"{name} [{a}, {b})" for name, (a, b) in ranges.items())
            raise SamplingError(f"prompts: token {token} lies outside the model's ranges: {spans}")
    return prompt


def _encoded(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a prompt; characters that the tokenizer has none for are named.

    SamplingError for bytes of the command line that were no UTF-8: they came as lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SamplingError(
            f"prompts (--prompt): {text[:40]!r}: what stands at character {error.start} is not "
            "UTF-8; write the prompt in UTF-8"
        ) from None
    [tokens] = tokenizer.encode([text])
    lost = "\ufffd"
    if tokenizer.decode([tokens])[0].count(lost) > text.count(lost):
        unknown = [
            c for c in dict.fromkeys(text) if lost in tokenizer.decode(tokenizer.encode([c]))[0]
        ]
        say(
            f"sample: the prompt '{text[:40]}' has characters that the model never learned from: "
            f"{' '.join(map(repr, unknown[:8]))}{' …' if len(unknown) > 8 else ''}"
        )
    return [int(token) for token in tokens]


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


def vocabulary_size(source: Source) -> int | None:
    """Values of an element; None for real numbers."""
    if source.card.get("vocabulary"):
        return Vocabulary.model_validate(source.card["vocabulary"]).values
    return getattr(source.model.config, "vocabulary_size", None)
