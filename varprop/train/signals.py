"""Signals that ask a run to save its state and end: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, as schedulers send them."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """A function that says whether one of `STOP_SIGNALS` has come; they do nothing else within the context.

    A second SIGINT raises KeyboardInterrupt. Outside the main thread, where Python takes no signals, the function says
    no.

    >>> import os
    >>> with stop_on_signals() as stop_requested:
    ...     os.kill(os.getpid(), signal.SIGUSR1)
    ...     stop_requested()
    True
    """
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in came:
            raise KeyboardInterrupt
        came.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
