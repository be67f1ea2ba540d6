"""Profiles from moments, against the vectors the moments came from."""

from typing import Any

import oracles
import pytest
import synthetic
import torch
from tolerances import EIGEN32

from spectralquant.calibration.fit import FARTHEST, NEAREST, PER_OCTAVE, PLAIN_POSITIONS, fit_profile, relative_positions
from spectralquant.calibration.hf import DEFAULT_LONGEST, ModelStatistics
from spectralquant.calibration.statistics import LayerStatistics
from spectralquant.profile import Choices, SideProfile
from spectralquant.rope import Rotary

DIM, HEADS, COUNT = 16, 2, 400
ROTARY = Rotary(synthetic.inv_freq(DIM // 2))


def kv(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, queries, values [H, n, D] with means and correlations."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(3, HEADS, DIM, DIM, generator=make)
    x = torch.randn(3, HEADS, COUNT, DIM, generator=make) @ mix + torch.randn(3, HEADS, 1, DIM, generator=make) * 2
    return x[0], x[1], x[2]


def statistics(rotary: Rotary | None = None, metric: torch.Tensor | None = None) -> ModelStatistics:
    made = ModelStatistics({"weights": "abc"}, tokens=COUNT)
    layer = LayerStatistics()
    layer.add(*kv())
    made.layers[3] = layer
    if rotary is not None:
        made.rotary[3] = rotary
    if metric is not None:
        made.output_metric[3] = metric
    return made


def fit(rotary: Rotary | None = None, metric: torch.Tensor | None = None, **choices: Any) -> tuple[SideProfile, SideProfile]:
    layer = fit_profile(statistics(rotary, metric), Choices(**choices)).layers[3]
    return layer.key, layer.value


def decorrelated(side: SideProfile, stored: torch.Tensor) -> None:
    """Vectors [H, n, D] as the codec would see them, mean subtracted, have the variances of the profile and no correlation."""
    z = stored.double() @ side.basis.double()
    assert (z.mean(1).abs() < EIGEN32 * side.variance[:, :1].double().sqrt()).all()
    covariance = z.mT @ z / z.shape[1]
    error = covariance - torch.diag_embed(side.variance.double())
    assert (error.abs() < EIGEN32 * side.variance[:, :1, None]).all()


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    return oracles.rotated(x, ROTARY.inv_freq, position, False)


@pytest.mark.parametrize("query_metric", [False, True])
def test_fit_profile_without_rotation_decorrelates(query_metric: bool) -> None:
    keys, _, values = kv()
    key, value = fit(query_metric=query_metric)
    decorrelated(key, keys - key.mean[:, None])
    decorrelated(value, values - value.mean[:, None])


@pytest.mark.parametrize("query_metric", [False, True])
def test_fit_profile_trajectory_frame_decorrelates_runs(query_metric: bool) -> None:
    """A run stores (k - mean) R(j), j = 0 .. run - 1."""
    key, _ = fit(ROTARY, query_metric=query_metric, run=16, trajectory=True)
    centred = kv()[0] - key.mean[:, None]
    decorrelated(key, torch.cat([turned(centred, j) for j in range(16)], 1))


def test_fit_profile_constant_frame_decorrelates_runs() -> None:
    """A run stores k R(j) - mean."""
    key, _ = fit(ROTARY, run=16, trajectory=False)
    decorrelated(key, torch.cat([turned(kv()[0], j) for j in range(16)], 1) - key.mean[:, None])


def test_fit_profile_plain_frame_averages_over_many_positions() -> None:
    key, _ = fit(ROTARY, run=0)
    want = sum(turned(kv()[0].mean(1), p) for p in range(PLAIN_POSITIONS)) / PLAIN_POSITIONS
    torch.testing.assert_close(key.mean.double(), want, rtol=EIGEN32, atol=EIGEN32)


def test_fit_profile_query_metric_measures_logits() -> None:
    """|e A|^2 is the mean square of <q, e>, over the queries seen."""
    key, _ = fit()
    error, queries = torch.randn(30, DIM, dtype=torch.float64), kv()[1].double()
    for head in range(HEADS):
        logits = (error @ queries[head].mT).square().mean(-1)
        torch.testing.assert_close((error @ key.basis[head].double()).square().sum(-1), logits, rtol=EIGEN32, atol=0)


def test_fit_profile_query_metric_averages_distances() -> None:
    """With a rotation: over the distances at which a query meets a run."""
    key, _ = fit(ROTARY, run=16)
    error, queries = torch.randn(30, DIM, dtype=torch.float64), kv()[1]
    for head in range(HEADS):
        logits = torch.stack([(error @ turned(queries[head], p).mT).square().mean(-1) for p in relative_positions(DEFAULT_LONGEST).tolist()]).mean(0)
        torch.testing.assert_close((error @ key.basis[head].double()).square().sum(-1), logits, rtol=EIGEN32, atol=0)


@pytest.mark.parametrize("longest", [1, NEAREST, 1000, 2048, FARTHEST, 10 * FARTHEST])
def test_relative_positions_are_alike_in_every_octave(longest: int) -> None:
    found = relative_positions(longest)
    octaves = (found.double() / NEAREST).log2().floor().long()
    assert (octaves.bincount() == PER_OCTAVE).all() and (found.diff() > 0).all()
    assert found.min() >= NEAREST and found.max() < max(min(longest, FARTHEST), 2 * NEAREST)
    assert longest < 2 * NEAREST or found.max() > min(longest, FARTHEST) / 2


def test_fit_profile_output_metric_measures_outputs() -> None:
    weight = torch.randn(HEADS, DIM, 40, dtype=torch.float64)
    _, value = fit(metric=weight @ weight.mT)
    error = torch.randn(30, DIM, dtype=torch.float64)
    for head in range(HEADS):
        torch.testing.assert_close((error @ value.basis[head].double()).square().sum(-1), (error @ weight[head]).square().sum(-1), rtol=EIGEN32, atol=0)


@pytest.mark.parametrize("side", [0, 1])
def test_fit_profile_without_metrics_is_orthogonal(side: int) -> None:
    weight = torch.randn(HEADS, DIM, 40, dtype=torch.float64)
    basis = fit(ROTARY, weight @ weight.mT, query_metric=False, output_metric=False)[side].basis
    torch.testing.assert_close(basis.mT @ basis, torch.eye(DIM).expand(HEADS, -1, -1), rtol=0, atol=1e-5)


def test_fit_profile_exact_share_counts_small_values() -> None:
    """5 % of the tokens have values of hardly any norm."""
    keys, queries, values = kv()
    values[:, ::20] *= 1e-3
    made = ModelStatistics({}, tokens=COUNT)
    made.layers[0] = LayerStatistics()
    made.layers[0].add(keys, queries, values)
    assert fit_profile(made, Choices(exact_below=1e-3)).exact_share == pytest.approx(0.05)
    assert fit_profile(made, Choices(exact_below=0.0)).exact_share == 0


def test_fit_profile_keeps_medians_and_peak() -> None:
    keys, _, values = kv()
    layer = fit_profile(statistics(), Choices()).layers[3]
    norms = values.square().sum(-1)
    assert ((norms <= layer.value_norm[:, None]).double().mean(1) - 0.5).abs().max() < 2 / COUNT
    assert layer.peak == max(keys.abs().max(), values.abs().max())


def test_fit_profile_takes_batches_in_any_pieces() -> None:
    """Moments are sums: text in two samples or one gives the same profile."""
    whole, pieces = statistics(), statistics()
    pieces.layers[3] = LayerStatistics()
    for part in (slice(0, 150), slice(150, COUNT)):
        pieces.layers[3].add(*(x[:, part] for x in kv()))
    a, b = (fit_profile(s, Choices()).layers[3] for s in (whole, pieces))
    torch.testing.assert_close(a.key.variance, b.key.variance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(a.value.mean, b.value.mean, rtol=1e-4, atol=1e-6)
    assert torch.equal(a.value_norm, b.value_norm) and a.peak == b.peak


def test_fit_profile_carries_what_it_was_given() -> None:
    made = statistics(ROTARY)
    profile = fit_profile(made, Choices(run=64), {"tokens": 7})
    assert (profile.model, profile.certificate, profile.choices.run) == (made.fingerprint, {"tokens": 7}, 64)
    assert list(profile.layers) == [3] and profile.layers[3].rotary is ROTARY
