"""Rotations against complex numbers."""

import oracles
import pytest
import synthetic
import torch
from tolerances import FLOAT64

from spectralquant.rope import Rotary

DIM = 16


@pytest.fixture(params=[(pairs, interleaved) for pairs in (8, 5) for interleaved in (False, True)], ids=lambda p: f"{p[0]}-pairs-{'gptj' if p[1] else 'neox'}")
def rotary(request: pytest.FixtureRequest) -> Rotary:
    """Whole and partial rotations in both layouts."""
    pairs, interleaved = request.param
    return Rotary(synthetic.inv_freq(pairs), interleaved)


def vectors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("position", [-70_000, -3, 0, 1, 131_072])
def test_rotate_multiplies_complex_numbers(rotary: Rotary, position: int) -> None:
    x = vectors(3, 2)
    close(rotary.rotate(x, torch.tensor(position)), oracles.rotated(x, rotary.inv_freq, position, rotary.interleaved))


def test_rotate_adds_positions(rotary: Rotary) -> None:
    x, a, b = vectors(20), torch.randint(-5000, 5000, (20,)), torch.randint(-5000, 5000, (20,))
    close(rotary.rotate(rotary.rotate(x, a), b), rotary.rotate(x, a + b))
    close(rotary.rotate(rotary.rotate(x, a), -a), x)


def test_rotate_keeps_products(rotary: Rotary) -> None:
    """R(-p) = R(p)^T, and products depend on the distance only."""
    x, y, p = vectors(20), vectors(20), torch.arange(20) * 7
    close((rotary.rotate(x, p) * y).sum(-1), (x * rotary.rotate(y, -p)).sum(-1))
    close((rotary.rotate(x, p + 100) * rotary.rotate(y, p + 60)).sum(-1), (rotary.rotate(x, torch.tensor(40)) * y).sum(-1))


def test_rotate_leaves_other_coordinates(rotary: Rotary) -> None:
    x = vectors(4)
    assert torch.equal(rotary.rotate(x, torch.arange(4))[:, rotary.dim :], x[:, rotary.dim :])


def test_rotate_broadcasts_positions(rotary: Rotary) -> None:
    x, positions = vectors(2, 3, 5), torch.randint(0, 100, (2, 1, 5))
    got = rotary.rotate(x, positions)
    for b in range(2):
        for t in range(5):
            close(got[b, :, t], oracles.rotated(x[b, :, t], rotary.inv_freq, int(positions[b, 0, t]), rotary.interleaved))


def test_rotate_keeps_float32_angles_sharp(rotary: Rotary) -> None:
    """At position 131,071 float32 angles would be off by up to 0.008."""
    x = vectors(50)
    want = oracles.rotated(x, rotary.inv_freq, 131_071, rotary.interleaved)
    got = rotary.rotate(x.float(), torch.tensor(131_071))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6)


def test_rotate_broadcasts_vectors_against_positions(rotary: Rotary) -> None:
    """One vector at many positions. Coordinates that do not turn were not repeated: partial rotary embeddings failed with a trajectory mean."""
    x, positions = vectors(1), torch.arange(5)
    close(rotary.rotate(x, positions), torch.cat([rotary.rotate(x, p[None]) for p in positions]))


def test_partner_is_a_quarter_turn(rotary: Rotary) -> None:
    x = vectors(4)[:, : rotary.dim]
    quarter = Rotary(torch.full_like(rotary.inv_freq, torch.pi / 2), rotary.interleaved)
    close(rotary.partner(x), quarter.rotate(x, torch.tensor(1)))
    assert torch.equal(rotary.partner(rotary.partner(x)), -x)


def test_average_rotated_is_the_mean_of_rotated_moments(rotary: Rotary) -> None:
    """M need not be symmetric for the identity, but second moments of samples are what it is for."""
    x, positions = vectors(2, 30), torch.tensor([0, 1, 5, 17, 1000])
    moment = x.mT @ x / 30
    want = torch.zeros_like(moment)
    for p in positions.tolist():
        turned = oracles.rotated(x, rotary.inv_freq, p, rotary.interleaved)
        want += turned.mT @ turned / 30 / len(positions)
    got = rotary.average_rotated(moment, positions)
    close(got, want)
    close(got.diagonal(dim1=-2, dim2=-1).sum(-1), moment.diagonal(dim1=-2, dim2=-1).sum(-1))


def test_average_rotated_at_zero_changes_nothing(rotary: Rotary) -> None:
    moment = torch.randn(DIM, DIM, dtype=torch.float64)
    close(rotary.average_rotated(moment, torch.tensor([0])), moment)
