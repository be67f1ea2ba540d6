"""The weighted Karhunen-Loeve transform does what its docstring derives."""

import oracles
import pytest
import synthetic
import torch
from tolerances import FLOAT64

from spectralquant.calibration.spectrum import METRIC_FLOOR, SHRINKAGE, metric_root, spectral_basis

DIM = 24


def metric(seed: int = 9) -> torch.Tensor:
    """Well above the floor."""
    return synthetic.covariance(2, DIM, 0.2, seed)


def test_metric_root_squares_to_the_metric() -> None:
    root = metric_root(metric())
    torch.testing.assert_close(root @ root, metric(), rtol=FLOAT64, atol=FLOAT64)
    torch.testing.assert_close(root, root.mT, rtol=FLOAT64, atol=FLOAT64)


def test_metric_root_floors_unused_directions() -> None:
    seen = torch.randn(1, 5, DIM, dtype=torch.float64)
    values = torch.linalg.eigvalsh(metric_root(seen.mT @ seen)) ** 2
    assert (values[:, 0] / values[:, -1] > METRIC_FLOOR * 0.999).all()
    assert metric_root(torch.zeros(1, DIM, DIM, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("weighted", [False, True])
def test_spectral_basis_decorrelates(weighted: bool) -> None:
    """A^T C A is diagonal and holds the variances, up to the shrinkage."""
    c = synthetic.covariance(2, DIM, 0.2)
    basis, variance = spectral_basis(c, metric() if weighted else None)
    scale = variance[:, :1, None]
    assert ((basis.mT @ c @ basis - torch.diag_embed(variance)).abs() <= 3 * SHRINKAGE * scale).all()
    assert (variance > 0).all() and (variance.diff(dim=-1) <= 0).all()


def test_spectral_basis_turns_the_weighted_error_into_a_plain_one() -> None:
    basis, _ = spectral_basis(synthetic.covariance(2, DIM, 0.2), metric())
    error = torch.randn(40, DIM, dtype=torch.float64)
    for head in range(2):
        torch.testing.assert_close((error @ basis[head]).square().sum(-1), oracles.weighted_error(error, metric()[head]), rtol=FLOAT64, atol=FLOAT64)


def test_spectral_basis_without_metric_is_orthogonal() -> None:
    basis, _ = spectral_basis(synthetic.covariance(3, DIM), None)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(DIM, dtype=torch.float64).expand(3, -1, -1), rtol=0, atol=FLOAT64)


def test_spectral_basis_packs_variance_better_than_any_rotation() -> None:
    """The first n variances sum to no less than the variance in any n orthogonal directions."""
    c = synthetic.covariance(1, DIM, 0.2)
    _, variance = spectral_basis(c, None)
    for n in (1, 5, 12):
        some = torch.linalg.qr(torch.randn(DIM, n, dtype=torch.float64))[0]
        assert variance[0, :n].sum() > (some.T @ c[0] @ some).trace()


def test_spectral_basis_fixes_signs_and_bits() -> None:
    """Equal input gives equal bits, heads are independent, and the sign is not the eigen-solver's."""
    c = synthetic.covariance(2, DIM, 0.2)
    basis, variance = spectral_basis(c, None)
    again, _ = spectral_basis(c.clone(), None)
    assert torch.equal(basis, again)
    largest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(spectral_basis(c[1:], None)[1], variance[1:], rtol=FLOAT64, atol=FLOAT64)


def test_spectral_basis_survives_dead_dimensions() -> None:
    """A covariance of low rank, or none at all, still has an inverse transform."""
    seen = torch.randn(1, 5, DIM, dtype=torch.float64)
    for c in (seen.mT @ seen, torch.zeros(1, DIM, DIM, dtype=torch.float64)):
        basis, variance = spectral_basis(c, None)
        assert (variance > 0).all()
        assert torch.linalg.inv(basis).isfinite().all()
