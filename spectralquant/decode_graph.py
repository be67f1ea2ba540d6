"""A decode step as a CUDA graph: one launch for the whole model instead of a thousand.

On a GPU a step of one token per sequence takes the host several times as long as the device. For the length of a `generate` call, `graphed_steps` puts
itself before the model's forward: steps that it can repeat are captured once and replayed, everything else (prefill, several tokens at once, outputs that were
asked for beside the logits) goes to the model as it is. Lengths are on the device and `Segment.append` writes where they say, so one graph serves growing
contexts.

Every 128 tokens a block leaves the window, in two more graphs that hold all layers. The first encodes it some steps early, and the number of tokens that stay
exact sets off for the host; when the block is due, that number is there, the exact store has the room it needs and no more, and the second graph moves the
block out. So the host never waits for the device. When a store grows, what uses it is captured anew.

Nothing depends on it: a model that can't be captured is run as it is, and the log says why, once.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectralquant.attention.hf import NAME
from spectralquant.cache.hf import SpectralCache
from spectralquant.cache.layers import SpectralLayer
from spectralquant.cache.segment import Segment
from spectralquant.codec.packed import plain_arithmetic
from spectralquant.compat import CACHE_ARGUMENTS

_STATIC = ("input_ids", "position_ids", "cache_position")
"""Tensors that change from step to step and have the same shape each time."""
_ALLOWED = {*_STATIC, *CACHE_ARGUMENTS, "attention_mask", "use_cache", "return_dict", "logits_to_keep", "output_attentions", "output_hidden_states"}
_TRIES = 4
"""Steps in a row whose buffers have moved, as under beam search, after which steps run as they are."""

AHEAD = 8
"""Units of room beyond what is needed: buffers move every 1,024 tokens at most."""
LEAD = 8
"""Steps between the encoding of a block and its move out of the window: by then the host has the number that came out. Not more, because the store of
codes grows at the first of the two."""

Places = tuple[tuple[int, torch.Size], ...]
"""Addresses and shapes of tensors."""

_log = logging.getLogger("spectralquant")


class CaptureError(Exception):
    """Launches can't be captured."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, what its launches returned, and where the tensors are that they use."""

    graph: torch.cuda.CUDAGraph
    output: Any
    places: Places


