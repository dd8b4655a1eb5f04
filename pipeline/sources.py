"""The content of raw source files, as one hash that enters an ingest stage's fingerprint.

Like make, but by content: a file whose size and modification time are those of the last
look keeps its hash; any other is read again. A touched file with the same bytes changes
nothing, an edited one of the same size is seen.
"""

import contextlib
import os
from pathlib import Path

from chainrule.pipeline.artifact import read_json, sha256_file, write_json
from chainrule.pipeline.config import digest


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
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
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
