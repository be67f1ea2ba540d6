"""Layers of a HuggingFace cache that are coded."""

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer

from spectralquant.cache.segment import CANDIDATES, Segment, use_kernels
from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.packed import LazyKV, plain_arithmetic, without_gradient
from spectralquant.compat import KEEPS_RECURRENT_STATES, RECURRENT_IS_CROPPABLE, STATES, LayerInterface, state_options, state_tensors
from spectralquant.config import CacheConfig
from spectralquant.errors import ConfigError
from spectralquant.stopwatch import Stopwatch

_length_of: Callable[[Segment], int] = torch.compiler.disable(lambda segment: segment.length)  # pyright: ignore  # what is compiled serves all lengths


class SpectralLayer(LayerInterface):
    """One coded layer. `update` returns the raw tensors on an empty layer (prefill attends in full precision) and LazyKV after."""

    codec: LayerCodec
    config: CacheConfig
    dtype: torch.dtype
    device: torch.device
    is_initialized: bool

    def __init__(self, codec: LayerCodec, config: CacheConfig) -> None:
        super().__init__()
        self.codec, self.config = codec, config
        self.segment: Segment | None = None
        self.padding: Tensor | None = None
        self.record_past: bool = False  # whether candidates may be refused, see `activate_past_recording`
        self.stepping = False  # whether `update` takes one token per sequence for a CUDA graph, see `Segment.append`
        self.seen: Tensor | None = None  # lengths that attention goes by in such a step, where they are not the segment's
        self.watch: Stopwatch | None = None  # of packing
        self.expected: int | None = None  # tokens that there will be at most, see `Segment`

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        batch = key_states.shape[0]
        with plain_arithmetic(key_states.device):
            start = torch.zeros(batch, dtype=torch.int64, device=key_states.device)
            if self.padding is not None:
                if batch % len(self.padding):
                    raise ConfigError(f"the cache was told of {len(self.padding)} sequences and got a batch of {batch}")
                start = self.padding.to(key_states.device).repeat_interleave(batch // len(self.padding))
            self.segment = Segment(self.codec, self.config, key_states, start)
        self.segment.candidates, self.segment.watch = CANDIDATES if self.record_past else 0, self.watch
        self.segment.expected = self.expected
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.segment is None:
            self.lazy_initialization(key_states, value_states)
        assert self.segment is not None
        if key_states.device != self.segment.records.device:
            self._follow(key_states.device)
        with plain_arithmetic(key_states.device):
            keys, values = key_states.detach(), value_states.detach()
            view = self.segment.append(keys, values, self.seen) if self.stepping else self.segment.update(keys, values)
        if view is None:
            return key_states, value_states
        key, value = without_gradient((LazyKV(view, "key"), LazyKV(view, "value")), (key_states, value_states))
        return key, value

    def _follow(self, device: torch.device) -> None:
        if device != self.device:
            raise ConfigError(f"keys are on {device} and the cache was made on {self.device}; make a new cache after moving a model")
        self.prefetch()

    def take_over(self, other: Any) -> None:
        """Encode what an uncompressed layer of the same model holds; this one is empty."""
        self.update(other.keys, other.values)

    def adopt(self, segment: Segment, config: CacheConfig) -> None:
        """Take the content of a file, and what it keeps exact; this layer is empty."""
        self.segment, self.config = segment, config
        segment.watch, segment.expected = self.watch, self.expected
        self.dtype, self.device, self.is_initialized = segment.dtype, segment.records.device, True

    def copy(self) -> "SpectralLayer":
        """An independent layer with the same content; the codec is shared."""
        other = copy(self)
        other.segment = self.segment.copy() if self.segment is not None else None
        return other

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return self.segment.tensors() if self.segment is not None else []

    def finish(self) -> None:
        """See `Segment.finish`."""
        if self.segment is not None:
            self.segment.finish()

    def expect(self, length: int | None) -> None:
        """There will be `length` tokens at most; None: not known."""
        self.expected = length
        if self.segment is not None:
            self.segment.expected = length

    def runs_kernels(self, device: torch.device) -> bool:
        """Whether attention over this layer on `device` is the fused kernel's."""
        return use_kernels(self.codec, self.config, device)

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self.segment is None else _length_of(self.segment)

    def keep(self, length: int) -> None:
        if length == 0:
            SpectralLayer.reset(self)  # what comes next may be another batch, with other padding
        if self.segment is not None:
            with plain_arithmetic(self.segment.records.device):
                self.segment.crop(length)

    def activate_past_recording(self) -> None:
        """From now on up to `CANDIDATES` tokens can be cropped after the update that brought them, as if they had never been there."""
        self.record_past = True
        if self.segment is not None:
            self.segment.candidates = CANDIDATES

    def reset(self) -> None:
        self.segment, self.padding, self.is_initialized = None, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take_rows(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take_rows(lambda t: t[indices.to(t.device)])
        if self.segment is not None:
            self.segment.drop_unused()

    def offload(self) -> None:
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        self._move(self.device)

    def _take_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        """What `fn` picks along dimension 0; packed units stay where they are, for the rows that read them."""
        if self.segment is not None:
            with plain_arithmetic(self.segment.records.device):
                self.segment.share()
                self.segment.map_rows(fn)

    def _move(self, device: torch.device) -> None:
        if self.segment is not None:
            with plain_arithmetic(self.segment.records.device):
                self.segment.to(device)


CODED: dict[type, type[SpectralLayer]] = {DynamicLayer: SpectralLayer}
"""transformers' layers that grow with the text -> ours. Sliding-window, recurrent and placeholder layers stay as they are: they are bounded."""

_OF_ATTENTION = {"codec", "config", "segment", "padding", "record_past", "stepping", "seen", "watch", "expected", "keys", "values", "is_initialized"}

if KEEPS_RECURRENT_STATES:

    class SpectralHybridLayer(SpectralLayer, cache_utils.LinearAttentionLayer):
        """A layer with attention, which is coded, and recurrent states, which are not: they don't grow."""

        supports_early_init = False
        is_croppable: Any = RECURRENT_IS_CROPPABLE

        def __init__(self, codec: LayerCodec, config: CacheConfig, **states: Any) -> None:
            cache_utils.LinearAttentionLayer.__init__(self, **states)
            SpectralLayer.__init__(self, codec, config)

        def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
            """Called by `SpectralLayer.update` with keys and values, and by the states' updates with names."""
            base = SpectralLayer if args else cache_utils.LinearAttentionLayer
            base.lazy_initialization(self, *args, **kwargs)

        def take_over(self, other: Any) -> None:
            self._set_states(vars(other))
            super().take_over(other)

        def copy(self) -> "SpectralHybridLayer":
            other = super().copy()
            assert isinstance(other, SpectralHybridLayer)
            other._set_states(vars(self))
            return other

        def tensors(self) -> list[Tensor]:
            return [*super().tensors(), *state_tensors(self)]

        def crop(self, tokens_to_remove: int) -> None:
            cache_utils.LinearAttentionLayer.crop(self, tokens_to_remove)
            super().crop(tokens_to_remove)

        def reset(self) -> None:
            cache_utils.LinearAttentionLayer.reset(self)
            super().reset()

        def _set_states(self, attributes: dict[str, Any]) -> None:
            for name in attributes.keys() - _OF_ATTENTION:
                setattr(self, name, deepcopy(attributes[name]))

        def _take_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
            super()._take_rows(fn)
            self._map_states(fn)

        def _move(self, device: torch.device) -> None:
            super()._move(device)
            self._map_states(lambda t: t.to(device))

        def _map_states(self, fn: Callable[[Tensor], Tensor]) -> None:
            for name in STATES:
                setattr(self, name, tree_map(lambda t: fn(t) if isinstance(t, Tensor) else t, getattr(self, name)))

    CODED[cache_utils.LinearAttentionAndFullAttentionLayer] = SpectralHybridLayer


def coded_layer(layer: Any, codec: LayerCodec, config: CacheConfig) -> SpectralLayer:
    """Ours in the place of transformers' `layer`, which is empty and of a type in `CODED`."""
    return CODED[type(layer)](codec, config, **state_options(layer))


@contextmanager
def all_or_nothing(layers: Iterable[Any]) -> Generator[None]:
    """For a with block that changes layers, ours or transformers': where it fails, they hold what they held. Recurrent states, which are written in place,
    don't go back."""
    before = [(vars(layer), dict(vars(layer))) for layer in layers]
    with ExitStack() as stack:
        for _, was in before:
            if isinstance(segment := was.get("segment"), Segment):
                stack.enter_context(segment.all_or_nothing())
        try:
            yield
        except BaseException:
            for now, was in before:
                now.clear()
                now.update(was)
            raise


def has_states(layer: Any) -> bool:
    """Whether a layer, ours or transformers', keeps recurrent states."""
    return any(hasattr(layer, name) for name in STATES)
