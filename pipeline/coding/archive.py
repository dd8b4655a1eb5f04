"""Files into a container under a model, and back: what is coded, what falls back, what is refused.

`pack` takes named bytes apart (`forms.py`), codes what the model was made for (`blocks.py`)
and stores the rest raw or with zstd, with the reason. `unpack` gives the bytes back and
compares the digest of all files before it hands anything on. Neither touches the file system.

The digest is the sha256 of each file's name, length and sha256, one after another: an archive
is decoded as a whole, so no file needs a checksum of its own. Of a file that comes back with the
same pixels (not bytes) it covers what comes back.
"""

import hashlib
import math
import platform
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from chainrule.pipeline.coding.blocks import Layout, Model, decode, encode
from chainrule.pipeline.coding.container import KEPT, Container, fold, unfold
from chainrule.pipeline.coding.entropy import (
    CodingError,
    Decoder,
    Encoder,
    UncodableError,
    least_bits,
    quantise,
)
from chainrule.pipeline.coding.forms import Adapter, NotForModel, Split, Symbols
from chainrule.pipeline.coding.header import ContainerError, Entry, Header, Parts

Named = tuple[str, bytes]
LARGER = "larger under the model than without it"
LARGEST_THREADS = 1024
"""Threads that a container may ask for: more of them than a machine gives would end the process."""
MOST_A_BYTE = 4
"""Symbols that a byte of text or sound is ever made: one, or a few that stand for no byte."""


@dataclass(frozen=True)
class Report:
    """What one file became."""

    name: str
    how: str
    """`model` (and the form), `zstd` or `raw`."""
    why: str
    """Why the model did not code it; empty where it did."""
    original_bytes: int
    ideal_bytes: float | None
    """Sum of -log2 p / 8 under the model; None for what fell back."""
    coded_bytes: int
    """Its streams. The container adds its header (names, checksums, contract) once."""
    cut_bytes: float = 0.0
    """About how many of the ideal bytes the cuts into rows cost (see `blocks.py`)."""
    exact: str = "bytes"

    @property
    def bits_per_byte(self) -> float:
        return 8 * self.coded_bytes / max(self.original_bytes, 1)


