"""The files of a run's folder, read and checked: a run may be somebody else's, and what is shown of it is computed with what it says."""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spectralquant.errors import ConfigError
from spectralquant.files import write_text
from spectralquant.untrusted import figure, listed, member, members, number, parse_json, printable, read_bounded, shown, whole

CONFIG, ROWS, BENCH = "config.json", "rows.jsonl", "bench.json"
MAX_DOCUMENT, MAX_ROWS = 16 << 20, 512 << 20
"""Bytes of a configuration or a bench, and of all rows: 20 methods on 24 windows of 256 tokens have 10 MB."""
MAX_PANELS, MAX_TEXT = 64, 1 << 16
"""Texts, and contexts, of a run, each of which is a picture; characters of a text."""
MAX_TOKENS = 1 << 40

Row = dict[str, Any]
Check = Callable[[Any, str], Any]


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of an evaluation.

    Raises:
        ConfigError: It can't be read, or is not as `runner` writes it.
    """
    with _told(path, "remove the folder and run again"):
        return _document(path, {"windows": _count, "scored": _count, "chunk": _some, "seed": _seed, "methods": _names})


def read_bench(path: Path) -> dict[str, Any]:
    """What `speed.bench` wrote.

    Raises:
        ConfigError: It can't be read, or is not as `bench` writes it.
    """
    with _told(path, f"run `spectralquant bench MODEL --out {path.parent}` again"):
        document = _document(path, {"repeats": _count, "new_tokens": _count, "presets": _strings})
        rows = [members(row, "a row") for row in listed(member(document, "rows", path.name), "rows")]
        for row in rows:
            _fields(row, {"cache": _text, "context": _some})
            if "out_of_memory" not in row:
                _fields(row, _BENCH_ROW)
        if len(rows) > MAX_PANELS**2:
            raise ValueError(f"it has {len(rows):,} rows, at most {MAX_PANELS**2:,} are read")
        return document


def read_rows(folder: Path) -> list[Row]:
    """Rows of a run so far. A last line that was cut off by an interruption is removed from the file.

    Raises:
        ConfigError: They can't be read, or are not as tasks write them.
    """
    path = folder / ROWS
    if not path.exists():
        return []
    with _told(path, "remove the folder and run again"):
        text = read_bounded(path, MAX_ROWS).decode("utf-8")
        whole_lines = text[: text.rfind("\n") + 1]
        rows = [_row(line, i) for i, line in enumerate(whole_lines.splitlines(), 1)]
        for column in ("text", "context", "length", "depth", "kind"):
            if (count := len({row[column] for row in rows if column in row})) > MAX_PANELS:
                raise ValueError(f"it has {count} values of {column}, at most {MAX_PANELS} are read")
    if len(whole_lines) < len(text):
        write_text(path, whole_lines)
    return rows


@contextmanager
def _told(path: Path, remedy: str) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be used: {error}; {remedy}") from error


def _document(path: Path, plan: dict[str, Check]) -> dict[str, Any]:
    document = members(parse_json(read_bounded(path, MAX_DOCUMENT), path.name), path.name)
    _fields(document, {"command": _text, "device": _text, "dtype": _text, "python": _text, "threads": _count, "plan": members, "versions": members})
    _fields(document["plan"], {"model": _text, **plan})
    for name, version in document["versions"].items():
        _text(name, "a package")
        _text(version or "", f"the version of {name}")
    for name, reason in members(document.get("unavailable", {}), "unavailable").items():
        _text(name, "a method")
        _text(reason, f"why {shown(name)} was left out")
    return document


def _row(line: str, number_of_line: int) -> Row:
    what = f"line {number_of_line}"
    row = members(parse_json(line, what), what)
    _fields(row, {"task": _text, "unit": _text, "method": _text})
    if row["task"] not in _TASKS:
        raise ValueError(f"task is {shown(row['task'])}, expected one of {', '.join(_TASKS)}")
    _fields(row, _TASKS[row["task"]])
    if row["task"] == "language" and len(row["nll"]) != len(row["nll_plain"]):
        raise ValueError(f"{what} has lists of different lengths")
    if row["task"] == "problems" and len({len(row[column]) for column in ("problem", "output", "expected", "correct", "correct_strict")}) > 1:
        raise ValueError(f"{what} has lists of different lengths")
    return row


def _fields(row: dict[str, Any], checks: dict[str, Check]) -> None:
    for name, check in checks.items():
        check(member(row, name, "it"), name)


def _text(value: Any, what: str) -> str:
    return printable(value, what, MAX_TEXT)


def _count(value: Any, what: str) -> int:
    return whole(value, what, 0, MAX_TOKENS)


def _some(value: Any, what: str) -> int:
    return whole(value, what, 1, MAX_TOKENS)


def _seed(value: Any, what: str) -> int:
    return whole(value, what, -(1 << 63), 1 << 63)


def _share(value: Any, what: str) -> float:
    return number(value, what, 0, 1)


def _amount(value: Any, what: str) -> float:
    return number(value, what, 0, 1e18)


def _bits(value: Any, what: str) -> float:
    return number(value, what, 1e-3, 1e3)


def _measured(value: Any, what: str) -> float:
    """A figure whose square is one too, or what came of a measurement that failed."""
    return figure(value, what) if isinstance(value, float) and not math.isfinite(value) else number(value, what, -1e9, 1e9)


def _right(value: Any, what: str) -> int:
    return whole(value, what, 0, 1)


def _nullable(check: Check) -> Check:
    return lambda value, what: value if value is None else check(value, what)


def _each(check: Check, least: int = 0) -> Check:
    def check_all(value: Any, what: str) -> list[Any]:
        if len(listed(value, what)) < least:
            raise ValueError(f"{what} is empty")
        return [check(part, f"an entry of {what}") for part in value]

    return check_all


_strings, _names = _each(_text), _each(_text, least=1)
_TASKS: dict[str, dict[str, Check]] = {
    "language": {
        "text": _text, "context": _some, "kl": _each(_measured, 1), "agree": _each(_share, 1), "nll": _each(_measured, 1), "nll_plain": _each(_measured, 1),
        "bits": _bits, "whole_bits": _bits,
    },
    "needles": {"kind": _text, "length": _some, "depth": _share, "correct": _right, "answer_nll": _measured},
    "problems": {
        "problem": _each(_count), "output": listed, "expected": listed, "correct": _each(_right), "correct_strict": _each(_right), "bits": _measured,
    },
}  # fmt: skip
_BENCH_ROW: dict[str, Check] = {
    **dict.fromkeys(("prompt_s", "prompt_s_low", "prompt_s_high", "tokens_per_s_low", "tokens_per_s_high", "codec_bytes"), _amount),
    **dict.fromkeys(("tokens_per_s", "cache_bytes", "fp16_bytes"), lambda value, what: number(value, what, 1e-9, 1e18)),
    "peak_bytes": _nullable(_amount),
    "decode_mode": _nullable(_text),
}
