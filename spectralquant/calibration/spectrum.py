"""Transforms and spectra: the metric-weighted Karhunen-Loeve transform of one head.

With error metric S (error e costs e S e^T) and covariance C, let U be the eigenvectors of S^1/2 C S^1/2. `z = (x - mean) A` with
A = S^1/2 U has uncorrelated coordinates and |z - z^|^2 is exactly the weighted error, so water-filling on the eigenvalues is optimal
for the error that is felt: of the logits for K (S = E[q^T q]) and of the layer's output for V (S = W_O W_O^T). Float64.
"""

import torch
from torch import Tensor

METRIC_FLOOR = 1e-4
"""Smallest eigenvalue of a metric as a share of its largest: directions no query has used yet may be used later."""
SHRINKAGE = 1e-6
"""Share of the mean variance added to every direction, so that a dead dimension or a short text leaves no zero variance."""


def metric_root(metric: Tensor) -> Tensor:
    """S^1/2 of symmetric metrics [H, D, D], with the floor applied. A metric of zeros, where no error was felt at all, becomes the identity."""
    values, vectors = torch.linalg.eigh((metric + metric.mT) / 2)
    values = torch.where(values[..., -1:] > 0, values, 1.0)
    values = values.clamp_min(METRIC_FLOOR * values[..., -1:].clamp_min(1e-12))
    return (vectors * values.sqrt()[..., None, :]) @ vectors.mT


def shrink(covariance: Tensor, samples: int) -> Tensor:
    """Covariances [H, D, D] of few samples, pulled towards a multiple of the identity by the oracle-approximating share (Chen, Wiesel, Eldar,
    Hero 2010, arXiv:0907.4698). Fewer samples than dimensions leave directions without variance, which later text will use."""
    dim = covariance.shape[-1]
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    squared, trace2 = covariance.square().sum((-2, -1)), trace.square()
    spread = ((samples + 1 - 2 / dim) * (squared - trace2 / dim)).clamp_min(1e-30)
    share = (((1 - 2 / dim) * squared + trace2) / spread).clamp_max(1.0)[:, None, None]
    eye = torch.eye(dim, dtype=covariance.dtype)
    return (1 - share) * covariance + share * (trace / dim)[:, None, None] * eye


def spectral_basis(covariance: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """(A [H, D, D], variance [H, D] descending) of covariances [H, D, D] under `metric` [H, D, D] (None: identity).

    The sign of each column is fixed (its largest entry is positive), so equal input gives equal bits.
    """
    eye = torch.eye(covariance.shape[-1], dtype=torch.float64)
    root = eye.expand_as(covariance) if metric is None else metric_root(metric)
    level = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    weighted = root @ (covariance + SHRINKAGE * level[:, None, None] * eye) @ root
    values, vectors = torch.linalg.eigh((weighted + weighted.mT) / 2)
    values, vectors = values.flip(-1).clamp_min(1e-20), vectors.flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return root @ (vectors * largest.sign()), values
