"""Names, types, shapes and ranges of what a calibration file holds, checked before anything is computed with it.

A checksum is no signature: who makes a file can give it the right one. So nothing is believed, neither tensors nor header. Sizes are
bounded by the file, which holds a matrix [D, D] for every head, and counts by the constants below. All errors are ValueErrors; `profile` adds the file's name.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from spectralquant.untrusted import figure, flag, listed, member, members, number, parse_json, printable, showable, shown, whole

MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM = 1024, 4096, 1024
"""Of a calibration; the largest models have some hundred layers, 128 KV heads and heads of 576."""
MAX_TURN = 1e4
"""Radians per position of a rotation."""
MAX_RUN, RUN_STEP = 4096, 128
"""Tokens of an anchored run: whole units, so that a unit has one anchor."""
MAX_WEIGHT = 1e6
"""Of a codebook's vectors, whose coordinates have unit variance."""
PLANE_STEP, PLANES_PER_COORDINATE = 16, 4
"""Planes of a codebook come in chunks of 16; a coordinate has at most 8 bits."""

SIDES, PARTS = ("key", "value"), ("mean", "basis", "variance")
PER_LAYER = ("peak", "key_error", "exact_share")
_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.((?:key|value)\.(?:mean|basis|variance)|value_norm|missing_mass|inv_freq|codebook\.([1-9][0-9]{0,4}))")


def layer_indices(names: Iterable[str]) -> list[int]:
    """The layers that tensors of these names belong to, in order."""
    found: set[int] = set()
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"there is no tensor called {shown(name)} in this format")
        found.add(int(match[1]))
    if not 0 < len(found) <= MAX_LAYERS:
        raise ValueError(f"it has {len(found)} layers, expected 1 to {MAX_LAYERS:,}")
    return sorted(found)


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless every tensor has the type, shape and values that its name promises."""
    for index in layer_indices(tensors):
        _check_layer(tensors, f"layers.{index}.")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"it holds values that are not finite in {name}")
        if name.endswith((".variance", ".value_norm")) and bool((tensor < 0).any()):
            raise ValueError(f"it holds values below zero in {name}")
        if name.endswith(".inv_freq") and bool((tensor.abs() > MAX_TURN).any()):
            raise ValueError(f"{name} has rotations of more than {MAX_TURN:g} radians per position")
        if ".codebook." in name and bool((tensor.abs() > MAX_WEIGHT).any()):
            raise ValueError(f"{name} has vectors of more than {MAX_WEIGHT:g} standard deviations")


def _check_layer(tensors: Mapping[str, Tensor], prefix: str) -> None:
    mean = _typed(tensors, f"{prefix}key.mean")
    heads, dim = mean.shape if mean.dim() == 2 else (0, 0)
    if not (0 < heads <= MAX_HEADS and 0 < dim <= MAX_HEAD_DIM):
        raise ValueError(f"{prefix}key.mean has shape {tuple(mean.shape)}, expected [H, D] with H from 1 to {MAX_HEADS:,} and D from 1 to {MAX_HEAD_DIM:,}")
    for side in SIDES:
        for part, want in zip(PARTS, ((heads, dim), (heads, dim, dim), (heads, dim)), strict=True):
            _shaped(_typed(tensors, f"{prefix}{side}.{part}"), f"{prefix}{side}.{part}", want)
    _shaped(_typed(tensors, f"{prefix}value_norm"), f"{prefix}value_norm", (heads,))
    if (name := f"{prefix}missing_mass") in tensors:
        mass = _typed(tensors, name)
        if mass.dim() != 2 or len(mass) != heads or not 0 < mass.shape[1] <= MAX_HEADS:
            raise ValueError(f"{name} has shape {tuple(mass.shape)}, expected [{heads}, query heads per KV head]")
    if (name := f"{prefix}inv_freq") in tensors:
        turns = _typed(tensors, name, torch.float64)
        if turns.dim() != 1 or not 0 < 2 * len(turns) <= dim:
            raise ValueError(f"{name} has shape {tuple(turns.shape)}, expected [R / 2] with R from 2 to {dim}")
    for name in (name for name in tensors if name.startswith(f"{prefix}codebook.")):
        _check_codebook(_typed(tensors, name), name, heads, dim)


def _check_codebook(book: Tensor, name: str, heads: int, dim: int) -> None:
    planes = int(name.rpartition(".")[2])
    if planes % PLANE_STEP or planes > PLANES_PER_COORDINATE * dim:
        raise ValueError(f"{name} is for {planes} planes, expected a multiple of {PLANE_STEP} up to {PLANES_PER_COORDINATE * dim}")
    if book.dim() != 4 or book.shape[0] != heads or book.shape[1] * book.shape[2] != planes or book.shape[1] * book.shape[3] != dim:
        raise ValueError(f"{name} has shape {tuple(book.shape)}, expected [{heads}, B, {planes} / B, {dim} / B] for some B")


def _typed(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    if tensors[name].dtype != dtype:
        raise ValueError(f"{name} has dtype {tensors[name].dtype}, expected {dtype}")
    return tensors[name]


def _shaped(tensor: Tensor, name: str, want: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != want:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {want}")


def check_choices(header: Mapping[str, str], known: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `profile.Choices` in the header, those of them that are there. `known` are the fields with their defaults, which say their types."""
    found = members(_entry(header, "choices"), "choices")
    for name, value in found.items():
        if name not in known:
            raise ValueError(f"choices has {shown(name)}, which this release doesn't know")
        if isinstance(known[name], bool):
            flag(value, name)
        elif isinstance(known[name], str):
            printable(value, name)
        elif name == "run":
            if whole(value, name, 0, MAX_RUN) % RUN_STEP:
                raise ValueError(f"run is {value}, expected a multiple of {RUN_STEP}")
        else:
            number(value, name, -8 if name == "value_shift" else 0, 8 if name == "value_shift" else 1e6)
    return found