def contract(model: Model) -> dict[str, Any]:
    """What the integers that are coded with depend on, here and now.

    dtype and threads are the container's again while decoding, the kind of device too unless
    another is asked for. Another accelerator, processor or version of torch may change floats in
    their last bits; another numpy how they are summed and rounded to integers; another
    constriction how integers are coded. Each of them mostly gives the same bytes, so decoding is
    tried, and refused before anything is written where checks or digest fail, with what differs.
    Versions of zstandard cannot matter (its format is fixed), nor those of Pillow (a PNG is
    compared with the digest as all files are).
    """
    weight = next(iter(model.parameters()))
    kind = weight.device.type
    return {
        "threads": torch.get_num_threads(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": kind,
        "accelerator": torch.cuda.get_device_name(weight.device) if kind == "cuda" else "",
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "constriction": version("constriction"),
    }


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """torch's thread count is part of the contract: sums are split by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _digest(files: Sequence[Named]) -> bytes:
    """See the head of the file."""
    total = hashlib.sha256()
    for name, data in files:
        total.update(name.encode("utf-8", "surrogateescape") + b"\0")
        total.update(len(data).to_bytes(8, "little") + hashlib.sha256(data).digest())
    return total.digest()[:KEPT]


def _shorter(data: bytes) -> bytes:
    """zstd of the data where that is shorter, the data themselves otherwise (also at a tie:
    the lengths alone tell which it is)."""
    folded = fold(data)
    return folded if len(folded) < len(data) else data


def pack(
    model: Model,
    adapter: Adapter,
    files: Sequence[Named],
    layout: Layout,
    choose_class: Callable[[Symbols], int] | None = None,
    report: Callable[[int], None] = lambda symbols: None,
) -> tuple[Header, list[Parts], list[Report]]:
    """(header, streams, reports) of named bytes coded under `model`.

    `choose_class`: for a model with classes, the one an item is coded under (it is written
    into the header). A file whose model stream came out larger than zstd's, or on which the
    model's probabilities are no distribution, is stored. CodingError for a model that gives no
    probabilities that can be coded with even before the first symbol.
    """
    alphabet = alphabet_of(model)
    splits: list[Split | NotForModel] = []
    for _, data in files:
        try:
            splits.append(_within(adapter.split(data), alphabet))
        except NotForModel as reason:
            splits.append(reason)
    fallback = [_shorter(data) for _, data in files]
    while True:  # fewer files, other batches: what remains is coded again
        try:
            coded = _code(model, adapter, splits, layout, choose_class, report)
        except UncodableError as error:
            chosen = [i for i, split in enumerate(splits) if isinstance(split, Split)]
            for place in error.places:
                splits[chosen[place]] = NotForModel(str(error))
            continue
        larger = [i for i, one in coded.items() if sum(map(len, one.parts)) >= len(fallback[i])]
        if not larger:
            break
        for i in larger:
            under = sum(map(len, coded[i].parts))
            splits[i] = NotForModel(f"{LARGER} ({under:,} bytes)")
    return _assemble(model, files, splits, coded, fallback, layout)


def alphabet_of(model: Model) -> int:
    """Symbols of the model's alphabet; CodingError if its first table cannot be coded with."""
    with torch.no_grad():
        first = model.cursor(1).next.pmf().float().cpu().numpy()
    return quantise(first.reshape(1, -1)).shape[1]


def _within(split: Split, alphabet: int) -> Split:
    for item in split.items:
        if item.size and not 0 <= int(item.min()) <= int(item.max()) < alphabet:
            raise NotForModel(f"token {int(item.max())}; the model's alphabet has {alphabet}")
    return split


@dataclass
class _Coded:
    """One file under the model."""

    parts: Parts
    classes: list[int]
    checks: list[int]
    """Of all files."""
    bits: float
    cut_bits: float


def _code(
    model: Model,
    adapter: Adapter,
    splits: Sequence[Split | NotForModel],
    layout: Layout,
    choose_class: Callable[[Symbols], int] | None,
    report: Callable[[int], None],
) -> dict[int, _Coded]:
    """What each file that has a split became."""
    chosen = [(i, split) for i, split in enumerate(splits) if isinstance(split, Split)]
    items = [item for _, split in chosen for item in split.items]
    owners = [n for n, (_, split) in enumerate(chosen) for _ in split.items]
    classes = None if choose_class is None else [choose_class(item) for item in items]
    result = encode(model, items, owners, layout, classes, adapter.cut, report)
    given = iter(classes or [])
    coded = {}
    for n, (i, split) in enumerate(chosen):
        places, bits = b"", result.ideal_bits[n]
        if split.places is not None:
            coder = Encoder()
            coder.encode_uniform(*split.places)
            places = coder.finish()
            bits += float(np.log2(split.places[0]).sum())
        coded[i] = _Coded(
            (result.streams[n], places, _shorter(split.extra)),
            [next(given) for _ in split.items] if classes is not None else [],
            result.checks,
            bits,
            result.cut_bits[n],
        )
    return coded


def _assemble(
    model: Model,
    files: Sequence[Named],
    splits: Sequence[Split | NotForModel],
    coded: dict[int, _Coded],
    fallback: Sequence[bytes],
    layout: Layout,
) -> tuple[Header, list[Parts], list[Report]]:
    streams: list[Parts] = []
    entries, reports, restored = [], [], []
    checks: list[int] = []
    for i, ((name, data), split) in enumerate(zip(files, splits, strict=True)):
        if isinstance(split, Split):
            one = coded[i]
            checks = one.checks
            streams.append(one.parts)
            lengths = [len(item) for item in split.items]
            entries.append(
                Entry(
                    name,
                    len(data),
                    "model",
                    split.form,
                    split.exact,
                    split.side,
                    len(split.extra),
                    lengths,
                    one.classes,
                )
            )
            how, size = f"model ({split.form})", sum(map(len, one.parts))
            ideal, cut = one.bits / 8, one.cut_bits / 8
            reports.append(Report(name, how, "", len(data), ideal, size, cut, split.exact))
            restored.append((name, data if split.restored is None else split.restored))
        else:
            how = "zstd" if len(fallback[i]) < len(data) else "raw"
            streams.append((fallback[i], b"", b""))
            entries.append(Entry(name, len(data), how))
            reports.append(Report(name, how, str(split), len(data), None, len(fallback[i])))
            restored.append((name, data))
    header = Header(contract(model), layout.model_dump(), checks, entries, _digest(restored))
    return header, streams, reports


def promised_bytes(reports: Sequence[Report]) -> float:
    """What a container takes at most beside the names in it: of each file 0.1 % and 64 bytes
    more than the sum of -log2 p under the model, or than what it was stored as."""
    sizes = (r.coded_bytes if r.ideal_bytes is None else 1.001 * r.ideal_bytes for r in reports)
    return math.fsum(size + 64 for size in sizes)


def unpack(
    container: Container,
    model: Model | None,
    adapter: Adapter | None,
    report: Callable[[int], None] = lambda symbols: None,
) -> list[Named]:
    """The files of a container that was found intact. ContainerError before anything is given.

    `model` and `adapter` may be None for a container that no file needed a model for. On a
    machine whose floats differ from the encoder's the result either has the right checksums
    or is refused, with what differs in the message.
    """
    header = container.header
    try:
        layout = Layout(**header.layout)
        modelled = [i for i, entry in enumerate(header.entries) if entry.how == "model"]
        items: dict[int, list[Symbols]] = {}
        if modelled:
            if model is None or adapter is None:
                raise ContainerError(f"{container.path}: its files were coded under a model")
            items = _decode_items(container, model, adapter, modelled, layout, report)
        files = []
        for i, entry in enumerate(header.entries):
            parts = container.streams[i]
            if entry.how == "model":
                assert adapter is not None
                data = _restore(adapter, entry, parts, items[i])
            elif entry.how == "zstd":
                data = unfold(parts[0], entry.length)
            else:
                data = parts[0]
            if entry.exact == "bytes" and len(data) != entry.length:
                raise ContainerError(
                    f"{container.path}: {entry.name} does not come back as it was"
                    + _difference(header, model)
                )
            files.append((entry.name, data))
    except CodingError as error:
        raise ContainerError(f"{container.path}: {error}{_difference(header, model)}") from None
    except ContainerError as error:
        raise ContainerError(
            str(error) if str(container.path) in str(error) else f"{container.path}: {error}"
        ) from None
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        struct.error,
        NotForModel,
        MemoryError,
        RuntimeError,  # of torch: shapes that do not fit, no memory on a device
    ) as error:
        # the checksum was right: symbols of other floats, another program, or a hostile one
        first_line = str(error).partition("\n")[0]
        raise ContainerError(
            f"{container.path}: makes no sense, or needs more memory than there is "
            f"({type(error).__name__}: {first_line}){_difference(header, model)}"
        ) from error
    if _digest(files) != header.digest:
        raise ContainerError(
            f"{container.path}: its files do not come back as they were"
            + _difference(header, model)
        )
    return files


