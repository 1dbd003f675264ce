"""Progress of long work: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

# Between the plain lines of an output that is no terminal: often enough to see life, rare enough for a log.
_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts work done, on standard error.

    Args:
        title: what is being done.
        total: how many units of work there are.
        unit: their name, plural.
        is_silent: in all processes but the one that speaks.

    Example:
        >>> with Progress("rendering", total=3, unit="frames") as progress:
        ...     for _ in range(3):
        ...         progress(1)
    """

    def __init__(self, title: str, total: int, unit: str = "", is_silent: bool = False) -> None:
        self._is_silent = is_silent
        self._title, self._total, self._unit = title, total, unit
        self._done = 0
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty() and not is_silent:
            self._bar = tqdm(
                total=total, desc=title, unit=f" {unit}", unit_scale=True, dynamic_ncols=True, smoothing=0.1
            )

    def __call__(self, count: int = 1, note: str = "") -> None:
        """Add `count` units to those done; `note` is shown beside them."""
        self._done += count
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
            return
        if self._is_silent:
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES and self._done < self._total:
            self._last_line = now
            self._print_line(now, note)

    def _print_line(self, now: float, note: str) -> None:
        rate = self._done / max(now - self._start, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        print(
            f"{self._title}: {self._done:,} of {self._total:,} {self._unit}, {rate:,.4g}/s, {left:.0f} s left"
            f"{', ' + note if note else ''}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and not self._is_silent:
            seconds = time.monotonic() - self._start
            print(
                f"{self._title}: {self._done:,} {self._unit} in {seconds:.1f} s", file=sys.stderr, flush=True
            )
