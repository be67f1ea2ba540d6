"""Keys and values at low rate: residuals of the predictor, rounded to steps, in as many bits as their entropy.

Coordinates are rounded to the nearest multiple of a step, and nothing is dropped: a dead zone, which mean square error would want, shrinks what attention
averages. Attention sinks, whose errors every query feels, have 1 / 32 of that step if symbols reach as far. Layers follow each other: what predicts a layer
are the decoded layers before it, so errors do not add up.

A payload is, integers little-endian:

    rate int16, tokens uint32, bytes of the next part uint32
    frame: a bit for each layer and token, in that order, the highest bit of a byte first: 1 where the step is fine
    blocks (see `archive.entropy`), one for each class that any symbol belongs to, in ascending order

The class of a symbol is how the spread of its coordinate compares with its step, in half octaves; the symbols of a class come layer by layer, K before V,
tokens with the usual step before fine ones, coordinate by coordinate, token by token. Symbols and classes are integers, so a decoder elsewhere finds the
same ones.
"""

import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectralquant.archive.entropy import MAX_SYMBOL, bytes_tensor, compress, expand, pack_symbols, split_blocks, unpack_symbols
from spectralquant.archive.lossless import payload_bytes
from spectralquant.archive.predictor import OCTAVE, ArchiveModel, LayerArchive, Layers, SideArchive
from spectralquant.errors import CacheFileError, ConfigError, ShapeError

SINKS = 4
"""First tokens with a fine step, beside secondary sinks."""
FINE = 5 * OCTAVE
SHRINK = 0.04
"""A level lies this share of a step nearer to zero than the middle of its interval: small values are more frequent."""
CLASSES, FINEST = 32, 10
"""Classes, and the one of a coordinate whose spread is one step."""
MAX_RATE = 8 * OCTAVE
_READERS = 8
_PER_CLASS = OCTAVE // 2
_HEAD = struct.Struct("<hII")

_Streams = list[list[NDArray[np.int16]]]


@torch.no_grad()
def encode_dense(model: ArchiveModel, layers: Layers, rate: int = 0, first: int = 0) -> Tensor:
    """Payload [N] uint8, on the CPU, of one sequence or a part of it.

    Args:
        model: Constants, on the device of the keys.
        layers: Keys and values of every coded layer.
        rate: Steps are 2^(rate / 8) times those of the model: 8 costs a bit less where coordinates are wide, and four times the error.
        first: Position of the first token, for keys at their rotary positions. At 0 the first tokens are attention sinks.

    Raises:
        ConfigError: `rate` is out of range, or keys or values are not finite.
        ShapeError: Layers are missing or have other shapes than the model.
    """
    if not -MAX_RATE <= rate <= MAX_RATE:
        raise ConfigError(f"rate={rate}: expected -{MAX_RATE} to {MAX_RATE}")
    tokens = _require_layers(model, layers)
    streams: _Streams = [[] for _ in range(CLASSES)]
    flags, past = list[Tensor](), list[Tensor]()
    for i, constants in model.layers.items():
        layer = constants.map(Tensor.double)  # rounded the same whatever the order in which a device sums
        keys, values = (x.double() for x in layers[i])
        if not (keys.isfinite().all() and values.isfinite().all()):
            raise ConfigError(f"layer {i} holds keys or values that are not finite; such a cache can't be archived")
        fine = layer.is_sink(values)
        fine[: max(SINKS - first, 0)] = True
        fine, symbols, seen = _code_layer(layer, (layer.turned_back(keys, first), values), _inputs(past, fine, torch.float64), fine, rate)
        flags.append(fine.cpu())
        for side, found in zip(layer.sides, symbols, strict=True):
            _append(streams, side, rate, found.short().cpu(), flags[-1])
        past = [*past, _own(seen, layer)][-model.depth :]
    bits = compress(np.packbits(torch.stack(flags).numpy()).tobytes())
    blocks = [pack_symbols(torch.from_numpy(np.concatenate(parts))) for parts in streams if parts]
    return bytes_tensor(_HEAD.pack(rate, tokens, len(bits)) + bits + b"".join(blocks))


