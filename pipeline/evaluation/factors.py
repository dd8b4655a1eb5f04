"""The likelihood of every factor, kept while an evaluation runs and after it.

Each rank scores a contiguous part of the samples and appends the nats of its elements to a
file of its own, in sample order:

    factors/part-0-of-2.f32.partial    growing; its length says where a restart goes on
    factors/part-0-of-2.f32            complete

When all parts are complete, rank 0 reads them one after another (sums, curves) and writes
them into one zarr group, `factors.zarr`: `nats` (elements,) float32 and `offsets`
(samples + 1,) int64, sample i being nats[offsets[i]:offsets[i + 1]].
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chainrule.pipeline.stage import StageFailed

FOLDER = "factors"
STORE = "factors.zarr"
CHUNK = 1 << 18


class Parts:
    """The parts of one evaluation, seen by one rank; `lengths` are the elements of each sample."""

    def __init__(
        self, folder: Path, lengths: npt.NDArray[np.int64], rank: int = 0, world_size: int = 1
    ) -> None:
        self.folder = folder / FOLDER
        self.folder.mkdir(exist_ok=True)
        self.lengths, self.rank, self.world_size = lengths, rank, world_size
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        # samples [bounds[r], bounds[r + 1]) are rank r's: about as many elements each
        shares = self.offsets[-1] * np.arange(1, world_size) // world_size
        self.bounds = [0, *np.searchsorted(self.offsets[1:], shares).tolist(), len(lengths)]

    def path(self, rank: int) -> Path:
        return self.folder / f"part-{rank}-of-{self.world_size}.f32"

    def resume(self) -> range:
        """This rank's samples that are still to be scored; a torn last sample is cut off."""
        first, last = self.bounds[self.rank], self.bounds[self.rank + 1]
        if self.path(self.rank).exists():
            return range(last, last)
        growing = self._growing()
        growing.touch()
        held = growing.stat().st_size // 4
        whole = int(np.searchsorted(self.offsets, self.offsets[first] + held, side="right")) - 1
        whole = min(whole, last)
        with open(growing, "r+b") as file:
            file.truncate(4 * int(self.offsets[whole] - self.offsets[first]))
        return range(whole, last)

    def _growing(self) -> Path:
        path = self.path(self.rank)
        return path.with_name(path.name + ".partial")

    def append(self, nats: Iterator[npt.NDArray[np.float32]]) -> Iterator[int]:
        """Write each sample's nats as it comes; yields its number of elements."""
        with open(self._growing(), "ab") as file:
            for values in nats:
                file.write(values.astype("<f4").tobytes())
                yield len(values)

    def complete(self) -> None:
        """Give this rank's part its final name."""
        if not self.path(self.rank).exists():
            self._growing().rename(self.path(self.rank))

    def wait(self, patience_s: float, poll_s: float = 0.1) -> None:
        """Until every rank's part is complete. StageFailed where none comes or grows for long."""
        seen: Any = None
        deadline = time.monotonic() + patience_s
        while missing := [r for r in range(self.world_size) if not self.path(r).exists()]:
            now = sorted((p.name, p.stat().st_size) for p in self.folder.iterdir())
            if now != seen:
                seen, deadline = now, time.monotonic() + patience_s
            elif time.monotonic() > deadline:
                raise StageFailed(
                    f"{self.folder}: the parts of ranks {missing} are missing and none grew for "
                    f"{patience_s:.0f} s; run the stage again to go on from what is there"
                )
            time.sleep(poll_s)

    def samples(self) -> Iterator[npt.NDArray[np.float32]]:
        """The nats of each sample in order, from complete parts."""
        for rank in range(self.world_size):
            first, last = self.bounds[rank], self.bounds[rank + 1]
            with open(self.path(rank), "rb") as file:
                for i in range(first, last):
                    data = file.read(4 * int(self.lengths[i]))
                    if len(data) != 4 * int(self.lengths[i]):
                        raise StageFailed(f"{self.path(rank)}: cut short; run with --force")
                    yield np.frombuffer(data, dtype="<f4")

    def to_zarr(self, keep: bool) -> None:
        """Move the parts into `factors.zarr` (or, with `keep` False, only remove them)."""
        if keep:
            self._write_zarr()
        shutil.rmtree(self.folder)

    def _write_zarr(self) -> None:
        import zarr

        group = zarr.open_group(str(self.folder.parent / STORE), mode="w")
        group.attrs["unit"] = "nats: -log p of each element, in generation order"
        total = int(self.offsets[-1])
        offsets = group.create_array("offsets", shape=self.offsets.shape, dtype="int64")
        offsets[:] = self.offsets
        nats = group.create_array(
            "nats", shape=(total,), dtype="float32", chunks=(min(CHUNK, max(total, 1)),)
        )
        held: list[npt.NDArray[np.float32]] = []
        at = size = 0
        for values in self.samples():
            held.append(values)
            size += len(values)
            if size >= CHUNK:
                joined = np.concatenate(held)
                whole = len(joined) // CHUNK * CHUNK
                nats[at : at + whole] = joined[:whole]
                at, held, size = at + whole, [joined[whole:]], len(joined) - whole
        if size:
            nats[at:] = np.concatenate(held)
