"""The file that `compress` writes: a header, the coded streams, a checksum over all of it.

    magic (8) | header size (4) | header: zstd of JSON | streams, one after another | sha256 (32)

Integers are little-endian. The last 32 bytes are the sha256 of everything before them, so a
damaged or truncated container is refused before anything in it is believed. The header says:

    format     version of this layout
    model      fingerprint, and the folder it was read from (a hint for `decompress`)
    contract   what the floats of the encoder depended on: dtype, device kind, torch version,
               thread count, instruction set
    layout     how sequences were cut into rows and batches (`blocks.Layout`)
    coded      the items (symbol sequences) of all files: lengths, classes, checks
    files      name, length and sha256 of the original, how it was stored, its items
    sizes      bytes of each stream

What the entries mean is decided by `archive.py`; this module only writes and reads.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

MAGIC = b"\x89CRL\r\n\x1a\n"
FORMAT = 1
LARGEST_HEADER = 1 << 28
"""Bytes of JSON a header may unfold to: guards against a small file that claims the world."""


class ContainerError(ValueError):
    """A container that is damaged, of another format, or of another model."""


@dataclass(frozen=True)
class Container:
    """A container read whole and found intact."""

    path: Path
    header: dict[str, Any]
    streams: list[bytes]


def fold(data: bytes) -> bytes:
    """zstd at its strongest level (the fallback of what no model codes)."""
    return zstandard.ZstdCompressor(level=19).compress(data)


def unfold(data: bytes, length: int) -> bytes:
    """Undo `fold`; ContainerError if the frame claims more than `length` bytes."""
    try:
        if zstandard.frame_content_size(data) > length:
            raise ContainerError(f"a zstd frame that claims more than {length:,} bytes")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=length)
    except zstandard.ZstdError as error:
        raise ContainerError(f"a zstd frame that cannot be read ({error})") from None


def write(path: Path, header: dict[str, Any], streams: list[bytes]) -> int:
    """Write a container and give its size in bytes; the header gains the streams' sizes.

    The caller writes under a temporary name and renames once it has verified the result.
    """
    header = {**header, "format": FORMAT, "sizes": [len(stream) for stream in streams]}
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    packed = fold(text)
    total = hashlib.sha256()
    size = 0
    with open(path, "wb") as file:
        for part in (MAGIC, len(packed).to_bytes(4, "little"), packed, *streams):
            file.write(part)
            total.update(part)
            size += len(part)
        file.write(total.digest())
        file.flush()
        os.fsync(file.fileno())
    return size + total.digest_size


def read(path: Path) -> Container:
    """Read a container and check every byte of it. ContainerError names what is wrong."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ContainerError(f"{path}: cannot be read ({error.strerror})") from None
    return parse(path, data)


def parse(path: Path, data: bytes) -> Container:
    """The container that `data` holds; `path` is for the messages."""
    if not data.startswith(MAGIC):
        raise ContainerError(f"{path}: not a container of chainrule")
    if len(data) < len(MAGIC) + 4 + 32:
        raise ContainerError(f"{path}: cut short ({len(data)} bytes)")
    body, checksum = data[:-32], data[-32:]
    if hashlib.sha256(body).digest() != checksum:
        raise ContainerError(f"{path}: damaged or cut short (its checksum does not match)")
    start = len(MAGIC) + 4
    stop = start + int.from_bytes(data[len(MAGIC) : start], "little")
    try:
        header = json.loads(unfold(body[start:stop], LARGEST_HEADER))
        sizes = header["sizes"]
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise TypeError("sizes")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ContainerError(f"{path}: its header cannot be read ({error})") from None
    if header.get("format") != FORMAT:
        raise ContainerError(
            f"{path}: container format {header.get('format')!r}; this version reads {FORMAT}"
        )
    if stop + sum(sizes) != len(body):
        raise ContainerError(f"{path}: holds {len(body) - stop} bytes of streams, not {sum(sizes)}")
    streams = []
    for size in sizes:
        streams.append(body[stop : stop + size])
        stop += size
    return Container(path, header, streams)
