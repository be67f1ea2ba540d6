"""Weights of queries and keys against loops, and against what errors on keys really do."""

import math

import pytest
import torch

from spectralquant.calibration.statistics import WEIGHT_CAP, FeltErrors, LayerStatistics, Moments, felt_errors

H, G, N, T, D = 2, 3, 4, 40, 8
POSITIONS = torch.tensor([12, 20, 33, 39])


def text() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    root = torch.randn(H, D, D)
    return torch.randn(H, G, N, D), torch.randn(H, T, D), torch.randn(H, T, D), (root @ root.mT).double()


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("metric", [False, True])
def test_weights_are_the_formula(softcap: float | None, metric: bool) -> None:
    queries, keys, values, matrix = text()
    got = felt_errors(queries, keys, values, POSITIONS, matrix if metric else None, softcap, skip=5).queries
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
    weight = felt_errors(queries, keys, values, POSITIONS, matrix, None, skip=5).queries[0, 0, 3]
    query, sigma = queries[0, 0, 3].double(), 1e-3
    noise = torch.zeros(4000, T, D, dtype=torch.float64)
    noise[:, 5 : 39 - 10] = torch.randn(4000, 24, D, dtype=torch.float64) * sigma
    moved = ((keys[0] + noise) @ query).softmax(-1) @ values[0].double() - (keys[0].double() @ query).softmax(-1) @ values[0].double()
    felt = ((moved @ matrix[0]) * moved).sum(-1).mean()
    assert float(felt) == pytest.approx(float(sigma**2 * query.square().sum() * weight), rel=0.1)


def test_a_query_that_sees_only_the_sink_counts_for_nothing() -> None:
    queries, keys, values, matrix = text()
    keys[:, 0] = 50 * queries[:, 0, -1]
    weight = felt_errors(queries, keys, values, POSITIONS, matrix, None, skip=5).queries
    assert (weight[:, 0, -1] < 1e-6 * weight.amax()).all()


def move(keys: torch.Tensor, queries: torch.Tensor, values: torch.Tensor, slot: int, count: int = 2000) -> float:
    """Squared move of all outputs of the queries of head 0 when the key in `slot` gets noise, mean over `count` draws."""
    noise, total = torch.randn(count, D, dtype=torch.float64) * 1e-3, 0.0
    for n, position in enumerate(POSITIONS.tolist()):
        if slot >= position - 10:
            continue
        for g in range(G):
            query = queries[0, g, n].double()
            scores = (keys[0, : position + 1].double() @ query).expand(count, -1).clone()
            value = values[0, : position + 1].double()
            plain = scores[0].softmax(-1) @ value
            scores[:, slot] += noise @ query
            total += float((scores.softmax(-1) @ value - plain).square().sum(-1).mean())
    return total


def test_key_weights_are_how_much_noise_on_one_key_is_felt() -> None:
    queries, keys, values, _ = text()
    queries = queries / 2  # no weight reaches the cap
    weight = felt_errors(queries, keys, values, POSITIONS, None, None, skip=5).keys[0]
    slots = [t for t in range(5, 29) if 0 < weight[t] < WEIGHT_CAP]
    assert len(slots) > 10
    felt = torch.tensor([move(keys, queries, values, t) for t in slots])
    torch.testing.assert_close(felt / felt.sum(), weight[slots] / weight[slots].sum(), rtol=0.2, atol=0.005)


def test_value_weights_are_attention_squared() -> None:
    queries, keys, values, _ = text()
    weight = felt_errors(queries, keys, values, POSITIONS, None, None, skip=5).values
    felt = torch.zeros(H, T)
    for n, position in enumerate(POSITIONS.tolist()):
        p = (queries[:, :, n] @ keys[:, : position + 1].mT).softmax(-1)
        felt[:, 5 : position - 10] += p[:, :, 5 : position - 10].square().sum(1)
    felt = (felt / felt[:, 5:].mean(-1, keepdim=True)).clamp_max(WEIGHT_CAP)
    torch.testing.assert_close(weight, felt, rtol=1e-4, atol=1e-5)


def test_sinks_and_first_tokens_have_no_key_weight() -> None:
    queries, keys, values, _ = text()
    values[:, 17] *= 1e-3
    keys[:, 17] = 3 * queries[:, 0, 2]  # looked at, like a sink
    weight = felt_errors(queries, keys, values, POSITIONS, None, None, skip=5).keys
    assert not weight[:, :5].any() and not weight[:, 17].any() and weight.amax() <= WEIGHT_CAP


def test_keys_weigh_alike_where_nothing_is_felt() -> None:
    queries, keys, values, _ = text()
    weight = felt_errors(queries, keys, torch.zeros_like(values), POSITIONS, None, None, skip=5).keys
    torch.testing.assert_close(weight, (torch.arange(T) >= 5).float().expand(H, -1))


def test_seen_keys_are_weighted_and_keys_are_not() -> None:
    keys, queries, values, weight = torch.randn(H, T, D), torch.randn(H, 9, D), torch.randn(H, T, D), torch.rand(H, T)
    stats, plain, seen = LayerStatistics(), Moments(), Moments()
    stats.add(keys, queries, values, FeltErrors(torch.ones(H, 3, 3), weight, weight))
    plain.add(keys)
    seen.add(keys, weight)
    assert torch.equal(stats.keys.second, plain.second) and torch.equal(stats.seen_keys.second, seen.second)
    assert not torch.equal(plain.second, seen.second)


def test_weighted_moments() -> None:
    x, weight = torch.randn(H, 50, D), torch.rand(H, 50)
    moments = Moments()
    for a, w in zip(x.split(20, 1), weight.split(20, 1), strict=True):
        moments.add(a, w)
    share = (weight / weight.sum(-1, keepdim=True)).double()
    torch.testing.assert_close(moments.mean, torch.einsum("hn,hnd->hd", share, x.double()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.second, torch.einsum("hn,hnd,hne->hde", share, x.double(), x.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_moments_survive_a_mean_of_hundreds_of_deviations(precision: str) -> None:
    """Products that round their factors to bfloat16 lost the variance of keys with a bias of 460 (Qwen2.5)."""
    x = torch.randn(H, 3000, D) + 460 * torch.randn(H, 1, D)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    moments = Moments()
    for piece in x.split(1000, 1):
        moments.add(piece)
    torch.set_float32_matmul_precision(before)
    exact = x.double() - x.double().mean(1, keepdim=True)
    torch.testing.assert_close(moments.covariance, exact.mT @ exact / 3000, rtol=0, atol=0.02)
    torch.testing.assert_close(moments.mean, x.double().mean(1), rtol=1e-5, atol=1e-3)


def test_no_weight_at_all_gives_zeros() -> None:
    moments = Moments()
    moments.add(torch.randn(H, 5, D), torch.zeros(H, 5))
    assert not moments.mean.any() and not moments.second.any()
