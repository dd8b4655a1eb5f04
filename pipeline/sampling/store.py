"""The store of samples: one zarr (v3, sharded) group, written by any number of processes.

    samples.parts/header.json    whose samples these are: model, settings, arrays
    samples.parts/00003.json     zarr shard 3 is written: its rows, and a sha256 of each file
    samples.zarr/                tokens, log_likelihood, seed, class, images or audio
    samples.json                 header and parts together, once every shard is there

1. `Store.start` writes the header, or compares it with the one that is there: a store of
   another model or of other settings is refused, with both named, and nothing is touched.
2. A writer owns whole zarr shards (`mine`): two writers in one shard would lose rows silently.
3. A shard counts as written when its part file exists, which is made last and by rename. zarr
   reads a missing shard as zeros without a word; here it is known to be missing.
4. Started again, `mine` gives only the shards without a valid part; `finish` checks them all.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chainrule.pipeline.artifact import read_json, require_same, sha256_file, write_json
from chainrule.pipeline.config import RequestError

FORMAT = 1
NAME = "samples.zarr"
CAPTIONS = "captions.json"
"""Beside it: what its array `caption` counts, the texts asked for, in order."""
PARTS = "samples.parts"
MANIFEST = "samples.json"


class StoreError(RequestError):
    """A store of samples that is incomplete, altered, or someone else's."""


@dataclass(frozen=True)
class Layout:
    """One array of the store: the shape and dtype of a row."""

    shape: tuple[int, ...]
    dtype: str


