"""Write a file so that at every moment its name holds the old content, the new content, or nothing: never half of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not a POSIX system: there an open file cannot be removed, which serves as well
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".partial"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well, and vanishes when it does not.

    The bytes are on the disk before the name points at them; until then they are under `file.name`. What killed writers of
    the same name left behind is removed.
    """
    target = Path(path)
    _remove_stale(target)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=_SUFFIX, dir=target.parent)
    os.close(descriptor)
    try:
        with open(name, "wb") as file:
            if fcntl is not None:  # says that the writer lives; the system lets go of it when the process dies
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            if hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), _mode(target))
            os.fsync(file.fileno())
            if os.name == "posix":  # while the lock is held, or a cleaner could take it away
                os.replace(name, target)
        if os.name != "posix":  # open files have no new name there
            os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(target.parent)


def _mode(target: Path) -> int:
    """The permissions that open() would have given, or those of the file that is replaced."""
    with contextlib.suppress(OSError):
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(target: Path) -> None:
    for left in target.parent.iterdir():
        if not (left.name.startswith(f".{target.name}.") and left.name.endswith(_SUFFIX)):
            continue
        with contextlib.suppress(OSError):
            if fcntl is not None:
                with open(left, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its writer lives
            left.unlink()
