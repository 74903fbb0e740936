"""Progress of long work, as log lines that people read and a display parses, and its cost. Plain code: no dagster."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

import psutil

logger = logging.getLogger("sbp_assets.progress")


class Progress:
    """Counts units of work and logs 'what: done/total unit · rate · ETA', at most once every `seconds`.

    Use as a context manager around the work and call `advance(n)`; `metadata()` gives seconds by the clock and of this
    process's processors, rate and peak memory afterwards. Peak memory is the resident set of this process and its
    children, sampled every 0.2 s.
    """

    def __init__(self, what: str, unit: str, total: int | None = None, done: int = 0, seconds: float = 2.0) -> None:
        self.what, self.unit, self.total, self.done = what, unit, total, done
        self._resumed_at = done
        self._seconds = seconds
        self._stop = threading.Event()

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        self._processor = time.process_time()
        self._peak = 0
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.wall_seconds = time.monotonic() - self._start
        self.processor_seconds = time.process_time() - self._processor
        self._stop.set()
        self._sampler.join()
        if error is None:
            self._log()

    @property
    def rate(self) -> float:
        """Return the units per second since the start, without those that an earlier run had done."""
        return (self.done - self._resumed_at) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add `count` finished units; `note` (a loss, say) is logged after the rate."""
        self.done += count
        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            self._log(note)

    def metadata(self) -> dict[str, float]:
        """Return wall_seconds, processor_seconds, {unit}_per_second and peak_memory_mb.

        They are numbers, so that Dagster plots them over time.
        """
        return {
            "wall_seconds": round(self.wall_seconds, 3),
            "processor_seconds": round(self.processor_seconds, 3),
            f"{self.unit}_per_second": round((self.done - self._resumed_at) / max(self.wall_seconds, 1e-9), 2),
            "peak_memory_mb": round(self._peak / 2**20, 1),
        }

    def _log(self, note: str = "") -> None:
        of = f"/{self.total:,}" if self.total else ""
        line = f"{self.what}: {self.done:,}{of} {self.unit} · {self.rate:,.0f} {self.unit}/s"
        if self.total and self.rate > 0 and self.done < self.total:
            left = int((self.total - self.done) / self.rate)
            line += f" · ETA {left // 60}:{left % 60:02d}"
        logger.info(line + (f" · {note}" if note else ""))

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.2):
            resident = 0
            for member in [process, *process.children(recursive=True)]:
                try:
                    resident += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self._peak = max(self._peak, resident)
