"""From a promise to plane counts, and from plane counts to widths per coordinate."""

import torch
from torch import Tensor

from spectralquant.allocation import water_fill
from spectralquant.codec.layout import CHUNK_PLANES
from spectralquant.codec.quantizer import SCALAR_WIDTHS
from spectralquant.config import Dials
from spectralquant.errors import ConfigError, ShapeError
from spectralquant.presets import BIT_WIDTHS, CompressionPreset
from spectralquant.profile import Profile

PROMISE_SLACK = 0.005
"""A preset's ratio may be missed by this share, never by more: planes come in groups of 16."""
GAIN_BITS = 16
"""Two 8-bit gains of a token and head."""
INDEX_BITS = 32
"""Slot number of an exact token, once a layer."""
EQUAL_SHARE = 0.2
"""Part of the exact tokens that layers share equally: other text may need them where calibration text did not."""


def plane_counts(profile: Profile, preset: CompressionPreset, dials: Dials) -> tuple[int, int]:
    """(P_K, P_V), the same for every coded layer and a multiple of 16 each.

    A packed token and head costs 2 bits a plane and two 8-bit gains; a share of `profile.exact_share` of the tokens costs 16 bits
    an element and a slot number on top, unless `choices.planes_first` leaves them what remains. The largest total that keeps
    `preset.ratio` (within `PROMISE_SLACK`) is split so that V gets `choices.value_shift` bits per element more than K, as nearly
    as groups of 16 allow.
    """
    dims = {layer.head_dim for layer in profile.layers.values()}
    if len(dims) != 1:
        raise ShapeError(f"head sizes {sorted(dims)} differ between layers; one size is needed for one record layout")
    dim = dims.pop()
    require_head_dim(dim)
    if dials.any_set:
        return _dialled_planes(profile, preset, dials, dim)
    exact = 0.0 if profile.choices.planes_first else profile.exact_share * _exact_bits(profile)
    spendable = _promised_bits(profile, preset) - GAIN_BITS - exact
    groups = int(spendable / 2 // CHUNK_PLANES)
    if groups < 2:
        raise ConfigError(f"compression={preset.name!r} leaves {groups} groups of planes for head size {dim}; at least 2 are needed")
    shift = profile.choices.value_shift * dim / 2 / CHUNK_PLANES  # groups that V has more than K
    key_groups = min(max(round((groups - shift) / 2), 1), groups - 1)
    limit = dim * BIT_WIDTHS[-1] // 2 // CHUNK_PLANES
    return min(key_groups, limit) * CHUNK_PLANES, min(groups - key_groups, limit) * CHUNK_PLANES


def exact_bounds(profile: Profile, preset: CompressionPreset, dials: Dials, planes: int) -> dict[int, float]:
    """Layer index -> largest share of its packed tokens that may stay exact beside `planes` planes in all, such that the promise holds on any text.

    The layers share what the promise leaves as they shared the exact tokens of calibration, but none goes without. Dialled sizes promise nothing.
    """
    if dials.any_set:
        return dict.fromkeys(profile.layers, 1.0)
    left = max((_promised_bits(profile, preset) - GAIN_BITS - 2 * planes) / _exact_bits(profile), 0.0)
    mean = profile.exact_share
    relative = {i: layer.exact_share / mean if mean else 1.0 for i, layer in profile.layers.items()}
    return {i: left * (EQUAL_SHARE + (1 - EQUAL_SHARE) * r) for i, r in relative.items()}


def _promised_bits(profile: Profile, preset: CompressionPreset) -> float:
    """Bits of a token and head, K and V, that keep the preset's ratio within the slack."""
    dim = next(iter(profile.layers.values())).head_dim
    return 2 * 16 * dim / preset.ratio * (1 + PROMISE_SLACK)


def _exact_bits(profile: Profile) -> float:
    """Bits that an exact token costs a head: K and V in 16 bits, and its part of the slot number."""
    layer = next(iter(profile.layers.values()))
    return 2 * 16 * layer.head_dim + INDEX_BITS / layer.heads


def require_head_dim(dim: int) -> None:
    """Raise ShapeError unless heads of size `dim` tile the tensor-core fragments."""
    if dim % 16 or not 32 <= dim <= 256:
        raise ShapeError(f"head_dim={dim} can't be tiled: the codec takes multiples of 16 from 32 to 256")


def coordinate_bits(variance: Tensor, planes: int, dials: Dials, preset: CompressionPreset, side: str, quantizer: str = "uniform") -> Tensor:
    """Widths [H, D] (int64, each row sums to 2 * planes) for spectra `variance` [H, D], descending, of `side` "key" or "value"."""
    widths = SCALAR_WIDTHS[quantizer]
    if not dials.any_set:
        return water_fill(variance, 2 * planes, widths, quantizer)
    heads, dim = variance.shape
    band = semantic_size(variance, _dial(dials.d_eff_variance, preset.d_eff_variance))
    tail_bits = tail_width(dials, preset, side)
    tail = torch.full((heads, dim - band), tail_bits, dtype=torch.int64, device=variance.device)
    head = water_fill(variance[:, :band], min(2 * planes - tail_bits * (dim - band), band * widths[-1]), widths, quantizer)
    bits = torch.cat([head, tail], -1)
    spare = 2 * planes - int(bits[0].sum())  # only when the semantic band is full: the tail takes the rest
    if spare:
        room = tuple(w for w in widths if w <= widths[-1] - tail_bits)
        bits[:, band:] += water_fill(variance[:, band:], spare, room, quantizer)
    return bits


def tail_width(dials: Dials, preset: CompressionPreset, side: str) -> int:
    """Bits of a tail coordinate of "key" or "value"."""
    if side == "key":
        return int(_dial(dials.noise_bits, preset.noise_bits))
    return int(_dial(dials.value_noise_bits, preset.value_noise_bits))


def semantic_size(variance: Tensor, share: float) -> int:
    """Coordinates that hold `share` of the variance, on average over the heads (rounded up, at least 1)."""
    kept = variance.double().cumsum(-1) / variance.double().sum(-1, keepdim=True).clamp_min(1e-30)
    return min(int((kept < share).sum(-1).add(1).double().mean().ceil()), variance.shape[-1])


def _dial(value: float | int | None, default: float | int) -> float | int:
    return default if value is None else value


def _dialled_planes(profile: Profile, preset: CompressionPreset, dials: Dials, dim: int) -> tuple[int, int]:
    share, avg = _dial(dials.d_eff_variance, preset.d_eff_variance), _dial(dials.avg_bits, preset.avg_bits)
    counts: list[int] = []
    for side in ("key", "value"):
        noise = tail_width(dials, preset, side)
        bands = [semantic_size(getattr(layer, side).variance, share) for layer in profile.layers.values()]
        bits = max(avg * band + noise * (dim - band) for band in bands)
        groups = -(-int(bits) // (2 * CHUNK_PLANES))
        counts.append(min(max(groups, 1), dim * BIT_WIDTHS[-1] // 2 // CHUNK_PLANES) * CHUNK_PLANES)
    return counts[0], counts[1]
