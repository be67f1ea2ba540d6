"""Profiles of made-up Gaussian keys and values, for tests that need no model."""

from typing import Any

import torch
from torch import Tensor

from spectralquant.calibration.spectrum import spectral_basis
from spectralquant.profile import Choices, LayerProfile, Profile, SideProfile
from spectralquant.rope import Rotary


def inv_freq(pairs: int, base: float = 10_000.0) -> Tensor:
    return base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


def covariance(heads: int, dim: int, decay: float = 0.03, seed: int = 0) -> Tensor:
    """[H, D, D] float64, eigenvalues exp(-decay i)."""
    make = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(heads, dim, dim, generator=make, dtype=torch.float64))[0]
    return (turn * torch.exp(-decay * torch.arange(dim, dtype=torch.float64))) @ turn.mT


def side(heads: int, dim: int, decay: float = 0.03, seed: int = 0, metric: Tensor | None = None) -> SideProfile:
    basis, variance = spectral_basis(covariance(heads, dim, decay, seed), metric)
    mean = torch.randn(heads, dim, generator=torch.Generator().manual_seed(seed + 1))
    return SideProfile(mean, basis.float(), variance.float())


def profile(
    heads: int = 2, dim: int = 64, layers: tuple[int, ...] = (0, 2), decay: float = 0.03, rotary: Rotary | None = None, exact_share: float = 0.0, **choices: Any
) -> Profile:
    made = {}
    for i in layers:
        own = rotary and Rotary(rotary.inv_freq.clone(), rotary.interleaved)  # as calibration reads it: one a layer
        made[i] = LayerProfile(side(heads, dim, decay, 10 * i), side(heads, dim, decay, 10 * i + 5), torch.ones(heads), 12.0 + i, own, exact_share=exact_share)
    return Profile(made, Choices(**choices), {"architecture": "Fake", "layers": len(layers), "weights": "abc"}, {"tokens": 5})


def samples(part: SideProfile, count: int, batch: int = 1) -> Tensor:
    """[B, H, count, D] Gaussian vectors with the mean and covariance of `part`."""
    z = torch.randn(batch, part.mean.shape[0], count, part.mean.shape[1], dtype=torch.float64) * part.variance.double().sqrt()[:, None]
    return (z @ torch.linalg.inv(part.basis.double()) + part.mean[:, None]).float()