class Readback:
    """Integers that the device computes and the host reads some steps later, without a wait in between.

    Attributes:
        values: [n] int64 on the device.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._device = device
        self.values = torch.zeros(count, dtype=torch.int64, device=device)
        self._copy = torch.zeros(count, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._arrived = torch.cuda.Event()

    def send(self) -> None:
        """Have `values` copied to the host once everything launched so far has run."""
        self._copy.copy_(self.values, non_blocking=True)
        self._arrived.record(torch.cuda.current_stream(self._device))

    def read(self) -> list[int]:
        """What was sent last."""
        self._arrived.synchronize()
        return self._copy.tolist()


class DecodeGraph:
    """Repeats steps of `forward` on `cache`.

    Args:
        model: Gives device and vocabulary.
        forward: The model's own forward.
        cache: Every layer coded, on an NVIDIA GPU that runs the kernels.

    Attributes:
        captures, replays: How often each kind of graph was captured and replayed: "step", "encode" and "store".
    """

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any], cache: SpectralCache) -> None:
        self.model, self.forward, self.cache = model, forward, cache
        self.captures: Counter[str] = Counter()
        self.replays: Counter[str] = Counter()
        self._stream = torch.cuda.Stream(model.device)  # of its own: what a launch keeps per stream is made before the capture
        self._pool: Any = None  # memory of all graphs: they run one after another
        self._captured: dict[str, Captured] = {}
        self._ran: set[str] = set()
        self._inputs: dict[str, Tensor] = {}
        self._needs: Readback | None = None  # entries of the exact stores, once the blocks that are encoded have moved
        self._places: Places = ()  # of the last step
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
        if inputs.get("position_ids") is None and hasattr(self.model.base_model, "rope_deltas"):
            return False  # behind an image, positions do not follow from the number of tokens (M-RoPE)
        if self._masked is None:
            self._masked = not _only_padding(inputs.get("attention_mask"), self._segments())
            if self._masked:
                self._report("the attention mask hides more than left padding (a prompt may hold the pad token)")
        return not self._masked

    def step(self, inputs: dict[str, Any]) -> Any:
        """The model's output for one more token per sequence."""
        segments = self._segments()
        try:
            with plain_arithmetic(self.model.device):
                self._pack(segments)
            self._fill(inputs, segments)
            out = self._step(inputs, segments)
        except CaptureError as error:
            self._turn_off(str(error))
            return self.forward(**inputs)
        for segment in segments:
            segment.count_step()
        return type(out)(**{**out, "logits": out.logits.clone()})  # a replay writes where the last one did

    def _segments(self) -> list[Segment]:
        return [layer.segment for layer in self.cache.coded_layers if layer.segment is not None]

    def _pack(self, segments: list[Segment]) -> None:
        """Let the window's oldest block of every layer leave if it is due, and encode it if it soon will be. All layers have the same lengths."""
        for segment in segments:
            segment.ahead = AHEAD
        if segments[0].tokens_left <= 0:
            self._store_blocks(segments)
        if segments[0].tokens_left <= LEAD and segments[0].can_encode:
            self._encode_blocks(segments)

    def _store_blocks(self, segments: list[Segment]) -> None:
        if self._needs is None or not all(segment.encoded for segment in segments):
            for segment in segments:
                segment.pack_ready()
            return
        self._reserve_exact(segments, self._needs)

        def launch() -> None:
            for segment in segments:
                segment.store_block()

        self._repeat("store", launch, _places(t for segment in segments for t in segment.tensors()))
        for segment in segments:
            segment.count_block()

    def _encode_blocks(self, segments: list[Segment]) -> None:
        needs = self._needs = self._needs or Readback(len(segments), self.model.device)
        moved = [segment.reserve_unit() for segment in segments]

        def launch() -> None:
            for segment in segments:
                segment.encode_block()
            needs.values.copy_(torch.stack([segment.exact_need() for segment in segments]))

        self._repeat("encode", launch, _places(t for segment in segments for t in segment.encode_tensors()))
        needs.send()
        for segment in segments:
            segment.encoded = True
        if any(moved):  # the step is captured anew, so the host waits for once, and the exact stores move in the same step if they have to
            self._reserve_exact(segments, needs)

    def _reserve_exact(self, segments: list[Segment], needs: Readback) -> None:
        for segment, need in zip(segments, needs.read(), strict=True):
            segment.reserve_exact(need)

    def _step(self, inputs: dict[str, Any], segments: list[Segment]) -> Any:
        places = _places([*self._inputs.values(), *(t for segment in segments for t in segment.tensors())])
        settled = places == self._places  # tables that follow the size of a store are made by a step that runs as it is
        self._places, self._moved = places, 0 if settled else self._moved + 1

        def launch() -> Any:
            with self._stepping():
                return self.forward(**{**inputs, **self._inputs, "attention_mask": None})

        out = self._repeat("step", launch, places, settled)
        if self._moved >= _TRIES:
            self._turn_off("buffers move at every step, as under beam search")
        return out

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

    def _repeat(self, kind: str, launch: Callable[[], Any], places: Places, settled: bool = True) -> Any:
        """What `launch` returns: run as it is the first time, so that libraries and kernels are ready, and where it is not `settled`; then captured, and
        replayed as long as the tensors that it uses stay at `places`.

        Raises:
            CaptureError: It can't be captured. Nothing was run.
        """
        found = self._captured.get(kind)
        if found is None or found.places != places:
            if kind not in self._ran or not settled:
                self._ran.add(kind)
                return self._run(launch)
            found = self._captured[kind] = self._capture(launch, places)
            self.captures[kind] += 1
        found.graph.replay()
        self.replays[kind] += 1
        return found.output

    def _run(self, launch: Callable[[], Any]) -> Any:
        """`launch` without a graph, on the stream of the captures."""
        current = torch.cuda.current_stream(self.model.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = launch()
        current.wait_stream(self._stream)
        return out

    def _capture(self, launch: Callable[[], Any], places: Places) -> Captured:
        graph = torch.cuda.CUDAGraph()
        try:
            # A capture that fails leaves its stream the current one; the outer block restores this one.
            with torch.cuda.stream(torch.cuda.current_stream(self.model.device)), torch.cuda.graph(graph, self._pool, self._stream):
                output = launch()
        except RuntimeError as error:
            raise CaptureError(str(error).splitlines()[0]) from error
        self._pool = graph.pool()
        return Captured(graph, output, places)

    def _turn_off(self, reason: str) -> None:
        self._off = True
        self._report(reason)

    def _report(self, reason: str) -> None:
        _log.info("decode steps of %s run without a CUDA graph: %s", type(self.model).__name__, reason)


def _places(tensors: Iterable[Tensor]) -> Places:
    return tuple((t.data_ptr(), t.shape) for t in tensors)


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
            if not args and any(inputs.get(name) is mine.cache for name in CACHE_ARGUMENTS) and mine.takes(inputs):
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
        and str(model.config.get_text_config(decoder=True)._attn_implementation) == NAME  # foreign attention reads views of a step at their full length
        and all(type(layer) is SpectralLayer and layer.config.cuda_graphs and layer.runs_kernels(model.device) for layer in layers)
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
