"""The content of raw source files, as one hash that enters an ingest stage's fingerprint.

Like make, but by content: a file whose size and modification time are those of the last
look keeps its hash; any other is read again. A touched file with the same bytes changes
nothing, an edited one of the same size is seen. What holds nothing to read (a link that leads
nowhere or to itself, a pipe, a device) counts by its name, and is never opened.
"""

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Any

from chainrule.pipeline.artifact import read_json, sha256_file, write_json
from chainrule.pipeline.config import digest

NOWHERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""What a system answers to a link that leads to no file."""
NO_FILE: list[Any] = [-1, -1, "no file"]  # no size and time that a file has


def source_digest(files: list[Path], cache: Path) -> str:
    """sha256 over (path below the common folder, content) of `files`; hashes kept in `cache`.

    The cache is written where the pipeline's folder is there, and where it can be: `status` of
    what was never run, or of somebody else's runs, makes no folder and fails on none.
    """
    if not files:
        return digest([])
    known: dict[str, list] = read_json(cache) if cache.is_file() else {}
    seen: dict[str, list] = {}
    for file in sorted(files):
        stamp = _stamp(file)
        if stamp is None:
            seen[str(file)] = NO_FILE
            continue
        entry = known.get(str(file))
        if entry is None or entry[:2] != stamp:
            entry = [*stamp, sha256_file(file)]
        seen[str(file)] = entry
    if seen != known and cache.parent.parent.is_dir():
        with contextlib.suppress(OSError):
            cache.parent.mkdir(exist_ok=True)
            write_json(cache, seen)
    base = os.path.commonpath([os.path.abspath(file.parent) for file in files])
    return digest([[os.path.relpath(path, base), entry[2]] for path, entry in seen.items()])


def _stamp(file: Path) -> list[int] | None:
    """Size and time of the last change; None for what is no file."""
    try:
        found = file.stat()
    except OSError as error:
        if error.errno not in NOWHERE:
            raise
        return None
    return [found.st_size, found.st_mtime_ns] if stat.S_ISREG(found.st_mode) else None
