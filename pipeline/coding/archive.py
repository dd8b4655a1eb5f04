"""Files into a container under a model, and back: what is coded, what falls back, what is refused.

`pack` takes named bytes apart (`forms.py`), codes what the model was made for (`blocks.py`)
and stores the rest raw or with zstd, with the reason. `unpack` gives the bytes back and
compares each file's sha256 before it hands anything on. Neither touches the file system.
"""

import hashlib
import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from chainrule.pipeline.coding.blocks import Layout, Model, decode, encode
from chainrule.pipeline.coding.container import Container, ContainerError, fold, unfold
from chainrule.pipeline.coding.entropy import CodingError, Decoder, Encoder, least_bits
from chainrule.pipeline.coding.forms import Adapter, NotForModel, Split, Symbols

Named = tuple[str, bytes]
MOST_THREADS = 4096
LARGER = "larger under the model than under zstd"


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
    """What the model's floats depend on, here and now."""
    weight = next(iter(model.parameters()))
    kind = weight.device.type
    return {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(weight.device) if kind == "cuda" else kind,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "constriction": importlib.metadata.version("constriction"),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
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


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_digest(found: str, recorded: str) -> bool:
    """Whether a sha256 is the recorded one, of which a container keeps the first digits."""
    return len(recorded) >= 8 and found.startswith(recorded)


def _of_all(digests: Sequence[str]) -> str:
    return _sha256("".join(digests).encode())


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
) -> tuple[dict[str, Any], list[bytes], list[Report]]:
    """(header, streams, reports) of named bytes coded under `model`.

    `choose_class`: for a model with classes, the one an item is coded under (it is written
    into the header). A file whose model stream came out larger than zstd's is stored by zstd.
    """
    splits: list[Split | NotForModel] = []
    for _, data in files:
        try:
            splits.append(adapter.split(data))
        except NotForModel as reason:
            splits.append(reason)
    fallback = [_shorter(data) for _, data in files]
    while True:
        coded, classes = _code(model, adapter, splits, layout, choose_class, report)
        larger = [
            i
            for i, stream in coded.items()
            if sum(len(part) for part in stream[:3]) >= len(fallback[i])
        ]
        if not larger:
            break
        for i in larger:  # fewer files, other batches: what remains is coded again
            splits[i] = NotForModel(LARGER)
    return _assemble(model, files, splits, coded, classes, fallback, layout)


def _code(
    model: Model,
    adapter: Adapter,
    splits: Sequence[Split | NotForModel],
    layout: Layout,
    choose_class: Callable[[Symbols], int] | None,
    report: Callable[[int], None],
) -> tuple[dict[int, Any], dict[str, Any]]:
    """file -> (stream, places, extra, ideal bits, bits of cuts), and the header's `coded`."""
    chosen = [(i, split) for i, split in enumerate(splits) if isinstance(split, Split)]
    items = [item for _, split in chosen for item in split.items]
    owners = [n for n, (_, split) in enumerate(chosen) for _ in split.items]
    classes = None if choose_class is None else [choose_class(item) for item in items]
    result = encode(model, items, owners, layout, classes, adapter.cut, report)
    coded = {}
    for n, (i, split) in enumerate(chosen):
        places, bits = b"", result.ideal_bits[n]
        if split.places is not None:
            coder = Encoder()
            coder.encode_uniform(*split.places)
            places = coder.finish()
            bits += float(np.log2(split.places[0]).sum())
        extra = _shorter(split.extra)
        coded[i] = (result.streams[n], places, extra, bits, result.cut_bits[n])
    entry = {
        "lengths": [len(item) for item in items],
        "owners": owners,
        "classes": classes,
        "checks": result.checks,
    }
    return coded, entry


def _assemble(
    model: Model,
    files: Sequence[Named],
    splits: Sequence[Split | NotForModel],
    coded: dict[int, Any],
    entry: dict[str, Any],
    fallback: Sequence[bytes],
    layout: Layout,
) -> tuple[dict[str, Any], list[bytes], list[Report]]:
    streams: list[bytes] = []
    entries, reports = [], []
    for i, ((name, data), split) in enumerate(zip(files, splits, strict=True)):
        record: dict[str, Any] = {"name": name, "length": len(data), "sha256": _sha256(data)}
        record["stream"] = len(streams)
        if isinstance(split, Split):
            stream, places, extra, bits, cut = coded[i]
            streams += [stream, places, extra]
            size = len(stream) + len(places) + len(extra)
            record |= {
                "how": "model",
                "form": split.form,
                "side": split.side,
                "extra": len(split.extra),
                "exact": split.exact,
            }
            how = f"model ({split.form})"
            reports.append(Report(name, how, "", len(data), bits / 8, size, cut / 8, split.exact))
        else:
            how = "zstd" if len(fallback[i]) < len(data) else "raw"
            streams.append(fallback[i])
            record |= {"how": how, "why": str(split)}
            reports.append(Report(name, how, str(split), len(data), None, len(fallback[i])))
        entries.append(record)
    header = {
        "contract": contract(model),
        "originals": _of_all([_expected(entry) for entry in entries]),
        "layout": layout.model_dump(),
        "coded": entry,
        "files": entries,
    }
    return header, streams, reports


