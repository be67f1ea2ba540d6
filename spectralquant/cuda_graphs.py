"""Launches that are captured once as a CUDA graph and replayed."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


class CaptureError(Exception):
    """Launches can't be captured."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, what its launches returned, and what stood for the places of the tensors that they use."""

    graph: torch.cuda.CUDAGraph
    output: Any
    places: Any


class GraphSet:
    """Graphs of several kinds that run one after another on a device and share memory.

    Attributes:
        captures, replays: How often each kind was captured and replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captures: Counter[str] = Counter()
        self.replays: Counter[str] = Counter()
        self._stream = _stream_of_captures(device)
        self._pool: Any = None  # memory of all graphs
        self._captured: dict[str, Captured] = {}
        self._ran: Counter[str] = Counter()

    def repeat(self, kind: str, launch: Callable[[], Any], places: Any, settled: bool = True, runs: int = 1) -> Any:
        """What `launch` returns: run as it is the first times (`runs`), so that libraries and kernels are ready, and where it is not `settled`; then captured,
        and replayed as long as the tensors that it uses stay where they are. `places` stands for that: it is another value when one has moved.

        Raises:
            CaptureError: It can't be captured. Nothing was run.
        """
        found = self._captured.get(kind)
        if found is None or found.places != places:
            if self._ran[kind] < runs or not settled:
                out = self._run(launch)
                self._ran[kind] += 1
                return out
            found = self._captured[kind] = self._capture(launch, places)
            self.captures[kind] += 1
        found.graph.replay()
        self.replays[kind] += 1
        return found.output

    def _run(self, launch: Callable[[], Any]) -> Any:
        """`launch` without a graph, on the stream of the captures."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = launch()
        current.wait_stream(self._stream)
        return out

    def _capture(self, launch: Callable[[], Any], places: Any) -> Captured:
        graph = torch.cuda.CUDAGraph()
        try:
            # A capture that fails leaves its stream the current one; the outer block restores this one.
            with torch.cuda.stream(torch.cuda.current_stream(self.device)), torch.cuda.graph(graph, self._pool, self._stream):
                output = launch()
        except RuntimeError as error:
            _end_random_capture(self.device)
            raise CaptureError(str(error).splitlines()[0]) from error
        self._pool = graph.pool()
        return Captured(graph, output, places)


class _Streams(threading.local):
    """Of one thread, by device."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, torch.cuda.Stream] = {}


_streams = _Streams()


def _stream_of_captures(device: torch.device) -> torch.cuda.Stream:
    """A stream of its own for all captures of a thread: what a launch keeps per stream is made before a capture, and once. cuBLAS keeps 32 MB for each stream,
    which a new one for every call of `generate` made a gigabyte of."""
    if device not in _streams.by_device:
        _streams.by_device[device] = torch.cuda.Stream(device)
    return _streams.by_device[device]


def _end_random_capture(device: torch.device) -> None:
    """A capture that fails leaves torch's generator waiting for its end: random numbers would be errors from then on."""
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]  # pyright: ignore[reportUnnecessaryComparison]
    generator.graphsafe_set_state(generator.clone_state())
