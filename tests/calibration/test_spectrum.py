"""The weighted Karhunen-Loeve transform does what its docstring derives."""

import oracles
import pytest
import synthetic
import torch
from tolerances import FLOAT64

from spectralquant.calibration.spectrum import METRIC_FLOOR, SHRINKAGE, metric_root, shrink, spectral_basis

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


def few(samples: int, decay: float = 0.1, heads: int = 3) -> torch.Tensor:
    """[H, D, D], the covariance of `samples` vectors."""
    x = synthetic.samples(synthetic.side(heads, DIM, decay), samples)[0].double()
    return (x - x.mean(1, keepdim=True)).mT @ (x - x.mean(1, keepdim=True)) / samples


def share_of_identity(covariance: torch.Tensor, shrunken: torch.Tensor) -> torch.Tensor:
    """[H], how far `shrunken` went: what is off the diagonal is only scaled."""
    off = 1 - torch.eye(DIM, dtype=torch.float64)
    return 1 - (shrunken * covariance * off).sum((-2, -1)) / (covariance.square() * off).sum((-2, -1))


@pytest.mark.parametrize("samples", [2, 5, 23, 24, 60, 95])
def test_shrink_keeps_the_trace_and_mixes_with_the_identity(samples: int) -> None:
    c = few(samples)
    got = shrink(c, samples)
    trace = c.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(got.diagonal(dim1=-2, dim2=-1).sum(-1), trace, rtol=FLOAT64, atol=0)
    share = share_of_identity(c, got)
    assert (share >= 0).all() and (share <= 1).all()
    eye = torch.eye(DIM, dtype=torch.float64)
    want = (1 - share)[:, None, None] * c + (share * trace / DIM)[:, None, None] * eye
    torch.testing.assert_close(got, want, rtol=FLOAT64, atol=FLOAT64)
    assert (torch.linalg.eigvalsh(got)[:, 0] > 0).all()


@pytest.mark.parametrize("samples", [1, 2, 10, 24, 95])
def test_shrink_is_the_formula(samples: int) -> None:
    """The closed form of Chen et al. with plain sums, head by head."""
    c = few(max(samples, 2))
    got = shrink(c, samples)
    for head in range(3):
        trace, trace_of_square = 0.0, 0.0
        for i in range(DIM):
            trace += float(c[head, i, i])
            for j in range(DIM):
                trace_of_square += float(c[head, i, j] * c[head, j, i])
        top = (1 - 2 / DIM) * trace_of_square + trace**2
        share = min(top / ((samples + 1 - 2 / DIM) * (trace_of_square - trace**2 / DIM)), 1.0)
        for i in range(DIM):
            for j in range(DIM):
                want = (1 - share) * float(c[head, i, j]) + share * trace / DIM * (i == j)
                assert float(got[head, i, j]) == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_shrink_falls_with_samples() -> None:
    """The same covariance, found on more and more samples: to none of the identity in the end."""
    c = few(40)
    shares = torch.stack([share_of_identity(c, shrink(c, samples)) for samples in (40, 60, 100, 1000, 10**9)])
    assert (shares.diff(dim=0) < 0).all() and (shares[-1] < 1e-6).all()


def test_shrink_is_stronger_on_flatter_spectra() -> None:
    """What looks like structure in few samples of a flat spectrum is noise."""
    flat, steep = (share_of_identity(c, shrink(c, 40)) for c in (few(40, 0.0), few(40, 0.3)))
    assert (flat > 2 * steep).all()


@pytest.mark.parametrize("samples", [1, 24, 1000])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_shrink_leaves_multiples_of_the_identity(scale: float, samples: int) -> None:
    c = scale * torch.eye(DIM, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(shrink(c, samples), c, rtol=FLOAT64, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_shrink_has_no_unit(scale: float) -> None:
    c = few(40)
    torch.testing.assert_close(shrink(scale * c, 40), scale * shrink(c, 40), rtol=FLOAT64, atol=0)


def test_shrink_comes_closer_to_the_truth() -> None:
    """In Frobenius norm, which it minimises; with fewer samples than dimensions, by far."""
    truth = synthetic.covariance(8, DIM, 0.1)
    basis = torch.linalg.cholesky(truth)
    x = torch.randn(8, 12, DIM, dtype=torch.float64) @ basis.mT
    c = x.mT @ x / 12
    assert (shrink(c, 12) - truth).norm() < 0.8 * (c - truth).norm()
