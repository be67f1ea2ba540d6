"""Figures from rows: pure functions, no model."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def token_divergence(want: Tensor, got: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Per-token figures of log-probabilities want, got [S, V] with targets [S - 1], the tokens that follow the first S - 1 positions.

    Returns:
        kl [S]: KL(want || got) in nats; agree [S]: 1 where the most likely token is the same; nll, nll_plain [S - 1]: negative
        log-likelihoods of the targets under `got` and `want`.
    """
    return {
        "kl": (want.exp() * (want - got)).sum(-1),
        "agree": (want.argmax(-1) == got.argmax(-1)).int(),
        "nll": -got[:-1].gather(1, targets[:, None])[:, 0],
        "nll_plain": -want[:-1].gather(1, targets[:, None])[:, 0],
    }


def summarise_language(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line from the rows of one method, text and context. Standard errors are over windows: tokens of one window are not independent."""
    kl = [torch.tensor(row["kl"], dtype=torch.float64) for row in rows]
    agree = [float(torch.tensor(row["agree"], dtype=torch.float64).mean()) for row in rows]
    excess = [float((torch.tensor(row["nll"]).double() - torch.tensor(row["nll_plain"]).double()).mean()) for row in rows]
    tokens = torch.cat(kl)
    per_window = [float(k.mean()) for k in kl]
    ratio = float(torch.tensor(_mean(excess), dtype=torch.float64).exp())  # infinity, not an error, for a method that has lost the text
    return {
        "windows": len(rows),
        "tokens": len(tokens),
        "bits": _mean([row["bits"] for row in rows]),
        "whole_bits": _mean([row["whole_bits"] for row in rows]),
        "kl": float(tokens.mean()),
        "kl_se": standard_error(per_window),
        "kl_median": float(tokens.median()),
        "kl_99": float(tokens.quantile(0.99)),
        "agreement": _mean(agree),
        "agreement_se": standard_error(agree),
        "perplexity_ratio": ratio,
        "perplexity_ratio_se": ratio * standard_error(excess),
        "kl_per_window": per_window,
    }


def means_by_position(windows: Sequence[Sequence[float]], piece: int) -> list[float]:
    """Means over the windows of each `piece` of neighbouring positions, as far as all windows reach; the last piece may be shorter."""
    length = min(map(len, windows))
    return [_mean([value for window in windows for value in window[i : min(i + piece, length)]]) for i in range(0, length, piece)]


def summarise_success(rows: Sequence[dict[str, Any]], yardstick: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share of successes of one method, its 95 % interval, and the paired difference to the yardstick on the same units.

    Rows have "unit" and "correct" (0 or 1). The difference is within noise when 0 lies inside `difference` +- 1.96 `difference_se`.
    """
    right = {row["unit"]: float(row["correct"]) for row in rows}
    other = {row["unit"]: float(row["correct"]) for row in yardstick}
    shared = [right[unit] - other[unit] for unit in right if unit in other]
    low, high = wilson_interval(sum(right.values()), len(right))
    return {
        "units": len(right),
        "accuracy": _mean(list(right.values())),
        "accuracy_low": low,
        "accuracy_high": high,
        "difference": _mean(shared),
        "difference_se": standard_error(shared),
    }


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def wilson_interval(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson 1927), sensible at 0 and 1 too."""
    if not trials:
        return 0.0, 1.0
    p, n = successes / trials, trials
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max((centre - half) / (1 + z * z / n), 0.0), min((centre + half) / (1 + z * z / n), 1.0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
