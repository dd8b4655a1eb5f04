"""Checkpoints: complete or absent, of no particular sharding.

    checkpoints/step-00001000/     checkpoint.json    counters, and size + sha256 of each file
                                   state-00000.safetensors …  one file a rank that wrote
    checkpoints/latest             the name of the newest, a text file

Every tensor is whole and carries a parameter's name: `model/<name>`, `ema/<name>`, and the
optimiser's moments `exp_avg/<name>`, … So any number of ranks under any strategy can read
what another number wrote under another, and handoff needs no engine at all. The ranks
share the writing, each whole tensors of its own.

A save, step by step (each rank, in a thread where `asynchronous`):

1. the tensors go into `.step-….tmp/state-<rank>.safetensors`, synced to disk and hashed;
2. the rank leaves a small `.part.json` with size and hash;
3. rank 0 waits for all parts, writes `checkpoint.json`, renames the folder, and only then
   moves `latest` and removes checkpoints that are kept no longer.

A kill at any instant leaves either a whole new checkpoint or none. One of the same step (a
damaged one made again, or one from before a rollback) is moved aside first, to `.step-….old`;
who begins after a kill between the two renames puts it back.
"""

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chainrule.pipeline.artifact import ArtifactError, read_json, sha256_file, write_json
from chainrule.pipeline.models.folder import write_tensors
from chainrule.pipeline.stage import StageFailed
from chainrule.pipeline.whole_file import write_whole

FORMAT = 1
MANIFEST = "checkpoint.json"
LATEST = "latest"
log = logging.getLogger("chainrule.checkpoints")


class CheckpointDamaged(ArtifactError):
    """A checkpoint that is torn or altered: named, with what is wrong."""


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """Steps of the published checkpoints, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-????????"))


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; tensors are read one at a time."""

    folder: Path
    state: dict[str, Any]
    """Everything that is not a tensor: step, data position, faults, optimiser steps, …"""
    index: dict[str, str]
    """Tensor name to file name."""

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> "Checkpoint":
        """Read and (unless told otherwise) hash a checkpoint; CheckpointDamaged by name."""
        if not (folder / MANIFEST).is_file():
            raise CheckpointDamaged(f"{folder}: no {MANIFEST}: torn")
        try:
            manifest = read_json(folder / MANIFEST)
            if manifest["format"] != FORMAT:
                raise CheckpointDamaged(
                    f"{folder}: checkpoint format {manifest['format']}, this version reads {FORMAT}"
                )
            files, state = manifest["files"], manifest["state"]
            index = {name: file for file, entry in files.items() for name in entry["tensors"]}
        except (KeyError, TypeError, AttributeError, ArtifactError) as error:
            raise CheckpointDamaged(f"{folder / MANIFEST}: altered or torn ({error})") from None
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                raise CheckpointDamaged(f"{path}: missing")
            if path.stat().st_size != entry["size"]:
                raise CheckpointDamaged(
                    f"{path}: {path.stat().st_size} bytes, {MANIFEST} says {entry['size']}"
                )
            if verify and sha256_file(path) != entry["sha256"]:
                raise CheckpointDamaged(f"{path}: altered (sha256 differs from {MANIFEST})")
        return cls(folder, state, index)

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def names(self, kind: str) -> list[str]:
        """Parameter names that have a tensor of `kind`: model, ema, exp_avg, …"""
        prefix = kind + "/"
        return [name.removeprefix(prefix) for name in self.index if name.startswith(prefix)]

    def tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, tensor on the CPU) of a kind, file by file."""
        prefix = kind + "/"
        for file in sorted(set(self.index.values())):
            names = [n for n, f in self.index.items() if f == file and n.startswith(prefix)]
            if not names:
                continue
            try:
                with safe_open(self.folder / file, framework="pt") as opened:
                    for name in names:
                        yield name.removeprefix(prefix), opened.get_tensor(name)
            except SafetensorError as error:
                raise CheckpointDamaged(f"{self.folder / file}: {error}") from None


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, None where there never was one; each damaged one that is newer
    is named in the log. CheckpointDamaged where none of those that are there is whole: nobody
    means a training to begin anew without a word."""
    steps = steps_in(folder)
    for step in reversed(steps):
        try:
            return Checkpoint.open(step_folder(folder, step))
        except CheckpointDamaged as error:
            log.warning("%s", error)
            if step != steps[0]:
                log.warning("the checkpoint before it is taken")
    if steps:
        raise CheckpointDamaged(
            f"{folder}: none of {len(steps)} checkpoints is whole (see above); put a whole one "
            "back, or remove the folder to begin at step 0"
        )
    return None


