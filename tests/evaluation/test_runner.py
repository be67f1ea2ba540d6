"""The runner: configuration first, rows one by one, resumption, methods that can't run here."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model

from spectralquant.errors import ConfigError
from spectralquant.evaluation import runner
from spectralquant.evaluation.methods import METHODS, Method, Subject
from spectralquant.evaluation.plan import Plan


class Letters:
    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 150 for c in text]}


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject(tiny_model("llama"), Letters(), tmp_path / "run")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "text.txt").write_text("".join(f"Line {i} of {i * i}.\n" for i in range(400)))
    return Plan("tiny", ("fp16", "q8_0"), texts={"lines": str(tmp_path / "text.txt")}, contexts=(64, 200), windows=3, scored=8)


def test_every_unit_has_a_row_of_every_method(plan: Plan, subject: Subject) -> None:
    rows = runner.run(plan, subject, "command", progress=False)
    assert {(r["context"], r["window"], r["method"]) for r in rows} == {(c, w, m) for c in (64, 200) for w in range(3) for m in plan.methods}
    assert len(rows) == 12 and runner.read_rows(subject.folder) == rows
    assert all(len(r["kl"]) == 8 and r["seconds"] >= 0 for r in rows)


def test_configuration_is_written_before_the_first_row(plan: Plan, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_measure", stop)
    with pytest.raises(KeyboardInterrupt):
        runner.run(plan, subject, "spectralquant evaluate", progress=False)
    config = json.loads((subject.folder / "config.json").read_text())
    assert config["plan"] == json.loads(json.dumps(plan.as_json())) and config["command"] == "spectralquant evaluate"
    assert config["versions"]["torch"] and config["dtype"] == "float32"


def test_an_interrupted_run_goes_on_where_it_stopped(plan: Plan, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = runner.run(plan, subject, progress=False)
    path = subject.folder / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:7]) + lines[7][:30])  # cut off in the middle of a line
    measured = []
    real = runner._measure

    def watch(*args: Any) -> Any:
        for row in real(*args):
            measured.append((row["unit"], row["method"]))
            yield row

    monkeypatch.setattr(runner, "_measure", watch)
    again = runner.run(plan, subject, progress=False)
    key = [(r["unit"], r["method"]) for r in whole]
    assert measured == key[7:]
    strip = [{k: v for k, v in r.items() if k != "seconds"} for r in whole]
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in again] == strip


def test_methods_can_be_added_to_a_run_and_settings_can_not(plan: Plan, subject: Subject) -> None:
    runner.run(plan, subject, progress=False)
    more = Plan(**{**_fields(plan), "methods": ("fp16", "q8_0", "fp8")})
    assert len(runner.run(more, subject, progress=False)) == 18
    with pytest.raises(ConfigError, match="scored: 8"):
        runner.run(Plan(**{**_fields(plan), "scored": 9}), subject, progress=False)


def test_a_method_that_can_not_be_prepared_is_left_out_and_named(plan: Plan, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(subject: Subject) -> Any:
        raise ConfigError("method 'broken' needs a package: pip install nothing")

    monkeypatch.setitem(METHODS, "broken", Method("broken", "Broken", "none", True, refuse))
    rows = runner.run(Plan(**{**_fields(plan), "methods": ("fp16", "broken")}), subject, progress=False)
    assert {r["method"] for r in rows} == {"fp16"}
    assert json.loads((subject.folder / "config.json").read_text())["unavailable"] == {"broken": "method 'broken' needs a package: pip install nothing"}
    other = Subject(subject.model, subject.tokenizer, subject.folder.with_name("other"))
    with pytest.raises(ConfigError, match="no method could be prepared: broken"):
        runner.run(Plan(**{**_fields(plan), "methods": ("broken",)}), other, progress=False)


@pytest.mark.parametrize(("field", "text"), [({"methods": ("fp17",)}, "method 'fp17' is unknown"), ({"tasks": ("tasks",)}, "task 'tasks' is unknown")])
def test_unknown_names_are_refused_before_anything_is_written(plan: Plan, subject: Subject, field: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        runner.run(Plan(**{**_fields(plan), **field}), subject, progress=False)
    assert not subject.folder.exists()


def _fields(plan: Plan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}
