"""Locks of the operating system on files: one ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from varprop.errors import ArgumentError


@contextlib.contextmanager
def claim(lock: Path) -> Iterator[bool]:
    """Whether this process has the lock `lock`, a file that is made where it is missing; never waits."""
    with contextlib.ExitStack() as stack:
        with writing(lock):
            try:
                stack.enter_context(FileLock(lock, blocking=False))
                mine = True
            except Timeout:
                mine = False
        yield mine


def is_claimed(lock: Path) -> bool:
    """Whether a process has the lock now, on machines that share the locks of this one.

    Looks through a shared lock, which no other look sees and which leaves no file; it needs no right to write.
    """
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except OSError:  # never claimed, or removed since
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Faults of the file system in the folder of `path` as one line."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"directory={str(path.parent)!r} cannot be written ({reason}); expected a writable directory"
        raise ArgumentError(message) from None
