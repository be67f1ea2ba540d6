"""Calibration files of the original package, PATH.pt with PATH_meta.json, read into a Profile as far as they go.

They hold eigenvalues and eigenvectors of uncentred keys (after the rotary embedding) and values, and nothing else: no means, no metrics, no
rotation, no norms by which secondary attention sinks are recognised, no fingerprint of the model. So the codec runs in the plain frame without
exact mid-text tokens, and whether the file belongs to a model can only be told by its shapes. Nothing is unpickled (see `torch_archive`): no code runs.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralquant.errors import ProfileError
from spectralquant.profile import Choices, LayerProfile, Profile, SideProfile
from spectralquant.profile_format import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS
from spectralquant.torch_archive import read_tensors
from spectralquant.untrusted import listed, member, members, parse_json, read_bounded, shown, whole

MAX_META = 64 << 20
"""Bytes of a meta file; a head takes some 150."""
CHOICES = Choices(query_metric=False, output_metric=False, token_weights=False, value_shift=0.0, exact_below=0.0, exact_error=0.0, run=0, trajectory=False)
SIDES = ("key", "value")


def original_pair(path: Path) -> tuple[Path, Path]:
    """(PATH.pt, PATH_meta.json); a `.pt` suffix of `path` is taken off first."""
    stem = path.with_suffix("") if path.suffix == ".pt" else path
    return stem.with_name(stem.name + ".pt"), stem.with_name(stem.name + "_meta.json")


def load_original(path: Path) -> Profile:
    """The profile that an original pair supports, with a warning that says what it lacks.

    Raises:
        ProfileError: A file is missing or unreadable, or its tensors are not finite, incomplete, or of the wrong shape.
    """
    weights, meta = original_pair(path)
    for part in (weights, meta):
        if not part.is_file():
            raise ProfileError(f"{part} does not exist; a calibration of the original package is the pair {weights.name} and {meta.name}")
    try:
        tensors = read_tensors(weights)
        rows = [_row(row) for row in listed(parse_json(read_bounded(meta, MAX_META), meta.name), meta.name)]
    except (OSError, ValueError) as error:
        raise ProfileError(f"{weights} with {meta.name} is no readable calibration of the original package ({error}); calibrate again") from error
    places: dict[tuple[int, str], set[int]] = {}
    for layer, side, head, _ in rows:
        places.setdefault((layer, side), set()).add(head)
    layers = {layer: _layer(tensors, places, layer, weights) for layer in sorted({layer for layer, _ in places})}
    if not layers:
        raise ProfileError(f"{meta} lists no head; calibrate again")
    warnings.warn(
        f"{weights} is a calibration of the original package: it has no means, metrics, rotation or model fingerprint, so quality is far below "
        "that of a calibration made by this release; calibrate again and save it",
        stacklevel=3,
    )
    tokens = min(samples for *_, samples in rows)
    return Profile(layers, CHOICES, {}, {"tokens": tokens, "corpus": "original package"})


def _row(value: Any) -> tuple[int, str, int, int]:
    """(layer, "key" or "value", head, samples) of one head."""
    row = members(value, "a head")
    layer = whole(member(row, "layer_idx", "a head"), "layer_idx", 0, MAX_LAYERS - 1)
    head = whole(member(row, "head_idx", "a head"), "head_idx", 0, MAX_HEADS - 1)
    side = member(row, "head_type", "a head")
    if side not in SIDES:
        raise ValueError(f"head_type is {shown(side)}, expected one of {', '.join(SIDES)}")
    return layer, side, head, whole(row.get("n_samples", 0), "n_samples", 0, 1 << 62)


def _layer(tensors: Mapping[str, Tensor], places: Mapping[tuple[int, str], set[int]], layer: int, source: Path) -> LayerProfile:
    sides: list[SideProfile] = []
    for side in SIDES:
        heads = sorted(places.get((layer, side), ()))
        if not heads or heads != list(range(len(heads))):
            raise ProfileError(f"{source}: layer {layer} has {side} heads {heads}, expected 0, 1, ... without gaps; calibrate again")
        tags = [f"L{layer}_H{head}_{side}" for head in heads]
        values = [_tensor(tensors, f"{tag}_eval", 1, source) for tag in tags]
        vectors = [_tensor(tensors, f"{tag}_evec", 2, source) for tag in tags]
        dim = len(values[0])
        if any(len(v) != dim for v in values) or any(m.shape != (dim, dim) for m in vectors) or not 0 < dim <= MAX_HEAD_DIM:
            raise ProfileError(f"{source}: layer {layer} has {side} spectra of different sizes, or of none; calibrate again")
        sides.append(SideProfile(torch.zeros(len(heads), dim), torch.stack(vectors), torch.stack(values).clamp_min(1e-20)))
    if sides[0].mean.shape != sides[1].mean.shape:
        raise ProfileError(f"{source}: layer {layer} has different numbers of key and value heads; calibrate again")
    return LayerProfile(sides[0], sides[1], torch.ones(len(sides[0].mean)), peak=float("inf"))


def _tensor(tensors: Mapping[str, Tensor], name: str, dims: int, source: Path) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or tensor.dim() != dims:
        raise ProfileError(f"{source} has no {dims}-dimensional tensor {name}; calibrate again")
    values = tensor.float().contiguous()  # of float64, what float32 can't hold is not finite
    if not values.isfinite().all():
        raise ProfileError(f"{source} holds values that are not finite in {name}; calibrate again")
    return values
