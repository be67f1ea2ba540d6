"""Word problems: that they are solvable and solved, how answers are read, and that a padded batch changes nothing."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from spectralquant import SpectralQuantEngine
from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods import Prepared, Subject, find_method
from spectralquant.evaluation.metrics import summarise_success
from spectralquant.evaluation.plan import Plan
from spectralquant.evaluation.tasks import problems
from spectralquant.evaluation.tasks.problems import answer_batch, final_number, make_problems, measure, per_problem, read_problems, units

SOLVERS: dict[str, Callable[..., float]] = {
    r"buys (\d+) \w+ that cost \$(\d+) each and pays with \$(\d+)\.": lambda n, price, paid: paid - n * price,
    r"has (\d+) \w+, loses (\d+) of them and shares the rest equally among (\d+) friends": lambda n, lost, friends: (n - lost) / friends,
    r"has (\d+) boxes with (\d+) \w+ in each, and (\d+) loose \w+\. It sells (\d+)\.": lambda boxes, each, loose, sold: boxes * each + loose - sold,
    r"has (\d+) \w+\. \w+ has (\d+) times as many and gets (\d+) more": lambda n, times, more: n + n * times + more,
    r"works (\d+) hours a day for (\d+) days and earns \$(\d+) an hour": lambda hours, days, wage: hours * days * wage,
    r"reads (\d+) pages a day of a book with (\d+) pages\. How many pages are left after (\d+) days": lambda pages, book, days: book - pages * days,
}
"""Written from the questions alone."""
FILL = 0
"""The tiny models' pad token, which rows are fed that have stopped."""


def solve(question: str) -> float:
    (answer,) = [solver(*map(int, m.groups())) for pattern, solver in SOLVERS.items() if (m := re.search(pattern, question))]
    return answer


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(problems, "NEW_TOKENS", 12)
    monkeypatch.setattr(problems, "BATCH", 4)
    return Plan("tiny", ("fp16",), problems=10)


@pytest.fixture
def small(plan: Plan, tmp_path: Path) -> Plan:
    """Short problems of different lengths, from a file."""
    path = tmp_path / "small.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"How many is {'very ' * (i % 7)}{i}?", "answer": f"It is {i}.\n#### {i}"}) for i in range(18)))
    return replace(plan, problem_file=str(path))


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ("5 * 3 = 15\n#### 42", "42", "42"),
        ("#### 42\n#### 7", "42", "42"),
        ("####-1,234.50 dollars, or 9", "-1234.5", "-1234.5"),
        ("####  $1,200.00", "1200", "1200"),
        ("so it is 10-4=6 apples.", None, "6"),
        ("between 5-10.", None, "10"),
        ("that makes $ -3", None, "-3"),
        ("1,000,000.", None, "1000000"),
        ("#### -0.0", "0", "0"),
        ("#### 007", "7", "7"),
        ("#### none, 8", None, "8"),
        ("no idea", None, None),
        ("", None, None),
        ("9" * 300, None, f"1{'0' * 300}"),
    ],
)
def test_final_number(text: str, strict: str | None, loose: str | None) -> None:
    assert final_number(text, strict=True) == strict
    assert final_number(text, strict=False) == loose


def test_made_problems_are_solved_right() -> None:
    """Answers against a solver that reads the question, every step against arithmetic, and steps build on each other."""
    examples, asked = make_problems(300, seed=3)
    for problem in examples + asked:
        answer = solve(problem.question)
        assert answer == int(answer) and final_number(problem.answer, strict=True) == str(int(answer))
        *steps, last = problem.answer.split("\n")
        assert 2 <= len(steps) <= 3 and last == f"#### {int(answer)}"
        results = []
        for step in steps:
            a, operator, b, result = re.search(r"(\d+) ([-+*/]) (\d+) = (\d+) ", step).groups()  # pyright: ignore
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[operator] == int(result)
            assert not results or results[-1] in (int(a), int(b))
            results.append(int(result))


def test_made_problems_are_seeded_and_never_examples() -> None:
    examples, asked = make_problems(2000, seed=0)
    assert make_problems(2000, seed=0) == (examples, asked) and make_problems(20, seed=0)[1] == asked[:20]
    other_examples, other = make_problems(300, seed=1)
    assert other_examples == examples and not set(other[:20]) & set(asked[:20])
    assert len(set(asked)) == 2000 and not set(asked) & set(examples)
    for pattern in SOLVERS:
        assert any(re.search(pattern, e.question) for e in examples) and any(re.search(pattern, a.question) for a in asked)


