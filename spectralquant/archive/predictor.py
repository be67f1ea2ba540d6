"""What an archive knows of a model beside its calibration: how the keys and values of a layer follow from those of the layers before.

A residual stream changes little from one layer to the next, and all heads of a layer, K and V alike, are projections of it. So most of what a layer
holds can be said from what two earlier ones hold. With y = (x - mean) S^1/2 over all heads of a layer, keys before the rotary embedding, S the metric of
the calibration,

    y_K = [1, y^_K(l-2), y^_V(l-2), y^_K(l-1), y^_V(l-1)] P_K + c_K U_K^T,        y_V = [..., y^_K(l)] P_V + c_V U_V^T

where y^ are decoded vectors: P is the least squares predictor from inputs that carry the noise of their codes, and U are the eigenvectors of what it leaves.
Only the coordinates c are coded. AQUA-KV (arXiv:2501.19392) predicts across layers with one layer as input, KVTC (arXiv:2511.01815) takes a transform over all
layers and heads at once; two layers as inputs save as much again on SmolLM2 as one does, and no matrix grows with the depth of the model.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralquant.errors import CacheFileError, CalibrationError, ShapeError
from spectralquant.profile import NORM_FLOOR, Profile, SideProfile, differences
from spectralquant.rope import Rotary
from spectralquant.tensor_file import FileKind, update_digest, with_suffix
from spectralquant.untrusted import listed, members, parse_json, whole

OCTAVE = 8
"""Steps of a quantizer's step, and of the spread of a coordinate, to a factor of two."""
MAX_STEP = 64 * OCTAVE
"""Of a quantizer's step in a file, either way."""
SKIPPED = 8
"""First positions of a text that the statistics leave out: attention sinks."""
SINK = 0.06
"""Tokens with |v|^2 below this share of the layer's median are secondary attention sinks."""
NOISE = 0.025
"""Noise of the codes at rate 0, as a share of the power of y: geometric mean over K and V of all layers."""
LEAST_NOISE, MOST_NOISE = 0.002, 0.5
TRUST = 0.4
"""Power of a measured sensitivity that the noise follows: 1 would be right if it were known for all text; see docs/archive.md."""
FITTED_NOISE = 0.5
"""Predictors are fitted for inputs with this share of a step's noise: where a coordinate's spread is below the step, its error is less."""
ACTIVE = (0.6, 0.9)
"""Share of the coordinates of K and V that cost bits: where more of them do, the same bits buy less."""
_FILE = FileKind("spectralquant-archive-model", 1, "archive model", "fit it again with fit_archive", CacheFileError)

Layers = Mapping[int, tuple[Tensor, Tensor]]
"""Layer index -> keys and values [H, T, D] of one sequence, keys at their rotary positions 0 .. T - 1."""


_FLOATS = {torch.float32, torch.bfloat16, torch.float16}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


@dataclass(frozen=True, slots=True)
class SideArchive:
    """K or V of one layer; N = H D, I inputs.

    Attributes:
        mean: [H, D] float32.
        whiten, unwhiten: [H, D, D] float32, S^1/2 and its inverse.
        predictor: [1 + I, N] float32, rounded to float16.
        basis: [N, N] float32, rounded to float16, U.
        level: [N] int64 on the CPU, log2 of the standard deviations of c in steps of 1 / `OCTAVE`.
        step: log2 of the quantizer's step at rate 0, in the same.
    """

    mean: Tensor
    whiten: Tensor
    unwhiten: Tensor
    predictor: Tensor
    basis: Tensor
    level: Tensor
    step: int

    def enter(self, x: Tensor) -> Tensor:
        """y [T, N] of x [H, T, D]."""
        return _enter(self.mean, self.whiten, x)

    def leave(self, y: Tensor) -> Tensor:
        """Inverse of `enter`."""
        heads, dim = self.mean.shape
        return y.unflatten(1, (heads, dim)).transpose(0, 1) @ self.unwhiten + self.mean[:, None]


