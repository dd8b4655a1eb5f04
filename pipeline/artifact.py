"""Artifacts: the folder a finished stage leaves, complete or absent.

    runs/<pipeline>/<stage>/              published: has artifact.json
    runs/<pipeline>/<stage>.partial/      unfinished work to resume: never a result
    runs/<pipeline>/<stage>.aside-<hash>/ the same, for the settings before the present ones
    runs/<pipeline>/.locks/<stage>.lock   held by whoever works on the stage

A stage works in `<stage>.partial`. When it is done, every file is hashed into
`artifact.json` and the folder is renamed to `<stage>`; the artifact that stood there
before is removed only after. A crash between the two renames is mended by the next
`recover`.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from chainrule.pipeline.config import RequestError, digest
from chainrule.pipeline.whole_file import write_whole

FORMAT = 1
MANIFEST = "artifact.json"
ATTEMPT = "attempt.json"
"""In an unfinished folder: what is being made there, and by which attempt."""
FLOCK, FLOCK_FIELDS = (
    ("qqihh", ("l_start", "l_len", "l_pid", "l_type", "l_whence"))
    if sys.platform == "darwin"
    else ("hhqqi0q", ("l_type", "l_whence", "l_start", "l_len", "l_pid"))
)
"""C's `struct flock`, as `struct` writes it."""


class ArtifactError(RequestError):
    """An artifact that is missing, unfinished, altered or of the wrong kind."""


class LineageError(RequestError):
    """Two things that must come from the same source do not."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path}: not JSON ({error}); the file was altered or cut") from None


def new_folder(out: Path) -> Path:
    """`out`, if it is empty or not there yet; RequestError otherwise."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out}: is there already; name another with --out, or remove it")
    return out


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class Artifact:
    """A published artifact, or a bare folder (`manifest` is then empty)."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "Artifact":
        """The published artifact in `folder`; its files are checked for presence and size."""
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise ArtifactError(f"{folder}: no {MANIFEST}: not a finished artifact")
        manifest = read_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise ArtifactError(
                f"{folder / MANIFEST}: format {manifest.get('format')!r}, "
                f"this version reads {FORMAT}"
            )
        for entry in manifest["files"]:
            path = folder / entry["path"]
            if not path.is_file():
                raise ArtifactError(
                    f"{path}: missing from the artifact; make it again with --force {folder.name}"
                )
            if path.stat().st_size != entry["size"]:
                raise ArtifactError(
                    f"{path}: {path.stat().st_size} bytes, {MANIFEST} says {entry['size']}; "
                    f"make it again with --force {folder.name}"
                )
        return cls(folder, manifest)

    @classmethod
    def bare(cls, folder: str | Path) -> "Artifact":
        """A folder taken as it is (a model someone copied), with its manifest if it has one."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ArtifactError(f"{folder}: no such folder")
        if (folder / MANIFEST).is_file():
            return cls.open(folder)
        return cls(folder, {})

    @property
    def name(self) -> str:
        return self.manifest.get("stage", self.folder.name)

    @property
    def fingerprint(self) -> str:
        """Hash of job, settings and inputs; empty for a bare folder."""
        return self.manifest.get("fingerprint", "")

    @property
    def identity(self) -> str:
        """What tells this from another one in its place: the fingerprint; of a bare folder its
        card's own, else a digest of its card or index, else of its files' sizes and times."""
        if self.fingerprint:
            return self.fingerprint
        for name in ("card.json", "index.json"):
            if (self.folder / name).is_file():
                about = read_json(self.folder / name)
                return str(about.get("fingerprint") or digest(about))
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        return digest([[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files])

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest.get("metrics", {})

    def path(self, name: str) -> Path:
        """A file or folder of the artifact; ArtifactError where it is missing."""
        path = self.folder / name
        if not path.exists():
            raise ArtifactError(f"{self.folder}: has no {name}")
        return path

    def verify(self, *names: str) -> None:
        """Compare sha256 of `names` (all files if none) with the manifest; ArtifactError."""
        for entry in self.manifest.get("files", []):
            if names and entry["path"] not in names:
                continue
            if sha256_file(self.folder / entry["path"]) != entry["sha256"]:
                raise ArtifactError(
                    f"{self.folder / entry['path']}: altered (sha256 differs from {MANIFEST}); "
                    f"make it again with --force {self.folder.name}"
                )

    @cached_property
    def card(self) -> dict[str, Any]:
        """`card.json` of a tokenizer or model."""
        return read_json(self.path("card.json"))

    @cached_property
    def index(self) -> dict[str, Any]:
        """`index.json` of raw or token shards."""
        return read_json(self.path("index.json"))


def require_same(
    what: str,
    expected: str,
    expected_by: str,
    found: str,
    found_in: str,
    remedy: str = "run the stages between them again",
) -> None:
    """Refuse a mismatch of fingerprints, naming both; LineageError."""
    if expected != found:
        raise LineageError(
            f"{what} do not match: {expected_by} was made with {expected[:16]}, "
            f"{found_in} is {found[:16]}; {remedy}"
        )


A_TRAINING = "a training; models are what is handed off from one (job handoff)"


def is_training(folder: Path) -> bool:
    """Whether it is a published training: what people give who mean the model that it made."""
    manifest = folder / MANIFEST
    return manifest.is_file() and read_json(manifest).get("job") == "pretrain"


def partial_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def aside_folder(folder: Path, fingerprint: str) -> Path:
    """Where unfinished work for this fingerprint lies while another one is being made."""
    return folder.with_name(f"{folder.name}.aside-{fingerprint[:12]}")


def asides(folder: Path) -> list[Path]:
    return sorted(folder.parent.glob(f"{folder.name}.aside-*"))


def publish(folder: Path, manifest: dict[str, Any]) -> Artifact:
    """Hash what `<folder>.partial` holds, write its manifest, put it in the place of `folder`."""
    partial = partial_folder(folder)
    for left in partial.rglob(".*.tmp"):  # by a writer that was killed
        if left.is_file():
            left.unlink()
    files = []
    for path in sorted(partial.rglob("*")):
        if path.is_file() and path.relative_to(partial).as_posix() not in (MANIFEST, ATTEMPT):
            size = path.stat().st_size
            files.append(
                {
                    "path": path.relative_to(partial).as_posix(),
                    "size": size,
                    "sha256": sha256_file(path),
                }
            )
    (partial / ATTEMPT).unlink(missing_ok=True)
    write_json(partial / MANIFEST, {"format": FORMAT, **manifest, "files": files})
    recover(folder)
    return Artifact.open(folder)


def recover(folder: Path) -> None:
    """Finish a publication that was cut between its renames; remove what it replaced."""
    partial = partial_folder(folder)
    replaced = folder.with_name(folder.name + ".replaced")
    if (partial / MANIFEST).is_file():
        if folder.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            os.rename(folder, replaced)
        os.rename(partial, folder)
    if replaced.exists():
        if folder.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, folder)