def _decode_items(
    container: Container,
    model: Model,
    adapter: Adapter,
    modelled: Sequence[int],
    layout: Layout,
    report: Callable[[int], None],
) -> dict[int, list[Symbols]]:
    """The items of each modelled file."""
    header = container.header
    entries = [header.entries[i] for i in modelled]
    streams = [container.streams[i][0] for i in modelled]
    lengths = [length for entry in entries for length in entry.items]
    owners = [n for n, entry in enumerate(entries) for _ in entry.items]
    given = [number for entry in entries for number in entry.classes]
    threads = header.contract["threads"]
    if not 1 <= threads <= LARGEST_THREADS:
        raise ContainerError(f"was coded by {threads:,} threads, it says; 1 to {LARGEST_THREADS}")
    known = range(-1, adapter.classes)
    if given and (len(given) != len(lengths) or any(number not in known for number in given)):
        raise ContainerError(f"names classes; the model has {adapter.classes}")
    for entry in entries:
        claimed = sum(entry.items)
        if entry.form in ("bytes", "text", "wav") and claimed > MOST_A_BYTE * entry.length:
            raise ContainerError(f"claims {claimed:,} symbols for {entry.length:,} bytes")
    most = _most_symbols(model, streams)
    if sum(lengths) > most:
        raise ContainerError(f"claims {sum(lengths):,} symbols, more than its bytes can hold")
    with _threads(threads):
        flat = decode(
            model,
            streams,
            lengths,
            owners,
            header.checks,
            layout,
            given or None,
            adapter.cut,
            report,
        )
    items: dict[int, list[Symbols]] = {i: [] for i in modelled}
    for owner, item in zip(owners, flat, strict=True):
        items[modelled[owner]].append(item)
    return items


def _most_symbols(model: Model, streams: list[bytes]) -> float:
    spare = 64 * len(streams)  # bits that a stream's last word still tells apart
    return (8 * sum(len(s) for s in streams) + spare) / least_bits(alphabet_of(model))


def _restore(adapter: Adapter, entry: Entry, parts: Parts, items: list[Symbols]) -> bytes:
    _, places_stream, extra = parts
    if len(extra) != entry.extra:
        extra = unfold(extra, entry.extra)
    places = None
    if entry.side.get("parts") == 2:
        places = Decoder(places_stream).decode_uniform(adapter.place_sizes(items[0]))
    return adapter.join(entry.form, items, entry.side, extra, places)


def _difference(header: Header, model: Model | None) -> str:
    """How this machine's contract differs from the container's, for a message."""
    if model is None:
        return ""
    there = header.contract
    here = {**contract(model), "threads": there["threads"]}
    differing = [
        f"{key} {there[key]!r} there, {here[key]!r} here" for key in here if there[key] != here[key]
    ]
    if not differing:
        return ""
    return f"; it was made under another numeric contract: {', '.join(differing)}"


def total_ideal_bits(reports: Sequence[Report]) -> float:
    """Bits that the model's own likelihood asks for, over the files it coded."""
    return math.fsum(8 * r.ideal_bytes for r in reports if r.ideal_bytes is not None)
