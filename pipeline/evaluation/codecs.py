"""General-purpose compressors on the same bytes, for scale beside a model's likelihood.

Each is given its strongest setting. Two ways, always said beside the figure: every document
alone (as a model scores it, from nothing), and all documents joined into one (where the
codec may learn from the documents before). A codec carries no model file; a trained model
does. Sizes include each format's own headers.
"""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from typing import Any

import zstandard

CODECS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, compresslevel=9, mtime=0),
    "bzip2": lambda data: bz2.compress(data, compresslevel=9),
    "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    "zstd": lambda data: zstandard.ZstdCompressor(level=19).compress(data),
}


class Joined:
    """All documents as one stream, without holding them: the joined size of each codec."""

    def __init__(self) -> None:
        self._coders: dict[str, Any] = {
            "gzip": zlib.compressobj(9, zlib.DEFLATED, 31),
            "bzip2": bz2.BZ2Compressor(9),
            "xz": lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
            "zstd": zstandard.ZstdCompressor(level=19).compressobj(),
        }
        self.sizes = dict.fromkeys(self._coders, 0)

    def add(self, data: bytes) -> None:
        for name, coder in self._coders.items():
            self.sizes[name] += len(coder.compress(data))

    def finish(self) -> dict[str, int]:
        """Bytes of the whole stream, by codec."""
        for name, coder in self._coders.items():
            self.sizes[name] += len(coder.flush())
        return self.sizes


class Baseline:
    """Sizes of documents under every codec, one document at a time."""

    def __init__(self) -> None:
        self.alone = dict.fromkeys(CODECS, 0)
        self.bytes = 0
        self._joined = Joined()

    def add(self, document: bytes) -> None:
        self.bytes += len(document)
        self._joined.add(document)
        for name, compress in CODECS.items():
            self.alone[name] += len(compress(document))

    def finish(self) -> dict[str, dict[str, int]]:
        """{"alone": {codec: bytes}, "joined": {codec: bytes}}."""
        return {"alone": self.alone, "joined": self._joined.finish()}
