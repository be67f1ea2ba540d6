"""What stands for CUDA graphs on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectralquant import decode_graph
from spectralquant.cache.segment import Segment
from spectralquant.cuda_graphs import Captured, CaptureError
from spectralquant.decode_graph import DecodeGraph

_WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default, torch.ops.aten.equal.default}
"""Operations that need a value or a size from the device, which a capture refuses."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out


class Tape:
    """Operations on tensors, recorded once and repeated on the same tensors: what Python decided stays decided, shapes, slices and numbers.

    Args:
        launch: Runs once, here; the first replay is that run.
    """

    def __init__(self, launch: Callable[[], Any]) -> None:
        recorder = _Recorder()
        with recorder:
            self.output = launch()
        self._steps, self._fresh = recorder.steps, True

    def replay(self) -> None:
        for func, args, kwargs, out in [] if self._fresh else self._steps:
            new = func(*args, **kwargs)
            for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != value.data_ptr():  # neither a view nor written in place
                    old.copy_(value)
        self._fresh = False


class Rerun:
    """Stands for the graph of a step on the CPU, where the reference reads lengths on the host: what is captured has run once, and is run again by every
    replay but the first."""

    def __init__(self, launch: Callable[[], Any]) -> None:
        self.launch, self.output, self.fresh = launch, launch(), True

    def replay(self) -> None:
        if not self.fresh:
            self.output.logits.copy_(self.launch().logits)
        self.fresh = False


class Event:
    """Stands for torch.cuda.Event."""

    def __init__(self) -> None:
        self.recorded = False

    def record(self, stream: Any) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded


class DoubledGraph(DecodeGraph):
    """Graphs of packing are tapes; those of steps are what `step_double` says."""

    step_double: type = Rerun
    _double: type = Tape

    def _step(self, inputs: dict[str, Any], segments: list[Segment]) -> Any:
        self._double = self.step_double
        try:
            return super()._step(inputs, segments)
        finally:
            self._double = Tape

    def _capture(self, launch: Callable[[], Any], places: Any) -> Captured:
        try:
            graph = self._double(launch)
        except RuntimeError as error:
            raise CaptureError(str(error)) from error
        return Captured(graph, graph.output, places)

    def _run(self, launch: Callable[[], Any]) -> Any:
        return launch()


def use_doubles(monkeypatch: pytest.MonkeyPatch, graph: type[DecodeGraph] = DoubledGraph) -> list[Any]:
    """Take steps as if there were a GPU. Returns the list that graphs go to when they are made."""
    made: list[Any] = []

    def make(*args: Any) -> DecodeGraph:
        made.append(graph(*args))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(decode_graph, "DecodeGraph", make)
    monkeypatch.setattr(decode_graph, "find_obstacle", lambda model, cache: None if cache.layers[0].config.cuda_graphs else "not asked for")
    return made
