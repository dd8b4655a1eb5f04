"""Compressors other than ours, on the same data, for scale beside a model's likelihood.

Each is given its strongest setting, and can undo what it did (so that a scoreboard verifies
it as it verifies a model). Sizes include each format's own headers. A codec carries no model
file; a trained model does. Ways of giving data to a codec, always said beside the figure:

- alone    every document, image or recording by itself, as a model scores it
- joined   all in one: documents end to end, images of one shape as one atlas
- primed   joined, after the training split: size(training + held out) - size(training),
           for byte codecs whose memory reaches back so far

Codecs of packages that are not installed are left out: brotli, pyppmd, pillow-jxl-plugin
(the extra `codecs`).
"""

import bz2
import gzip
import importlib.util
import io
import lzma
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

_XZ: dict[str, Any] = {"preset": 9 | lzma.PRESET_EXTREME}
PPM_ORDER, PPM_MEMORY = 6, 64 << 20


@dataclass(frozen=True)
class Codec:
    """A compressor of bytes, of images (H, W, C) uint8, or of recordings (T,) int16."""

    name: str
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


def byte_codecs() -> list[Codec]:
    """For any bytes, text above all."""
    found = [
        Codec("gzip", lambda data: gzip.compress(data, 9, mtime=0), gzip.decompress),
        Codec("bzip2", lambda data: bz2.compress(data, 9), bz2.decompress),
        Codec("xz", lambda data: lzma.compress(data, **_XZ), lzma.decompress),
        Codec(
            "zstd",
            lambda data: zstandard.ZstdCompressor(level=19).compress(data),
            lambda data: zstandard.ZstdDecompressor().decompress(data),
        ),
    ]
    if importlib.util.find_spec("brotli"):
        import brotli

        found.append(
            Codec("brotli", lambda data: brotli.compress(data, lgwin=24), brotli.decompress)
        )
    if importlib.util.find_spec("pyppmd"):
        import pyppmd

        found.append(
            Codec(
                f"PPMd (order {PPM_ORDER})",
                lambda data: pyppmd.compress(data, max_order=PPM_ORDER, mem_size=PPM_MEMORY),
                lambda data: pyppmd.decompress(data, max_order=PPM_ORDER, mem_size=PPM_MEMORY),
            )
        )
    return found


def image_codecs() -> list[Codec]:
    """Lossless, for uint8 (H, W, C), C = 1 or 3."""
    found = [
        _pillow("PNG", "PNG", optimize=True),
        _pillow("WebP", "WEBP", lossless=True, method=6, quality=100),
    ]
    if importlib.util.find_spec("pillow_jxl"):
        importlib.import_module("pillow_jxl")  # registers itself with Pillow
        found.append(_pillow("JPEG XL", "JXL", lossless=True, effort=9))
    return found


def _pillow(name: str, form: str, **settings: Any) -> Codec:
    from PIL import Image

    def encode(image: np.ndarray) -> bytes:
        stream = io.BytesIO()
        pixels = image[:, :, 0] if image.shape[2] == 1 else image
        # WebP has no grey images: three equal channels, which cost it next to nothing
        Image.fromarray(np.ascontiguousarray(pixels)).save(stream, form, **settings)
        return stream.getvalue()

    def decode(data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    return Codec(name, encode, decode)


def audio_codecs(rate: int) -> list[Codec]:
    """Lossless, for int16 (T,) at `rate` Hz."""
    import soundfile

    def encode(samples: np.ndarray) -> bytes:
        stream = io.BytesIO()
        soundfile.write(
            stream, samples, rate, format="FLAC", subtype="PCM_16", compression_level=1.0
        )
        return stream.getvalue()

    def decode(data: bytes) -> np.ndarray:
        samples: np.ndarray = soundfile.read(io.BytesIO(data), dtype="int16")[0]
        return samples

    return [Codec("FLAC", encode, decode)]


def same(original: Any, back: Any) -> bool:
    """Whether a decoded thing is the original (a grey image may come back as three channels)."""
    if isinstance(original, bytes):
        return bool(original == back)
    if original.ndim == 3 and original.shape[2] == 1 and back.shape[2] == 3:
        back = back[:, :, :1] if (back == back[:, :, :1]).all() else back
    return np.array_equal(original, back)


def atlas(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images of one shape side by side in a nearly square sheet; empty places are zero."""
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    h, w, c = images[0].shape
    sheet = np.zeros((rows * h, columns * w, c), dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * h, i % columns * w
        sheet[top : top + h, left : left + w] = image
    return sheet


class Baseline:
    """Sizes of documents under the four codecs that every install has, one at a time, in
    bounded memory: alone, and joined through each codec's stream."""

    def __init__(self) -> None:
        self.codecs = [c for c in byte_codecs() if c.name in ("gzip", "bzip2", "xz", "zstd")]
        self.alone = {codec.name: 0 for codec in self.codecs}
        self.bytes = 0
        self._streams: dict[str, Any] = {
            "gzip": zlib.compressobj(9, zlib.DEFLATED, 31),
            "bzip2": bz2.BZ2Compressor(9),
            "xz": lzma.LZMACompressor(**_XZ),
            "zstd": zstandard.ZstdCompressor(level=19).compressobj(),
        }
        self._joined = dict.fromkeys(self._streams, 0)

    def add(self, document: bytes) -> None:
        self.bytes += len(document)
        for name, stream in self._streams.items():
            self._joined[name] += len(stream.compress(document))
        for codec in self.codecs:
            self.alone[codec.name] += len(codec.encode(document))

    def finish(self) -> dict[str, dict[str, int]]:
        """{"alone": {codec: bytes}, "joined": {codec: bytes}}."""
        for name, stream in self._streams.items():
            self._joined[name] += len(stream.flush())
        return {"alone": self.alone, "joined": self._joined}
