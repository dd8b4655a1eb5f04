"""What a container says of its files, in few bytes: a picture of 800 bytes shall stay one.

    contract | layout and manners: JSON, NUL | number of files | columns | checks | names

all of it deflated with a preset dictionary. The parts:

    contract   threads, then dtype, device kind, accelerator, machine and instructions as numbers
               of `WORDS` (0: spelled out), then the versions of torch, numpy and constriction
    layout     how sequences were cut into rows and batches (`blocks.Layout`)
    manners    the different ways in which the files are stored: how, form, exact, side, and
               whether there are places and extra bytes; a file names its manner by number
    columns    one value a file (or an item) after the other, so that equal ones lie together:
               manner, length, bytes of its streams, items; then each item's length and class
    checks     of what has been decoded so far (`blocks.CHECK_EVERY`), 16 bits each
    names      of the files, then the folder of the model (a hint, may be empty), NUL between

What one file of 700 bytes has beside its stream and its name, the container's own 24 bytes included
(0.1 % and 64 bytes of the model's bits are promised): 40 bytes on a processor with the dictionary's
versions, 55 on a GPU with others. More, up to 120, take what is spelled out: a device that `WORDS`
lacks, versions that are no three numbers, a layout or `adapt` of other settings; and an original's
bytes that are no symbols (chunks of a PNG, tails of a WAV) are stored beside. A further file of
many takes 3 to 6 bytes, its name included where names resemble each other.

Numbers are varints (LEB128). `WORDS` and `_DICTIONARY` belong to the format: a container of
another one is not read with these.
"""

import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

LARGEST_HEADER = 1 << 24
"""Bytes a header may unfold to, about a million files: guards against a small file that claims
the world."""
LARGEST_NUMBER = 1 << 63
MODEL, STORED = "model", ("zstd", "raw")

Parts = tuple[bytes, bytes, bytes]
"""Streams of one file: symbols (or the stored bytes), places of a two-part code, extra bytes."""


class ContainerError(ValueError):
    """A container that is damaged, of another format, or of another model."""


@dataclass
class Entry:
    """One file."""

    name: str
    length: int
    """Bytes of the original."""
    how: str
    """`model`, `zstd` or `raw`."""
    form: str = ""
    exact: str = "bytes"
    side: dict[str, Any] = field(default_factory=dict)
    extra: int = 0
    """Length of its extra bytes, unfolded."""
    items: list[int] = field(default_factory=list)
    """Symbols of each item."""
    classes: list[int] = field(default_factory=list)
    """The class each item was coded under (-1: none); empty for a model without classes."""


@dataclass
class Header:
    """What is said of all files together, and of each."""

    contract: dict[str, Any]
    layout: dict[str, Any]
    checks: list[int]
    entries: list[Entry]
    digest: bytes = bytes(8)
    """Over the names, lengths and bytes of all files as they shall come back."""
    fingerprint: str = "0" * 16
    """Of the model: the first 16 digits, the ones that messages show."""
    folder: str = ""
    """Where the model lay; empty where that was not kept."""


WORDS = (
    *("", "float32", "bfloat16", "float16", "float64"),
    *("cpu", "cuda", "mps", "x86_64", "aarch64", "arm64", "AMD64"),
    *("DEFAULT", "NO AVX", "AVX2", "AVX512", "SVE128", "SVE256"),
    *("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA GH200 480GB"),
    *("NVIDIA B200", "NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "Tesla V100-SXM2-16GB"),
    *("Tesla T4", "NVIDIA L4", "NVIDIA L40S", "NVIDIA A10G", "NVIDIA RTX A6000"),
    *("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 5090"),
    *("cu118", "cu121", "cu124", "cu126", "cu128", "cu129", "cu130"),
)
_NAMED = ("dtype", "device", "accelerator", "machine", "instructions")
_VERSIONS = ("torch", "numpy", "constriction")
_PLAIN_VERSION = re.compile(r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})(?:\+(.+))?")


# --- numbers and words -----------------------------------------------------------------------


def _number(value: int) -> bytes:
    if not 0 <= value < LARGEST_NUMBER:
        raise ContainerError(f"{value} is no number that a header holds")
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def _numbers(values: Sequence[int]) -> bytes:
    return b"".join(map(_number, values))


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogateescape")  # file names are bytes to some systems
    return _number(len(data)) + data


def _word(value: str) -> bytes:
    if value in WORDS:
        return _number(WORDS.index(value) + 1)
    return _number(0) + _text(value)


def _version(value: str) -> bytes:
    plain = _PLAIN_VERSION.fullmatch(value)
    if plain is None:
        return _number(0) + _text(value)
    major, minor, patch = (int(plain[i]) for i in (1, 2, 3))
    numbers = _numbers([major + 1, minor, 2 * patch + (plain[4] is not None)])
    return numbers + (_word(plain[4]) if plain[4] is not None else b"")


