"""The sweep's points are those of its rows, and its choices are right on any points."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyTokenizer
from transformers import PreTrainedModel

from spectralquant.evaluation import sweep as sweeping
from spectralquant.evaluation.methods import Subject, ours
from spectralquant.evaluation.plan import Plan
from spectralquant.presets import PRESETS


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_points_are_those_of_the_rows(llama: PreTrainedModel, tokenizer: TinyTokenizer, llama_calibration: Path, tmp_path: Path) -> None:
    text = tmp_path / "squares.txt"
    text.write_text(" ".join(f"line {i} of {i * i}" for i in range(300)))
    settings = sweeping.settings_for(list(PRESETS), True)
    assert len(settings) == len(PRESETS) + 7
    plan = Plan("tiny", tuple(m.name for m in settings), texts={"squares": str(text)}, contexts=(200,), windows=1, scored=32)
    points = sweeping.sweep(settings, plan, Subject(llama, tokenizer, tmp_path / "run", llama_calibration), "command")
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    figures: dict[str, tuple[float, float]] = {}
    for method in settings:
        mine = [r for r in rows if r["method"] == method.name]
        figures[method.name] = (mean([r["bits"] for r in mine]), mean([k for r in mine for k in r["kl"]]))
    assert [p["name"] for p in points] == sorted(figures, key=lambda name: figures[name])
    assert all((p["bits"], p["kl"]) == pytest.approx(figures[p["name"]]) for p in points)
    assert {p["name"] for p in points if p["pareto"]} == front(figures)
    sweeping.plot(points, tmp_path / "new" / "sweep.png")
    assert (tmp_path / "new" / "sweep.png").stat().st_size > 10_000


def front(figures: dict[str, tuple[float, float]]) -> set[str]:
    """Walking from small to large, those that have less KL than all smaller ones; of equal size, only those with the least KL."""
    found: set[str] = set()
    least = math.inf
    for bits in sorted({bits for bits, _ in figures.values()}):
        here = min(kl for b, kl in figures.values() if b == bits)
        if here < least:
            found |= {name for name, point in figures.items() if point == (bits, here)}
            least = here
    return found


@pytest.mark.parametrize("seed", range(20))
def test_pareto_on_random_points(seed: int) -> None:
    """Few different values, so that there are ties in bits, in KL, and in both."""
    draws = torch.randint(1, 6, (12, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    points = [{"label": str(i), "bits": float(bits), "kl": float(kl)} for i, (bits, kl) in enumerate(draws)]
    best = sweeping.pareto(points)
    assert {p["label"] for p in best} == front({p["label"]: (p["bits"], p["kl"]) for p in points})
    assert best == [p for p in points if p in best]


def test_dials_are_what_their_names_say() -> None:
    seen: set[tuple[str, str]] = set()
    for method in sweeping.DIALS:
        avg, key, value = method.name.removeprefix("dials-").split("-")
        assert method.label == f"avg {avg}, tails K {key} V {value}" and method.family != ours.METHODS[0].family
        seen.add((method.name, method.label))
    assert len(seen) == len(sweeping.DIALS) == 7


@pytest.mark.parametrize(("target", "name"), [(0.5, "small"), (0.3, "better"), (0.1, None)])
def test_sweet_spot(target: float, name: str | None) -> None:
    points: list[dict[str, Any]] = [
        {"name": n, "bits": bits, "kl": kl} for n, bits, kl in (("small", 2.0, 0.5), ("better", 3.0, 0.2), ("same", 3.0, 0.3), ("big", 4.0, 0.25))
    ]
    found = sweeping.sweet_spot(points, target)
    assert (found and found["name"]) == name
