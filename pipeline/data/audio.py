"""Sources of audio. A sample is mono, 16 bits, at one sampling rate, stored losslessly."""

import io
import re
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from chainrule.pipeline.data.sources import (
    Labels,
    Raw,
    Source,
    SourceSettings,
    Tree,
    Unreadable,
    tree_files,
)

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")


class AudioFolder(SourceSettings):
    """A folder (or tar) of recordings; the class of one is its first subfolder.

    Channels are averaged; other rates are resampled by soxr at its very high quality.
    """

    kind: Literal["audio-folder"]
    path: Path
    sample_rate: int = Field(16_000, ge=1, description="Hz")
    class_pattern: str | None = Field(
        None, description="regular expression on the relative path; its first group is the class"
    )
    max_seconds: float = Field(3600.0, gt=0, description="longer recordings are refused")

    def open(self) -> Source:
        return _Recordings(self)

    def files(self) -> list[Path]:
        return tree_files(self.path, SUFFIXES)


class _Recordings(Source):
    modality, what = "audio", "recording"

    def __init__(self, settings: AudioFolder) -> None:
        self._settings = settings
        self._tree = Tree(settings.path, SUFFIXES)
        self._labels = Labels(self._tree.names, settings.path, settings.class_pattern)
        self.classes = self._labels.classes

    def __len__(self) -> int:
        return len(self._tree.names)

    def where(self, i: int) -> str:
        return self._tree.names[i]

    def read(self, i: int) -> Raw:
        samples = decode(
            self._tree.read(self._tree.names[i]),
            self._settings.sample_rate,
            self._settings.max_seconds,
        )
        meta = {
            "source": self.where(i),
            "sample_rate": self._settings.sample_rate,
            "samples": len(samples),
            **self._labels.meta(i),
        }
        return Raw({"flac": encode_flac(samples, self._settings.sample_rate), "json": meta})


def decode(data: bytes, rate: int, max_seconds: float) -> np.ndarray:
    """int16 (T,) at `rate` Hz of an encoded recording. Unreadable.

    A recording that is mono, 16 bits and at `rate` already is kept bit for bit.
    """
    import soundfile
    import soxr

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.frames > max_seconds * file.samplerate:
                raise Unreadable(
                    f"too long: {file.frames / file.samplerate:.0f} s, max_seconds {max_seconds:g}"
                )
            exact = file.channels == 1 and file.samplerate == rate and file.subtype == "PCM_16"
            samples = file.read(dtype="int16" if exact else "float32", always_2d=True)
            if len(samples) != file.frames:
                raise Unreadable(f"truncated: {len(samples)} of {file.frames} frames")
            own_rate = file.samplerate
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        said = re.sub(r"<_io\.\w+ object at 0x[0-9a-f]+>", "it", str(error))  # the same every time
        raise Unreadable(f"damaged: {said}") from None
    if not len(samples):
        raise Unreadable("holds no sound")
    if exact:
        return np.ascontiguousarray(samples[:, 0])
    if not np.isfinite(samples).all():
        raise Unreadable("damaged: values that are not finite")
    mono = samples.mean(axis=1, dtype=np.float64).astype(np.float32)
    if own_rate != rate:
        mono = soxr.resample(mono, own_rate, rate, quality="VHQ")
    return np.clip(np.round(mono * 32768.0), -32768, 32767).astype(np.int16)


def encode_flac(samples: np.ndarray, rate: int) -> bytes:
    """int16 (T,) as FLAC."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
