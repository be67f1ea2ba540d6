"""Seconds that a kind of work took, summed over many pieces, without making the device wait."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Sums the time of `running` blocks: on a GPU that of the work launched in them, elsewhere the host's. One inside another counts once."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._inside, self._host = device, False, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Generator[None]:
        if self._inside:
            yield
            return
        self._inside, stop = True, self._start()
        try:
            yield
        finally:
            self._inside = False
            stop()

    def seconds(self) -> float:
        """So far; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self._device)
            self._host += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
            self._events.clear()
        return self._host

    def _start(self) -> Callable[[], None]:
        """Begin a block; what it returns ends it."""
        if self._device.type != "cuda":
            began = time.perf_counter()

            def stop() -> None:
                self._host += time.perf_counter() - began

            return stop
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self._device)
        begin.record(stream)

        def record() -> None:
            end.record(stream)
            self._events.append((begin, end))

        return record
