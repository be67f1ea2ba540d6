"""How much memory a generation takes, before anything is allocated.

What the cache takes follows from the format: whole units of 128 tokens, room that stores have beyond what they hold, exact tokens at the rate that calibration
saw (at most the preset's bound). What a forward pass takes besides is measured: two short prompts go through the model, and since all of its buffers grow in
proportion to the tokens that are in it at once, a line through the two tells the rest.
"""

from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from spectralquant.attention.tiles import TILE_TOKENS
from spectralquant.byte_counts import parse_bytes, told_bytes
from spectralquant.cache.exact import EARLY
from spectralquant.cache.growth import EXACT_AHEAD, grown_units
from spectralquant.cache.hf import SpectralCache, dense_layers, storage_bytes
from spectralquant.codec.codec import LayerCodec, codec_nbytes
from spectralquant.codec.layout import UNIT
from spectralquant.compat import cache_argument, last_logits
from spectralquant.config import CacheConfig
from spectralquant.decode_graph import AHEAD
from spectralquant.errors import MemoryLimitError

PROBE = (1024, 3072)
"""Tokens of the two prompts that are measured."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one generation on a device.

    Attributes:
        batch, context: Sequences, and tokens of each at the end.
        weights: The model's parameters and buffers.
        codec: Constants of the codec, shared by all caches of the model.
        packed: Records: codes and gains.
        exact: Exact tokens among them.
        window: Recent tokens.
        other: Layers that are not coded (sliding windows).
        forward: Buffers of the largest forward pass, the prompt's or a piece's; 0 where it can't be measured (not on an NVIDIA GPU).
        dense_cache: What a 16-bit cache of the same tokens takes.
    """

    batch: int
    context: int
    weights: int
    codec: int
    packed: int
    exact: int
    window: int
    other: int
    forward: int
    dense_cache: int

    @property
    def cache(self) -> int:
        """What grows with batch and context."""
        return self.packed + self.exact + self.window + self.other

    @property
    def total(self) -> int:
        """The peak that `torch.cuda.max_memory_allocated` will show."""
        return self.weights + self.codec + self.cache + self.forward

    @property
    def ratio(self) -> float:
        """16-bit cache / this one."""
        return self.dense_cache / self.cache


@dataclass(frozen=True, slots=True)
class ForwardCost:
    """Bytes of the buffers of a forward pass over a prompt: `fixed`, and `per_token` of all sequences together."""

    fixed: int
    per_token: float

    def of(self, tokens: int) -> int:
        return round(self.fixed + self.per_token * tokens)


@dataclass(frozen=True, slots=True)
class LayerSize:
    """What decides the bytes of a coded layer.

    Attributes:
        heads, dim: KV heads and their size.
        record_bytes: Of a unit of one head.
        exact_share: Of the packed tokens, that stays exact.
    """

    heads: int
    dim: int
    record_bytes: int
    exact_share: float

    @property
    def vector_bytes(self) -> int:
        """Of a token's keys, or values, in 16 bits."""
        return 2 * self.heads * self.dim


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans for one model.

    Attributes:
        weights, codec: Bytes of the model, and of the codec's constants.
        layers: Coded layers.
        sliding: Windows of the layers that are not coded.
        config: What stays exact besides.
        ahead: Units that stores have room for in advance, on devices that replay decode steps.
    """

    weights: int
    codec: int
    layers: tuple[LayerSize, ...]
    sliding: tuple[int, ...]
    config: CacheConfig
    ahead: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel, codecs: dict[int, LayerCodec], shares: dict[int, float], config: CacheConfig) -> "Planner":
        """For a calibrated model. `shares`: layer index -> share of the packed tokens that stays exact."""
        sizes = [LayerSize(c.heads, c.head_dim, c.layout.record_bytes, min(shares.get(i, 0.0), c.exact_bound)) for i, c in codecs.items()]
        ahead = AHEAD if model.device.type == "cuda" and config.cuda_graphs else 0
        return cls(weight_bytes(model), codec_nbytes(codecs.values()), tuple(sizes), sliding_windows(model, codecs), config, ahead)

    def plan(self, batch: int, prompt: int, new_tokens: int, forward: ForwardCost | None = None, piece: int | None = None) -> MemoryPlan:
        """Of one generation. `piece`: tokens of each prompt that go through the model at a time, None for all."""
        at_once = min(prompt, piece or prompt)
        buffers = 0 if forward is None else forward.of(batch * at_once)
        if buffers and at_once < prompt:  # attention of later pieces decodes a tile of the earlier ones
            buffers += 2 * self.layers[0].vector_bytes * TILE_TOKENS
        return MemoryPlan(batch, prompt + new_tokens, self.weights, self.codec, forward=buffers, **self._cache(batch, prompt, new_tokens))

    def _cache(self, batch: int, prompt: int, new_tokens: int) -> dict[str, int]:
        packed, exact, window, dense = 0, 0, 0, 0
        units, room = _units(prompt, new_tokens, self.config, self.ahead)
        for layer in self.layers:
            share, both = min(layer.exact_share, self.config.max_exact_share), 2 * layer.vector_bytes
            entries = self.config.sinks + EARLY * (share > 0) + int(share * units * UNIT) if units else 0
            entries += self.ahead * EXACT_AHEAD * (room > units and share > 0)
            packed += batch * layer.heads * room * layer.record_bytes
            exact += batch * entries * (both + 4)
            window += batch * (self.config.window + UNIT) * both
            dense += batch * (prompt + new_tokens) * both
        other = sum(batch * min(window, prompt + new_tokens) * 2 * self.layers[0].vector_bytes for window in self.sliding)
        return {"packed": packed, "exact": exact, "window": window, "other": other, "dense_cache": dense + other}


def weight_bytes(model: PreTrainedModel) -> int:
    """Of parameters and buffers; shared ones count once."""
    return storage_bytes((*model.parameters(), *model.buffers()))


def sliding_windows(model: PreTrainedModel, coded: Collection[int]) -> tuple[int, ...]:
    """Windows of the layers of `model` that are not in `coded`."""
    layers = enumerate(dense_layers(model.config))
    return tuple(int(layer.sliding_window) for i, layer in layers if i not in coded and getattr(layer, "sliding_window", None))


def _units(prompt: int, new_tokens: int, config: CacheConfig, ahead: int) -> tuple[int, int]:
    """Units packed at the end, and units that the store has room for by then: a prompt's fit, later ones make it grow as `Segment` does."""
    units = room = max(prompt - config.window, 0) // UNIT
    last = max(prompt + new_tokens - 1 - config.window, 0) // UNIT if new_tokens else units
    for need in range(units + 1, last + 1):
        if need > room:
            room = grown_units(room, need, ahead, prompt + new_tokens)
    return max(units, last), room