@dataclass(frozen=True, slots=True)
class LayerArchive:
    """One layer: both sides, its rotation, and what recognises attention sinks (`LayerProfile.value_norm`)."""

    key: SideArchive
    value: SideArchive
    rotary: Rotary | None
    value_norm: Tensor

    @property
    def sides(self) -> tuple[SideArchive, SideArchive]:
        return self.key, self.value

    def turned_back(self, keys: Tensor, first: int = 0) -> Tensor:
        """Keys [H, T, D] of positions `first` .. as they were before the rotary embedding."""
        return _turn(self.rotary, keys, first, -1)

    def turned(self, keys: Tensor, first: int = 0) -> Tensor:
        """Inverse of `turned_back`."""
        return _turn(self.rotary, keys, first, 1)

    def is_sink(self, values: Tensor) -> Tensor:
        """[T] bool of values [H, T, D]."""
        return _is_sink(self.value_norm, values)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "LayerArchive":
        """The same with `fn` applied to every tensor that arithmetic is done with."""

        def side(s: SideArchive) -> SideArchive:
            return replace(s, mean=fn(s.mean), whiten=fn(s.whiten), unwhiten=fn(s.unwhiten), predictor=fn(s.predictor), basis=fn(s.basis))

        return replace(self, key=side(self.key), value=side(self.value), value_norm=fn(self.value_norm))