class Store:
    """`number` rows in shards of `samples_per_shard`, in a folder."""

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self.folder = folder
        self.header = dict(header)
        self.number = int(header["number"])
        self.samples_per_shard = int(header["samples_per_shard"])
        self.arrays = {
            name: Layout(tuple(a["shape"]), a["dtype"]) for name, a in header["arrays"].items()
        }

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        model: str,
        settings: Mapping[str, Any],
        number: int,
        samples_per_shard: int,
        arrays: Mapping[str, Layout],
    ) -> "Store":
        """A new store, or the one that is there to be filled up.

        `model` is the model's fingerprint, `settings` everything else that decides a sample.
        Raises LineageError for another model's store, StoreError for other settings.
        """
        header = {
            "format": FORMAT,
            "model": model,
            "settings": dict(settings),
            "number": number,
            "samples_per_shard": samples_per_shard,
            "arrays": {
                name: {"shape": list(a.shape), "dtype": a.dtype} for name, a in arrays.items()
            },
        }
        found = cls._header_in(folder)
        if found is not None:
            cls._require_same_header(folder, header, found)
        store = cls(folder, header)
        if store.finished:  # killed between the manifest and the end of `finish`
            shutil.rmtree(folder / PARTS, ignore_errors=True)
            return cls.open(folder)
        if found is None:
            (folder / PARTS).mkdir(parents=True, exist_ok=True)
            write_json(folder / PARTS / "header.json", header)
        store._create()
        return store

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> "Store":
        """A finished store; StoreError where a shard is missing or (`verify`) altered."""
        if not (folder / MANIFEST).is_file():
            raise StoreError(f"{folder}: no finished store of samples (no {MANIFEST})")
        manifest = read_json(folder / MANIFEST)
        store = cls(folder, manifest)
        for part in manifest["shards"]:
            store._check_part(part, verify)
        return store

    def read(self, name: str, rows: Sequence[int] | None = None) -> np.ndarray:
        """An array of the store: the rows named, in their order, or all of them."""
        import zarr

        if name not in self.arrays:
            raise StoreError(f"{self.folder / NAME}: no array '{name}'; it has {[*self.arrays]}")
        array: Any = zarr.open_group(self.folder / NAME, mode="r")[name]
        if rows is None:
            return np.asarray(array)
        if isinstance(rows, range) and rows.step == 1:
            return np.asarray(array[rows.start : rows.stop])
        if len(rows) == 0:
            return np.asarray(array[:0])
        return np.asarray(array.oindex[np.asarray(rows)])

    # --- writing ---------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    @property
    def shards(self) -> int:
        return -(-self.number // self.samples_per_shard)

    def rows(self, shard: int) -> range:
        start = shard * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, self.number))

    def mine(self, rank: int, world_size: int) -> list[int]:
        """Shards of this writer that are still to be written (or were damaged)."""
        if self.finished:
            return []
        return [s for s in range(rank, self.shards, world_size) if not self._is_written(s)]

    def write(self, shard: int, values: Mapping[str, np.ndarray]) -> None:
        """Write one whole shard: every array, all of its rows."""
        import zarr

        rows = self.rows(shard)
        if set(values) != set(self.arrays):
            raise ValueError(f"arrays {sorted(values)} given, {sorted(self.arrays)} expected")
        for name, value in values.items():
            if value.shape != (len(rows), *self.arrays[name].shape):
                raise ValueError(f"{name}: {value.shape} given for rows {rows}")
        # zarr would read a damaged last shard, shorter than the others, before it writes.
        for name in self.arrays:
            (self.folder / self._shard_file(name, shard)).unlink(missing_ok=True)
        # Without this a shard of zeros would not be written at all.
        with zarr.config.set({"array.write_empty_chunks": True}):
            group = zarr.open_group(self.folder / NAME, mode="r+")
            for name, value in values.items():
                group[name][rows.start : rows.stop] = value  # type: ignore[index]
        files = {}
        for name in self.arrays:
            path = self._shard_file(name, shard)
            files[path] = sha256_file(self.folder / path)
        part = {"shard": shard, "start": rows.start, "stop": rows.stop, "files": files}
        write_json(self.folder / PARTS / f"{shard:05d}.json", part)

    def wait(self, patience_s: float, poll_s: float = 0.2) -> None:
        """Until other writers have written their shards; StoreError when none comes for long."""
        missing = self._missing()
        deadline = time.monotonic() + patience_s
        while missing:
            time.sleep(poll_s)
            now_missing = self._missing()
            if len(now_missing) < len(missing):
                deadline = time.monotonic() + patience_s
            elif time.monotonic() > deadline:
                raise StoreError(
                    f"{self.folder / NAME}: shards {now_missing[:8]} are missing and no other "
                    f"writer finished one for {patience_s:.0f} s; run the stage again to fill them"
                )
            missing = now_missing

    def finish(self) -> None:
        """Check every shard and write the manifest; StoreError names what is missing."""
        missing = self._missing()
        if missing:
            raise StoreError(f"{self.folder / NAME}: shards {missing[:8]} are missing")
        parts = [read_json(self._part(shard)) for shard in range(self.shards)]
        for part in parts:
            self._check_part(part, verify=True)
        for left in self.folder.glob(f".{NAME}.*.tmp"):  # by a writer killed in `_create`
            shutil.rmtree(left)
        write_json(self.folder / MANIFEST, {**self.header, "shards": parts})
        parts_folder = self.folder / PARTS
        while parts_folder.exists():  # a rank that opens the finished store removes it as well
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(parts_folder)

    # --- inside ----------------------------------------------------------------------------

    @staticmethod
    def _header_in(folder: Path) -> dict[str, Any] | None:
        for path in (folder / MANIFEST, folder / PARTS / "header.json"):
            if path.is_file():
                return read_json(path)
        if (folder / NAME).exists():
            raise StoreError(
                f"{folder / NAME}: a store without its {MANIFEST}: not known whose it is; "
                "write into another folder"
            )
        return None

    @staticmethod
    def _require_same_header(
        folder: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]
    ) -> None:
        if found.get("format") != FORMAT:
            raise StoreError(
                f"{folder / MANIFEST}: format {found.get('format')!r}, this version writes {FORMAT}"
            )
        require_same(
            "model and store of samples",
            found["model"],
            str(folder / NAME),
            wanted["model"],
            "the model given",
        )
        ours, theirs = wanted["settings"], found["settings"]
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key):
                raise StoreError(
                    f"{folder / NAME}: made with {key} = {theirs.get(key)!r}, asked for "
                    f"{ours.get(key)!r}; write into another folder"
                )
        for key in ("number", "samples_per_shard", "arrays"):
            if wanted[key] != found[key]:
                raise StoreError(
                    f"{folder / NAME}: has {key} {found[key]!r}, asked for {wanted[key]!r}; "
                    "write into another folder"
                )

    def _create(self) -> None:
        """Lay out the zarr group under a name of our own, then rename: one of all writers wins."""
        import zarr
        from zarr.codecs import ZstdCodec

        target = self.folder / NAME
        if target.is_dir():
            return
        temporary = self.folder / f".{NAME}.{os.getpid()}.{time.monotonic_ns()}.tmp"
        group = zarr.open_group(temporary, mode="w", zarr_format=3)
        group.attrs.update({"model": self.header["model"], "settings": self.header["settings"]})
        rows = self.samples_per_shard
        chunk = next(c for c in range(min(rows, 100), 0, -1) if rows % c == 0)
        for name, layout in self.arrays.items():
            group.create_array(
                name,
                shape=(self.number, *layout.shape),
                dtype=layout.dtype,
                chunks=(chunk, *layout.shape),
                shards=(rows, *layout.shape),
                compressors=ZstdCodec(level=3),
            )
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
            shutil.rmtree(temporary)  # another writer was first; the layout is the same

    def _part(self, shard: int) -> Path:
        return self.folder / PARTS / f"{shard:05d}.json"

    def _shard_file(self, name: str, shard: int) -> str:
        return "/".join([NAME, name, "c", str(shard), *("0" for _ in self.arrays[name].shape)])

    def _is_written(self, shard: int) -> bool:
        path = self._part(shard)
        if not path.is_file():
            return False
        try:
            self._check_part(read_json(path), verify=True)
        except StoreError:
            return False  # damaged: it is drawn again, and the same
        return True

    def _missing(self) -> list[int]:
        return [shard for shard in range(self.shards) if not self._part(shard).is_file()]

    def _check_part(self, part: Mapping[str, Any], verify: bool) -> None:
        for name, expected in part["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise StoreError(f"{path}: missing (rows {part['start']} to {part['stop']})")
            if verify and sha256_file(path) != expected:
                raise StoreError(f"{path}: altered (sha256 differs from {MANIFEST})")
