"""A decode step as a CUDA graph: one launch for the whole model instead of a thousand.

On a GPU a step of one token per sequence takes the host several times as long as the device. For the length of a `generate` call, `graphed_steps` puts
itself before the model's forward: steps that it can repeat are captured once and replayed, everything else (prefill, several tokens at once, outputs that were
asked for beside the logits) goes to the model as it is. Lengths are on the device and `Segment.append` writes where they say, so one graph serves growing
contexts. Blocks that leave the window are packed between two replays; when that moves a buffer, the step is captured anew.

Nothing depends on it: a model that can't be captured is run as it is, and the log says why, once.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectralquant.cache.hf import SpectralCache, SpectralLayer
from spectralquant.cache.segment import Segment

_STATIC = ("input_ids", "position_ids", "cache_position")
"""Tensors that change from step to step and have the same shape each time."""
_CACHES = ("past_key_values", "cache")
_ALLOWED = {*_STATIC, *_CACHES, "attention_mask", "use_cache", "return_dict", "logits_to_keep", "output_attentions", "output_hidden_states"}
_TRIES = 4
"""Steps in a row whose buffers have moved, as under beam search, after which steps run as they are."""

AHEAD = 8
"""Units of room beyond what is needed: buffers move every 1,024 tokens at most."""

_log = logging.getLogger("spectralquant")


class DecodeGraph:
    """Repeats steps of `forward` on `cache`.

    Args:
        model: Gives device and vocabulary.
        forward: The model's own forward.
        cache: Every layer coded, on an NVIDIA GPU that runs the kernels.

    Attributes:
        captures, replays: How often a step was captured and replayed.
    """

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any], cache: SpectralCache) -> None:
        self.model, self.forward, self.cache = model, forward, cache
        self.captures = self.replays = 0
        self._stream = torch.cuda.Stream(model.device)  # of its own: what a launch keeps per stream is made before the capture
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._output: Any = None
        self._seen: tuple[Any, ...] = ()  # buffers and inputs of the last step
        self._moved = 0
        self._masked: bool | None = None  # whether the mask of this call hides more than left padding
        self._off = False

    def takes(self, inputs: dict[str, Any]) -> bool:
        """Whether a forward with these arguments is a step that can be repeated."""
        ids = inputs.get("input_ids")
        if self._off or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or not self.cache.get_seq_length():
            return False
        if any(inputs.get(name) for name in ("output_attentions", "output_hidden_states")) or inputs.get("return_dict") is False:
            return False
        if any(v is not None and k not in _ALLOWED for k, v in inputs.items()):
            return False
        if self._masked is None:
            self._masked = not _only_padding(inputs.get("attention_mask"), self._segments())
        return not self._masked

    def step(self, inputs: dict[str, Any]) -> Any:
        """The model's output for one more token per sequence."""
        segments = self._segments()
        for segment in segments:
            segment.ahead = AHEAD
            segment.pack_ready()
        self._fill(inputs, segments)
        seen = (tuple(t.data_ptr() for s in segments for t in s.read()), tuple((k, t.data_ptr()) for k, t in self._inputs.items()))
        self._moved = self._moved + 1 if seen != self._seen else 0
        if seen != self._seen:
            self._graph = None
            self._seen = seen
            self._off = self._moved >= _TRIES
            return self._run_once(inputs, segments)
        if self._graph is None and not self._capture(inputs):
            return self.forward(**inputs)
        assert self._graph is not None
        self._graph.replay()
        self.replays += 1
        for segment in segments:
            segment.count_step()
        return type(self._output)(**{**self._output, "logits": self._output.logits.clone()})

    def _segments(self) -> list[Segment]:
        return [layer.segment for layer in self.cache.coded_layers if layer.segment is not None]

    def _fill(self, inputs: dict[str, Any], segments: list[Segment]) -> None:
        """The step's tensors into the buffers that the graph reads."""
        given = {name: inputs[name] for name in _STATIC if inputs.get(name) is not None}
        if "position_ids" not in given:
            position = self.cache.get_seq_length() - segments[0].start
            given["position_ids"] = position[:, None]
        if {k: v.shape for k, v in given.items()} != {k: v.shape for k, v in self._inputs.items()}:
            self._inputs = {k: v.clone() for k, v in given.items()}
        else:
            for name, value in given.items():
                self._inputs[name].copy_(value)

    def _arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, **self._inputs, "attention_mask": None}

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        layers: list[SpectralLayer] = self.cache.coded_layers
        try:
            for layer in layers:
                layer.stepping = True
            yield
        finally:
            for layer in layers:
                layer.stepping = False

    def _run_once(self, inputs: dict[str, Any], segments: list[Segment]) -> Any:
        """A step without a graph, by the same operations: libraries and tables are ready afterwards."""
        current = torch.cuda.current_stream(self.model.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), self._stepping():
            out = self.forward(**self._arguments(inputs))
        current.wait_stream(self._stream)
        for segment in segments:
            segment.count_step()
        return out

    def _capture(self, inputs: dict[str, Any]) -> bool:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream), self._stepping():
                self._output = self.forward(**self._arguments(inputs))
        except RuntimeError as error:
            self._off = True
            _log.info("decode steps of %s run without a CUDA graph: %s", type(self.model).__name__, str(error).splitlines()[0])
            return False
        self._graph = graph
        self.captures += 1
        return True


@contextmanager
def graphed_steps(model: Any, cache: SpectralCache) -> Iterator[DecodeGraph | None]:
    """For the length of a with block, decode steps of `model` on `cache` are replayed where that is possible; gives None where it never is."""
    forward = model.forward
    if not _can_graph(model, cache):
        yield None
        return
    graph = DecodeGraph(model, forward, cache)
    active = [graph]

    @wraps(forward)
    def stepped(*args: Any, **inputs: Any) -> Any:
        for mine in active:
            if not args and any(inputs.get(name) is mine.cache for name in _CACHES) and mine.takes(inputs):
                return mine.step(inputs)
        return forward(*args, **inputs)

    own = "forward" in model.__dict__
    model.forward = stepped
    try:
        yield graph
    finally:
        active.clear()  # another thread's generate may have wrapped this wrapper, which then passes everything on
        if model.__dict__.get("forward") is stepped:
            if own:
                model.forward = forward
            else:
                del model.forward


def _can_graph(model: Any, cache: SpectralCache) -> bool:
    layers: list[Any] = list(cache.layers)
    return (
        model.device.type == "cuda"
        and bool(layers)
        and all(isinstance(layer, SpectralLayer) and layer.config.cuda_graphs and layer.runs_kernels(model.device) for layer in layers)
        and {"input_ids", "position_ids"} <= signature(model.forward).parameters.keys()
        and len({p.device for p in model.parameters()}) == 1
    )


def _only_padding(mask: Any, segments: list[Segment]) -> bool:
    """Whether a mask [B, T] (1: seen) hides nothing but the left padding that the cache knows of."""
    if mask is None:
        return not any(segments[0].padding)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    start, slots = segments[0].start, torch.arange(mask.shape[1], device=mask.device)
    return len(start) == len(mask) and torch.equal(mask.bool(), slots[None] >= start.to(mask.device)[:, None])
