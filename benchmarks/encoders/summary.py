"""Means over seeds with their 95 % intervals, and the tables a terminal shows."""

import math
from collections.abc import Sequence
from typing import Any

from scipy.stats import t as student

CODES = ("head_dim", "key_bits", "value_bits")
"""The same for all seeds of a task and setting."""
FIGURES = ("accuracy_uncoded", "accuracy_coded", "accuracy_difference", "cosine", "kl")
Row = dict[str, Any]


def interval(values: Sequence[float]) -> Row:
    """Mean and 95 % interval by Student's t over seeds; without bounds where there is one seed."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return {"mean": mean, "low": None, "high": None}
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    half = float(student.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One row per task and setting, over its seeds."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["setting"]), []).append(row)
    return [
        {"task": task, "setting": setting, "seeds": len(group), **{k: group[0][k] for k in CODES}, **{k: interval([row[k] for row in group]) for k in FIGURES}}
        for (task, setting), group in groups.items()
    ]


def claims(summary: Sequence[Row]) -> list[Row]:
    """What is there for "spectral filtering can even improve quality": a row per task, setting -> accuracy coded minus uncoded, and what it shows."""
    found: dict[str, Row] = {}
    for row in summary:
        difference = row["accuracy_difference"]
        found.setdefault(row["task"], {})[row["setting"]] = {**difference, "shows": verdict(difference)}
    return [{"task": task, "accuracy_difference": settings} for task, settings in found.items()]


def verdict(difference: Row) -> str:
    if difference["low"] is None:
        return "nothing: one seed"
    return "better" if difference["low"] > 0 else "worse" if difference["high"] < 0 else "no difference beyond noise"


def table(summary: Sequence[Row]) -> str:
    """Per cents of accuracy, cosine and KL, each with half its interval."""
    columns = f"{'uncoded %':>15} {'coded %':>15} {'difference':>15} {'cosine':>17} {'KL, nats':>21}"
    lines = [f"{'task':<14} {'setting':<9} {'seeds':>5} {'K bits':>6} {'V bits':>6} {columns}"]
    for row in summary:
        accuracies = (f"{told(row[name], 100, 2):>15}" for name in FIGURES[:3])
        what = f"{row['task']:<14} {row['setting']:<9} {row['seeds']:>5} {row['key_bits']:>6.2f} {row['value_bits']:>6.2f}"
        lines.append(f"{what} {' '.join(accuracies)} {told(row['cosine'], 1, 5):>17} {told(row['kl'], 1, 6):>21}")
    return "\n".join(lines)


def told(figure: Row, scale: float, digits: int) -> str:
    mean = f"{scale * figure['mean']:.{digits}f}"
    return mean if figure["low"] is None else f"{mean} +-{scale * (figure['high'] - figure['mean']):.{digits}f}"