class _Reader:
    """Reads the parts of a header; ContainerError past its end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self) -> int:
        value = shift = 0
        while True:
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift >= 63:
                raise ContainerError("a number without an end")
        return value

    def numbers(self, count: int) -> list[int]:
        self.room(count)
        return [self.number() for _ in range(count)]

    def room(self, count: int) -> None:
        """Each of `count` values takes a byte at least: so much is left, or it lies."""
        if count > len(self._data) - self._at:
            raise ContainerError(f"{count:,} values in {len(self._data) - self._at:,} bytes")

    def take(self, size: int) -> bytes:
        self.room(size)
        self._at += size
        return self._data[self._at - size : self._at]

    def until_nul(self) -> bytes:
        stop = self._data.find(b"\0", self._at)
        if stop < 0:
            raise ContainerError("a text without an end")
        found = self._data[self._at : stop]
        self._at = stop + 1
        return found

    def rest(self) -> bytes:
        return self._data[self._at :]

    def text(self) -> str:
        return self.take(self.number()).decode("utf-8", "surrogateescape")

    def word(self) -> str:
        number = self.number()
        if number == 0:
            return self.text()
        if number > len(WORDS):
            raise ContainerError(f"word {number} of {len(WORDS)}")
        return WORDS[number - 1]

    def version(self) -> str:
        major = self.number()
        if major == 0:
            return self.text()
        minor, patch = self.numbers(2)
        local = f"+{self.word()}" if patch % 2 else ""
        return f"{major - 1}.{minor}.{patch // 2}{local}"


# --- the parts of a header -------------------------------------------------------------------


def _contract(contract: dict[str, Any]) -> bytes:
    return b"".join(
        (
            _number(contract["threads"]),
            *(_word(contract[key]) for key in _NAMED),
            *(_version(contract[key]) for key in _VERSIONS),
        )
    )


def _read_contract(reader: _Reader) -> dict[str, Any]:
    contract: dict[str, Any] = {"threads": reader.number()}
    contract |= {key: reader.word() for key in _NAMED}
    return contract | {key: reader.version() for key in _VERSIONS}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _manner(entry: Entry, parts: Parts) -> str:
    """What files of one kind have in common, as JSON."""
    if entry.how != MODEL:
        return _json([entry.how])
    places, extra = bool(parts[1]), entry.extra > 0
    return _json([entry.how, entry.form, entry.exact, entry.side, int(places), int(extra)])


def _columns(entries: Sequence[Entry], streams: Sequence[Parts]) -> Iterator[list[int]]:
    """The columns of modelled files, in the order they are written."""
    pairs = list(zip(entries, streams, strict=True))
    modelled = [(entry, parts) for entry, parts in pairs if entry.how == MODEL]
    yield [len(parts[0]) for entry, parts in pairs if entry.how != "raw"]
    yield [len(parts[1]) for entry, parts in modelled if parts[1]]
    yield [entry.extra for entry, _ in modelled if entry.extra]
    yield [len(parts[2]) for entry, parts in modelled if entry.extra]
    yield [len(entry.items) for entry, _ in modelled]
    yield [length for entry, _ in modelled for length in entry.items]
    yield [given + 1 for entry, _ in modelled for given in entry.classes]


def fold_header(header: Header, streams: Sequence[Parts]) -> bytes:
    """The header's bytes. ContainerError for more than a header holds."""
    manners: dict[str, int] = {}
    chosen = []
    for entry, parts in zip(header.entries, streams, strict=True):
        if "\0" in entry.name:
            raise ContainerError(f"{entry.name!r} is no file name")
        chosen.append(manners.setdefault(_manner(entry, parts), len(manners)))
    classes = int(any(entry.classes for entry in header.entries))
    shared = f"[{_json(header.layout)},{classes},[{','.join(manners)}]]"
    names = "\0".join([*(entry.name for entry in header.entries), header.folder])
    data = b"".join(
        (
            _contract(header.contract),
            shared.encode() + b"\0",
            _number(len(header.entries)),
            _numbers(chosen),
            _numbers([entry.length for entry in header.entries]),
            *map(_numbers, _columns(header.entries, streams)),
            _number(len(header.checks)),
            b"".join(check.to_bytes(2, "little") for check in header.checks),
            names.encode("utf-8", "surrogateescape"),
        )
    )
    if len(data) > LARGEST_HEADER:
        raise ContainerError(
            f"{len(header.entries):,} files are more than one container holds; make several"
        )
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=_DICTIONARY)
    return deflater.compress(data) + deflater.flush()


def unfold_header(data: bytes) -> tuple[Header, list[Parts]]:
    """The header at the start of `data`, and the streams that follow it. ContainerError."""
    try:
        unfolder = zlib.decompressobj(-15, zdict=_DICTIONARY)
        unfolded = unfolder.decompress(data, LARGEST_HEADER + 1)
        if not unfolder.eof or len(unfolded) > LARGEST_HEADER:
            raise ContainerError("cut short, or larger than a header may be")
        header, sizes = _read(_Reader(unfolded))
    except (zlib.error, ValueError, LookupError, TypeError, RecursionError, MemoryError) as error:
        raise ContainerError(f"its header cannot be read ({error or 'too large'})") from None
    rest = unfolder.unused_data
    if sum(map(sum, sizes)) != len(rest):
        raise ContainerError(
            f"holds {len(rest):,} bytes of streams, its header claims {sum(map(sum, sizes)):,}"
        )
    streams, at = [], 0
    for size in sizes:
        parts = []
        for part in size:
            parts.append(rest[at : at + part])
            at += part
        streams.append((parts[0], parts[1], parts[2]))
    return header, streams


