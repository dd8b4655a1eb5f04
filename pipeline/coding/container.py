"""The file that `compress` writes: a header, the coded streams, a checksum over all of it.

    magic (4) | format (1) | size of the header | header | digests | streams | sha256, cut (8)

Everything but the streams is kept small, since a picture of MNIST has 90 bytes of stream: the
header is JSON under deflate (which has no frame of its own) with the usual words known
beforehand (`header_words.json`), its lists of files are columns, its digests are bytes of
their own, cut to what tells accidents apart. The size is a LEB128 number. The last 8 bytes
are of the sha256 of everything before them, so a damaged or truncated container is refused
before anything in it is believed. The header says:

    model      fingerprint, and the folder it was read from (a hint for `decompress`)
    contract   what the floats of the encoder depended on: dtype, device kind, versions of the
               libraries, thread count, instruction set
    layout     how sequences were cut into rows and batches (`blocks.Layout`)
    coded      the items (symbol sequences) of all files: lengths, classes, checks
    files      name, length and sha256 of the original, how it was stored, its items
    originals  sha256 over the sha256 of all files
    sizes      bytes of each stream

What the entries mean is decided by `archive.py`; this module only writes and reads.
"""

import hashlib
import importlib.resources
import json
import os
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import zstandard

MAGIC = b"\x89CRL"
FORMAT = 2
FORMAT_1 = b"\r"
"""What format 1 had where the format stands since."""
CHECKSUM = 8
DIGESTS = {"fingerprint": 8, "sha256": 4, "restored": 4, "originals": 4}
"""Bytes that are kept of each. A file that came back wrong is found by its own four or by the
four of all."""
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
    header = {**header, "sizes": [len(stream) for stream in streams]}
    digests: list[bytes] = []
    short = _to_columns(_take_digests(header, digests))
    text = json.dumps(short, separators=(",", ":"), allow_nan=False).encode()
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=_words())
    packed = deflate.compress(text) + deflate.flush()
    total = hashlib.sha256()
    size = 0
    with open(path, "wb") as file:
        start = (MAGIC, bytes([FORMAT]), _leb128(len(packed)), packed)
        for part in (*start, *digests, *streams):
            file.write(part)
            total.update(part)
            size += len(part)
        file.write(total.digest()[:CHECKSUM])
        file.flush()
        os.fsync(file.fileno())
    return size + CHECKSUM


def read(path: Path) -> Container:
    """Read a container and check every byte of it. ContainerError names what is wrong.

    Its digests are the first hexadecimal digits of those that were given to `write`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ContainerError(f"{path}: cannot be read ({error.strerror})") from None
    return parse(path, data)


def parse(path: Path, data: bytes) -> Container:
    """The container that `data` holds; `path` is for the messages."""
    if not data.startswith(MAGIC):
        raise ContainerError(f"{path}: not a container of chainrule")
    if len(data) < len(MAGIC) + 2 + CHECKSUM:
        raise ContainerError(f"{path}: cut short ({len(data)} bytes)")
    version = data[len(MAGIC)]
    if bytes([version]) == FORMAT_1:
        version = 1
    if version != FORMAT:
        raise ContainerError(
            f"{path}: container format {version}; this version reads {FORMAT}, if it is not damaged"
        )
    body, checksum = data[:-CHECKSUM], data[-CHECKSUM:]
    if hashlib.sha256(body).digest()[:CHECKSUM] != checksum:
        raise ContainerError(f"{path}: damaged or cut short (its checksum does not match)")
    try:
        size, start = _read_leb128(body, len(MAGIC) + 1)
        stop = start + size
        inflate = zlib.decompressobj(-15, zdict=_words())
        text = inflate.decompress(body[start:stop], LARGEST_HEADER)
        if not inflate.eof:
            raise ValueError("it does not end, or is too large")
        header = _from_columns(json.loads(text))
        stop = _give_digests(header, body, stop)
        sizes = header["sizes"]
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise TypeError("sizes")
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        zlib.error,
    ) as error:
        raise ContainerError(f"{path}: its header cannot be read ({error})") from None
    if stop + sum(sizes) != len(body):
        raise ContainerError(f"{path}: holds {len(body) - stop} bytes of streams, not {sum(sizes)}")
    streams = []
    for size in sizes:
        streams.append(body[stop : stop + size])
        stop += size
    return Container(path, header, streams)


@lru_cache(maxsize=1)
def _words() -> bytes:
    source = importlib.resources.files("chainrule.pipeline.coding").joinpath("header_words.json")
    return source.read_bytes()


def _take_digests(value: Any, digests: list[bytes]) -> Any:
    """`value` with null for each digest, whose first bytes go to `digests`, in order."""
    if isinstance(value, list):
        return [_take_digests(item, digests) for item in value]
    if not isinstance(value, dict):
        return value
    result: dict[str, Any] = {}
    for key in sorted(value):
        item = value[key]
        kept = 2 * DIGESTS.get(key, 0)
        if kept and isinstance(item, str) and len(item) >= kept and _is_hex(item[:kept]):
            digests.append(bytes.fromhex(item[:kept]))
            result[key] = None
        else:
            result[key] = _take_digests(item, digests)
    return result


def _is_hex(text: str) -> bool:
    return all(character in "0123456789abcdef" for character in text)


def _give_digests(value: Any, body: bytes, at: int) -> int:
    """Undo `_take_digests` in place with the bytes from `at` on; where they end."""
    for item in value if isinstance(value, list) else ():
        at = _give_digests(item, body, at)
    for key in sorted(value) if isinstance(value, dict) else ():
        size = DIGESTS.get(key, 0)
        if size and value[key] is None:
            if at + size > len(body):
                raise ValueError("fewer digests than it names")
            value[key] = body[at : at + size].hex()
            at += size
        else:
            at = _give_digests(value[key], body, at)
    return at


def _to_columns(header: dict[str, Any]) -> dict[str, Any]:
    """Files as columns, where all have the same keys: what repeats stands together. The
    number of a file's first stream is said by how many streams those before it have."""
    files = header.get("files")
    if not isinstance(files, list) or not files or not all(isinstance(f, dict) for f in files):
        return header
    keys = list(files[0])
    if any(list(file) != keys for file in files) or "stream" not in keys:
        return header
    columns = {key: [file[key] for file in files] for key in keys}
    numbers = columns["stream"]
    if all(isinstance(number, int) for number in numbers):
        columns["stream"] = [b - a for a, b in zip([0, *numbers[:-1]], numbers, strict=True)]
    return {**header, "files": columns}


def _from_columns(header: dict[str, Any]) -> dict[str, Any]:
    columns = header.get("files")
    if not isinstance(columns, dict):
        return header
    numbers, total = [], 0
    for step in columns["stream"]:
        total += step
        numbers.append(total)
    columns = {**columns, "stream": numbers}
    rows = zip(*columns.values(), strict=True)
    return {**header, "files": [dict(zip(columns, row, strict=True)) for row in rows]}


def _leb128(number: int) -> bytes:
    result = bytearray()
    while number > 0x7F:
        result.append(0x80 | number & 0x7F)
        number >>= 7
    return bytes([*result, number])


def _read_leb128(data: bytes, at: int) -> tuple[int, int]:
    """The number that starts at `at`, and where it ends. ValueError beyond four bytes."""
    number = 0
    for place, byte in enumerate(data[at : at + 4]):
        number |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return number, at + place + 1
    raise ValueError("its size does not end")
