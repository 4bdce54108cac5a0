"""A progress display: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

PLAIN_SECONDS = 10.0  # between two plain lines


class Progress:
    """Counts work; shows rate, time left, and whatever figures it is given, on standard error."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0, shown: bool = True) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._first = done
        self._started = self._printed = time.monotonic()
        self._console = Console(stderr=True, quiet=not shown)
        self._bar: Bar | None = None
        if self._console.is_terminal and shown:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[line]}"))
            self._bar = Bar(*columns, console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task(title, total=total, completed=done, line="")
            self._bar.start()

    def advance(self, amount: int = 1, /, **figures: float | str) -> None:
        """Count `amount` more; figures (for instance `loss=0.02`) are shown beside the rate."""
        self.done += amount
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, line=self._line(now, figures))
        elif self.done >= self.total or now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            self._console.out(f"{self.title} {self._line(now, figures)}", highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, now: float, figures: dict[str, float | str]) -> str:
        rate = (self.done - self._first) / max(now - self._started, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        parts = [f"{self.done}/{self.total} {self.unit}", f"{rate:.3g} {self.unit}/s", f"{_clock(left)} left"]
        for name, value in figures.items():
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        return " · ".join(parts)


@contextmanager
def progress(title: str, total: int, unit: str, done: int = 0, shown: bool = True) -> Iterator[Progress]:
    """`with progress("training", steps, "steps") as bar: bar.advance(loss=0.1)`; `done` of `total` are done already."""
    bar = Progress(title, total, unit, done, shown)
    try:
        yield bar
    finally:
        bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(min(seconds, 359999)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