class StageLocked(RequestError):
    """Somebody else works on the stage."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[IO[str]]:
    """Hold the stage's lock; StageLocked if another live process holds it.

    A POSIX record lock: the kernel drops it when its holder dies, however it dies, and
    forked children (data workers) do not inherit it.
    """
    path = lock_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115 (closed below; closing releases the lock)
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise StageLocked(f"stage '{folder.name}' is running: {lock_holder(folder)}") from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now()}\n")
        file.flush()
        yield file
    finally:
        file.close()


def lock_path(folder: Path) -> Path:
    return folder.parent / ".locks" / f"{folder.name}.lock"


def lock_holder(folder: Path) -> str:
    """Who holds the lock, as its file says."""
    return lock_path(folder).read_text().strip() or "by an unnamed process"


def is_locked(folder: Path) -> bool:
    """Whether a live process other than this one holds the stage's lock.

    It is asked for, not tried: whoever may only read the runs folder sees it too, and a look
    refuses nobody the lock meanwhile.
    """
    path = lock_path(folder)
    if not path.exists():
        return False
    whole_file = {"l_type": fcntl.F_WRLCK, "l_whence": os.SEEK_SET}
    asked = struct.pack(FLOCK, *(whole_file.get(name, 0) for name in FLOCK_FIELDS))
    with open(path) as file:
        answer = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return bool(answer[FLOCK_FIELDS.index("l_type")] != fcntl.F_UNLCK)
