"""Files that are whole or absent: written beside their place, then renamed into it."""

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; at the end it takes the place of `path`.

    Where the block raises, what stood at `path` stays and the temporary is removed. Threads
    and processes may write the same path at a time: the last to end wins, whole. The name
    begins with a dot and ends in `.tmp`, which readers of folders leave out. What the system
    refuses it refuses by the name of `path`, not of the temporary.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # below a file, or of a name that is too long
            temporary.unlink(missing_ok=True)
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def as_usual(path: Path) -> None:
    """Give a file that a library made for its owner alone the permissions of any other."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all; it is on the disk when this returns."""
    with whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
