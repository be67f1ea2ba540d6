"""Promises kept, widths that add up."""

from dataclasses import replace

import pytest
import synthetic
import torch
from tolerances import FLOAT64

from spectralquant.allocation import water_fill
from spectralquant.codec.budget import PROMISE_SLACK, coordinate_bits, exact_bounds, plane_counts, require_head_dim, semantic_size
from spectralquant.codec.layout import CHUNK_PLANES, RecordLayout
from spectralquant.config import Dials
from spectralquant.errors import ConfigError, ShapeError
from spectralquant.presets import BIT_WIDTHS, PRESETS
from spectralquant.profile import Profile

SIZES = [64, 80, 96, 128, 256]
NO_DIALS = Dials()
HIGH = PRESETS["high"]


def sized(dim: int, exact_share: float = 0.0, value_shift: float = 0.25) -> Profile:
    """One layer, one head: budgets don't look at more."""
    return synthetic.profile(1, dim, (0,), exact_share=exact_share, value_shift=value_shift)


def ratio(dim: int, key_planes: int, value_planes: int, exact_share: float) -> float:
    """FP16 bytes / bytes of a token's record and its share of exact tokens, with a slot number of 4 bytes for the one head."""
    dense = 2 * 2 * dim
    return dense / (RecordLayout(key_planes, value_planes).bytes_per_token + exact_share * (dense + 4))


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("exact_share", [0.0, 0.001, 0.005, 0.01])
@pytest.mark.parametrize("dim", SIZES)
def test_plane_counts_keeps_the_promise(dim: int, exact_share: float, preset: str) -> None:
    """The ratio is missed by 0.5 % at most, and no further chunk would fit."""
    promised = PRESETS[preset].ratio
    key, value = plane_counts(sized(dim, exact_share), PRESETS[preset], NO_DIALS)
    assert key % CHUNK_PLANES == value % CHUNK_PLANES == 0
    assert ratio(dim, key, value, exact_share) >= promised / (1 + PROMISE_SLACK) * (1 - FLOAT64)
    assert ratio(dim, key, value + CHUNK_PLANES, exact_share) < promised / (1 + PROMISE_SLACK)
    assert PROMISE_SLACK <= 0.005


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("dim", SIZES)
def test_plane_counts_may_come_first(dim: int, preset: str) -> None:
    """As many planes as without exact tokens, which then share what is left of the promise."""
    profile = sized(dim, 0.01)
    profile = replace(profile, choices=replace(profile.choices, planes_first=True))
    key, value = plane_counts(profile, PRESETS[preset], NO_DIALS)
    assert (key, value) == plane_counts(sized(dim), PRESETS[preset], NO_DIALS)
    bound = exact_bounds(profile, PRESETS[preset], NO_DIALS, key + value)[0]
    assert ratio(dim, key, value, bound) == pytest.approx(PRESETS[preset].ratio / (1 + PROMISE_SLACK))


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.01, 0.001), (0.002, 0.002)])
@pytest.mark.parametrize("dim", SIZES)
def test_exact_bounds_spend_what_the_promise_leaves(dim: int, shares: tuple[float, float], preset: str) -> None:
    """Text that wants more exact tokens than calibration did gets no more than that; layers share it as they did in calibration, roughly."""
    profile = sized(dim)
    profile = replace(profile, layers={i: replace(profile.layers[0], exact_share=share) for i, share in enumerate(shares)})
    key, value = plane_counts(profile, PRESETS[preset], NO_DIALS)
    first, second = exact_bounds(profile, PRESETS[preset], NO_DIALS, key + value).values()
    assert ratio(dim, key, value, (first + second) / 2) == pytest.approx(PRESETS[preset].ratio / (1 + PROMISE_SLACK))
    assert (first + second) / 2 >= profile.exact_share and min(first, second) > 0
    assert (first > second) == (shares[0] > shares[1])


def test_exact_bounds_with_dials_leave_it_to_the_cache() -> None:
    assert exact_bounds(sized(64), HIGH, Dials(avg_bits=3), 200) == {0: 1.0}


@pytest.mark.parametrize("dim", SIZES)
def test_plane_counts_falls_with_the_promise(dim: int) -> None:
    totals = [sum(plane_counts(sized(dim), preset, NO_DIALS)) for preset in sorted(PRESETS.values(), key=lambda p: p.ratio)]
    assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]


