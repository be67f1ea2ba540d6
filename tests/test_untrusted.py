"""JSON and values of files that anybody may have made."""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectralquant import untrusted


def test_read_bounded(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert untrusted.read_bounded(file, 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        untrusted.read_bounded(file, 4)
    with pytest.raises(ValueError, match="no such file"):
        untrusted.read_bounded(tmp_path / "other", 4)
    with pytest.raises(ValueError, match="expected a file"):
        untrusted.read_bounded(tmp_path, 4)


def test_read_bounded_waits_for_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="expected a file"):
        untrusted.read_bounded(tmp_path / "pipe", 4)
    with pytest.raises(ValueError, match="expected a file"):
        untrusted.read_bounded(Path("/dev/zero"), 4)


@pytest.mark.parametrize("text", ["{", b"\xff", "1" * 5000, "nul", "[" * 100_000, '{"a":' * 100_000, "[" * 40 + "]" * 40])
def test_parse_json_refuses(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"it is n(o JSON|ested more than 32 deep)"):
        untrusted.parse_json(text, "it")


def test_parse_json_takes_what_is_not_too_deep() -> None:
    assert untrusted.parse_json("[" * 31 + "]" * 31, "it") == eval("[" * 31 + "]" * 31)
    assert untrusted.parse_json('{"a": [1, 2.5, null, true, "x"]}', "it") == {"a": [1, 2.5, None, True, "x"]}


ACCEPTED: list[tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]] = [
    (untrusted.number, (0, 1, 2.5), (True, "1", None, [1], math.nan, math.inf, 10**400)),
    (untrusted.figure, (0, -2.5, math.nan, math.inf), (True, "1", None, 10**400)),
    (untrusted.flag, (True, False), (0, 1, "true", None)),
    (untrusted.members, ({}, {"a": 1}), ([], "x", None)),
    (untrusted.listed, ([], [1]), ({}, "x", None)),
    (untrusted.printable, ("", "é x", "two\nlines"), ("\x1b[2J", "a\0", "\ud800", "x" * 5000, 1, None, "\u202e")),
    (untrusted.showable, ({"a": [1, None, "x", math.nan]}, [], 3), ({"\x1b": 1}, [{"a": ["\0"]}], 10**400)),
]


@pytest.mark.parametrize(("check", "good", "bad"), ACCEPTED, ids=lambda v: getattr(v, "__name__", ""))
def test_values_are_taken_by_type(check: Callable[..., Any], good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    for value in good:
        got = check(value, "it")
        assert got == value or math.isnan(got)
    for value in bad:
        with pytest.raises(ValueError, match=r"it is|in it is"):
            check(value, "it")


@pytest.mark.parametrize(("value", "low", "high"), [(1.5, 2, 3), (4, 2, 3), (math.inf, 0, 1)])
def test_numbers_have_a_range(value: float, low: float, high: float) -> None:
    with pytest.raises(ValueError, match=f"share is {value}, expected a number from {low} to {high}"):
        untrusted.number(value, "share", low, high)
    assert untrusted.number(math.inf, "peak", 0, math.inf, endless=True) == math.inf


def test_whole_numbers() -> None:
    assert untrusted.whole(3, "run", 0, 3) == 3
    for value in (4, -1, 1.0, True, "1", 10**5000):
        with pytest.raises(ValueError, match="expected an integer from 0 to 3"):
            untrusted.whole(value, "run", 0, 3)


def test_what_others_say_is_one_printable_line() -> None:
    assert untrusted.one_line(ValueError("two\nlines \x1b[2J \ud800")) == "two lines ?[2J ?"
    assert len(untrusted.one_line("x" * 1000)) == 300 and untrusted.one_line(KeyError()) == "KeyError"
    assert re.fullmatch(r"'x+\.\.\.", untrusted.shown("x" * 1000)) and len(untrusted.shown("x" * 1000)) == 80
