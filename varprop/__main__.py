"""Entry point of `varprop` and `python -m varprop`: bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import os
import sys
import warnings

# Threads that wait by spinning slow training down many times where a core is shared; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from varprop import cli, errors
from varprop.errors import Stopped, VarpropError

FORMAT = warnings.formatwarning


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code.

    0: done. 1: a comparison that does not agree, runs of a sweep that failed. 2: bad input. 3: a signal ended a run,
    whose state is saved.
    """
    warnings.formatwarning = _one_line
    try:
        return cli.run(sys.argv[1:] if arguments is None else arguments)
    except VarpropError as error:
        print(f"varprop: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"varprop: {error.filename or 'file'} failed ({error.strerror or error}); expected a usable file",
            file=sys.stderr,
        )
        return 2
    except MemoryError as error:
        print(f"varprop: out of memory ({error}); expected a smaller model, fewer tokens or networks", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"varprop: {stopped}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("varprop: interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = FORMAT


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Warnings of ours without the place in the code."""
    if category.__module__ != errors.__name__:
        return FORMAT(message, category, filename, lineno, line)
    return f"varprop: warning: {message}\n"


if __name__ == "__main__":
    sys.exit(main())