class CheckpointWriter:
    """Writes this rank's share of each checkpoint; rank 0 also publishes and cleans up."""

    def __init__(
        self,
        folder: Path,
        rank: int = 0,
        world_size: int = 1,
        keep: int = 2,
        keep_every: int | None = None,
        asynchronous: bool = True,
        parts_within_s: float = 600.0,
    ) -> None:
        """`keep` newest are kept, besides every multiple of `keep_every` steps and the best."""
        self.folder = folder
        self.rank, self.world_size = rank, world_size
        self.keep, self.keep_every = keep, keep_every
        self.asynchronous = asynchronous
        self.parts_within_s = parts_within_s
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._abandoned = threading.Event()
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for torn in folder.glob(".step-*.tmp"):
                shutil.rmtree(torn)
            for aside in folder.glob(".step-*.old"):
                final = folder / aside.stem.removeprefix(".")
                if final.exists():
                    shutil.rmtree(aside)
                else:
                    os.rename(aside, final)

    @property
    def failed(self) -> bool:
        """Whether a save in the background ended with an error."""
        return self._error is not None

    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], best: int | None
    ) -> None:
        """Save this rank's `tensors` (CPU, no longer written to by anyone) and `state`.

        `best` is the step of the best checkpoint so far, which is kept. Waits for the save
        before it; StageFailed where that, or this one, could not be written.
        """
        self.wait()
        arguments = (step, dict(tensors), state, best)
        if self.asynchronous:
            self._thread = threading.Thread(
                target=self._guarded, args=arguments, name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._guarded(*arguments)
            self.wait()

    def amend(self, step: int, state: dict[str, Any], best: int | None) -> None:
        """Renew these entries of the state of the checkpoint of `step`, where there is one."""
        self.wait()
        manifest = step_folder(self.folder, step) / MANIFEST
        if self.rank == 0 and manifest.is_file():
            content = read_json(manifest)
            content["state"] |= state
            write_json(manifest, content)
            self._clean_up(best)

    def wait(self) -> None:
        """Until the save under way is published (rank 0) or handed in; StageFailed on its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise self._named(error) from error

    def give_up(self) -> NoReturn:
        """A save failed on some rank: raise its error there, StageFailed on the others."""
        self._abandoned.set()
        self.wait()
        raise StageFailed(f"{self.folder}: another rank could not save its part of a checkpoint")

    def _named(self, error: Exception) -> StageFailed:
        intact = steps_in(self.folder)
        kept = (
            f"the checkpoint of step {intact[-1]} is intact" if intact else "no earlier one exists"
        )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = "no space left on the device; free some and run the same command again"
        else:
            why = f"{type(error).__name__}: {error}"
        return StageFailed(f"{self.folder}: a checkpoint could not be saved: {why} ({kept})")

    def _guarded(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], best: int | None
    ) -> None:
        temporary = self.folder / f".step-{step:08d}.tmp"
        try:
            self._write_part(temporary, tensors)
            if self.rank == 0:
                self._publish(temporary, step, state, best)
        except Exception as error:  # noqa: BLE001 (kept, and raised by wait() in the loop's thread)
            self._error = error
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _write_part(self, temporary: Path, tensors: dict[str, Tensor]) -> None:
        temporary.mkdir(parents=True, exist_ok=True)
        entry: dict[str, Any] | None = None
        name = f"state-{self.rank:05d}.safetensors"
        if tensors:
            path = temporary / name
            save_tensors(path, tensors)
            entry = {
                "size": path.stat().st_size,
                "sha256": sha256_file(path),
                "tensors": sorted(tensors),
            }
        write_json(temporary / f"{self.rank:05d}.part.json", {"name": name, "entry": entry})

    def _publish(self, temporary: Path, step: int, state: dict[str, Any], best: int | None) -> None:
        parts = [temporary / f"{rank:05d}.part.json" for rank in range(self.world_size)]
        until = time.monotonic() + self.parts_within_s
        while not all(part.exists() for part in parts):
            if self._abandoned.is_set() or time.monotonic() > until:
                missing = [rank for rank, part in enumerate(parts) if not part.exists()]
                raise TimeoutError(f"ranks {missing} did not write their part of step {step}")
            time.sleep(0.01)
        files = {}
        for part in parts:
            content = read_json(part)
            if content["entry"] is not None:
                files[content["name"]] = content["entry"]
            part.unlink()
        write_json(temporary / MANIFEST, {"format": FORMAT, "state": state, "files": files})
        sync_folder(temporary)
        final = step_folder(self.folder, step)
        aside = self.folder / f".{final.name}.old"
        if final.exists():
            if aside.exists():
                shutil.rmtree(aside)
            os.rename(final, aside)
        try:
            os.rename(temporary, final)
        except OSError:
            if aside.exists():
                os.rename(aside, final)
            raise
        sync_folder(self.folder)
        if aside.exists():
            shutil.rmtree(aside)
        write_whole(self.folder / LATEST, final.name + "\n")
        self._clean_up(best)

    def _clean_up(self, best: int | None) -> None:
        steps = steps_in(self.folder)
        kept = set(steps[-self.keep :])
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        if best is not None:
            kept.add(best)
        for step in steps:
            if step not in kept:
                # Renamed first: a removal that is cut must not leave half a checkpoint.
                doomed = self.folder / f".step-{step:08d}.tmp"
                os.rename(step_folder(self.folder, step), doomed)
                shutil.rmtree(doomed)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file and sync it to disk."""
    write_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def average(checkpoints: list[Checkpoint], kind: str = "model") -> dict[str, Tensor]:
    """The mean of several checkpoints' tensors of a kind, in float32.

    ArtifactError where they hold different parameters.
    """
    total: dict[str, Tensor] = {}
    for checkpoint in checkpoints:
        found = {name: tensor for name, tensor in checkpoint.tensors(kind)}
        if total and found.keys() != total.keys():
            raise ArtifactError(f"{checkpoint.folder}: other parameters than the checkpoint before")
        for name, tensor in found.items():
            # Integer buffers (masks, orders) are the same in all: the last one stands.
            if tensor.is_floating_point() and name in total:
                total[name] += tensor.float() / len(checkpoints)
            elif tensor.is_floating_point():
                total[name] = tensor.float() / len(checkpoints)
            else:
                total[name] = tensor
    return total


def snapshot(tensor: Tensor) -> Tensor:
    """A copy on the CPU that later updates do not touch."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return copy.copy_(tensor.detach())
