"""Where a command writes: refused before the work is done, or in one line where the system refuses.

require_folder_place, require_file_place    at the start of a command that takes long
refused                                     at its end, of whatever could not be foreseen
"""

import errno
import os
from pathlib import Path

from chainrule.pipeline.config import RequestError

REFUSALS = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
    }
)
"""What a system answers to a path that cannot be used as asked: no fault of the program's."""


def refused(error: OSError) -> str | None:
    """`PATH: reason` of a file that the system refused; None for any other error."""
    file = error.filename if error.filename2 is None else error.filename2  # where it was to go
    if error.errno not in REFUSALS or file is None or isinstance(file, int):
        return None
    reason = os.strerror(error.errno)
    return f"{os.fsdecode(file)}: {reason[:1].lower()}{reason[1:]}"


def require_folder_place(path: Path, option: str = "--out") -> Path:
    """`path`, where a file or folder of that name can be made; RequestError otherwise."""
    remedy = f"name another place with {option}"
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise RequestError(f"{above}: is a file, not a folder; {remedy}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise RequestError(f"{above}: permission denied, nothing can be made there; {remedy}")
    return path


def require_file_place(path: Path, option: str = "--out") -> Path:
    """`path`, where a file can be made or replaced; RequestError otherwise."""
    if path.is_dir():
        raise RequestError(f"{path}: is a folder; name a file with {option}")
    if path.exists() and not path.is_file():
        raise RequestError(f"{path}: not a regular file; name another with {option}")
    return require_folder_place(path, option)
