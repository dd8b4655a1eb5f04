"""The ledger: what each step consumed, and the proof that nothing was skipped or repeated.

    ledger/sets.json             seed, context, weights and sets, as the run drew from them
    ledger/set-0.lengths.npy     tokens of each sample of set 0, and so on
    ledger/rank-0000.ledger      appended to by rank 0: one record a piece, int64 little-endian

A record is written before the step uses the batch, and a whole record or none is read back:
a torn tail is cut off. A run that goes on from a checkpoint of step s drops what steps >= s
recorded (`rewind`), on every rank's file, whatever the number of ranks is now.

Each record ends with a CRC-32 of its bytes that starts from its number in the file, so that an
altered record, and one that stands where another was, is told from a good one. What ends early
is whole as far as it goes: how far it should go is known to the checkpoints (jobs/verify.py).

`verify` believes none of it: it counts the tokens of every sample in every epoch, the
positions of the global order, and compares each record with the order computed anew.
"""

import json
import logging
import os
import zlib
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from chainrule.pipeline.artifact import ArtifactError, read_json, write_json
from chainrule.pipeline.data.batches import Batch, Mixture
from chainrule.pipeline.data.order import Interleave
from chainrule.pipeline.data.rows import (
    EPOCH,
    ROW,
    SAMPLE,
    SET,
    START,
    STOP,
    FixedRows,
    PackedRows,
    Rows,
    draw,
)
from chainrule.pipeline.whole_file import whole

FORMAT = 2
UNGUARDED = 1
"""The format before: the same records with 0 for a CRC, and sets.json without checksums."""
RECORD = np.dtype(
    [
        ("step", "<i8"),
        ("position", "<i8"),  # global, of the row
        ("set", "<i4"),
        ("epoch", "<i4"),
        ("sample", "<i8"),
        ("start", "<i8"),
        ("stop", "<i8"),
        ("passed_over", "<i4"),  # 1: left out by policy (after a fault of learning), not trained on
        ("crc", "<u4"),
    ]
)
GUARDED_BYTES = RECORD.itemsize - RECORD["crc"].itemsize
PIECE_COLUMNS = {"set": SET, "epoch": EPOCH, "sample": SAMPLE, "start": START, "stop": STOP}
CHUNK = 1 << 16  # positions compared with the order at a time
REMEDY = "take the ledger from a copy, or train again with --force"
log = logging.getLogger("chainrule.ledger")


class LedgerDamaged(ArtifactError):
    """A ledger that was cut or altered: the file, the record, the remedy."""


def checksums(records: np.ndarray, first: int = 0) -> np.ndarray:
    """uint32 (n,): the CRC of each record, the first of which is number `first` of its file."""
    data = memoryview(records.tobytes())
    starts = range(0, len(data), RECORD.itemsize)
    return np.fromiter(
        (
            zlib.crc32(data[at : at + GUARDED_BYTES], (first + i) & 0xFFFFFFFF)
            for i, at in enumerate(starts)
        ),
        np.uint32,
        len(records),
    )


