"""Text as it comes: pieces for a terminal, stop strings.

A tokenizer is anything with `decode([ids]) -> [str]`; this room knows no more of it.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.sampling.drafts import Draft
from chainrule.pipeline.sampling.sampler import Plan, Rules, pack_prompts, steps
from chainrule.pipeline.sampling.speculative import Gamma, speculated
from chainrule.pipeline.sampling.uniforms import sample_seeds

TAIL = 32
"""Last tokens decoded to look for a stop string, at least. A token has a byte or more, so that a
string's bytes bound its tokens; the one before it may lose a leading space in decoding."""


class Decoder(Protocol):
    """What is asked of a text tokenizer."""

    def decode(self, batch: Sequence[np.ndarray]) -> list[Any]: ...


def cut_at(text: str, stop: Sequence[str], start: int = 0) -> str:
    """`text` up to the first of the stop strings found from character `start` on."""
    found = [at for at in (text.find(s, start) for s in stop) if at >= 0]
    return text[: min(found)] if found else text


class StopStrings:
    """Ends a row when its drawn text holds one of the strings (`Rules.finished`)."""

    def __init__(self, tokenizer: Decoder, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.tail = max(TAIL, 1 + max(len(s.encode()) for s in stop))

    def __call__(self, row: int, drawn: Sequence[int]) -> bool:
        tail = self.tokenizer.decode([np.asarray(drawn[-self.tail :])])[0]
        return any(s in tail for s in self.stop)


def stream(
    model: Autoregressive,
    tokenizer: Decoder,
    prompt: Sequence[int],
    length: int,
    rules: Rules,
    seed: int = 0,
    stop: Sequence[str] = (),
    index: int = 0,
    draft: Draft | None = None,
    gamma: Gamma | None = None,
) -> Iterator[str]:
    """Pieces of one sample's text as its tokens are drawn, the prompt left out.

    With a draft they are drawn by speculation, some at a time.

    The pieces joined are the text that `sample` writes for its sample `index`. A token that ends
    inside a character (byte pieces) is held back until the character is whole; text that may
    be the beginning of a stop string is held back too.
    """
    known, given = pack_prompts([prompt])
    # The stream cuts at stop strings itself.
    rules = dataclasses.replace(rules, finished=None)
    plan = Plan(
        seeds=sample_seeds(seed, np.array([index])),
        lengths=np.array([len(prompt) + length]),
        known=known if len(prompt) else None,
        given=given if len(prompt) else None,
    )
    tokens: list[int] = list(prompt)
    prompt_text = tokenizer.decode([np.asarray(prompt, dtype=np.int64)])[0] if prompt else ""
    shown = len(prompt_text)
    held = max((len(s) for s in stop), default=1) - 1
    text = prompt_text
    if draft is None:
        drawn = _drawn(model, plan, rules)
    else:
        rounds = speculated(model, draft, plan, rules, gamma or Gamma())
        drawn = itertools.chain.from_iterable(rounds)
    for token in drawn:
        if token in rules.end:
            break
        tokens.append(token)
        text = tokenizer.decode([np.asarray(tokens)])[0]
        stopped = cut_at(text, stop, len(prompt_text))
        if stopped != text:
            text = stopped
            break
        whole = text.rstrip("�")
        if len(whole) - held > shown:
            yield whole[shown : len(whole) - held]
            shown = len(whole) - held
    if len(text) > shown:
        yield text[shown:]


def _drawn(model: Autoregressive, plan: Plan, rules: Rules) -> Iterator[int]:
    """The tokens of a plan of one row, one after another, without its prompt."""
    first = plan.common_prefix
    for step in steps(model, plan, rules):
        if step.position >= first:
            yield int(step.x[0])