@dataclass(frozen=True, slots=True)
class ArchiveModel:
    """Constants that archives of one model are written and read with.

    Attributes:
        layers: Coded layers, by index, in order.
        depth: Layers that a layer is predicted from.
        model: Fingerprint of the model.
        digest: What archives know it by: 32 hexadecimal digits over all that decoding follows from.
    """

    layers: dict[int, LayerArchive]
    depth: int
    model: dict[str, Any]
    digest: str

    @classmethod
    def of(cls, layers: dict[int, LayerArchive], depth: int, model: dict[str, Any]) -> "ArchiveModel":
        """With its digest."""
        return cls(layers, depth, model, _digest(layers, depth))

    @property
    def nbytes(self) -> int:
        """Bytes of predictors and bases in a file; the rest of the constants is small, or follows from the calibration."""
        return sum(2 * (side.predictor.numel() + side.basis.numel()) for layer in self.layers.values() for side in layer.sides)

    def to(self, device: torch.device | str) -> "ArchiveModel":
        """The same on another device."""
        return replace(self, layers={i: layer.map(lambda t: t.to(device)) for i, layer in self.layers.items()})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a file; returns its path, with `.safetensors` added if missing. It is read together with the calibration that it was fitted with."""
        target, tensors = with_suffix(path), dict[str, Tensor]()
        for i, layer in self.layers.items():
            for name, side in zip(("key", "value"), layer.sides, strict=True):
                tensors[f"layers.{i}.{name}.predictor"] = side.predictor.half()
                tensors[f"layers.{i}.{name}.basis"] = side.basis.half()
                tensors[f"layers.{i}.{name}.level"] = side.level.short()
        steps = {i: [side.step for side in layer.sides] for i, layer in self.layers.items()}
        _FILE.write(target, tensors, {"depth": str(self.depth), "steps": json.dumps(steps), "model": json.dumps(self.model, sort_keys=True)})
        return target


def load_archive(path: str | os.PathLike[str], profile: Profile) -> ArchiveModel:
    """Read the file of `ArchiveModel.save`, with the calibration it was fitted with.

    Raises:
        CacheFileError: The file is missing, damaged, or of another model than the calibration.
    """
    target = with_suffix(path)
    tensors, header = _FILE.read(target)
    try:
        depth, steps, model = int(header["depth"]), members(parse_json(header["steps"], "steps"), "steps"), parse_json(header["model"], "model")
        if depth < 1 or differences(model, profile.model):
            raise CacheFileError(f"{target} was fitted for another model than the calibration; fit it again")
        layers: dict[int, LayerArchive] = {}
        for place, (i, layer) in enumerate(profile.layers.items()):
            known = 1 + 2 * min(place, depth) * layer.heads * layer.head_dim
            names = [(f"layers.{i}.{name}", getattr(layer, name)) for name in ("key", "value")]
            own = [whole(step, f"a step of layer {i}", -MAX_STEP, MAX_STEP) for step in listed(steps[str(i)], f"steps of layer {i}")]
            key, value = (_read_side(target, tensors, name, side, known, step) for (name, side), step in zip(names, own, strict=True))
            layers[i] = LayerArchive(key, value, layer.rotary, layer.value_norm)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, CacheFileError):
            raise
        raise CacheFileError(f"{target} is incomplete ({error}); fit it again") from error
    return ArchiveModel.of(layers, depth, model)


def _read_side(path: Path, tensors: dict[str, Tensor], name: str, side: SideProfile, inputs: int, step: int) -> SideArchive:
    size = side.mean.numel()
    inputs += size if name.endswith("value") else 0
    predictor, basis, level = (tensors[f"{name}.{part}"] for part in ("predictor", "basis", "level"))
    for part, got, want in (("predictor", predictor, (inputs, size)), ("basis", basis, (size, size)), ("level", level, (size,))):
        if tuple(got.shape) != want:
            raise CacheFileError(f"{path}: {name}.{part} has shape {tuple(got.shape)}, expected {want}; fit it again")
    if not {predictor.dtype, basis.dtype} <= _FLOATS or level.dtype not in _INTEGERS:
        raise CacheFileError(f"{path}: {name} is of {predictor.dtype}, {basis.dtype} and {level.dtype}, expected floats, floats and integers; fit it again")
    if not (predictor.isfinite().all() and basis.isfinite().all()):
        raise CacheFileError(f"{path}: {name} holds numbers that are not finite; fit it again")
    return SideArchive(side.mean, *_roots(side), predictor.float(), basis.float(), level.long(), step)


class Moments:
    """Second moments of y over the layers that meet in a predictor, from whole sequences, summed where the sequences are.

    Args:
        profile: The model's calibration.
        depth: Layers that a layer is predicted from. A layer takes (2 H D (depth + 1))^2 numbers of 8 bytes.
    """

    def __init__(self, profile: Profile, depth: int = 2) -> None:
        if depth < 1:
            raise CalibrationError(f"depth={depth}: a layer is predicted from 1 layer or more")
        self.profile, self.depth = profile, depth
        self.sums: dict[int, Tensor] = {}
        self.weight: dict[int, float] = {}
        self._roots = {i: (_roots(layer.key)[0], _roots(layer.value)[0]) for i, layer in profile.layers.items()}

    @torch.no_grad()
    def add(self, layers: Layers) -> None:
        """Take one sequence: keys and values of all coded layers."""
        before: list[tuple[Tensor, Tensor]] = []
        for i, layer in self.profile.layers.items():
            keys, values = (x.float() for x in layers[i])
            if keys.shape[::2] != (layer.heads, layer.head_dim) or keys.shape != values.shape:
                raise ShapeError(f"layer {i}: keys {tuple(keys.shape)}, values {tuple(values.shape)}, expected [{layer.heads}, T, {layer.head_dim}]")
            counts = ~_is_sink(layer.value_norm.to(keys.device), values)
            counts[:SKIPPED] = False
            sides = zip((layer.key, layer.value), self._roots[i], (_turn(layer.rotary, keys, 0, -1), values), strict=True)
            parts = [_enter(side.mean, root, x) for side, root, x in sides]
            before = [*before[-self.depth :], (torch.cat(parts, 1), counts)]
            weight = torch.stack([c for _, c in before]).all(0).float()
            stacked = torch.cat([torch.ones_like(weight)[:, None], *(y for y, _ in before)], 1)
            found = (stacked.mT @ (stacked * weight[:, None])).double()
            self.sums[i] = self.sums[i] + found if i in self.sums else found
            self.weight[i] = self.weight.get(i, 0.0) + float(weight.sum())


def fit_archive(profile: Profile, moments: Moments, sensitivity: Mapping[int, tuple[float, float]] | None = None) -> ArchiveModel:
    """Predictors, bases and steps of a model.

    Args:
        profile: The calibration that `moments` were taken with.
        moments: Of some ten thousand tokens at least.
        sensitivity: Layer index -> the KL that noise in K and in V of that layer alone makes, per unit of the power of y, as
            `cold.fit` measures it; None: all layers and both sides get noise in proportion to their power.
    """
    if not moments.sums:
        raise CalibrationError("the archive has no statistics; add sequences to the moments first")
    noise = _noise(profile, sensitivity)
    power = {i: _power(moments, i) for i in profile.layers}
    layers, order = dict[int, LayerArchive](), list(profile.layers)
    for place, (i, layer) in enumerate(profile.layers.items()):
        size = layer.heads * layer.head_dim
        together = order[max(place - moments.depth, 0) : place + 1]
        carried = [FITTED_NOISE * n * p for j in together for n, p in zip(noise[j], power[j], strict=True)]
        added = torch.cat([torch.zeros(1), torch.tensor(carried, dtype=torch.float64).repeat_interleave(size)])
        gram, sides = (moments.sums[i] / moments.weight[i]).cpu(), list[SideArchive]()
        for s, side in enumerate((layer.key, layer.value)):
            known = 1 + (2 * (len(together) - 1) + s) * size
            step = round(OCTAVE * math.log2(math.sqrt(12 * noise[i][s] * power[i][s])))
            sides.append(_fit_side(side, gram[: known + size, : known + size], added[:known], known, step))
        layers[i] = LayerArchive(sides[0], sides[1], layer.rotary, layer.value_norm)
    return ArchiveModel.of(layers, moments.depth, dict(profile.model))


def _fit_side(side: SideProfile, gram: Tensor, noise: Tensor, known: int, step: int) -> SideArchive:
    inputs = gram[:known, :known] + torch.diag(noise)
    ridge = 1e-5 * inputs.diagonal().mean()
    predictor = torch.linalg.solve(inputs + ridge * torch.eye(known, dtype=gram.dtype), gram[:known, known:]).half().double()
    cross = predictor.mT @ gram[:known, known:]
    left = gram[known:, known:] - cross - cross.mT + predictor.mT @ inputs @ predictor
    variance, vectors = torch.linalg.eigh(left)
    basis = vectors.flip(-1).half().float()
    level = (OCTAVE * 0.5 * variance.flip(-1).clamp_min(1e-20).log2()).round().long()
    return SideArchive(side.mean, *_roots(side), predictor.float(), basis, level, step)


def _noise(profile: Profile, sensitivity: Mapping[int, tuple[float, float]] | None) -> dict[int, tuple[float, float]]:
    """Layer -> noise of K and V as a share of their power."""
    felt = {i: (1.0, 1.0) if sensitivity is None else sensitivity[i] for i in profile.layers}
    least = 1e-3 * max(max(pair) for pair in felt.values())
    raw = {i: [a / max(s, least) ** TRUST for a, s in zip(ACTIVE, pair, strict=True)] for i, pair in felt.items()}
    logs = [math.log(x) for pair in raw.values() for x in pair]
    factor = NOISE / math.exp(sum(logs) / len(logs))
    bounded = {i: [min(max(factor * x, LEAST_NOISE), MOST_NOISE) for x in pair] for i, pair in raw.items()}
    return {i: (pair[0], pair[1]) for i, pair in bounded.items()}


def _power(moments: Moments, index: int) -> tuple[float, float]:
    """Mean square of K and V of y, constant mean included."""
    layer = moments.profile.layers[index]
    size = layer.heads * layer.head_dim
    squares = (moments.sums[index].diagonal() / moments.weight[index])[-2 * size :].cpu()
    return float(squares[:size].mean().clamp_min(1e-20)), float(squares[size:].mean().clamp_min(1e-20))


def _roots(side: SideProfile) -> tuple[Tensor, Tensor]:
    """S^1/2 and its inverse, [H, D, D] float32, of the metric S = A A^T."""
    basis = side.basis.double().cpu()
    values, vectors = torch.linalg.eigh(basis @ basis.mT)
    values = values.clamp_min(1e-12 * values.amax(-1, keepdim=True).clamp_min(1e-30))
    scaled = [(vectors * p[..., None, :]) @ vectors.mT for p in (values.sqrt(), values.rsqrt())]
    return scaled[0].float(), scaled[1].float()


def _digest(layers: dict[int, LayerArchive], depth: int) -> str:
    digest = hashlib.sha256(str(depth).encode())
    for i, layer in layers.items():
        for name, side in zip(("key", "value"), layer.sides, strict=True):
            digest.update(f"{i} {name} {side.step}".encode())
            for part, tensor in (("mean", side.mean), ("predictor", side.predictor.half()), ("basis", side.basis.half()), ("level", side.level)):
                update_digest(digest, part, tensor.cpu())
    return digest.hexdigest()[:32]


def _enter(mean: Tensor, root: Tensor, x: Tensor) -> Tensor:
    """y [T, N] of x [H, T, D]."""
    return ((x - mean.to(x)[:, None]) @ root.to(x)).transpose(0, 1).flatten(1)


def _turn(rotary: Rotary | None, keys: Tensor, first: int, sign: int) -> Tensor:
    if rotary is None:
        return keys
    return rotary.rotate(keys, sign * torch.arange(first, first + keys.shape[1], device=keys.device))


def _is_sink(value_norm: Tensor, values: Tensor) -> Tensor:
    """[T] bool of values [H, T, D]."""
    return (values.square().sum(-1).clamp_min(NORM_FLOOR) / value_norm[:, None]).mean(0) < SINK