def decode_dense(model: ArchiveModel, payload: Tensor, tokens: int, first: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(layer index, keys, values) one layer after the other, [H, T, D] float32 on the device of `model`, keys at their rotary positions.

    Args:
        model: The constants that the payload was made with.
        payload: As a file has it.
        tokens: T, as the caller has checked it: what it comes to is all that is allocated.
        first: As it was given to `encode_dense`.

    Raises:
        CacheFileError: The payload is damaged, or of another length; before the first layer is given out.
    """
    rate, flags, symbols = _read(model, payload_bytes(payload), tokens)
    return _layers(model, rate, flags, symbols, first)


def _code_layer(layer: LayerArchive, pair: tuple[Tensor, Tensor], known: Tensor, fine: Tensor, rate: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """Where the step is fine in the end, symbols [T, N] of K and V, and all that is known then. Where symbols of a fine step don't reach, it is usual."""
    symbols, seen = list[Tensor](), known
    for side, x in zip(layer.sides, pair, strict=True):
        step, predicted = _steps(side, rate, fine), seen @ side.predictor
        found = ((side.enter(x) - predicted) @ side.basis / step[:, None]).round()
        beyond = fine & (found.abs().amax(1) > MAX_SYMBOL)
        if beyond.any():
            return _code_layer(layer, pair, known, fine & ~beyond, rate)
        symbols.append(found.clamp(-MAX_SYMBOL, MAX_SYMBOL))
        seen = torch.cat([seen, predicted + _levels(symbols[-1], step) @ side.basis.mT], 1)
    return fine, symbols, seen


def _layers(model: ArchiveModel, rate: int, flags: Tensor, symbols: "_Symbols", first: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    past = list[Tensor]()
    for (i, layer), flag in zip(model.layers.items(), flags, strict=True):
        fine = flag.to(layer.value_norm.device)
        seen, found = _inputs(past, fine, torch.float32), list[Tensor]()
        for side in layer.sides:
            q = symbols.take(side, rate, flag).float()
            y = seen @ side.predictor + _levels(q, _steps(side, rate, fine)) @ side.basis.mT
            seen = torch.cat([seen, y], 1)
            found.append(side.leave(y))
        past = [*past, _own(seen, layer)][-model.depth :]
        yield i, layer.turned(found[0], first), found[1]


def _inputs(past: list[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, 1 + I]: what the K of a layer is predicted from."""
    ones = torch.ones((len(like), 1), dtype=dtype, device=like.device)
    return torch.cat([ones, *past], 1)


def _own(seen: Tensor, layer: LayerArchive) -> Tensor:
    """Of all that was known when a layer was done, the layer's own K and V."""
    return seen[:, -2 * layer.key.mean.numel() :]


def _steps(side: SideArchive, rate: int, fine: Tensor) -> Tensor:
    """[T] float64 or float32 as the side's constants are."""
    exponent = (side.step + rate - FINE * fine.long()).to(side.mean.dtype) / OCTAVE
    return exponent.exp2()


def _levels(symbols: Tensor, step: Tensor) -> Tensor:
    return (symbols - SHRINK * symbols.sign()) * step[:, None]


def _classes(side: SideArchive, rate: int, fine: bool) -> NDArray[np.int64]:
    """[N] class of every coordinate."""
    spread = side.level.numpy() - side.step - rate + FINE * fine
    return np.clip(spread // _PER_CLASS + FINEST, 0, CLASSES - 1)


def _append(streams: _Streams, side: SideArchive, rate: int, symbols: Tensor, flag: Tensor) -> None:
    """Put symbols [T, N] where they belong."""
    by_coordinate = symbols.mT.contiguous().numpy()
    for fine in (False, True):
        chosen = np.flatnonzero(flag.numpy() == fine)
        if len(chosen):
            part, classes = by_coordinate[:, chosen], _classes(side, rate, fine)
            for c in np.unique(classes):
                streams[c].append(part[classes == c].reshape(-1))


class _Symbols:
    """The symbols of all classes, taken in the order in which `_append` put them."""

    def __init__(self, streams: dict[int, Tensor]) -> None:
        self._streams, self._used = streams, dict.fromkeys(streams, 0)

    def take(self, side: SideArchive, rate: int, flag: Tensor) -> Tensor:
        """Symbols [T, N] of the next side, on the device of the streams."""
        tokens = [(~flag).nonzero()[:, 0], flag.nonzero()[:, 0]]
        parts = [self._take(_classes(side, rate, bool(fine)), len(chosen)) for fine, chosen in enumerate(tokens) if len(chosen)]
        place = torch.cat(tokens).argsort().to(parts[0].device)
        return torch.cat(parts, 1)[:, place].mT

    def _take(self, classes: NDArray[np.int64], width: int) -> Tensor:
        """[N, width]: so many symbols of every coordinate."""
        rows = list[Tensor]()
        for c, count in zip(*(x.tolist() for x in np.unique(classes, return_counts=True)), strict=True):
            first = self._used[c]
            self._used[c] = last = first + count * width
            rows.append(self._streams[c][first:last].view(count, width))
        place = torch.from_numpy(np.argsort(np.argsort(classes, kind="stable"))).to(rows[0].device)
        return torch.cat(rows)[place]


def _read(model: ArchiveModel, data: bytes, tokens: int) -> tuple[int, Tensor, _Symbols]:
    if len(data) < _HEAD.size:
        raise CacheFileError("a payload of the archive has no head; it is truncated: store the prefix again")
    rate, count, size = _HEAD.unpack(data[: _HEAD.size])
    if count != tokens or abs(rate) > MAX_RATE or _HEAD.size + size > len(data):
        raise CacheFileError(f"a payload of the archive says {count} tokens at rate {rate}, expected {tokens}; it is damaged: store the prefix again")
    bits = expand(data[_HEAD.size : _HEAD.size + size], -(-len(model.layers) * tokens // 8))
    flags = np.unpackbits(np.frombuffer(bits, np.uint8), count=len(model.layers) * tokens).reshape(-1, tokens).astype(bool)
    counts = np.zeros(CLASSES, np.int64)
    for layer, flag in zip(model.layers.values(), flags, strict=True):
        fine = int(flag.sum())
        for side in layer.sides:
            for many, is_fine in ((tokens - fine, False), (fine, True)):
                counts += many * np.bincount(_classes(side, rate, is_fine), minlength=CLASSES)
    used = np.flatnonzero(counts).tolist()
    blocks = split_blocks(data[_HEAD.size + size :], len(used))
    device = next(iter(model.layers.values())).value_norm.device
    with ThreadPoolExecutor(_READERS) as pool:  # zstandard lets go of the interpreter
        symbols = list(pool.map(unpack_symbols, blocks, [int(counts[c]) for c in used], [device] * len(used)))
    return rate, torch.from_numpy(flags), _Symbols(dict(zip(used, symbols, strict=True)))


def _require_layers(model: ArchiveModel, layers: Layers) -> int:
    """The number of tokens."""
    counts = set[int]()
    for i, layer in model.layers.items():
        if i not in layers:
            raise ShapeError(f"keys and values of layer {i} are missing; give all {len(model.layers)} layers that the model has")
        heads, dim = layer.key.mean.shape
        for x in layers[i]:
            if x.dim() != 3 or (x.shape[0], x.shape[2]) != (heads, dim):
                raise ShapeError(f"layer {i} has shape {tuple(x.shape)}, expected [{heads}, T, {dim}]: the keys or values of one sequence")
            counts.add(x.shape[1])
    if len(counts) != 1 or not min(counts):
        raise ShapeError(f"layers have {sorted(counts)} tokens, expected one number above 0")
    return counts.pop()
