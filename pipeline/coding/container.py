"""The file that `compress` writes: a header, the coded streams, a checksum over all of it.

    magic (4) | format (1) | model (8) | digest (8) | header | streams, file by file | checksum (4)

    format     version of this layout; another one is refused by name
    model      the first 8 bytes of the model's fingerprint
    digest     the first 8 bytes of the sha256 over the originals (`archive.py`)
    header     numeric contract, layout, and each file's name, length and streams, deflated; it
               ends itself (`header.py`)
    checksum   the first 4 bytes of the sha256 of everything before: a damaged or truncated
               container is refused before anything in it is believed; what 2**-32 of all
               damages slip past, the digest refuses before a file is written

What the entries mean is decided by `archive.py`; this module only writes and reads. Formats 1
and 2 (headers of JSON) are not read any more.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard

from chainrule.pipeline.coding.header import (
    ContainerError,
    Header,
    Parts,
    fold_header,
    unfold_header,
)

MAGIC = b"\x89CRL"
FORMAT = 3
_FORMAT_1 = ord("\r")
"""What stood in the place of the format in containers of format 1."""
KEPT = 8
"""Bytes kept of the model's fingerprint, and of the originals' sha256."""
CHECKSUM = 4


@dataclass(frozen=True)
class Container:
    """A container read whole and found intact."""

    path: Path
    header: Header
    streams: list[Parts]
    """One of each entry."""


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


def write(path: Path, header: Header, streams: Sequence[Parts]) -> int:
    """Write a container and give its size in bytes. ContainerError for what it cannot hold.

    The caller writes under a temporary name and renames once it has verified the result.
    """
    head = b"".join(
        (
            MAGIC,
            bytes([FORMAT]),
            bytes.fromhex(header.fingerprint),
            header.digest,
            fold_header(header, streams),
        )
    )
    total = hashlib.sha256()
    size = 0
    with open(path, "wb") as file:
        for part in (head, *(part for parts in streams for part in parts)):
            file.write(part)
            total.update(part)
            size += len(part)
        file.write(total.digest()[:CHECKSUM])
        file.flush()
        os.fsync(file.fileno())
    return size + CHECKSUM


def read(path: Path) -> Container:
    """Read a container and check every byte of it. ContainerError names what is wrong."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ContainerError(f"{path}: cannot be read ({error.strerror})") from None
    return parse(path, data)


def parse(path: Path, data: bytes) -> Container:
    """The container that `data` holds; `path` is for the messages."""
    start = len(MAGIC) + 1
    if not data.startswith(MAGIC) or len(data) < start:
        raise ContainerError(f"{path}: not a container of chainrule")
    written = 1 if data[start - 1] == _FORMAT_1 else data[start - 1]
    if written != FORMAT:
        raise ContainerError(f"{path}: container format {written}; this version reads {FORMAT}")
    if len(data) < start + 2 * KEPT + CHECKSUM:
        raise ContainerError(f"{path}: cut short ({len(data)} bytes)")
    body, checksum = data[:-CHECKSUM], data[-CHECKSUM:]
    if hashlib.sha256(body).digest()[:CHECKSUM] != checksum:
        raise ContainerError(f"{path}: damaged or cut short (its checksum does not match)")
    try:
        header, streams = unfold_header(body[start + 2 * KEPT :])
    except ContainerError as error:
        raise ContainerError(f"{path}: {error}") from None
    header.fingerprint = body[start : start + KEPT].hex()
    header.digest = body[start + KEPT : start + 2 * KEPT]
    return Container(path, header, streams)
