"""Weights of queries against loops, and against what errors on keys really do."""

import math

import pytest
import torch

from spectralquant.calibration.statistics import Moments, felt_errors

H, G, N, T, D = 2, 3, 4, 40, 8
POSITIONS = torch.tensor([12, 20, 33, 39])


def text() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    root = torch.randn(H, D, D)
    return torch.randn(H, G, N, D), torch.randn(H, T, D), torch.randn(H, T, D), (root @ root.mT).double()


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("metric", [False, True])
def test_weights_are_the_formula(softcap: float | None, metric: bool) -> None:
    queries, keys, values, matrix = text()
    got = felt_errors(queries, keys, values, POSITIONS, matrix if metric else None, softcap, skip=5)
    for h in range(H):
        for g in range(G):
            for n, position in enumerate(POSITIONS.tolist()):
                scores = [float(queries[h, g, n] @ keys[h, t]) for t in range(position + 1)]
                scores = scores if softcap is None else [softcap * math.tanh(s / softcap) for s in scores]
                p = torch.tensor(scores, dtype=torch.float64).softmax(0)
                output = sum(p[t] * values[h, t].double() for t in range(position + 1))
                want = 0.0
                for t in range(5, position - 10):  # the nearest quarter of a short text is exact
                    away = values[h, t].double() - output
                    want += float(p[t] ** 2 * (away @ matrix[h] @ away if metric else away @ away))
                assert float(got[h, g, n]) == pytest.approx(want, rel=1e-3, abs=1e-6)


def test_weights_predict_the_move_of_the_output() -> None:
    """E |move|^2 = sigma^2 |q|^2 weight for independent errors of variance sigma^2 on the coded keys."""
    queries, keys, values, matrix = text()
    weight = felt_errors(queries, keys, values, POSITIONS, matrix, None, skip=5)[0, 0, 3]
    query, sigma = queries[0, 0, 3].double(), 1e-3
    noise = torch.zeros(4000, T, D, dtype=torch.float64)
    noise[:, 5 : 39 - 10] = torch.randn(4000, 24, D, dtype=torch.float64) * sigma
    moved = ((keys[0] + noise) @ query).softmax(-1) @ values[0].double() - (keys[0].double() @ query).softmax(-1) @ values[0].double()
    felt = ((moved @ matrix[0]) * moved).sum(-1).mean()
    assert float(felt) == pytest.approx(float(sigma**2 * query.square().sum() * weight), rel=0.1)


def test_a_query_that_sees_only_the_sink_counts_for_nothing() -> None:
    queries, keys, values, matrix = text()
    keys[:, 0] = 50 * queries[:, 0, -1]
    weight = felt_errors(queries, keys, values, POSITIONS, matrix, None, skip=5)
    assert (weight[:, 0, -1] < 1e-6 * weight.amax()).all()


def test_weighted_moments() -> None:
    x, weight = torch.randn(H, 50, D), torch.rand(H, 50)
    moments = Moments()
    for a, w in zip(x.split(20, 1), weight.split(20, 1), strict=True):
        moments.add(a, w)
    share = (weight / weight.sum(-1, keepdim=True)).double()
    torch.testing.assert_close(moments.mean, torch.einsum("hn,hnd->hd", share, x.double()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.second, torch.einsum("hn,hnd,hne->hde", share, x.double(), x.double()), rtol=1e-5, atol=1e-6)


def test_no_weight_at_all_gives_zeros() -> None:
    moments = Moments()
    moments.add(torch.randn(H, 5, D), torch.zeros(H, 5))
    assert not moments.mean.any() and not moments.second.any()
