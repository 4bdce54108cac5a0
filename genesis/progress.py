"""A progress display: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Counts work; shows rate, time left, and whatever figures it is given."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._first = done
        self._start = time.monotonic()
        self._shown = 0.0
        self._live = sys.stderr.isatty()

    def advance(self, amount: int = 1, **figures: float | str) -> None:
        """Count `amount` more; figures (for instance `loss=0.02`) are shown beside the rate."""
        self.done += amount
        now = time.monotonic()
        if self.done < self.total and now - self._shown < (0.2 if self._live else 10.0):
            return
        self._shown = now
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        parts = [
            f"{self.title} {self.done}/{self.total} {self.unit}",
            f"{rate:.3g} {self.unit}/s",
            f"{_clock(left)} left",
        ]
        parts += [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        ]
        line = " · ".join(parts)
        print(f"\r\x1b[2K{line}" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live and self._shown:
            print(file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """`with progress("training", steps, "steps") as bar: bar.advance(loss=0.1)`."""
    bar = Progress(title, total, unit, done)
    try:
        yield bar
    finally:
        bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(min(seconds, 359999)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
