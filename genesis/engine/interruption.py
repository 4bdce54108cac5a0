"""Signals that ask a training to stop, heeded between its steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupt_between_steps() -> Iterator[Callable[[], int]]:
    """Yield a function that tells which signal, SIGINT or SIGTERM, came, 0 for none; a second one acts at once."""
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield lambda: 0
        return
    came = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    finally:
        restore()
