"""The content of a whole cache as plain tensors and numbers, for files, and back. What comes back is checked: a stranger may have written it."""

from collections.abc import Callable, Collection, Mapping
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
Tensors = dict[int, dict[str, Tensor]]
Flags = dict[int, dict[str, int | None]]


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
    others: Tensors = field(default_factory=dict)
    flags: Flags = field(default_factory=dict)
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
    def of_tensors(cls, tensors: Mapping[str, Tensor], flags: Flags, dtype: torch.dtype) -> "CacheState":
        """Inverse of `tensors`.

        Raises:
            CacheFileError: Names are not those of a cache, or a layer lacks some.
        """
        segments: dict[int, dict[str, Tensor]] = {}
        others: Tensors = {}
        for name, tensor in tensors.items():
            layer, _, part = name.partition(".")
            if not (layer.isascii() and layer.isdecimal()) or len(layer) > 6:
                raise CacheFileError(f"{name!r} names no layer, expected a number, a point and a part")
            (segments if part in _SEGMENT else others).setdefault(int(layer), {})[part] = tensor
        try:
            state = cls({i: SegmentState(**parts) for i, parts in sorted(segments.items())}, others, flags, dtype)
        except TypeError as error:
            raise CacheFileError(f"a layer's tensors are incomplete: {error}") from error
        for segment in state.segments.values():
            segment.require_ranks()
        return state


def require_savable(cache: Cache, coded: Collection[int]) -> None:
    """Raise UnsupportedModelError where a layer that is not coded, not in `coded`, is of a kind whose content is not known."""
    for i, (layer, empty) in enumerate(zip(cache.layers, placeholders(cache), strict=True)):
        if not (empty or i in coded or _is_recurrent(layer) or type(layer) in _WINDOWS):
            raise UnsupportedModelError(f"layer {i} is a {type(layer).__name__}: what it keeps can't be saved")


def capture_cache(cache: Cache) -> CacheState:
    """The content of a cache with coded layers; views of its tensors.

    Raises:
        UnsupportedModelError: See `require_savable`.
    """
    held = {i: layer.segment for i, layer in enumerate(cache.layers) if isinstance(layer, SpectralLayer) and layer.segment is not None}
    others, flags = capture_others(cache, coded_indices(cache))
    return CacheState({i: capture(segment) for i, segment in held.items()}, others, flags, next(iter(held.values())).dtype)


def capture_others(cache: Cache, coded: Collection[int]) -> tuple[Tensors, Flags]:
    """What a cache holds beside the keys and values of the layers in `coded`, which may be packed or not: tensors and numbers by layer and name.

    Raises:
        UnsupportedModelError: See `require_savable`.
    """
    require_savable(cache, coded)
    others, flags = Tensors(), Flags()
    layers: list[Any] = list(cache.layers)
    for i, (layer, empty) in enumerate(zip(layers, placeholders(cache), strict=True)):
        if empty:
            continue
        if _is_recurrent(layer) or (i in coded and isinstance(layer, RECURRENT)):
            others[i] = {name: t for name, t in _flattened(layer, STATES).items() if t is not None}
            flags[i] = _flattened(layer, STATE_FLAGS)
        elif i not in coded:
            window: dict[str, Any] = vars(layer)
            others[i] = {name: window[name] for name in ("keys", "values")}
            flags[i] = {_SEEN: layer.cumulative_length} if type(layer) is DynamicSlidingWindowLayer else {}
    return others, flags


def coded_indices(cache: Cache) -> list[int]:
    """Indices of the layers that are coded."""
    return [i for i, layer in enumerate(cache.layers) if isinstance(layer, SpectralLayer)]


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
    coded = coded_indices(cache)
    if set(coded) != state.segments.keys():
        raise CacheFileError(f"layers {sorted(state.segments)} are packed, the model has {coded}")
    if len({(len(segment.start), segment.length) for segment in state.segments.values()}) != 1:
        raise CacheFileError("layers hold different numbers of sequences or tokens")
    for i in coded:
        layer: Any = cache.layers[i]
        layer.adopt(build_segment(state.segments[i], layer.codec, config, state.dtype), config)
    restore_others(cache, state.others, state.flags, (state.batch, state.length), state.dtype, device_of)


def restore_others(cache: Cache, others: Tensors, flags: Flags, size: tuple[int, int], dtype: torch.dtype, device_of: Callable[[int], torch.device]) -> None:
    """Give an empty cache what `capture_others` gave, which may come from a file.

    Args:
        cache: Where this fails it is to be thrown away.
        others, flags: By layer.
        size: Sequences, and tokens of each.
        dtype: Of the model.
        device_of: Where each layer runs.

    Raises:
        CacheFileError: It doesn't fit the cache's layers.
    """
    beyond = sorted((others.keys() | flags.keys()) - set(range(len(cache.layers))))
    if beyond:
        raise CacheFileError(f"layers {beyond} are there, the model has {len(cache.layers)}")
    for i, (layer, empty) in enumerate(zip(cache.layers, placeholders(cache), strict=True)):
        tensors, numbers = others.get(i, {}), flags.get(i, {})
        if not empty and _is_recurrent(layer):
            _restore_states(layer, i, tensors, numbers, size[0], device_of(i))
        elif not empty and type(layer) in _WINDOWS:
            shape = (size[0], *getattr(cache, "window_sizes", {}).get(i, (None, None)))
            _restore_window(layer, i, tensors, shape, size[1], dtype, device_of(i))
        elif tensors or numbers:
            raise CacheFileError(f"layer {i} has {', '.join(sorted({*tensors, *numbers}))}, of which this model's keeps nothing")


def _is_recurrent(layer: Any) -> bool:
    return isinstance(layer, RECURRENT) and not isinstance(layer, DynamicLayer)


def _restore_states(layer: Any, index: int, tensors: dict[str, Tensor], flags: dict[str, int | None], batch: int, device: torch.device) -> None:
    for name, tensor in tensors.items():
        if tensor.shape[:1] != (batch,):
            raise CacheFileError(f"{index}.{name} has shape {tuple(tensor.shape)}, expected {batch} sequences, as in others")
        held = tensor.to(device, copy=True)
        _set(layer, index, name, STATES, held)
        layer.dtype, layer.device = held.dtype, held.device
    for name, flag in flags.items():
        _set(layer, index, name, STATE_FLAGS, flag)


def _restore_window(
    layer: Any, index: int, tensors: dict[str, Tensor], shape: tuple[int | None, ...], length: int, dtype: torch.dtype, device: torch.device
) -> None:
    """`shape`: sequences, heads and head size, None where they are not known."""
    slides = isinstance(layer, DynamicSlidingWindowLayer)
    if tensors.keys() != {"keys", "values"}:
        raise CacheFileError(f"layer {index} has {', '.join(sorted(tensors)) or 'nothing'}, expected keys and values")
    keys, values = tensors["keys"], tensors["values"]
    batch, heads, dim = shape
    want = (batch, heads, min(length, layer.sliding_window - 1) if slides else length, dim)
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dim() != 4 or tensor.dtype != dtype or any(w is not None and w != got for w, got in zip(want, tensor.shape, strict=True)):
            raise CacheFileError(f"{index}.{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {want}")
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
