"""The content of a whole cache as plain tensors and numbers, for files, and back. What comes back is checked: a stranger may have written it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from spectralquant.cache.layers import SpectralLayer
from spectralquant.cache.segment_state import SegmentState, build_segment, capture
from spectralquant.compat import RECURRENT, STATE_FLAGS, STATES, placeholders
from spectralquant.config import CacheConfig
from spectralquant.errors import CacheFileError, UnsupportedModelError

_SEGMENT = frozenset(f.name for f in fields(SegmentState))
_SEEN = "cumulative_length"
_WINDOWS = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True, slots=True)
class CacheState:
    """What a cache holds.

    Attributes:
        segments: Layer index -> packed keys and values.
        others: Layer index -> tensors of what is not coded, by name: "keys" and "values" of a sliding window, recurrent states ("conv_states.0").
        flags: Layer index -> numbers that go with them, by name.
        dtype: Of the model.
    """

    segments: dict[int, SegmentState]
    others: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    flags: dict[int, dict[str, int | None]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(next(iter(self.segments.values())).start)

    @property
    def units(self) -> int:
        """Packed units of each sequence."""
        return next(iter(self.segments.values())).units

    @property
    def length(self) -> int:
        """Tokens of each sequence, padding included."""
        return next(iter(self.segments.values())).length

    def tensors(self) -> dict[str, Tensor]:
        """All of them, as "3.records"."""
        layers = sorted(self.segments.keys() | self.others.keys())
        held = {i: {**(self.segments[i].tensors() if i in self.segments else {}), **self.others.get(i, {})} for i in layers}
        return {f"{i}.{name}": tensor for i, parts in held.items() for name, tensor in parts.items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], flags: dict[int, dict[str, int | None]], dtype: torch.dtype) -> "CacheState":
        """Inverse of `tensors`.

        Raises:
            CacheFileError: Names are not those of a cache, or a layer lacks some.
        """
        segments: dict[int, dict[str, Tensor]] = {}
        others: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            layer, _, part = name.partition(".")
            if not (layer.isascii() and layer.isdecimal()) or len(layer) > 6:
                raise CacheFileError(f"{name!r} names no layer, expected a number, a point and a part")
            (segments if part in _SEGMENT else others).setdefault(int(layer), {})[part] = tensor
        try:
            return cls({i: SegmentState(**parts) for i, parts in sorted(segments.items())}, others, flags, dtype)
        except TypeError as error:
            raise CacheFileError(f"a layer's tensors are incomplete: {error}") from error


def require_savable(cache: Cache) -> None:
    """Raise UnsupportedModelError where a layer that is not coded is of a kind whose content is not known."""
    for i, (layer, empty) in enumerate(zip(cache.layers, placeholders(cache), strict=True)):
        if not (empty or isinstance(layer, SpectralLayer) or _is_recurrent(layer) or type(layer) in _WINDOWS):
            raise UnsupportedModelError(f"layer {i} is a {type(layer).__name__}: what it keeps can't be saved")


def capture_cache(cache: Cache) -> CacheState:
    """The content of a cache with coded layers; views of its tensors.

    Raises:
        UnsupportedModelError: See `require_savable`.
    """
    require_savable(cache)
    layers: list[Any] = list(cache.layers)
    state = CacheState({}, dtype=next(layer.segment.dtype for layer in layers if isinstance(layer, SpectralLayer) and layer.segment is not None))
    for i, (layer, empty) in enumerate(zip(layers, placeholders(cache), strict=True)):
        if empty:
            continue
        if isinstance(layer, SpectralLayer) and layer.segment is not None:
            state.segments[i] = capture(layer.segment)
        if _is_recurrent(layer):
            state.others[i] = {name: t for name, t in _flattened(layer, STATES).items() if t is not None}
            state.flags[i] = _flattened(layer, STATE_FLAGS)
        elif type(layer) in _WINDOWS:
            window: dict[str, Any] = vars(layer)
            state.others[i] = {name: window[name] for name in ("keys", "values")}
            state.flags[i] = {_SEEN: layer.cumulative_length} if type(layer) is DynamicSlidingWindowLayer else {}
    return state


def restore_cache(cache: Cache, state: CacheState, config: CacheConfig, device_of: Callable[[int], torch.device]) -> None:
    """Give an empty cache this content; packed units are not copied on a CPU.

    Args:
        cache: Of the model and calibration that the content was made with. Where this fails it is empty, or to be thrown away.
        state: Its content.
        config: What was kept exact when it was made.
        device_of: Where each layer runs.

    Raises:
        CacheFileError: It doesn't fit the cache's layers.
    """
    coded = {i for i, layer in enumerate(cache.layers) if isinstance(layer, SpectralLayer)}
    if coded != state.segments.keys():
        raise CacheFileError(f"layers {sorted(state.segments)} are packed, the model has {sorted(coded)}")
    if len({(len(segment.start), segment.length) for segment in state.segments.values()}) != 1:
        raise CacheFileError("layers hold different numbers of sequences or tokens")
    beyond = sorted((state.others.keys() | state.flags.keys()) - set(range(len(cache.layers))))
    if beyond:
        raise CacheFileError(f"layers {beyond} are there, the model has {len(cache.layers)}")
    for i, (layer, empty) in enumerate(zip(cache.layers, placeholders(cache), strict=True)):
        if isinstance(layer, SpectralLayer):
            layer.adopt(build_segment(state.segments[i], layer.codec, config, state.dtype), config)
        _restore_other(layer, i, None if empty else state, device_of)


def _is_recurrent(layer: Any) -> bool:
    return isinstance(layer, RECURRENT) and not isinstance(layer, DynamicLayer)


def _restore_other(layer: Any, index: int, state: CacheState | None, device_of: Callable[[int], torch.device]) -> None:
    """Tensors and flags of a layer that is not coded, or of a coded one's recurrent states."""
    tensors, flags = ({}, {}) if state is None else (state.others.get(index, {}), state.flags.get(index, {}))
    if state is not None and _is_recurrent(layer):
        for name, tensor in tensors.items():
            if len(tensor) != state.batch:
                raise CacheFileError(f"{index}.{name} has {len(tensor)} sequences, others {state.batch}")
            held = tensor.to(device_of(index), copy=True)
            _set(layer, index, name, STATES, held)
            layer.dtype, layer.device = held.dtype, held.device
        for name, flag in flags.items():
            _set(layer, index, name, STATE_FLAGS, flag)
    elif state is not None and type(layer) in _WINDOWS:
        _restore_window(layer, index, state, device_of(index))
    elif tensors or flags:
        raise CacheFileError(f"layer {index} has {', '.join(sorted({*tensors, *flags}))}, of which this model's keeps nothing")


