"""Windows of text, and the divergence measured on them."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods import Prepared, Subject, find_method
from spectralquant.evaluation.methods.simulated import Rule, simulated
from spectralquant.evaluation.metrics import summarise_language
from spectralquant.evaluation.plan import Plan
from spectralquant.evaluation.tasks.language import measure, units


@pytest.fixture
def plan(story: Path) -> Plan:
    return Plan("tiny", ("fp16",), texts={"story": str(story)}, contexts=(96, 200), windows=3, scored=24, chunk=8)


def coarse(step: float, subject: Subject) -> Prepared:
    """Everything rounded to multiples of `step`."""
    rule = Rule(lambda x: (x / step).round() * step, lambda x: (x / step).round() * step)
    return simulated("coarse", "", "", lambda subject: lambda layer: rule, lambda dim: 3.0).prepare(subject)


def test_units_are_reproducible_and_spread(plan: Plan, subject: Subject, story: Path) -> None:
    """Windows of one length do not overlap, lie in order, reach over the whole text, and begin with BOS; those of all lengths end alike."""
    found, again = units(plan, subject), units(plan, subject)
    assert [u.key for u in found] == [f"story/{context}/{i}" for context in (96, 200) for i in range(3)]
    assert all(torch.equal(a.content, b.content) for a, b in zip(found, again, strict=True))
    text = story.read_text(encoding="utf-8")
    for context in (96, 200):
        mine = [u for u in found if u.fields["context"] == context]
        starts = [text.index(subject.tokenizer.decode(u.content[0, 1:])) for u in mine]
        assert all(u.content[0, 0] == 1 for u in mine)
        assert all(u.content.shape == (1, context + 24) for u in mine)
        gaps = [b - a for a, b in pairwise(starts)]
        assert min(gaps) >= context + 24 and max(gaps) - min(gaps) <= 1
        assert all(torch.equal(u.content[:, -24:], v.content[:, -24:]) for u, v in zip(mine, found[:3], strict=True))
        assert starts[0] < len(text) / 3 and starts[-1] > len(text) / 2


def test_units_move_with_the_seed(plan: Plan, subject: Subject) -> None:
    pairs = zip(units(plan, subject), units(replace(plan, seed=1), subject), strict=True)
    assert not any(torch.equal(a.content, b.content) for a, b in pairs)


def test_units_reject_a_short_text(plan: Plan, subject: Subject) -> None:
    with pytest.raises(ConfigError, match=r"text 'story' has .* tokens, too few for 3 windows of 9024"):
        units(replace(plan, contexts=(9000,)), subject)


def test_measure_columns(plan: Plan, subject: Subject) -> None:
    unit = units(plan, subject)[0]
    method = find_method("kivi2-g32").prepare(subject)
    rows = dict(measure(unit, plan, subject, {"a": method, "b": method}))
    assert list(rows) == ["a", "b"] and rows["a"] == rows["b"], "the context is the same for all"
    row = rows["a"]
    assert set(row) == {"kl", "agree", "nll", "nll_plain", "bits", "whole_bits"}
    assert [len(row[name]) for name in ("kl", "agree", "nll", "nll_plain")] == [24, 24, 23, 23]
    assert row["bits"] == 3.0, "2 bits, and 32 for every 32 elements"


def test_measure_counts_exact_tokens_in_whole_bits(plan: Plan, subject: Subject) -> None:
    """KIVI holds up to 128 newest tokens in 16 bits: of 200, K has 128 coded and V 72."""
    unit = units(plan, subject)[3]
    (_, row), *_ = measure(unit, plan, subject, {"k": find_method("kivi2-g32").prepare(subject)})
    assert row["whole_bits"] == pytest.approx((100 * 3 + 100 * 16) / 200)


def test_measure_plain_is_the_reference(plan: Plan, subject: Subject, plain: Prepared) -> None:
    for unit in units(plan, subject)[::3]:
        ((_, row),) = measure(unit, plan, subject, {"plain": plain})
        assert max(map(abs, row["kl"])) < 1e-5 and row["agree"] == [1] * 24
        assert row["nll"] == pytest.approx(row["nll_plain"], rel=1e-4)


@torch.no_grad()
def test_measure_nll_is_the_models_loss(plan: Plan, subject: Subject, plain: Prepared) -> None:
    unit = units(plan, subject)[0]
    ((_, row),) = measure(unit, plan, subject, {"plain": plain})
    labels = unit.content.clone()
    labels[:, : 96 + 1] = -100  # the first scored position has no prediction in the row: it is made from the context
    assert math.fsum(row["nll_plain"]) / 23 == pytest.approx(float(subject.model(unit.content, labels=labels).loss), rel=1e-4)


def test_measure_orders_methods_by_their_error(plan: Plan, subject: Subject) -> None:
    methods = {"fp16": find_method("fp16").prepare(subject), "fine": coarse(0.1, subject), "bad": coarse(2.0, subject)}
    rows: dict[str, list[dict[str, object]]] = {name: [] for name in methods}
    for unit in units(plan, subject)[:3]:
        for name, row in measure(unit, plan, subject, methods):
            rows[name].append(row)
    kl = {name: summarise_language(found)["kl"] for name, found in rows.items()}
    assert abs(kl["fp16"]) < 1e-4, "float16's rounding, through a random model"
    assert kl["fp16"] < kl["fine"] < kl["bad"] / 10
