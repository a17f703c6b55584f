"""Files that are built once per user: unpacked and tokenised corpora, checked by hash each time they are opened."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from varprop.errors import ArgumentError
from varprop.files import replacing


def cache_directory() -> Path:
    """A writable folder: `$XDG_CACHE_HOME/varprop`, `~/.cache/varprop`, else one below the temporary directory."""
    candidates = []
    if os.environ.get("XDG_CACHE_HOME"):
        candidates.append(Path(os.environ["XDG_CACHE_HOME"], "varprop"))
    else:
        with contextlib.suppress(RuntimeError):  # no home directory
            candidates.append(Path.home() / ".cache" / "varprop")
    candidates.append(Path(tempfile.gettempdir(), f"varprop-cache-{os.getuid() if hasattr(os, 'getuid') else 'user'}"))
    for folder in candidates:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    raise ArgumentError(f"XDG_CACHE_HOME={str(candidates[0])!r} is not writable; expected a writable cache directory")


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cached(name: str, sha256: str, build: Callable[[], bytes]) -> Path:
    """Path of a cached file whose bytes have the given hash; `build` makes them where the cache has not got them.

    A damaged or half-written file is built anew. `ArgumentError` if what `build` returns has another hash.
    """
    path = cache_directory() / f"{sha256[:16]}-{name}"
    if path.is_file() and sha256_of_file(path) == sha256:
        return path
    content = build()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ArgumentError(f"corpus={name!r} is damaged (sha256 {found[:16]}); expected sha256 {sha256[:16]}")
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


def once(path: Path, expected: str, check: Callable[[], None]) -> None:
    """Call `check` unless it has passed before for this file, as large and as old as it is now, and for `expected`.

    That it has passed is an empty file in the cache directory; remove it to check again.
    """
    found = path.stat()
    state = f"{path.resolve()} {found.st_size} {found.st_mtime_ns} {found.st_ino} {expected}"
    passed = cache_directory() / f"checked-{hashlib.sha256(state.encode()).hexdigest()[:32]}"
    if not passed.exists():
        check()
        with contextlib.suppress(OSError):  # a full disk: it is checked again next time
            passed.touch()
