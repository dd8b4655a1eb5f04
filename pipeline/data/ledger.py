"""The ledger: what each step consumed, and the proof that nothing was skipped or repeated.

    ledger/sets.json             seed, context, weights and sets, as the run drew from them
    ledger/set-0.lengths.npy     tokens of each sample of set 0, and so on
    ledger/rank-0000.ledger      appended to by rank 0: one record a piece, int64 little-endian

A record is written before the step uses the batch, and a whole record or none is read back:
a torn tail is cut off. A run that goes on from a checkpoint of step s drops what steps >= s
recorded (`rewind`), on every rank's file, whatever the number of ranks is now.

`verify` believes none of it: it counts the tokens of every sample in every epoch, the
positions of the global order, and compares each record with the order computed anew.
"""

import os
from dataclasses import dataclass
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

FORMAT = 1
RECORD = np.dtype(
    [
        ("step", "<i8"),
        ("position", "<i8"),  # global, of the row
        ("set", "<i4"),
        ("epoch", "<i4"),
        ("sample", "<i8"),
        ("start", "<i8"),
        ("stop", "<i8"),
        ("passed_over", "<i8"),  # 1: left out by policy (after a fault of learning), not trained on
    ]
)
PIECE_COLUMNS = {"set": SET, "epoch": EPOCH, "sample": SAMPLE, "start": START, "stop": STOP}
CHUNK = 1 << 16  # positions compared with the order at a time


class Ledger:
    """Rank `rank`'s file, appended to."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{rank:04d}.ledger"
        _cut_torn_tail(path)
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
        data = memoryview(records.tobytes())
        while data:
            data = data[os.write(self._file, data) :]

    def close(self) -> None:
        """Write through to the disk and close."""
        os.fsync(self._file)
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
    """Drop what steps >= `step` recorded, on all ranks' files. On rank 0, before any records."""
    for path in sorted(folder.glob("rank-*.ledger")):
        _cut_torn_tail(path)
        records = np.fromfile(path, RECORD)
        # Steps rise within a file, so what is to go is its tail.
        keep = int(np.searchsorted(records["step"], step))
        if keep < len(records):
            os.truncate(path, keep * RECORD.itemsize)


def write_header(folder: Path, mixture: Mixture) -> None:
    """What the order is computed from. On rank 0; ArtifactError if another run's is there."""
    folder.mkdir(parents=True, exist_ok=True)
    header = {
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
    if path.is_file():
        if read_json(path) != header:
            raise ArtifactError(f"{path}: the ledger of another data order; move it away")
        return
    for k, member in enumerate(mixture.members):
        np.save(folder / f"set-{k}.lengths.npy", member.tokens.lengths, allow_pickle=False)
    write_json(path, header)


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


def read_records(folder: Path) -> np.ndarray:
    """All ranks' records, in order of position."""
    paths = sorted(folder.glob("rank-*.ledger"))
    if not paths:
        raise ArtifactError(f"{folder}: no rank-*.ledger; the run kept no ledger")
    parts = []
    for path in paths:
        whole = path.stat().st_size // RECORD.itemsize
        parts.append(np.fromfile(path, RECORD, count=whole))
    records = np.concatenate(parts)
    return records[np.lexsort((records["step"], records["position"]))]


def verify(folder: Path) -> list[Finding]:
    """Samples skipped and repeated, by set and epoch. ArtifactError where there is no ledger."""
    path = folder / "sets.json"
    if not path.is_file():
        raise ArtifactError(
            f"{folder}: no ledger; run the stage with ledger: true to have it written"
        )
    header = read_json(path)
    sets = header["sets"]
    lengths = [
        np.load(folder / f"set-{k}.lengths.npy", allow_pickle=False) for k in range(len(sets))
    ]
    rows = [_rows(entry, lengths[k], header["context"]) for k, entry in enumerate(sets)]
    interleave = Interleave([Fraction(count) for count in header["counts"]])
    records = read_records(folder)
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
    for first in range(0, position, CHUNK):
        low, high = np.searchsorted(records["position"], [first, first + CHUNK])
        if low == high:
            continue
        chunk = records[low:high]
        expected = draw(rows, interleave, first, min(first + CHUNK, position))
        expected[:, ROW] += first
        found = np.stack([chunk["position"], *(chunk[name] for name in PIECE_COLUMNS)], axis=1)
        if np.array_equal(found, expected):
            continue
        known = set(map(tuple, expected.tolist()))
        wrong[low:high] = [tuple(row) not in known for row in found.tolist()]
    return wrong
