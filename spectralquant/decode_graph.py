"""A decode step as a CUDA graph: one launch for the whole model instead of a thousand.

On a GPU a step of one token per sequence takes the host several times as long as the device. For the length of a `generate` call, `graphed_steps` puts
itself before the model's forward: steps that it can repeat are captured once and replayed, everything else (prefill, several tokens at once, outputs that were
asked for beside the logits) goes to the model as it is. Lengths are on the device and `Segment.append` writes where they say, so one graph serves growing
contexts.

Every 128 tokens a block leaves the window, in two more graphs that hold all layers. The first encodes it some steps early, and the number of tokens that stay
exact sets off for the host; when the block is due, that number is there, the exact store has the room it needs and no more, and the second graph moves the
block out. So the host never waits for the device. When a store grows, what uses it is captured anew.

Rows whose input token ends a text are finished: attention does not read their keys and values any more.

With `CacheConfig(compile_steps=True)` torch.compile fuses the step's small operations before it is captured. Codes are written and read outside of what it
sees, so all layers of a kind and all lengths share what it compiles.

Nothing depends on it: a model that can't be captured or compiled is run as it is. The log says why, once, and so does `SpectralCache.decode_report`.
"""

import logging
from collections.abc import Callable, Generator
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
from spectralquant.cuda_graphs import CaptureError, GraphSet
from spectralquant.readback import Readback

_STATIC = ("input_ids", "position_ids", "cache_position")
"""Tensors that change from step to step and have the same shape each time."""
_ALLOWED = {*_STATIC, *CACHE_ARGUMENTS, "attention_mask", "use_cache", "return_dict", "logits_to_keep", "output_attentions", "output_hidden_states"}
_TRIES = 4
"""Steps in a row whose buffers have moved, as under beam search, after which steps run as they are."""

AHEAD = 8
"""Units of room beyond what is needed: buffers move every 1,024 tokens at most."""
_COMPILED_RUNS = 3
"""Runs of a compiled step before it is captured: the first compiles, the second what has turned out to differ from step to step."""
LEAD = 8
"""Steps between the encoding of a block and its move out of the window: by then the host has the number that came out. Not more, because the store of
codes grows at the first of the two."""

_log = logging.getLogger("spectralquant")


@dataclass(frozen=True, slots=True)
class DecodeReport:
    """How the steps of one generation ran.

    Attributes:
        mode: "CUDA graph", "compiled CUDA graph", or "as it is": the model's own forward, launch by launch.
        reason: Why not as a graph, or not compiled though that was asked for; None where nothing stands against it.
        captures, replays: Of the step's graph.
    """

    mode: str
    reason: str | None = None
    captures: int = 0
    replays: int = 0