def _read(reader: _Reader) -> tuple[Header, list[list[int]]]:
    contract = _read_contract(reader)
    layout, with_classes, manners = json.loads(reader.until_nul())
    if not isinstance(layout, dict):
        raise ContainerError("a layout that is none")
    files = reader.number()
    chosen = reader.numbers(files)
    entries, sizes, flags = [], [], []
    for index, length in zip(chosen, reader.numbers(files), strict=True):
        entry, places, extra = _entry(manners[index], length)
        entries.append(entry)
        sizes.append([length if entry.how == "raw" else 0, 0, 0])
        flags.append((places, extra))
    modelled = [i for i, entry in enumerate(entries) if entry.how == MODEL]
    placed = [i for i in modelled if flags[i][0]]
    extended = [i for i in modelled if flags[i][1]]
    for part, of in ((0, [i for i, e in enumerate(entries) if e.how != "raw"]), (1, placed)):
        for i, size in zip(of, reader.numbers(len(of)), strict=True):
            sizes[i][part] = size
    for i, length in zip(extended, reader.numbers(len(extended)), strict=True):
        entries[i].extra = length
    for i, size in zip(extended, reader.numbers(len(extended)), strict=True):
        sizes[i][2] = size
    counts = reader.numbers(len(modelled))
    for i, count in zip(modelled, counts, strict=True):
        entries[i].items = reader.numbers(count)
    if with_classes:
        for i, count in zip(modelled, counts, strict=True):
            entries[i].classes = [number - 1 for number in reader.numbers(count)]
    checks = reader.take(2 * reader.number())
    names = reader.rest().decode("utf-8", "surrogateescape").split("\0")
    if len(names) != files + 1:
        raise ContainerError(f"{len(names) - 1:,} names for {files:,} files")
    for entry, name in zip(entries, names, strict=False):
        entry.name = name
    return (
        Header(
            contract,
            layout,
            [int.from_bytes(checks[i : i + 2], "little") for i in range(0, len(checks), 2)],
            entries,
            folder=names[-1],
        ),
        sizes,
    )


def _entry(manner: Any, length: int) -> tuple[Entry, int, int]:
    """(an entry of this manner without its name, whether it has places, and extra bytes)."""
    how, *more = manner
    if how in STORED and not more:
        return Entry("", length, how), 0, 0
    form, exact, side, places, extra = more
    if how != MODEL or not isinstance(side, dict):
        raise ContainerError(f"a file stored as {manner!r}")
    return Entry("", length, how, str(form), str(exact), dict(side)), places, extra


def _typical(threads: int, instructions: str) -> bytes:
    return _contract(
        {
            "threads": threads,
            "dtype": "float32",
            "device": "cpu",
            "accelerator": "",
            "machine": "x86_64",
            "instructions": instructions,
            "torch": "2.13.0+cpu",
            "numpy": "2.4.6",
            "constriction": "0.5.0",
        }
    )


_DICTIONARY = b"".join(
    (
        b'"adapt":{"optimizer":{"name":"muon","learning_rate":0.003,"betas":[0.9,0.99],',
        b'"epsilon":1e-08,"weight_decay":0.0,"decay_embeddings":false,"fused":true,',
        b'"muon_learning_rate":0.02,"muon_momentum":0.95,"muon_iterations":5},"every":64,',
        b'"steps":4,"warmup":10,"clip":1.0}},0,',
        b"image-00000validation/train/0123456789.npy.ppm.pgm.txt.wav.png\0.jpg\0.json\0runs/_model\0",
        b'["raw"],["zstd"]],["raw"],["model","wav","bytes",{"head":44,"parts":1},0,1],',
        b'["model","wav","bytes",{"rate":16000,"parts":1},0,0],{"rate":44100,{"rate":22050,',
        b'["model","wav","bytes",{"rate":8000,"parts":2},1,0]]]\0\1\0',
        b'["model","npy","bytes",{"shape":[28,28],"tiles":[1,1]},0,1]]]\0\1\0',
        b'["model","pnm","bytes",{"tiles":[1,1]},0,1]]]\0\1\0',
        b'["model","png","pixels",{"level":null,"tiles":[1,1]},0,0]]]\0\1\0',
        b'["model","text","bytes",{},0,0]]]\0\1\0',
        b'"rows":1,"least_row":4096,"overlap":0.5,"adapt":null},1,[["model","png","bytes",',
        b'{"level":6,"tiles":[1,1]},0,0]]]\0\1\0',
        _typical(2, "AVX2"),
        _typical(1, "AVX512"),
        b'[{"rows":64,"least_row":4096,"overlap":0.5,"adapt":null},0,[["model","bytes","bytes",{},',
        b"0,0]]]\0\1\0",
    )
)
"""What headers are made of, the likeliest last; frozen with `container.FORMAT`."""