def test_read_problems(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    records = [{"question": f" q{i} ", "answer": f"a\u2028b #### {i}", "more": 1} for i in range(12)]
    path.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    examples, asked = read_problems(path, 3)
    assert [p.question for p in examples] == [f"q{i}" for i in range(8)] and [p.question for p in asked] == ["q8", "q9", "q10"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 9: '{'; expected an object with the strings question and answer"),
        ("[1]", "line 9: .*expected an object"),
        ('{"question": "q"}', "line 9: .*expected an object"),
        ('{"question": "q", "answer": 3}', "line 9: .*expected an object"),
        ('{"question": "q", "answer": "it is 42"}', "line 9: the answer ends in 'it is 42'; expected \"#### \" and a number"),
        ("", "has 8 problems; expected at least 8 examples and problems=1 more"),
    ],
)
def test_read_problems_rejects(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(['{"question": "q", "answer": "#### 1"}'] * 8 + [line]))
    with pytest.raises(ConfigError, match=message):
        read_problems(path, 1)


def test_units_reject_a_missing_file(plan: Plan, subject: Subject) -> None:
    with pytest.raises(ConfigError, match=r"problem_file='/nowhere/p\.jsonl': there is no such file"):
        units(replace(plan, problem_file="/nowhere/p.jsonl"), subject)


def test_units_hold_every_problem_once_sorted_by_length(plan: Plan, subject: Subject) -> None:
    examples, asked = make_problems(10, seed=0)
    found = units(plan, subject)
    assert [u.key for u in found] == ["batch/0", "batch/1", "batch/2"] and [len(u.fields["problem"]) for u in found] == [4, 4, 2]
    order = [i for u in found for i in u.fields["problem"]]
    assert sorted(order) == list(range(10)) and order != list(range(10))
    prompts = [p for u in found for p in u.content.prompts]
    lengths = [len(subject.tokenizer(p)["input_ids"]) for p in prompts]
    assert lengths == sorted(lengths)
    shots = "".join(f"Question: {e.question}\nAnswer: {e.answer}\n\n" for e in examples)
    assert prompts == [f"{shots}Question: {asked[i].question}\nAnswer:" for i in order]
    assert [e for u in found for e in u.content.expected] == [str(int(solve(asked[i].question))) for i in order]
    assert [u.content for u in units(plan, subject)] == [u.content for u in found]


@torch.no_grad()
@pytest.mark.parametrize("method", ["plain", "fp16"])
def test_padding_changes_nothing(small: Plan, subject: Subject, plain: Prepared, talkative: PreTrainedModel, method: str) -> None:
    """Each text of a batch of different lengths is the one of its prompt alone, and of the model without any of this."""
    prepared = plain if method == "plain" else find_method("fp16").prepare(subject)
    prompts = [p for u in units(small, subject)[::2] for p in u.content.prompts]
    assert len({len(p) for p in prompts}) > 2
    together = answer_batch(subject, prepared.cache(), prompts)
    assert len(set(together)) > len(prompts) / 2 and any(len(set(text)) > 6 for text in together), "else nothing would show"
    for prompt, text in zip(prompts, together, strict=True):
        assert answer_batch(subject, prepared.cache(), [prompt]) == [text]
        ids = subject.tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = talkative.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert method == "fp16" or subject.tokenizer.decode(new, skip_special_tokens=True).lstrip() == text


def test_padding_reaches_the_packed_cache(small: Plan, subject: Subject, engine: SpectralQuantEngine, llama: PreTrainedModel) -> None:
    prompts = units(small, subject)[0].content.prompts
    widths = [len(subject.tokenizer(p)["input_ids"]) for p in prompts]
    cache = engine.cache(llama)
    answer_batch(replace(subject, model=llama), cache, prompts)
    segment = cache.coded_layers[0].segment
    assert segment is not None and segment.packed > 0
    assert segment.start.tolist() == [max(widths) - w for w in widths] != [0] * 4