class DecodeGraph(GraphSet):
    """Repeats steps of `forward` on `cache`, as graphs of the kinds "step", "encode" and "store".

    Args:
        model: Gives device and vocabulary.
        forward: The model's own forward.
        cache: Every layer coded, on an NVIDIA GPU that runs the kernels.
        ends: Ids of tokens behind which nothing is read of a row any more. Only for rows that keep their place: none for beam search.
    """

    model: PreTrainedModel
    forward: Callable[..., Any]
    cache: SpectralCache

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any], cache: SpectralCache, ends: tuple[int, ...] = ()) -> None:
        super().__init__(model.device)
        self.model, self.forward, self.cache = model, forward, cache
        self._compiled = compile_forward(forward) if cache.coded_layers[0].config.compile_steps else None
        self._ends = torch.tensor(ends, dtype=torch.int64, device=model.device) if ends else None
        self._seen: _SeenLengths | None = None
        self._inputs: dict[str, Tensor] = {}
        self._needs: Readback | None = None  # entries of the exact stores, once the blocks that are encoded have moved
        self._places: Any = None  # of the last step
        self._moved = 0
        self._masked: bool | None = None  # whether the mask of this call hides more than left padding
        self._off = False
        self._reason: str | None = None

    def report(self) -> DecodeReport:
        """What has happened so far."""
        mode = "as it is" if self._off or not self._ran else "CUDA graph" if self._compiled is None else "compiled CUDA graph"
        return DecodeReport(mode, self._reason, self.captures["step"], self.replays["step"])

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
            self._turn_off(str(error), logging.WARNING)
            return self.forward(**inputs)
        except BaseException:  # the device may have counted a token that the host has not
            for segment in segments:
                segment.distrust()
            raise
        for segment in segments:
            segment.count_step()
        return type(out)(**{**out, "logits": out.logits.clone()})  # a replay writes where the last one did

    def _segments(self) -> list[Segment]:
        return [layer.segment for layer in self.cache.coded_layers if layer.segment is not None]

    def _pack(self, segments: list[Segment]) -> None:
        """Let the window's oldest block of every layer leave if it is due, and encode it if it soon will be. All layers have the same lengths."""
        for segment in segments:
            segment.ahead = AHEAD
            segment.finish()
        if segments[0].tokens_left > LEAD:
            return
        with segments[0].watched():
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

        try:
            self.repeat("store", launch, _moves(segments, True))
            for segment in segments:
                segment.count_block()
        except CaptureError:
            raise
        except BaseException:  # nobody knows which windows have moved on
            self.cache.reset()
            raise

    def _encode_blocks(self, segments: list[Segment]) -> None:
        needs = self._needs = self._needs or Readback(torch.zeros(len(segments), dtype=torch.int64, device=self.model.device))
        moved = [segment.reserve_unit() for segment in segments]

        def launch() -> None:
            for segment in segments:
                segment.encode_block()
            needs.values.copy_(torch.stack([segment.exact_need() for segment in segments]))

        self.repeat("encode", launch, _moves(segments, False))
        needs.send()
        for segment in segments:
            segment.encoded = True
        if any(moved):  # the step is captured anew, so the host waits for once, and the exact stores move in the same step if they have to
            self._reserve_exact(segments, needs)

    def _reserve_exact(self, segments: list[Segment], needs: Readback) -> None:
        for segment, need in zip(segments, needs.read(), strict=True):
            segment.reserve_exact(need)

    def _step(self, inputs: dict[str, Any], segments: list[Segment]) -> Any:
        if self._ends is not None and self._seen is None:
            self._seen = _SeenLengths(self._ends, segments[0].lengths)
        places = [(name, t.data_ptr(), t.shape) for name, t in self._inputs.items()], _moves(segments, True)
        settled = places == self._places  # tables that follow the size of a store are made by a step that runs as it is
        self._places, self._moved = places, 0 if settled else self._moved + 1
        try:
            out = self.repeat("step", lambda: self._launch(inputs, segments), places, settled, _COMPILED_RUNS if self._compiled else 1)
        except Exception as error:  # of dynamo, inductor, Triton or a compiler
            if self._compiled is None or isinstance(error, CaptureError):
                raise
            self._compiled = None
            self._report(f"torch.compile raised {type(error).__name__}: {(str(error).splitlines() or ['nothing'])[0]}", "are not compiled", logging.WARNING)
            self._ran.clear()
            for segment in segments:
                segment.write_lengths()
            out = self.repeat("step", lambda: self._launch(inputs, segments), places, settled)
        if self._moved >= _TRIES:
            self._turn_off("buffers move at every step, as under beam search")
        return out

    def _launch(self, inputs: dict[str, Any], segments: list[Segment]) -> Any:
        if self._seen is not None:
            self._seen.count_step(self._inputs["input_ids"], segments[0].lengths)
        with self._stepping():
            return (self._compiled or self.forward)(**{**inputs, **self._inputs, "attention_mask": None})

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
    def _stepping(self) -> Generator[None]:
        layers: list[SpectralLayer] = self.cache.coded_layers
        try:
            for layer in layers:
                layer.stepping, layer.seen = True, None if self._seen is None else self._seen.lengths
            yield
        finally:
            for layer in layers:
                layer.stepping, layer.seen = False, None

    def _turn_off(self, reason: str, level: int = logging.INFO) -> None:
        self._off = True
        self._report(reason, level=level)

    def _report(self, reason: str, what: str = "run without a CUDA graph", level: int = logging.INFO) -> None:
        self._reason = reason
        _log.log(level, "decode steps of %s %s: %s", type(self.model).__name__, what, reason)


