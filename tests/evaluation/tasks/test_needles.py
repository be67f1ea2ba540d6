"""Needles: where they lie, that nobody can guess them, and what is measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods import Prepared, Subject, find_method
from spectralquant.evaluation.metrics import summarise_success
from spectralquant.evaluation.plan import Plan
from spectralquant.evaluation.tasks.base import Unit
from spectralquant.evaluation.tasks.needles import REACH, SLACK, measure, nearest_boundary, units


@pytest.fixture
def plan(story: Path) -> Plan:
    return Plan("tiny", ("fp16",), texts={"story": str(story), "other": "/nowhere"}, needle_lengths=(800, 1500), needle_samples=2, chunk=8)


def read(subject: Subject, unit: Unit) -> tuple[str, str]:
    """(context, the asked line with its line breaks)."""
    search, decode = unit.content, subject.tokenizer.decode
    line = decode(search.question[0]).removeprefix("\n") + decode(search.answer[0])
    return decode(search.context[0], skip_special_tokens=True), line + (".\n" if unit.fields["kind"] == "sentence" else "\n")


def test_units_are_the_grid_and_reproducible(plan: Plan, subject: Subject) -> None:
    found, again, other = units(plan, subject), units(plan, subject), units(replace(plan, seed=1), subject)
    assert len({u.key for u in found}) == len(found) == 3 * 2 * 5 * 2
    assert "key-value/800/0.25/1" in {u.key for u in found}
    assert all(u.key == "{kind}/{length}/{depth}/{sample}".format(**u.fields) for u in found)
    assert all(torch.equal(a.content.context, b.content.context) and a.content.expected == b.content.expected for a, b in zip(found, again, strict=True))
    assert not any(torch.equal(a.content.context, b.content.context) for a, b in zip(found, other, strict=True))
    assert len({u.content.expected for u in found}) == len(found)


def test_units_do_not_depend_on_the_rest_of_the_grid(plan: Plan, subject: Subject) -> None:
    alone = units(replace(plan, needle_kinds=("multi-key",), needle_lengths=(1500,), needle_depths=(0.5,), needle_samples=1), subject)
    same = next(u for u in units(plan, subject) if u.key == alone[0].key)
    assert torch.equal(alone[0].content.context, same.content.context)


def test_context_has_the_asked_length_and_one_answer(plan: Plan, subject: Subject, story: Path) -> None:
    text = story.read_text(encoding="utf-8")
    for unit in units(plan, subject):
        context, line = read(subject, unit)
        assert unit.content.context.shape == (1, unit.fields["length"]) and int(unit.content.context[0, 0]) == 1
        assert context.count(line) == 1 and context.count(unit.content.expected) == 1
        assert unit.content.expected not in text
        assert context.replace(line, "") in text or unit.fields["kind"] == "multi-key"


def test_needle_lies_at_its_depth_behind_a_boundary(plan: Plan, subject: Subject) -> None:
    for unit in units(plan, subject):
        if unit.fields["kind"] == "multi-key":
            continue
        context, line = read(subject, unit)
        before, after = context.split(line)
        assert abs(len(before) - unit.fields["depth"] * len(before + after)) <= REACH
        assert not before or not after or before[-1] == "\n" or (before.rstrip()[-1] == "." and (before + after[:1])[-1 - before.endswith(" ") :].isspace())


def test_depths_0_and_1_are_the_ends(plan: Plan, subject: Subject) -> None:
    found = units(replace(plan, needle_kinds=("key-value",), needle_depths=(0.0, 1.0)), subject)
    for unit in found:
        context, line = read(subject, unit)
        assert context.startswith(line) if unit.fields["depth"] == 0 else context.endswith(line)


def test_multi_key_has_seven_others_spread_over_the_text(plan: Plan, subject: Subject, story: Path) -> None:
    for unit in units(replace(plan, needle_kinds=("multi-key",)), subject):
        context, line = read(subject, unit)
        lines = [row for row in context.split("\n") if len(row) == 36 + 2 + 7 and row[36:38] == ": "]
        assert len(lines) == len({row[:36] for row in lines}) == len({row[38:] for row in lines}) == 8 and line.strip() in lines
        places = [context.index(row) / len(context) for row in lines]
        assert max(b - a for a, b in zip([0.0, *places], [*places, 1.0], strict=True)) < 0.35
        rest = context
        for row in lines:
            rest = rest.replace(f"\n{row}\n", "", 1)
        assert rest in story.read_text(encoding="utf-8")


def test_nearest_boundary(subject: Subject) -> None:
    """Before every place: does a sentence or a line end there? The nearest of all those, by brute force."""
    text = "No. 3.14 is pi.\nIs it?  Yes! a.b.c stays. " + "x" * 60
    tokenizer: Any = subject.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    good = [0, len("No."), len("No. 3.14 is pi."), text.index("Is"), text.index("  Yes"), text.index(" a.b"), text.index(" xx"), len(ids)]
    for target in range(len(ids) + 1):
        assert abs(nearest_boundary(tokenizer, ids, target) - target) == min(abs(g - target) for g in good)


def test_nearest_boundary_stays_where_there_is_none(subject: Subject) -> None:
    ids = [120] * 1000
    assert nearest_boundary(subject.tokenizer, ids, 500) == 500
    assert nearest_boundary(subject.tokenizer, ids, REACH) == 0 and nearest_boundary(subject.tokenizer, ids, 1000 - REACH) == 1000


def test_a_token_over_the_joint_belongs_to_the_answer(plan: Plan, subject: Subject) -> None:
    """Tokenizers may join the colon and the space behind it: the question must then end before the colon, as the model saw it in the context."""

    class Joining(type(subject.tokenizer)):
        def __call__(self, text: str, **options: Any) -> Any:
            return super().__call__(text.replace(": ", "ø"), **options)

    tokenizer = Joining()
    for unit in units(replace(plan, needle_kinds=("key-value",)), replace(subject, tokenizer=tokenizer)):
        search = unit.content
        assert int(search.answer[0, 0]) == 150 and tokenizer.decode(search.question[0])[-1] != ":"
        assert tokenizer.decode(search.answer[0, 1:]) == search.expected


@torch.no_grad()
def test_measure_equals_the_model_alone(plan: Plan, subject: Subject, talkative: PreTrainedModel, plain: Prepared) -> None:
    """Teacher-forced likelihood and greedy output of one forward pass and `generate` over the whole text."""
    for unit in units(plan, subject)[::13]:
        search = unit.content
        ((name, row),) = measure(unit, plan, subject, {"plain": plain})
        assert name == "plain" and set(row) == {"answer", "output", "correct", "answer_nll", "bits"}
        assert row["answer"] == search.expected and row["bits"] == 32.0
        prompt, count = torch.cat([search.context, search.question], 1), search.answer.shape[1]
        labels = torch.cat([torch.full_like(prompt, -100), search.answer], 1)
        assert row["answer_nll"] == pytest.approx(float(talkative(torch.cat([prompt, search.answer], 1), labels=labels).loss), rel=1e-3)
        new = talkative.generate(prompt, max_new_tokens=count + SLACK, do_sample=False)[0, prompt.shape[1] :]
        assert subject.tokenizer.decode(new, skip_special_tokens=True).startswith(row["output"]) and row["output"]


def test_correct_is_whether_the_answer_occurs(plan: Plan, subject: Subject, plain: Prepared) -> None:
    unit = units(plan, subject)[0]
    ((_, row),) = measure(unit, plan, subject, {"plain": plain})
    assert row["correct"] == 0, "a random model knows nothing"
    for expected, correct in ((row["output"][3:9], 1), (row["output"] + "?", 0)):
        ((_, again),) = measure(replace(unit, content=replace(unit.content, expected=expected)), plan, subject, {"plain": plain})
        assert again["correct"] == correct


def test_output_ends_with_its_line(plan: Plan, subject: Subject, plain: Prepared) -> None:
    """A line break before the answer does not end it, one after it does, and so does the end of the text."""

    class Scripted(type(subject.tokenizer)):
        def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
            return ("\n ab\n" + "c" * 100)[: len(ids)]

    unit = units(plan, subject)[0]
    ((_, whole),) = measure(unit, plan, subject, {"plain": plain})
    ((_, row),) = measure(unit, plan, replace(subject, tokenizer=Scripted()), {"plain": plain})
    assert row["output"] == "\n ab\n"
    tokenizer = type(subject.tokenizer)()
    tokenizer.eos_token_id = ord(whole["output"][1])
    ((_, row),) = measure(unit, plan, replace(subject, tokenizer=tokenizer), {"plain": plain})
    assert row["output"] == whole["output"][: whole["output"].index(whole["output"][1]) + 1] and len(whole["output"]) > 12


def test_methods_do_not_disturb_each_other(plan: Plan, subject: Subject) -> None:
    """Every method runs on its own caches, the first one's answer does not leak into the second's."""
    unit = units(plan, subject)[-1]
    fp16, kivi = (find_method(name).prepare(subject) for name in ("fp16", "kivi2-g32"))
    both = dict(measure(unit, plan, subject, {"fp16": fp16, "kivi": kivi}))
    turned = dict(measure(unit, plan, subject, {"kivi": kivi, "fp16": fp16}))
    assert both == turned and both["fp16"]["answer_nll"] != both["kivi"]["answer_nll"]
    assert both["fp16"]["bits"] == 16.0 and both["kivi"]["bits"] == 3.0


def test_rows_feed_the_summary(plan: Plan, subject: Subject, plain: Prepared) -> None:
    some = units(plan, subject)[:3]
    rows = [{"unit": u.key, **u.fields, **row} for u in some for _, row in measure(u, plan, subject, {"plain": plain})]
    assert summarise_success(rows, rows)["units"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": {}}, "texts is empty: the needles task hides its needles in the first text"),
        ({"needle_lengths": (40,), "needle_kinds": ("key-value",)}, "needle_lengths has 40: needles and special tokens alone take 48"),
        ({"needle_lengths": (100_000,)}, "text 'story' has .* tokens, too few for a haystack of 100000"),
    ],
)
def test_units_reject(plan: Plan, subject: Subject, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        units(replace(plan, **change), subject)
