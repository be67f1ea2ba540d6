"""Statistics and choices -> Profile."""

from typing import Any

import torch
from torch import Tensor

from spectralquant.calibration.hf import TOKENS_PER_DIMENSION, ModelStatistics
from spectralquant.calibration.spectrum import shrink, spectral_basis
from spectralquant.profile import NORM_FLOOR, Choices, LayerProfile, Profile, SideProfile
from spectralquant.rope import Rotary

NEAREST, FARTHEST = 16, 32_768
"""Distances over which the query metric is averaged: all octaves from the first to the second, or to the longest text that the model takes."""
PER_OCTAVE = 16
PLAIN_POSITIONS = 2048
"""Positions over which keys and queries are averaged for the plain frame."""


def fit_profile(statistics: ModelStatistics, choices: Choices, certificate: dict[str, Any] | None = None) -> Profile:
    """The profile of a model under `choices`. Costs two eigen-decompositions per head; nothing is run."""
    layers: dict[int, LayerProfile] = {}
    for index, stats in statistics.layers.items():
        rotary = statistics.rotary.get(index)
        norms = torch.cat(stats.value_norms, 1).clamp_min(NORM_FLOOR)
        median = norms.median(1).values
        keys, values = (stats.seen_keys, stats.seen_values) if choices.token_weights else (stats.keys, stats.values)
        few = statistics.tokens < TOKENS_PER_DIMENSION * keys.mean.shape[-1]
        covariances = [shrink(m.covariance, statistics.tokens) if few else m.covariance for m in (keys, values)]
        distances = relative_positions(statistics.longest)
        key = _fit_key(keys.mean, covariances[0], stats.queries.second, rotary, distances, choices)
        value = _fit_value(values.mean, covariances[1], statistics.output_metric.get(index), choices)
        share = float(((norms / median[:, None]).mean(0) < choices.exact_below).double().mean())
        layers[index] = LayerProfile(key, value, median.float(), stats.peak, rotary, exact_share=share)
    return Profile(layers, choices, statistics.fingerprint, certificate or {})


def relative_positions(longest: int) -> Tensor:
    """[n] int64, distances between a query and the start of a run that it reads, the same number in every octave up to `longest` tokens.

    Text of any length may come, and a query turns against the keys with distance: a metric of near queries alone is wrong for far ones.
    """
    first = NEAREST * 2 ** torch.arange(max((min(longest, FARTHEST) // NEAREST).bit_length() - 1, 1))
    within = (torch.arange(PER_OCTAVE) + 0.5) / PER_OCTAVE
    return (first[:, None] * (1 + within)).long().flatten()


def _fit_key(mean: Tensor, covariance: Tensor, queries: Tensor, rotary: Rotary | None, distances: Tensor, choices: Choices) -> SideProfile:
    metric = queries if choices.query_metric else None
    if rotary is None:
        return _side(mean, covariance, metric)
    if metric is not None:
        seen = distances if choices.run else torch.arange(PLAIN_POSITIONS)
        metric = rotary.average_rotated(metric, seen)
    positions = torch.arange(choices.run or PLAIN_POSITIONS)
    if choices.run and choices.trajectory:
        return _side(mean, rotary.average_rotated(covariance, positions), metric)
    constant = rotary.rotate(mean[:, None], positions).mean(1)
    return _side(constant, rotary.average_rotated(covariance + _outer(mean), positions) - _outer(constant), metric)


def _fit_value(mean: Tensor, covariance: Tensor, metric: Tensor | None, choices: Choices) -> SideProfile:
    return _side(mean, covariance, metric if choices.output_metric else None)


def _side(mean: Tensor, covariance: Tensor, metric: Tensor | None) -> SideProfile:
    basis, variance = spectral_basis(covariance, metric)
    return SideProfile(mean.float(), basis.float(), variance.float())


def _outer(x: Tensor) -> Tensor:
    return x[..., :, None] * x[..., None, :]
