"""Quantizers against quadrature, and the conditions that make them optimal."""

import math
from collections.abc import Callable

import oracles
import pytest
import torch
from tolerances import QUADRATURE

from spectralquant.codebook import Codebook, distortion_table, lloyd_max_codebook, uniform_codebook
from spectralquant.errors import ConfigError

MAKERS = pytest.mark.parametrize("make", [uniform_codebook, lloyd_max_codebook])
BITS = pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])


def books(bits: int) -> tuple[Codebook, Codebook]:
    return uniform_codebook(bits), lloyd_max_codebook(bits)


@MAKERS
@BITS
def test_codebook_distortion_is_the_integral(make: Callable[[int], Codebook], bits: int) -> None:
    book = make(bits)
    assert abs(book.distortion - oracles.gaussian_distortion(book.levels)) < QUADRATURE


@MAKERS
@BITS
def test_codebook_is_symmetric_and_ascending(make: Callable[[int], Codebook], bits: int) -> None:
    levels = make(bits).levels
    assert len(levels) == 2**bits and (levels.diff() > 0).all()
    torch.testing.assert_close(levels, -levels.flip(0), rtol=0, atol=1e-5)


def test_codebook_distortions_are_the_published_ones() -> None:
    """Max 1960, tables I and II: 1, 2, 3 and 4 bits."""
    for book, want in ((uniform_codebook, (0.3634, 0.1188, 0.03744, 0.01154)), (lloyd_max_codebook, (0.3634, 0.1175, 0.03454, 0.009497))):
        assert [book(b).distortion for b in (1, 2, 3, 4)] == pytest.approx(want, rel=1e-3)


@BITS
@pytest.mark.parametrize("change", [0.99, 1.01])
def test_uniform_codebook_step_is_best(bits: int, change: float) -> None:
    book = uniform_codebook(bits)
    assert oracles.gaussian_distortion(book.levels * change) > book.distortion + QUADRATURE


@BITS
def test_uniform_codebook_levels_are_linear_in_the_code(bits: int) -> None:
    book = uniform_codebook(bits)
    assert book.step is not None
    want = (torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2) * book.step
    torch.testing.assert_close(book.levels.double(), want, rtol=1e-6, atol=1e-7)


@BITS
def test_lloyd_max_codebook_levels_are_conditional_means(bits: int) -> None:
    levels = lloyd_max_codebook(bits).levels.double()
    edges = [-math.inf, *((levels[1:] + levels[:-1]) / 2).tolist(), math.inf]
    for level, low, high in zip(levels.tolist(), edges[:-1], edges[1:], strict=True):
        mass = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
        density = (math.exp(-0.5 * low * low) - math.exp(-0.5 * high * high)) / math.sqrt(2 * math.pi)
        assert abs(density / mass - level) < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_lloyd_max_codebook_beats_uniform(bits: int) -> None:
    uniform, best = books(bits)
    assert best.distortion < uniform.distortion


@MAKERS
@BITS
def test_assign_finds_the_nearest_level(make: Callable[[int], Codebook], bits: int) -> None:
    book, x = make(bits), torch.randn(3, 500) * 2
    codes = book.assign(x)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape
    nearest = (x[..., None] - book.levels).abs().min(-1).values
    torch.testing.assert_close((x - book.lookup(codes)).abs(), nearest, rtol=0, atol=1e-6)


@MAKERS
def test_assign_inverts_lookup(make: Callable[[int], Codebook]) -> None:
    codes = torch.arange(64, dtype=torch.uint8)
    assert torch.equal(make(6).assign(make(6).lookup(codes)), codes)


def test_assign_takes_views() -> None:
    x, book = torch.randn(8, 6), uniform_codebook(3)
    assert torch.equal(book.assign(x.T), book.assign(x).T)


@pytest.mark.parametrize("quantizer", ["uniform", "lloyd-max"])
def test_distortion_table_is_convex(quantizer: str) -> None:
    """What makes greedy allocation optimal: every further step of width gains less."""
    drops = torch.tensor(distortion_table((0, 2, 4, 6), quantizer), dtype=torch.float64).diff()
    assert (drops < 0).all() and (drops.diff() > 0).all()


def test_distortion_table_of_no_bits_is_the_variance() -> None:
    assert distortion_table((0, 3)) == [1.0, uniform_codebook(3).distortion]


@MAKERS
@pytest.mark.parametrize("bits", [-1, 0, 9])
def test_codebook_rejects_widths(make: Callable[[int], Codebook], bits: int) -> None:
    with pytest.raises(ConfigError, match=f"bits={bits} is out of range"):
        make(bits)


def test_distortion_table_rejects_quantizers() -> None:
    with pytest.raises(ConfigError, match="quantizer='best': expected one of 'uniform', 'lloyd-max'"):
        distortion_table((0, 2), "best")