def _expected(entry: dict[str, Any]) -> str:
    """The sha256 of what comes back of a file."""
    exact = entry.get("exact", "bytes") == "bytes"
    digest: str = entry["sha256"] if exact else entry["side"]["restored"]
    return digest


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
        entries, coded = header["files"], header["coded"]
        layout = Layout(**header["layout"])
        modelled = [e for e in entries if e["how"] == "model"]
        items: list[list[Symbols]] = [[] for _ in modelled]
        if modelled:
            if model is None or adapter is None:
                raise ContainerError(f"{container.path}: its files were coded under a model")
            items = _decode_items(container, model, adapter, modelled, coded, layout, report)
        files = []
        found = []
        parts = iter(items)
        for e in entries:
            if e["how"] == "model":
                assert adapter is not None
                data = _restore(container, adapter, e, next(parts))
            elif e["how"] == "zstd":
                data = unfold(container.streams[e["stream"]], e["length"])
            else:
                data = container.streams[e["stream"]]
            found.append(_sha256(data))
            if not _is_digest(found[-1], _expected(e)) or (
                e.get("exact", "bytes") == "bytes" and len(data) != e["length"]
            ):
                raise ContainerError(
                    f"{container.path}: {e['name']} does not come back as it was"
                    + _difference(header, model)
                )
            files.append((e["name"], data))
        if not _is_digest(_of_all(found), header["originals"]):
            raise ContainerError(
                f"{container.path}: its files do not come back as they were"
                + _difference(header, model)
            )
        return files
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
        NotForModel,
    ) as error:
        # the checksum was right, so this was written by another program, or by a hostile one
        first_line = str(error).partition("\n")[0]
        raise ContainerError(
            f"{container.path}: its header makes no sense ({type(error).__name__}: {first_line})"
        ) from None


def _decode_items(
    container: Container,
    model: Model,
    adapter: Adapter,
    modelled: list[dict[str, Any]],
    coded: dict[str, Any],
    layout: Layout,
    report: Callable[[int], None],
) -> list[list[Symbols]]:
    """The items of each modelled file."""
    streams = [container.streams[e["stream"]] for e in modelled]
    lengths, owners = coded["lengths"], coded["owners"]
    most = _most_symbols(model, streams)
    if len(lengths) != len(owners) or any(not 0 <= o < len(streams) for o in owners):
        raise ContainerError(f"{container.path}: items that belong to no file")
    if any(n < 0 for n in lengths) or sum(lengths) > most:
        raise ContainerError(
            f"{container.path}: claims {sum(lengths):,} symbols, more than its bytes can hold"
        )
    threads = container.header["contract"]["threads"]
    if not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS:
        raise ContainerError(f"{container.path}: claims to be made by {threads!r} threads")
    with _threads(threads):
        flat = decode(
            model,
            streams,
            lengths,
            owners,
            coded["checks"],
            layout,
            coded["classes"],
            adapter.cut,
            report,
        )
    items: list[list[Symbols]] = [[] for _ in modelled]
    for owner, item in zip(owners, flat, strict=True):
        items[owner].append(item)
    return items


def _most_symbols(model: Model, streams: list[bytes]) -> float:
    with torch.no_grad():
        size = model.cursor(1).next.pmf().shape[-1]
    spare = 64 * len(streams)  # bits that a stream's last word still tells apart
    return (8 * sum(len(s) for s in streams) + spare) / least_bits(size)


def _restore(
    container: Container, adapter: Adapter, entry: dict[str, Any], items: list[Symbols]
) -> bytes:
    _, places_stream, extra = container.streams[entry["stream"] : entry["stream"] + 3]
    if len(extra) != entry["extra"]:
        extra = unfold(extra, entry["extra"])
    places = None
    if entry["side"].get("parts") == 2:
        places = Decoder(places_stream).decode_uniform(adapter.place_sizes(items[0]))
    return adapter.join(entry["form"], items, entry["side"], extra, places)


def _difference(header: dict[str, Any], model: Model | None) -> str:
    """How this machine's contract differs from the container's, for a message."""
    if model is None:
        return ""
    here = {**contract(model), "threads": header["contract"].get("threads")}
    differing = [
        f"{key} {header['contract'].get(key)!r} there, {here[key]!r} here"
        for key in here
        if header["contract"].get(key) != here[key]
    ]
    if not differing:
        return ""
    return f"; it was made under another numeric contract: {', '.join(differing)}"


def total_ideal_bits(reports: Sequence[Report]) -> float:
    """Bits that the model's own likelihood asks for, over the files it coded."""
    return math.fsum(8 * r.ideal_bytes for r in reports if r.ideal_bytes is not None)