def per_layer(header: Mapping[str, str], indices: Iterable[int]) -> dict[str, dict[int, float]]:
    """Name of each of PER_LAYER -> layer index -> its number."""
    out: dict[str, dict[int, float]] = {}
    for name in PER_LAYER:
        found, high = members(_entry(header, name), name), 1.0 if name == "exact_share" else float("inf")
        out[name] = {i: number(member(found, str(i), name), f"{name} of layer {i}", 0, high, endless=name == "peak") for i in indices}
    return out


def rotated(header: Mapping[str, str], tensors: Mapping[str, Tensor], indices: Iterable[int]) -> dict[int, bool]:
    """Layer index -> whether pairs are interleaved, of the layers with a rotation."""
    found = members(_entry(header, "interleaved"), "interleaved")
    out: dict[int, bool] = {}
    for i in indices:
        if (str(i) in found) != (f"layers.{i}.inv_freq" in tensors):
            raise ValueError(f"layers.{i}.inv_freq and 'interleaved' disagree about whether layer {i} has a rotation")
        if str(i) in found:
            out[i] = flag(found[str(i)], f"interleaved of layer {i}")
    return out


def model_of(header: Mapping[str, str]) -> dict[str, Any]:
    """The fingerprint of a model in the header."""
    found = members(showable(_entry(header, "model"), "model"), "model")
    if isinstance(found.get("modules"), list):  # of an encoder, see `integrations.encoder`
        names = [printable(name, "a module") for name in found["modules"]]
        if len(set(names)) < len(names):
            raise ValueError("modules of the model are listed twice")
    return found


def certificate_of(header: Mapping[str, str]) -> dict[str, Any]:
    """What was measured, in the header. Without "kl" it says nothing about quality, and is whatever can be shown."""
    found = members(showable(_entry(header, "certificate"), "certificate"), "certificate")
    if "tokens" in found:
        whole(found["tokens"], "tokens", 0, 1 << 62)
    if "corpus" in found:
        printable(found["corpus"], "corpus")
    if "seconds" in found:
        number(found["seconds"], "seconds", 0)
    if "kl" in found:
        number(found["kl"], "kl")
        number(member(found, "agreement", "certificate"), "agreement", 0, 1)
        printable(member(found, "preset", "certificate"), "preset")
        whole(member(found, "scored_tokens", "certificate"), "scored_tokens", 0, 1 << 62)
        for row in listed(member(found, "menu", "certificate"), "menu"):
            _check_row(members(row, "a row of the menu"))
    return found


def _check_row(row: dict[str, Any]) -> None:
    members(member(row, "changed", "a row of the menu"), "changed")
    for name in ("kl", "agreement"):  # a candidate may have failed
        figure(member(row, name, "a row of the menu"), name)
    flag(member(row, "kept", "a row of the menu"), "kept")


def _entry(header: Mapping[str, str], name: str) -> Any:
    if name not in header:
        raise ValueError(f"its header has no {name!r}")
    return parse_json(header[name], name)
