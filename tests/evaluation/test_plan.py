"""A plan refuses what could not be measured or would flatter a method, and says what it expected."""

import json
from typing import Any

import pytest

from spectralquant.errors import ConfigError
from spectralquant.evaluation.plan import DEFAULT_TEXTS, NEEDLE_KINDS, Plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ()}, "methods is empty: name at least one"),
        ({"windows": 0}, "windows=0 is out of range: expected an integer >= 1"),
        ({"windows": 2.5}, "windows=2.5: expected an integer >= 1"),
        ({"scored": "many"}, "scored='many': expected an integer >= 1"),
        ({"scored": 1}, "scored=1: expected at least 2, the perplexity needs a next token"),
        ({"contexts": (512, 0)}, "contexts=0 is out of range"),
        ({"chunk": 0}, "chunk=0 is out of range"),
        ({"chunk": 17}, "chunk=17: expected 1 to 16, longer pieces attend to themselves uncoded"),
        ({"needle_lengths": (1024, -1)}, "needle_lengths=-1 is out of range"),
        ({"needle_depths": (0.5, 1.01)}, r"needle_depths=\(0.5, 1.01\): expected shares between 0 and 1"),
        ({"needle_depths": (-0.1,)}, "needle_depths=.*: expected shares"),
        ({"needle_kinds": ("sentence", "haiku")}, r"needle_kinds has \['haiku'\]: expected some of sentence, key-value, multi-key"),
        ({"needle_samples": 0}, "needle_samples=0 is out of range"),
        ({"problems": 0}, "problems=0 is out of range"),
    ],
)
def test_plan_rejects(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(**{"model": "m", "methods": ("fp16",), **change})


@pytest.mark.parametrize(
    "change", [{"chunk": 1}, {"chunk": 16}, {"scored": 2}, {"needle_depths": (0, 1)}, {"needle_kinds": NEEDLE_KINDS[:1]}, {"contexts": (1,)}]
)
def test_plan_takes_its_limits(change: dict[str, Any]) -> None:
    Plan("m", ("fp16",), **change)


def test_plan_default_texts_are_its_own() -> None:
    first = Plan("m", ("fp16",))
    first.texts["mine"] = "file"
    assert Plan("m", ("fp16",)).texts == DEFAULT_TEXTS and "mine" not in DEFAULT_TEXTS


def test_as_json_is_plain_and_whole() -> None:
    """JSON gives back what was put in: nothing is a tuple or lost."""
    plan = Plan("m", ("fp16", "high"), problem_file="p.jsonl", needle_depths=(0.25,))
    document = plan.as_json()
    assert json.loads(json.dumps(document)) == document
    assert Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}) == plan
