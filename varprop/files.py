"""Writing files whole: under a temporary name beside the target, then renamed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from varprop.errors import ArgumentError, require


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path to write; on a clean exit it becomes `path`, on any other it is removed.

    Raises `ArgumentError` with one line if the file cannot be written (missing folder, full disk, no permission).
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        if target.exists() and not target.is_file():
            raise ArgumentError(
                f"output={str(path)!r} cannot be written (a folder or a device); expected a regular file"
            )
        target = target.resolve()  # a link stays a link
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArgumentError(f"output={str(path)!r} cannot be written ({reason}); expected a writable path") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """As `replacing`, of a folder: an older folder at `path` is removed when the new one is whole."""
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ArgumentError(f"output={str(path)!r} cannot be written (a file); expected a folder or a new name")
    workplace: Path | None = None
    try:
        target = target.resolve()
        workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        yield workplace / "new"
        if target.exists():
            target.rename(workplace / "old")
        (workplace / "new").rename(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArgumentError(f"output={str(path)!r} cannot be written ({reason}); expected a writable path") from None
    finally:
        if workplace is not None:
            shutil.rmtree(workplace, ignore_errors=True)


def require_zarr(path: str | Path) -> None:
    """`ArgumentError` unless zarr is installed."""
    found = importlib.util.find_spec("zarr") is not None
    require(found, ArgumentError, "file", str(path), "a zarr store, and zarr is not installed", "a .nc file, or zarr")


def writable(path: str) -> Path:
    """An output path of the command line, checked before any work is done; `ArgumentError` otherwise."""
    target = Path(path)
    if target.suffix == ".zarr":
        require_zarr(path)
    try:
        if target.exists() and not (target.is_file() or (target.is_dir() and target.suffix == ".zarr")):
            raise ArgumentError(f"out={path!r} is a directory or a device; expected a file")
        good = target.parent.is_dir() and os.access(target.parent, os.W_OK)
    except OSError as error:
        raise ArgumentError(f"out={path[:80]!r} cannot be written ({error.strerror}); expected a file name") from None
    if not good:
        raise ArgumentError(f"out={path!r} cannot be written; expected a path in a writable folder")
    return target


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8 whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)
