"""K-best search against the enumeration of all symbols."""

import oracles
import pytest
import torch

from spectralquant.codec.search import PATHS, nearest_symbols


def problem(planes: int, dim: int, count: int = 200, groups: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors [G, N, d], codebooks [G, P, d] in ascending order of length, ridges [G]."""
    book = torch.randn(groups, planes, dim) * torch.linspace(0.3, 1.0, planes)[:, None]
    book = book.gather(1, book.square().sum(-1).argsort(dim=-1)[..., None].expand_as(book))
    return (4 * torch.rand(groups, count, planes) - 2) @ book, book, torch.full((groups,), 0.02)


def error(x: torch.Tensor, book: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
    return (x - symbols @ book).square().sum(-1)


@pytest.mark.parametrize(("planes", "dim"), [(4, 4), (5, 4), (6, 4), (3, 3), (1, 2)])
def test_wide_search_finds_the_nearest_point(planes: int, dim: int) -> None:
    x, book, ridge = problem(planes, dim)
    symbols = nearest_symbols(x, book, ridge, paths=256)
    assert set(symbols.unique().tolist()) <= {-1.5, -0.5, 0.5, 1.5}
    best = oracles.nearest_point_error(x, book)
    assert error(x, book, symbols).mean() < 1.05 * best.mean()  # two nearest symbols are tried, not all four
    assert (error(x, book, symbols) >= best - 1e-4).all()


def test_default_width_is_near_the_best_and_better_than_one_path() -> None:
    x, book, ridge = problem(6, 5, count=400)
    best = oracles.nearest_point_error(x, book).mean()
    one, default = (error(x, book, nearest_symbols(x, book, ridge, paths)).mean() for paths in (1, PATHS))
    assert default < 1.05 * best and one > 1.2 * best


def test_a_codeword_is_found_exactly() -> None:
    _, book, _ = problem(4, 6)
    symbols = torch.randint(0, 4, (2, 50, 4)) - 1.5
    assert torch.equal(nearest_symbols(symbols @ book, book, torch.full((2,), 1e-6)), symbols)


def test_vectors_do_not_depend_on_each_other() -> None:
    x, book, ridge = problem(6, 5, count=1100)
    whole = nearest_symbols(x, book, ridge)
    pieces = torch.cat([nearest_symbols(piece.contiguous(), book, ridge) for piece in x.split([1, 127, 512, 460], 1)], 1)
    assert (whole != pieces).double().mean() < 1e-4  # ties that float32 rounding decides
    assert torch.equal(nearest_symbols(x, book, ridge), whole)


def test_no_vectors() -> None:
    x, book, ridge = problem(4, 4, count=0)
    assert nearest_symbols(x, book, ridge).shape == (2, 0, 4)
