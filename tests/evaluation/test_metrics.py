"""Figures against published values and against sums written out by hand."""

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch

from spectralquant.evaluation.metrics import standard_error, summarise_language, summarise_success, token_divergence, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_known_values(successes: int, trials: int, low: float, high: float) -> None:
    """Newcombe 1998, table I, method 3."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("trials", [1, 7, 100])
def test_wilson_interval_is_where_the_normal_test_turns(trials: int) -> None:
    """Its ends solve |p - q| = z sqrt(q (1 - q) / n), it lies within [0, 1], and mirrors under success <-> failure."""
    for successes in range(trials + 1):
        low, high = wilson_interval(successes, trials)
        p = successes / trials
        assert 0 <= low <= p + 1e-12 and p - 1e-12 <= high <= 1
        for q in {low, high} - {0.0, 1.0}:
            assert abs(p - q) == pytest.approx(1.96 * math.sqrt(q * (1 - q) / trials), abs=1e-7), "the root of a rounded 0 is 1e-8"
        assert wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_interval_of_nothing_is_everything() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, -4.0, 2.5, 2.5], list(np.random.default_rng(0).normal(size=50))])
def test_standard_error(values: list[float]) -> None:
    assert standard_error(values) == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))


@pytest.mark.parametrize("values", [[], [3.0]])
def test_standard_error_of_too_few(values: list[float]) -> None:
    assert math.isnan(standard_error(values))


def test_token_divergence_by_brute_force() -> None:
    want, got = torch.randn(2, 6, 11).double().log_softmax(-1)
    targets = torch.randint(11, (5,))
    found = token_divergence(want, got, targets)
    assert {k: len(v) for k, v in found.items()} == {"kl": 6, "agree": 6, "nll": 5, "nll_plain": 5}
    p, q = want.exp().numpy(), got.exp().numpy()
    for i in range(6):
        assert float(found["kl"][i]) == pytest.approx(sum(p[i, v] * math.log(p[i, v] / q[i, v]) for v in range(11)))
        assert int(found["agree"][i]) == int(np.argmax(p[i]) == np.argmax(q[i]))
    for i, target in enumerate(targets.tolist()):
        assert float(found["nll"][i]) == pytest.approx(-math.log(q[i, target]))
        assert float(found["nll_plain"][i]) == pytest.approx(-math.log(p[i, target]))


def test_token_divergence_of_equals_is_nothing() -> None:
    x = torch.randn(4, 9).log_softmax(-1)
    found = token_divergence(x, x, torch.tensor([1, 2, 3]))
    assert not found["kl"].any() and found["agree"].all() and torch.equal(found["nll"], found["nll_plain"])


def test_summarise_language_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    rows: list[dict[str, Any]] = [
        {
            "kl": rng.gamma(0.3, 0.1, 40).tolist(),
            "agree": rng.integers(0, 2, 40).tolist(),
            "nll": rng.gamma(2, 1, 39).tolist(),
            "nll_plain": rng.gamma(2, 0.9, 39).tolist(),
            "bits": 2.4 + i / 10,
            "whole_bits": 3.0 + i / 10,
        }
        for i in range(3)
    ]
    found = summarise_language(rows)
    kl = np.array([row["kl"] for row in rows])
    assert found["windows"] == 3 and found["tokens"] == 120
    assert found["bits"] == pytest.approx(2.5) and found["whole_bits"] == pytest.approx(3.1)
    assert found["kl"] == pytest.approx(kl.mean()) and found["kl_per_window"] == pytest.approx(kl.mean(1).tolist())
    assert found["kl_se"] == pytest.approx(kl.mean(1).std(ddof=1) / math.sqrt(3))
    assert np.sort(kl.ravel())[59] == pytest.approx(found["kl_median"]), "the lower of the two in the middle"
    assert found["kl_99"] == pytest.approx(np.quantile(kl, 0.99))
    agree = np.array([row["agree"] for row in rows]).mean(1)
    assert found["agreement"] == pytest.approx(agree.mean()) and found["agreement_se"] == pytest.approx(agree.std(ddof=1) / math.sqrt(3))
    perplexity, plain = (math.exp(np.mean([row[name] for row in rows])) for name in ("nll", "nll_plain"))
    assert found["perplexity_ratio"] == pytest.approx(perplexity / plain)
    logs = [np.mean(row["nll"]) - np.mean(row["nll_plain"]) for row in rows]
    assert found["perplexity_ratio_se"] == pytest.approx(perplexity / plain * np.std(logs, ddof=1) / math.sqrt(3))


def test_summarise_success_pairs_units() -> None:
    """The difference is over units that both have; the accuracy over all of the method's own."""

    def rows(**correct: int) -> list[dict[str, Any]]:
        return [{"unit": unit, "correct": value} for unit, value in correct.items()]

    found = summarise_success(rows(a=1, b=0, c=1, d=1), rows(d=0, c=1, b=1, x=1))
    assert found["units"] == 4 and found["accuracy"] == 0.75
    assert (found["accuracy_low"], found["accuracy_high"]) == wilson_interval(3, 4)
    assert found["difference"] == pytest.approx((-1 + 0 + 1) / 3)
    assert found["difference_se"] == pytest.approx(statistics.stdev([-1, 0, 1]) / math.sqrt(3))


def test_summarise_success_of_the_yardstick_itself_is_no_difference() -> None:
    rows = [{"unit": str(i), "correct": i % 2} for i in range(10)]
    found = summarise_success(rows, rows)
    assert found["difference"] == found["difference_se"] == 0 and found["accuracy"] == 0.5


def test_summarise_success_without_a_shared_unit() -> None:
    found = summarise_success([{"unit": "a", "correct": 1}], [])
    assert found["accuracy"] == 1.0 and math.isnan(found["difference"]) and math.isnan(found["difference_se"])