def whole_records(path: Path) -> np.ndarray:
    """The records of a file, unchecked; without a torn tail."""
    return np.fromfile(path, RECORD, count=path.stat().st_size // RECORD.itemsize)


class Ledger:
    """Rank `rank`'s file, appended to."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{rank:04d}.ledger"
        _cut_torn_tail(path)
        self._count = path.stat().st_size // RECORD.itemsize if path.is_file() else 0
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def record(self, batch: Batch) -> None:
        """What a batch holds. In the system's hands when this returns: a kill keeps it."""
        self._write(batch.pieces, batch.step, batch.position, False)

    def pass_over(self, mixture: Mixture, position: int, rows: int, step: int) -> None:
        """A data window left out by policy before `step`. On one rank."""
        self._write(mixture.pieces(position, position + rows), step, position, True)

    def _write(self, pieces: np.ndarray, step: int, position: int, passed_over: bool) -> None:
        records = np.zeros(len(pieces), RECORD)
        records["step"] = step
        records["position"] = position + pieces[:, ROW]
        for name, column in PIECE_COLUMNS.items():
            records[name] = pieces[:, column]
        records["passed_over"] = passed_over
        records["crc"] = checksums(records, self._count)
        self._count += len(records)
        data = memoryview(records.tobytes())
        while data:
            data = data[os.write(self._file, data) :]

    def sync(self) -> None:
        """Write through to the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Write through to the disk and close."""
        self.sync()
        os.close(self._file)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut_torn_tail(path: Path) -> None:
    if path.is_file():
        size = path.stat().st_size
        if size % RECORD.itemsize:
            os.truncate(path, size - size % RECORD.itemsize)


def rewind(folder: Path, step: int) -> None:
    """Drop what steps >= `step` recorded, on all ranks' files. On rank 0, before any records.

    A damaged record stops no training: it stays for `verify` to name, unless nothing sound that
    is kept follows it.
    """
    for path in sorted(folder.glob("rank-*.ledger")):
        _cut_torn_tail(path)
        records = whole_records(path)
        sound = records["crc"] == checksums(records)
        # Steps rise within a file, so what is to go is its tail.
        kept = np.flatnonzero(sound & (records["step"] < step))
        keep = int(kept[-1]) + 1 if len(kept) else 0
        if not sound[: keep + 1].all():
            log.warning(
                "%s: record %d was altered, or what stood before it cut out; the training goes on, "
                "`chainrule verify` tells what is missing",
                path,
                int(np.argmin(sound)),
            )
        if keep < len(records):
            os.truncate(path, keep * RECORD.itemsize)


def write_header(folder: Path, mixture: Mixture) -> None:
    """What the order is computed from. On rank 0, before any records; a ledger of the format
    before is guarded from here on. ArtifactError if another run's is there."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {
        "format": FORMAT,
        "context": mixture.context,
        "counts": mixture.interleave.counts,
        "sets": [
            {
                "name": member.tokens.name,
                "split": member.tokens.split,
                "fingerprint": member.tokens.fingerprint,
                "samples": member.tokens.samples,
                "packed": member.rows.packed,
                "rows": len(member.rows),
                "seed": member.rows.seed,
            }
            for member in mixture.members
        ],
    }
    path = folder / "sets.json"
    earlier = read_json(path) if path.is_file() else None
    unguarded = earlier == header | {"format": UNGUARDED}
    for entry, member in zip(header["sets"], mixture.members, strict=True):
        entry["lengths_crc"] = _crc_of_lengths(member.tokens.lengths)
    header["crc"] = _crc_of_header(header)
    if earlier is not None and not unguarded:
        if earlier != header:
            raise ArtifactError(
                f"{path}: altered, or the ledger of another data order; move it away"
            )
        return
    if unguarded:
        for ranks in sorted(folder.glob("rank-*.ledger")):
            records = whole_records(ranks)
            records["crc"] = checksums(records)
            with whole(ranks) as temporary:
                records.tofile(temporary)
    for k, member in enumerate(mixture.members):
        np.save(folder / f"set-{k}.lengths.npy", member.tokens.lengths, allow_pickle=False)
    write_json(path, header)


def _crc_of_lengths(lengths: np.ndarray) -> int:
    return zlib.crc32(lengths.astype("<i8").tobytes())


def _crc_of_header(header: dict[str, Any]) -> int:
    guarded = {key: value for key, value in header.items() if key != "crc"}
    return zlib.crc32(json.dumps(guarded, sort_keys=True).encode())


@dataclass(frozen=True)
class Finding:
    """One epoch of one set."""

    set: str
    epoch: int
    rows: int
    """Rows consumed, of `of`."""
    of: int
    skipped: int
    """Samples with tokens that were not consumed, though the epoch (or the run) went past."""
    repeated: int
    """Samples with tokens that were consumed more than once."""
    passed_over: int
    """Rows left out by policy; they count neither as skipped nor as repeated."""
    misplaced: int
    """Records that are not what the order has at their position."""

    @property
    def good(self) -> bool:
        return self.skipped == self.repeated == self.misplaced == 0


@dataclass(frozen=True)
class Book:
    """A ledger as it was read, each byte of it checked."""

    guarded: bool
    """Whether its records have checksums; those of the format before have none."""
    context: int
    sets: list[dict[str, Any]]
    lengths: list[np.ndarray]
    """Tokens of each sample of each set."""
    interleave: Interleave
    records: np.ndarray
    """All ranks' records, in order of position."""

    def before(self, step: int) -> "Book":
        """The same without what steps >= `step` recorded."""
        return replace(self, records=self.records[self.records["step"] < step])

    @property
    def samples(self) -> int:
        """Samples that were consumed, in whatever epoch."""
        return len(np.unique(self.records[["set", "sample"]]))

    @property
    def twice(self) -> np.ndarray:
        """Steps of which a piece was recorded more than once, ascending."""
        columns = ("position", "set", "sample", "start")
        found = self.records[np.lexsort([self.records[name] for name in columns])]
        same = np.logical_and.reduce([found[name][1:] == found[name][:-1] for name in columns])
        return np.unique(found["step"][1:][same])


def read(folder: Path, unfinished: bool = False) -> Book:
    """The ledger in `folder`. A torn last record is no fault where the run is `unfinished`: it is
    cut away when that goes on.

    ArtifactError where there is no ledger or one of another format, LedgerDamaged for one that
    was cut or altered.
    """
    path = folder / "sets.json"
    if not path.is_file():
        raise ArtifactError(
            f"{folder}: no ledger; run the stage with ledger: true to have it written"
        )
    header = _read_header(path)
    guarded = header["format"] == FORMAT
    lengths = []
    for k, entry in enumerate(header["sets"]):
        path = folder / f"set-{k}.lengths.npy"
        try:
            lengths.append(np.load(path, allow_pickle=False))
            sound = not guarded or entry["lengths_crc"] == _crc_of_lengths(lengths[k])
        except (OSError, EOFError, ValueError):
            sound = False
        if not sound:
            raise LedgerDamaged(f"{path}: missing, altered or cut; {REMEDY}")
    paths = sorted(folder.glob("rank-*.ledger"))
    if not paths and not unfinished:
        raise LedgerDamaged(f"{folder}: its rank-*.ledger are gone; {REMEDY}")
    parts = [np.zeros(0, RECORD)]
    for path in paths:
        records = whole_records(path)
        sound = records["crc"] == checksums(records) if guarded else _possible(records, lengths)
        if not sound.all():
            raise LedgerDamaged(
                f"{path}: record {int(np.argmin(sound))} of {len(records)} was altered, or what "
                f"stood before it cut out; {REMEDY}"
            )
        torn = path.stat().st_size % RECORD.itemsize
        if torn and not unfinished:
            raise LedgerDamaged(
                f"{path}: record {len(records)} is cut: {torn} of {RECORD.itemsize} bytes; {REMEDY}"
            )
        parts.append(records)
    records = np.concatenate(parts)
    return Book(
        guarded=guarded,
        context=header["context"],
        sets=header["sets"],
        lengths=lengths,
        interleave=Interleave([Fraction(count) for count in header["counts"]]),
        records=records[np.lexsort((records["step"], records["position"]))],
    )


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(path.read_text())
        version = header["format"]
        sound = version != FORMAT or header["crc"] == _crc_of_header(header)
    except (KeyError, TypeError, ValueError):  # no JSON, or other JSON
        raise LedgerDamaged(f"{path}: altered or cut; {REMEDY}") from None
    if not sound:
        raise LedgerDamaged(f"{path}: altered; {REMEDY}")
    if version not in (UNGUARDED, FORMAT):
        raise ArtifactError(
            f"{path}: ledger format {version!r}, this version reads {UNGUARDED} and {FORMAT}"
        )
    return header


def _possible(records: np.ndarray, lengths: list[np.ndarray]) -> np.ndarray:
    """Which unguarded records name what there is: bool (n,)."""
    sound = (records["set"] >= 0) & (records["set"] < len(lengths))
    for name in ("step", "position", "epoch"):
        sound &= (records[name] >= 0) & (records[name] < 1 << 32)
    sound &= ((records["passed_over"] | 1) == 1) & (records["crc"] == 0)
    for k, of_set in enumerate(lengths):
        here = np.flatnonzero(sound & (records["set"] == k))
        found = records[here]
        known = (found["sample"] >= 0) & (found["sample"] < len(of_set))
        longest = of_set[np.where(known, found["sample"], 0)]
        start, stop = found["start"], found["stop"]
        sound[here] = known & (start >= 0) & (start <= stop) & (stop <= longest)
    return sound


def verify(book: Book) -> list[Finding]:
    """Samples skipped and repeated, by set and epoch."""
    sets, lengths, records, interleave = book.sets, book.lengths, book.records, book.interleave
    rows = [_rows(entry, lengths[k], book.context) for k, entry in enumerate(sets)]
    position = int(records["position"].max()) + 1 if len(records) else 0
    misplaced = _misplaced(records, rows, interleave, position)

    findings = []
    for k, entry in enumerate(sets):
        given = interleave.before(position)[k]
        of_set = records["set"] == k
        seen = records["epoch"][of_set]
        last = max((given - 1) // entry["rows"], int(seen.max()) if len(seen) else -1)
        for epoch in range(last + 1):
            here = of_set & (records["epoch"] == epoch)
            expected = min(max(given - epoch * entry["rows"], 0), entry["rows"])
            owed = _owed(rows[k], epoch, expected, lengths[k])
            skipped, repeated = _coverage(records[here], owed)
            passed = records[here & (records["passed_over"] == 1)]
            findings.append(
                Finding(
                    set=entry["name"],
                    epoch=epoch,
                    rows=len(np.unique(records["position"][here])),
                    of=entry["rows"],
                    skipped=skipped,
                    repeated=repeated,
                    passed_over=len(np.unique(passed["position"])),
                    misplaced=int(misplaced[here].sum()),
                )
            )
    return findings


def _rows(entry: dict[str, Any], lengths: np.ndarray, context: int) -> Rows:
    if entry["packed"]:
        return PackedRows(lengths, context, entry["seed"])
    return FixedRows(entry["samples"], context, entry["seed"])


def _owed(rows: Rows, epoch: int, expected: int, lengths: np.ndarray) -> np.ndarray:
    """Tokens of each sample that the first `expected` rows of an epoch hold, int64 (samples,)."""
    if expected == len(rows):
        return lengths.astype(np.int64)
    owed = np.zeros(len(lengths), np.int64)
    for first in range(0, expected, CHUNK):
        found = rows.pieces(epoch, np.arange(first, min(first + CHUNK, expected)))
        np.add.at(owed, found.sample, found.stop - found.start)
    return owed


def _coverage(records: np.ndarray, owed: np.ndarray) -> tuple[int, int]:
    """(samples with tokens not consumed, samples with tokens consumed twice) in one epoch."""
    order = np.lexsort((records["start"], records["sample"]))
    sample = records["sample"][order]
    start, stop = records["start"][order], records["stop"][order]
    # What a record adds to its sample: its tokens past the furthest one before it, which is a
    # running maximum within the sample; a large offset keeps one sample from the next.
    first = np.ones(len(sample), np.bool_)
    first[1:] = sample[1:] != sample[:-1]
    offset = (np.cumsum(first) - 1) * (int(stop.max()) + 1 if len(stop) else 1)
    furthest = np.maximum.accumulate(stop + offset) - offset
    reach = np.zeros(len(sample), np.int64)
    reach[1:] = np.where(first[1:], 0, furthest[:-1])
    fresh = np.maximum(stop - np.maximum(start, reach), 0)
    consumed = np.zeros(len(owed), np.int64)
    np.add.at(consumed, sample, fresh)
    repeated = np.unique(sample[fresh < stop - start])
    return int((consumed < owed).sum()), len(repeated)


def _misplaced(
    records: np.ndarray, rows: list[Rows], interleave: Interleave, position: int
) -> np.ndarray:
    """Which records are not among what the order, computed anew, has at their position."""
    wrong = np.zeros(len(records), np.bool_)
    for number in np.unique(records["position"] // CHUNK).tolist():
        first = number * CHUNK
        low, high = np.searchsorted(records["position"], [first, first + CHUNK])
        chunk = records[low:high]
        expected = draw(rows, interleave, first, min(first + CHUNK, position))
        expected[:, ROW] += first
        found = np.stack([chunk["position"], *(chunk[name] for name in PIECE_COLUMNS)], axis=1)
        if np.array_equal(found, expected):
            continue
        known = set(map(tuple, expected.tolist()))
        wrong[low:high] = [tuple(row) not in known for row in found.tolist()]
    return wrong
