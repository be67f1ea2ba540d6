"""Folders of runs that somebody else made, or a disk damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
from hand_made import bench_row, language_row, language_rows, needle_row, problem_row, write_bench, write_run

from spectralquant.errors import ConfigError
from spectralquant.evaluation.report import build_report
from spectralquant.evaluation.run_files import read_bench, read_config, read_rows


def changed(file: Path, *place: str, value: Any) -> Path:
    """`file` with an entry of its document replaced."""
    document = json.loads(file.read_text())
    inner = document
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    file.write_text(json.dumps(document))
    return file


CONFIGS: list[tuple[tuple[str, ...], Any, str]] = [
    (("plan",), [], r"plan is \[\], expected an object"),
    (("plan", "methods"), [], "methods is empty"),
    (("plan", "methods"), "fp16", "methods is 'fp16', expected a list"),
    (("plan", "chunk"), 0, "chunk is 0, expected an integer from 1"),
    (("plan", "chunk"), "16", "chunk is '16'"),
    (("plan", "model"), "\x1b[2J", "all of them printable"),
    (("versions",), {"torch": 3}, "the version of torch is 3"),
    (("threads",), -1, "threads is -1"),
    (("unavailable",), ["x"], "unavailable is"),
]


@pytest.mark.parametrize(("place", "value", "text"), CONFIGS)
def test_configurations(tmp_path: Path, place: tuple[str, ...], value: Any, text: str) -> None:
    path = changed(write_run(tmp_path, language_rows()) / "config.json", *place, value=value)
    with pytest.raises(ConfigError, match=rf"config\.json can't be used: .*{text}.*; remove the folder and run again"):
        read_config(path)


ROWS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (language_row("high"), {"kl": []}, "kl is empty"),
    (language_row("high"), {"kl": ["x"]}, "an entry of kl is 'x', expected a number"),
    (language_row("high"), {"kl": [1e308]}, "an entry of kl is 1e.308, expected a number from -1e.09 to 1e.09"),
    (language_row("high"), {"task": "1e999", "text": []}, "task is '1e999', expected one of language, needles, problems"),
    (language_row("high"), {"bits": 0}, "bits is 0, expected a number from 0.001"),
    (language_row("high"), {"context": "512"}, "context is '512'"),
    (language_row("high"), {"nll": [1.0]}, "lists of different lengths"),
    (language_row("high"), {"method": None}, "method is None"),
    (needle_row("high", 1), {"depth": 2}, "depth is 2, expected a number from 0 to 1"),
    (needle_row("high", 1), {"correct": 7}, "correct is 7"),
    (problem_row("high", [1, 0], [1, 0]), {"problem": [1]}, "lists of different lengths"),
]


@pytest.mark.parametrize(("row", "change", "text"), ROWS)
def test_rows(tmp_path: Path, row: dict[str, Any], change: dict[str, Any], text: str) -> None:
    write_run(tmp_path, [row])
    build_report(tmp_path)  # it is fine without the change
    write_run(tmp_path, [row, {**row, **change}])
    with pytest.raises(ConfigError, match=rf"rows\.jsonl can't be used: .*{text}.*; remove the folder and run again"):
        build_report(tmp_path)


def test_a_row_without_a_column(tmp_path: Path) -> None:
    row = language_row("high")
    del row["agree"]
    with pytest.raises(ConfigError, match="it has no 'agree'"):
        read_rows(write_run(tmp_path, [row]))


@pytest.mark.parametrize("line", ["{", "[]", "3", "[" * 50_000, '{"task": 1}'])
def test_lines_that_are_no_rows(tmp_path: Path, line: str) -> None:
    (write_run(tmp_path, []) / "rows.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"line 1|task is 1"):
        read_rows(tmp_path)


def test_a_run_of_thousands_of_contexts(tmp_path: Path) -> None:
    """Each would be a picture."""
    with pytest.raises(ConfigError, match="65 values of context, at most 64"):
        read_rows(write_run(tmp_path, language_rows(contexts=range(1, 66))))


def test_a_method_that_has_lost_the_text(tmp_path: Path) -> None:
    """Its perplexity is infinite; that is a figure, not an error."""
    row = {**language_row("high"), "nll": [1e6] * 3}
    report = build_report(write_run(tmp_path, [row, language_row("fp16")]))
    assert "inf" in report.as_markdown() and next(line for line in report.as_json()["language"] if line["method"] == "high")["perplexity_ratio"] is None


BENCHES: list[tuple[tuple[str, ...], Any, str]] = [
    (("rows",), 3, "rows is 3, expected a list"),
    (("rows",), [{"cache": "fp16"}], "it has no 'context'"),
    (("rows",), [{**bench_row("high", 512), "cache_bytes": 0}], "cache_bytes is 0"),
    (("rows",), [{**bench_row("high", 512), "tokens_per_s": "fast"}], "tokens_per_s is 'fast'"),
    (("plan", "presets"), 3, "presets is 3, expected a list"),
    (("plan",), None, "plan is None, expected an object"),
]


@pytest.mark.parametrize(("place", "value", "text"), BENCHES)
def test_benches(tmp_path: Path, place: tuple[str, ...], value: Any, text: str) -> None:
    path = changed(write_bench(tmp_path) / "bench.json", *place, value=value)
    with pytest.raises(ConfigError, match=rf"bench\.json can't be used: .*{text}.*; run `spectralquant bench MODEL"):
        read_bench(path)