def test_answers_end_at_their_stop(small: Plan, subject: Subject) -> None:
    """White space in front is no stop. A row that stopped waits for the others, and what it was fed meanwhile is cut off."""
    scripts = {0: "\n\n 1 2\n\n3 4 5 6 7", 1: "9\nQuestion: 8 and so on", 2: "no stop at all in here"}

    class Scripted(type(subject.tokenizer)):
        calls = 0

        def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
            row, self.calls = self.calls % 3, self.calls + 1
            tokens = list(map(int, ids))
            return scripts[row][: 2 * (tokens.index(FILL) if FILL in tokens else len(tokens))]

    tokenizer = Scripted()
    cache = DynamicCache()
    prompts = units(small, subject)[0].content.prompts[:3]
    assert answer_batch(replace(subject, tokenizer=tokenizer), cache, prompts) == ["1 2", "9\n", "no stop at all in here"]
    tokenizer.calls, cache, scripts[2] = 0, DynamicCache(), "11\n\n"
    longest = max(len(tokenizer(p)["input_ids"]) for p in prompts)
    assert answer_batch(replace(subject, tokenizer=tokenizer), cache, prompts) == ["1 2", "9\n", "11"]
    assert cache.get_seq_length() - longest < 11, "all have stopped before the last of 12 tokens"


def test_model_penalties_are_left_out(small: Plan, subject: Subject, plain: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = units(small, subject)[0].content.prompts
    want = answer_batch(subject, plain.cache(), prompts)
    monkeypatch.setattr(subject.model.generation_config, "repetition_penalty", 5.0)
    monkeypatch.setattr(subject.model.generation_config, "do_sample", True)
    assert answer_batch(subject, plain.cache(), prompts) == want


def test_measure_judges_every_problem(small: Plan, subject: Subject, plain: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = units(small, subject)[0]
    texts = ["so #### 1", "it is 2", "#### 3", "nothing"]
    monkeypatch.setattr(problems, "answer_batch", lambda subject, cache, prompts: texts)
    unit = replace(unit, content=replace(unit.content, expected=["1", "2", "4", "5"]))
    rows = dict(measure(unit, small, subject, {"a": plain, "b": plain}))
    want = {"output": texts, "expected": ["1", "2", "4", "5"], "correct": [1, 1, 0, 0], "correct_strict": [1, 0, 0, 0], "bits": 32.0}
    assert rows == {"a": want, "b": want}


def test_measure_gives_each_method_its_own_cache(small: Plan, subject: Subject) -> None:
    unit = units(small, subject)[1]
    methods = {name: find_method(name).prepare(subject) for name in ("fp16", "kivi2-g32")}
    both, turned = dict(measure(unit, small, subject, methods)), dict(measure(unit, small, subject, dict(reversed(methods.items()))))
    assert both == turned and both["fp16"]["bits"] == 16.0 and both["kivi2-g32"]["bits"] == 3.0
    assert both["fp16"]["output"] != both["kivi2-g32"]["output"] and all(both["fp16"]["output"])


def test_per_problem() -> None:
    def row(unit: str, method: str, numbers: list[int], correct: list[int]) -> dict[str, Any]:
        texts = [f"t{n}" for n in numbers]
        lists = {"output": texts, "expected": [str(n) for n in numbers], "correct": correct, "correct_strict": [0] * len(correct)}
        return {"task": "problems", "unit": unit, "problem": numbers, "method": method, **lists, "bits": 2.5, "seconds": 1.0}

    rows = per_problem([row("batch/0", "a", [4, 0], [1, 0]), row("batch/1", "a", [2], [1]), row("batch/0", "b", [4, 0], [0, 0])])
    assert rows[0] == {
        "task": "problems",
        "unit": "problem/4",
        "method": "a",
        "output": "t4",
        "expected": "4",
        "correct": 1,
        "correct_strict": 0,
        "bits": 2.5,
    }
    found = [(r["unit"], r["method"], r["correct"]) for r in rows[1:]]
    assert found == [
        ("problem/0", "a", 0),
        ("problem/2", "a", 1),
        ("problem/4", "b", 0),
        ("problem/0", "b", 0),
    ]
    summary = summarise_success(rows[:3], rows[3:])
    assert summary["units"] == 3 and summary["accuracy"] == pytest.approx(2 / 3) and summary["difference"] == 0.5