def _restore_window(layer: Any, index: int, state: CacheState, device: torch.device) -> None:
    tensors, length = state.others.get(index, {}), state.length
    slides = isinstance(layer, DynamicSlidingWindowLayer)
    if tensors.keys() != {"keys", "values"}:
        raise CacheFileError(f"layer {index} has {', '.join(sorted(tensors)) or 'nothing'}, expected keys and values")
    keys, values = tensors["keys"], tensors["values"]
    held = min(length, layer.sliding_window - 1) if slides else length
    alike = keys.dim() == values.dim() == 4 and keys.shape[:3] == values.shape[:3] and keys.dtype == values.dtype
    if not alike or len(keys) != state.batch or keys.shape[2] != held or not keys.is_floating_point():
        raise CacheFileError(f"{index}.keys are {tuple(keys.shape)} and {index}.values {tuple(values.shape)}, expected [{state.batch}, H, {held}, D]")
    layer.update(keys.to(device, copy=True), values.to(device, copy=True))
    if slides:
        layer.cumulative_length = length


def _flattened(layer: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Attributes by name, entries of dicts as "name.key"."""
    out: dict[str, Any] = {}
    for name in names:
        held = getattr(layer, name, None)
        out.update({f"{name}.{key}": value for key, value in held.items()} if isinstance(held, dict) else {name: held})
    return out


def _set(layer: Any, index: int, name: str, known: tuple[str, ...], value: Any) -> None:
    """Inverse of `_flattened` for one entry. An empty layer has it already: nothing else is set."""
    base, _, key = name.partition(".")
    held = vars(layer).get(base)
    if base in known and isinstance(held, dict) and key in map(str, held):
        held[int(key)] = value
    elif base in known and not key and base in vars(layer) and not isinstance(held, dict):
        setattr(layer, base, value)
    else:
        raise CacheFileError(f"{index}.{name} is no state that this model's layer has")
