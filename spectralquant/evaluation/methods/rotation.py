"""Random rotation and a fixed codebook, as in TurboQuant (Zandieh et al. 2025, arXiv 2504.19874; its MSE variant, without the QJL stage that
no serving engine kept): the norm of each vector in float16, its direction turned by a random orthogonal matrix, after which every
coordinate is nearly Gaussian with variance 1/D whatever the data, and coded with the Lloyd-Max quantizer of that density. No calibration, no exact window."""

from functools import cache

import torch
from torch import Tensor

from spectralquant.codebook import Codebook, lloyd_max_codebook
from spectralquant.evaluation.methods.base import Method
from spectralquant.evaluation.methods.simulated import Rule, simulated

LARGEST_NORM = 65504.0
"""Of float16."""
SMALLEST_NORM = 2.0**-24


@cache
def random_rotation(dim: int, seed: int, device: torch.device) -> Tensor:
    """[D, D] float32, orthogonal, uniform over all (QR of a Gaussian matrix, signs fixed)."""
    gaussian = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float().to(device)


def round_rotated(x: Tensor, rotation: Tensor, book: Codebook) -> Tensor:
    """x [..., D] with rotation [D, D]."""
    y, root = x.float(), x.shape[-1] ** 0.5
    norm = y.norm(dim=-1, keepdim=True).clamp_max(LARGEST_NORM).half().float()
    turned = (y @ rotation) * (root / norm.clamp_min(SMALLEST_NORM))
    levels = book.lookup(book.assign(turned))
    return ((levels @ rotation.T) * (norm / root)).to(x.dtype)


def _rotation(bits: int) -> Method:
    book = lloyd_max_codebook(bits)

    def rule(layer: int) -> Rule:
        """One rotation for K and another for V of every layer."""
        return Rule(
            lambda x: round_rotated(x, random_rotation(x.shape[-1], 2 * layer, x.device), book),
            lambda x: round_rotated(x, random_rotation(x.shape[-1], 2 * layer + 1, x.device), book),
        )

    return simulated(f"rotation{bits}", f"random rotation, Lloyd-Max {bits}-bit", "random rotation", lambda subject: rule, lambda dim: bits + 16 / dim)


METHODS = tuple(_rotation(bits) for bits in (2, 3, 4))
