"""A recording of one's own, whose beginning is given and whose continuation is drawn."""

from pathlib import Path
from typing import Any

from pydantic import Field

from chainrule.pipeline.config import Settings
from chainrule.pipeline.data.audio import decode
from chainrule.pipeline.data.sources import Unreadable
from chainrule.pipeline.sampling.sampler import SamplingError

LONGEST = 3600.0
"""Seconds of a file that is read."""


class Recording(Settings):
    """A sound file, and how much of its beginning is kept."""

    file: Path
    seconds: float | None = Field(
        None, gt=0, description="its first ones; default: half of what the model makes"
    )


def beginning_of(asked: Recording, source: Any, length: int | None = None) -> list[int]:
    """Tokens of the first seconds of a file, at the rate that the model was trained on.

    `length` elements are to be drawn after them: None for what the model makes in all, less these.
    SamplingError where there is no such recording, or it leaves nothing to draw.
    """
    if source.modality != "audio" or source.tokenizer is None:
        raise SamplingError("recording: the model is not one of sound; leave it out")
    card = source.tokenizer.card()
    rate = card["sample_rate"]
    most = source.elements // card["tokens_per_sample"]
    kept = most // 2 if asked.seconds is None else round(asked.seconds * rate)
    if kept < 1 or (kept >= most and length is None):
        raise SamplingError(
            f"recording: {kept} samples are {kept / rate:.3g} s; the model makes {most} "
            f"({most / rate:.3g} s), of which some must be left to draw; set seconds, or length"
        )
    try:
        samples = decode(asked.file.read_bytes(), rate, LONGEST)
    except OSError as error:
        raise SamplingError(f"recording: {asked.file}: {error.strerror}") from None
    except Unreadable as error:
        raise SamplingError(f"recording: {asked.file}: {error}") from None
    if len(samples) < kept:
        raise SamplingError(
            f"recording: {asked.file}: is {len(samples) / rate:.3g} s long, {kept / rate:.3g} s "
            f"are to be kept; set seconds to {len(samples) / rate:.3g} or less"
        )
    return [int(token) for token in source.tokenizer.encode([samples[:kept]])[0]]