def measure_forward(model: PreTrainedModel, make_cache: Callable[[], SpectralCache]) -> ForwardCost:
    """The cost of a prompt in a forward pass, from two short ones. Zero where torch doesn't count memory. `make_cache()` gives an empty cache.
    Resets torch's peak statistics of the device."""
    if model.device.type != "cuda":
        return ForwardCost(0, 0.0)
    model_peaks = [_peak_beside_cache(model, make_cache(), tokens) for tokens in (PROBE[0], *PROBE)]  # what is made once is made by the first
    per_token = (model_peaks[2] - model_peaks[1]) / (PROBE[1] - PROBE[0])
    return ForwardCost(max(round(model_peaks[1] - per_token * PROBE[0]), 0), per_token)


@torch.no_grad()
def _peak_beside_cache(model: PreTrainedModel, cache: SpectralCache, tokens: int) -> int:
    ids = torch.randint(0, model.config.get_text_config(decoder=True).vocab_size, (1, tokens), device=model.device)
    torch.cuda.synchronize(model.device)
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    model(input_ids=ids, use_cache=True, **cache_argument(model, cache), **last_logits(model))
    return torch.cuda.max_memory_allocated(model.device) - before - cache.nbytes


@contextmanager
def bounded_memory(planner: Planner, rows: int, prompt: int, new_tokens: int, max_memory: int | str | None) -> Generator[None]:
    """For the length of a generation: refuse it if its cache would take more than `max_memory`, and say what was needed where the device's memory runs out.

    Raises:
        MemoryLimitError: One of the two.
        ConfigError: `max_memory` is no number of bytes.
    """
    if max_memory is not None:
        _require_room(planner, planner.plan(rows, prompt, new_tokens), parse_bytes("max_memory", max_memory), prompt)
    try:
        yield
    except torch.OutOfMemoryError as error:
        plan = planner.plan(rows, prompt, new_tokens)
        raise MemoryLimitError(
            f"the device's memory has run out: the weights take {told_bytes(plan.weights)}, a cache of {rows} x {plan.context:,} tokens "
            f"{told_bytes(plan.cache)}, the buffers of the forward pass what is beside. Use fewer sequences, shorter ones, or prefill_chunk_size=4096, so that "
            "a long prompt needs smaller buffers; engine.memory_plan(model, batch, context) tells what fits. Engine and model are as they were"
        ) from error


def _require_room(planner: Planner, plan: MemoryPlan, limit: int, prompt: int) -> None:
    if plan.cache <= limit:
        return
    batch = largest(lambda n: planner.plan(n, prompt, plan.context - prompt).cache <= limit, plan.batch)
    context = largest(lambda n: planner.plan(plan.batch, min(n, prompt), max(n - prompt, 0)).cache <= limit, plan.context)
    raise MemoryLimitError(
        f"max_memory is {told_bytes(limit)}, and a cache of {plan.batch} x {plan.context:,} tokens takes {told_bytes(plan.cache)}; "
        f"{batch} x {plan.context:,} tokens would fit, or {plan.batch} x {context:,}"
    )


def largest(fits: Callable[[int], bool], high: int) -> int:
    """The largest n in [0, high] that fits, where larger ones fit less."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