@pytest.mark.parametrize("shift", [-0.5, 0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("dim", SIZES)
def test_plane_counts_moves_bits_to_values(dim: int, shift: float) -> None:
    """V gets `shift` bits per element more than K, to the nearest chunk: a moved chunk changes the difference by two."""
    key, value = plane_counts(sized(dim, value_shift=shift), HIGH, NO_DIALS)
    total = sum(plane_counts(sized(dim, value_shift=0.0), HIGH, NO_DIALS))
    assert key + value == total and min(key, value) >= CHUNK_PLANES
    if CHUNK_PLANES < key < total - CHUNK_PLANES:
        assert abs(2 * (value - key) / dim - shift) <= 2 * CHUNK_PLANES / dim + FLOAT64


@pytest.mark.parametrize("dim", [0, 8, 16, 40, 72, 100, 272, 512, -16])
def test_require_head_dim_rejects_sizes_that_do_not_tile(dim: int) -> None:
    with pytest.raises(ShapeError, match=f"head_dim={dim} can.t be tiled: .* multiples of 16 from 32 to 256"):
        require_head_dim(dim)


@pytest.mark.parametrize("dim", [24, 72, 272])
@pytest.mark.parametrize("dials", [NO_DIALS, Dials(avg_bits=3)])
def test_plane_counts_rejects_sizes_that_do_not_tile(dim: int, dials: Dials) -> None:
    with pytest.raises(ShapeError, match=f"head_dim={dim}"):
        plane_counts(sized(dim), HIGH, dials)


def test_plane_counts_rejects_sizes_that_differ() -> None:
    profile = sized(64)
    profile.layers[1] = sized(96).layers[0]
    with pytest.raises(ShapeError, match=r"head sizes \[64, 96\] differ"):
        plane_counts(profile, HIGH, NO_DIALS)


@pytest.mark.parametrize(("dim", "exact_share"), [(32, 0.1), (64, 0.15)])
def test_plane_counts_rejects_promises_it_cannot_keep(dim: int, exact_share: float) -> None:
    """Gains or exact tokens alone take what the promise leaves."""
    with pytest.raises(ConfigError, match="compression='high' leaves"):
        plane_counts(sized(dim, exact_share), HIGH, NO_DIALS)


@pytest.mark.parametrize("planes", [16, 64, 80, 240])
def test_coordinate_bits_is_water_filling_without_dials(planes: int) -> None:
    variance = synthetic.side(3, 64, 0.1).variance
    bits = coordinate_bits(variance, planes, NO_DIALS, HIGH, "key")
    assert torch.equal(bits, water_fill(variance, 2 * planes))
    assert (bits.sum(-1) == 2 * planes).all() and set(bits.unique().tolist()) <= set(BIT_WIDTHS)


@pytest.mark.parametrize("decay", [0.01, 0.3, 4.0])
@pytest.mark.parametrize("noise", [None, 0, 2, 4, 6, 8])
@pytest.mark.parametrize("avg", [None, 1, 3, 8])
@pytest.mark.parametrize("share", [None, 0.3, 1.0])
def test_coordinate_bits_with_dials_adds_up(decay: float, noise: int | None, avg: int | None, share: float | None) -> None:
    """Every row spends its planes, the tail has its width, or more once the band is full, and every width is one of the format's."""
    dials = Dials(avg, noise, noise, share)
    profile = synthetic.profile(2, 64, (0, 1), decay=decay)
    counts = plane_counts(profile, HIGH, dials)
    for layer in profile.layers.values():
        for name, side, planes in zip(("key", "value"), (layer.key, layer.value), counts, strict=True):
            bits = coordinate_bits(side.variance, planes, dials, HIGH, name)
            assert (bits.sum(-1) == 2 * planes).all()
            assert set(bits.unique().tolist()) <= set(BIT_WIDTHS)
            if dials.any_set:
                band, width = semantic_size(side.variance, share or HIGH.d_eff_variance), HIGH.noise_bits if noise is None else noise
                assert (bits[:, band:] >= width).all()
                assert (bits[:, band:] == width).all() or (bits[:, :band] == BIT_WIDTHS[-1]).all()


@pytest.mark.parametrize("avg", [1, 2, 3, 5, 8])
def test_plane_counts_with_dials_affords_them(avg: int) -> None:
    """Enough for the band at its mean width and the tail at its own, and less than one chunk more."""
    profile, dim = synthetic.profile(2, 64, (0,)), 64
    dials = Dials(avg_bits=avg, noise_bits=2, value_noise_bits=0)
    for planes, side, noise in zip(plane_counts(profile, HIGH, dials), (profile.layers[0].key, profile.layers[0].value), (2, 0), strict=True):
        band = semantic_size(side.variance, HIGH.d_eff_variance)
        need = avg * band + noise * (dim - band)
        assert need <= 2 * planes < need + 2 * CHUNK_PLANES


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_semantic_size_is_the_smallest_that_holds_the_share(share: float) -> None:
    variance = synthetic.side(1, 64, 0.07).variance
    size, cumulated = semantic_size(variance, share), variance[0].double().cumsum(0) / variance[0].double().sum()
    assert cumulated[size - 1] >= share
    assert size == 1 or cumulated[size - 2] < share


def test_semantic_size_of_everything_is_all() -> None:
    assert semantic_size(synthetic.side(2, 64, 0.02).variance, 1.0) == 64
    assert semantic_size(torch.zeros(2, 16), 0.5) == 16
