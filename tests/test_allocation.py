"""Water-filling against enumeration."""

import oracles
import pytest
import torch
from tolerances import FLOAT64

from spectralquant.allocation import water_fill
from spectralquant.codebook import distortion_table
from spectralquant.errors import ConfigError
from spectralquant.presets import BIT_WIDTHS

TABLE = dict(zip(BIT_WIDTHS, distortion_table(BIT_WIDTHS), strict=True))


@pytest.mark.parametrize("budget", range(0, 34, 2))
@pytest.mark.parametrize("decay", [0.0, 0.5, 3.0])
def test_water_fill_is_optimal(budget: int, decay: float) -> None:
    """As cheap as the best of all assignments that spend the budget."""
    variance = torch.rand(4, dtype=torch.float64) * torch.exp(-decay * torch.arange(4))
    cost = sum(v * TABLE[b] for v, b in zip(variance.tolist(), water_fill(variance, budget).tolist(), strict=True))
    assert cost <= oracles.cheapest_allocation(variance.tolist(), budget, TABLE) * (1 + FLOAT64)


@pytest.mark.parametrize("widths", [(0, 2, 4, 6, 8), (0, 1, 2, 3), (0, 4)])
@pytest.mark.parametrize("quantizer", ["uniform", "lloyd-max"])
def test_water_fill_spends_every_row_exactly(widths: tuple[int, ...], quantizer: str) -> None:
    variance = torch.rand(2, 3, 16)
    for budget in range(0, 16 * widths[-1] + 1, 4 * widths[1]):
        bits = water_fill(variance, budget, widths, quantizer)
        assert (bits.sum(-1) == budget).all() and set(bits.unique().tolist()) <= set(widths)


def test_water_fill_gives_more_to_larger_variances() -> None:
    variance = torch.rand(5, 32).sort(-1, descending=True).values
    assert (water_fill(variance, 90).diff(dim=-1) <= 0).all()


def test_water_fill_is_independent_of_scale_and_rows() -> None:
    variance = torch.rand(4, 32) + 0.01
    bits = water_fill(variance, 80)
    assert torch.equal(water_fill(variance * 1024, 80), bits)
    assert torch.equal(torch.stack([water_fill(row, 80) for row in variance]), bits)


def test_water_fill_grows_with_its_budget() -> None:
    variance, before = torch.rand(32), torch.zeros(32, dtype=torch.int64)
    for budget in range(0, 257, 2):
        bits = water_fill(variance, budget)
        assert (bits >= before).all()
        before = bits


def test_water_fill_serves_equal_variances_in_order() -> None:
    assert water_fill(torch.ones(6), 6).tolist() == [2, 2, 2, 0, 0, 0]
    assert water_fill(torch.zeros(4), 4).sum() == 4


@pytest.mark.parametrize("budget", [-2, 3, 34])
def test_water_fill_rejects_budgets(budget: int) -> None:
    with pytest.raises(ConfigError, match=f"budget={budget}: expected a multiple of 2 from 0 to 32 bits for 4 coordinates"):
        water_fill(torch.ones(4), budget)
