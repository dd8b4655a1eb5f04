"""Sources of audio. A sample is mono, 16 bits, at one sampling rate, stored losslessly."""

import io
import re
import struct
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from chainrule.pipeline.data.sources import (
    Labels,
    Pattern,
    Raw,
    Source,
    SourceSettings,
    Tree,
    Unreadable,
    shown,
    tree_files,
)

SOUND_CHUNKS = {
    (b"RIFF", b"WAVE"): ("<", b"data", 0x7FFFF000),
    (b"FORM", b"AIFF"): (">", b"SSND", 0x7EFF0000),
    (b"FORM", b"AIFC"): (">", b"SSND", 0x7EFF0000),
}
"""Byte order, name of the chunk with the sound, and the size from which on sizes are placeholders
of programs that wrote to a pipe."""
HEADER = 44
"""Bytes of the usual header, which some programs count with the sound."""
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")


class AudioFolder(SourceSettings):
    """A folder (or tar) of recordings; the class of one is its first subfolder.

    Channels are averaged; other rates are resampled by soxr at its very high quality.
    """

    modality = "audio"
    kind: Literal["audio-folder"]
    path: Path
    sample_rate: int = Field(16_000, ge=1, description="Hz")
    class_pattern: Pattern | None = Field(
        None, description="regular expression on the relative path; its first group is the class"
    )
    max_seconds: float = Field(3600.0, gt=0, description="longer recordings are refused")
    seconds: float | None = Field(
        None,
        gt=0,
        description="cut each recording to that, or fill it up with silence: samples of one "
        "length make a row each, which a model can be given the class of",
    )

    def open(self) -> Source:
        return _Recordings(self)

    def files(self) -> list[Path]:
        return tree_files(self.path, SUFFIXES)


class _Recordings(Source):
    what = "recording"

    def __init__(self, settings: AudioFolder) -> None:
        self._settings = settings
        self._tree = Tree(settings.path, SUFFIXES)
        self._labels = Labels(self._tree.names, settings.path, settings.class_pattern)
        self.classes = self._labels.classes

    def __len__(self) -> int:
        return len(self._tree.names)

    def where(self, i: int) -> str:
        return shown(self._tree.names[i])

    def read(self, i: int) -> Raw:
        samples = decode(
            self._tree.read(self._tree.names[i]),
            self._settings.sample_rate,
            self._settings.max_seconds,
        )
        meta = {"source": self.where(i), "sample_rate": self._settings.sample_rate}
        if self._settings.seconds is not None:
            meta["recorded"] = len(samples)
            samples = samples[: round(self._settings.seconds * self._settings.sample_rate)]
            missing = round(self._settings.seconds * self._settings.sample_rate) - len(samples)
            samples = np.pad(samples, (0, missing))
        meta |= {
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

    _require_whole(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.frames > max_seconds * file.samplerate:
                raise Unreadable(
                    f"too long: {file.frames / file.samplerate:.0f} s, max_seconds {max_seconds:g}"
                )
            exact = file.channels == 1 and file.samplerate == rate and file.subtype == "PCM_16"
            samples = file.read(
                frames=file.frames,  # the default asks for a codec that can seek; GSM 6.10 cannot
                dtype="int16" if exact else "float32",
                always_2d=True,
            )
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


def _require_whole(data: bytes) -> None:
    """Unreadable where a WAV or AIFF file ends before its header says: libsndfile would take what
    is there for all of it."""
    form = (data[:4], data[8:12])
    if form not in SOUND_CHUNKS:
        return
    order, sound, streamed = SOUND_CHUNKS[form]
    at = 12
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}4sI", data, at)
        if kind == sound:
            held = len(data) - at - 8
            if held + HEADER < size < streamed:
                raise Unreadable(f"truncated: {held} of {size} bytes of sound")
            return
        at += 8 + size + size % 2


def encode_flac(samples: np.ndarray, rate: int) -> bytes:
    """int16 (T,) as FLAC."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