class _SeenLengths:
    """Lengths that attention goes by: those of the cache with a step's token, and nothing of rows that are finished.

    Attributes:
        lengths: [B, 2] int32, see `Segment.lengths`.
    """

    def __init__(self, ends: Tensor, lengths: Tensor) -> None:
        self._ends, self.lengths = ends, torch.zeros_like(lengths)
        self._token = torch.tensor([0, 1], dtype=torch.int32, device=lengths.device)
        self._running = torch.ones((len(lengths), 1), dtype=torch.int32, device=lengths.device)

    def count_step(self, ids: Tensor, before: Tensor) -> None:
        """Launches only. ids: [B, 1], the step's tokens; before: [B, 2], the cache's lengths without them."""
        self._running.mul_(torch.isin(ids, self._ends, invert=True))
        torch.mul(before + self._token, self._running, out=self.lengths)


def compile_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` by torch.compile. A layer's number is no reason to compile it again."""
    compiled = torch.compile(forward)

    def run(**inputs: Any) -> Any:
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):  # pyright: ignore[reportPrivateUsage]
            return compiled(**inputs)

    return run


@contextmanager
def graphed_steps(model: Any, cache: SpectralCache, ends: tuple[int, ...] = ()) -> Generator[DecodeGraph | None]:
    """For the length of a with block, decode steps of `model` on `cache` are replayed where that is possible; gives None where it never is. Leaves a
    `DecodeReport` in `cache.decode_report`. `ends`: see `DecodeGraph`."""
    forward, obstacle = model.forward, find_obstacle(model, cache)
    if obstacle is not None:
        cache.decode_report = DecodeReport("as it is", obstacle)
        yield None
        return
    graph = DecodeGraph(model, forward, cache, ends)
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
        cache.decode_report = graph.report()
        if model.__dict__.get("forward") is stepped:
            if own:
                model.forward = forward
            else:
                del model.forward


def find_obstacle(model: Any, cache: SpectralCache) -> str | None:
    """Why no step of `model` on `cache` can be a CUDA graph, or None."""
    layers: list[Any] = list(cache.layers)
    if model.device.type != "cuda":
        return f"the model is on {str(model.device)!r}, not on an NVIDIA GPU"
    if str(model.config.get_text_config(decoder=True)._attn_implementation) != NAME:  # it reads views of a step at their full length
        return "attention is not ours; call engine.apply_to(model) before generate"
    if not layers or not all(type(layer) is SpectralLayer for layer in layers):
        return "some layers are not coded"
    if not layers[0].config.cuda_graphs:
        return "CacheConfig(cuda_graphs=False)"
    if not all(layer.runs_kernels(model.device) for layer in layers):
        return "attention over codes is the reference's here (see `spectralquant doctor`)"
    if not {"input_ids", "position_ids"} <= signature(model.forward).parameters.keys():
        return "the model takes no position_ids"
    if len({p.device for p in model.parameters()}) > 1:
        return "the model's weights are on several devices"
    return None


def _moves(segments: list[Segment], exact: bool) -> tuple[int, ...]:
    """Other numbers when a tensor of the segments has moved, one of their exact stores included or not."""
    return tuple(n for segment in segments for n in ((segment.move, segment.exact_move) if exact else (segment.move,)))


def _only_padding(mask: Any, segments: list[Segment]) -> bool:
    """Whether a mask [B, T] (1: seen) hides nothing but the left padding that the cache knows of."""
    if mask is None:
        return not any(segments[0].padding)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    start, slots = segments[0].start, torch.arange(mask.shape[1], device=mask.device)
    return len(start) == len(mask) and torch.equal(mask.bool(), slots[None] >= start.to(mask.device)[:, None])
