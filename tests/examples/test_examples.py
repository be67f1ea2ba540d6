"""The example scripts, from their command lines, on a tiny model saved to a folder."""

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from example_scripts import script

from spectralquant.evaluation.methods import METHODS

Row = dict[str, Any]


@pytest.fixture(scope="module")
def perplexity() -> ModuleType:
    return script("run_perplexity")


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """The arguments for two short texts."""
    for name, line in (("squares", "Line {} of {}.\n"), ("rhymes", "{} bottles, {} bottles on the wall,\n")):
        (tmp_path / f"{name}.txt").write_text("".join(line.format(i, i * i) for i in range(100)), encoding="utf-8")
    return [f"--text={name}={tmp_path / f'{name}.txt'}" for name in ("squares", "rhymes")]


def rows_of(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


# run_perplexity -------------------------------------------------------------------------------------------------------


def test_perplexity_table_is_that_of_the_rows(
    perplexity: ModuleType, model_folder: str, llama_calibration: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["--model", model_folder, "--calibration", str(llama_calibration), "--context", "260", "--windows", "2", "--preset", "high", "--out", str(out)]
    assert perplexity.main([*arguments, *texts]) == 0
    header, *lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert header.split() == ["text", "method", "bits", "ratio", "ppl", "plain", "ppl", "ppl", "ratio", "KL", "same", "token"]
    rows = rows_of(out)
    assert {(r["text"], r["method"], r["window"]) for r in rows} == {(t, m, w) for t in ("squares", "rhymes") for m in ("fp16", "high") for w in (0, 1)}
    assert len(lines) == 4
    for line, (text, name) in zip(lines, [(t, m) for t in ("squares", "rhymes") for m in ("fp16", "high")], strict=True):
        mine = [r for r in rows if (r["text"], r["method"]) == (text, name)]
        assert line.startswith(text) and METHODS[name].label in line
        figures = line.split(METHODS[name].label)[1].replace("x", "").replace("±", "").replace("%", "").split()
        bits, ratio, plain, ppl, ppl_ratio, kl, error, agreement = map(float, figures)
        windows = [mean(r["kl"]) for r in mine]
        assert bits == pytest.approx(mean([r["bits"] for r in mine]), abs=0.005) and ratio == pytest.approx(16 / bits, rel=0.01)
        assert plain == pytest.approx(math.exp(mean(mine[0]["nll_plain"] + mine[1]["nll_plain"])), abs=6e-4)
        assert ppl == pytest.approx(math.exp(mean(mine[0]["nll"] + mine[1]["nll"])), abs=6e-4)
        assert ppl_ratio == pytest.approx(ppl / plain, abs=1e-4)
        assert kl == pytest.approx(mean(windows), abs=6e-5) and error == pytest.approx(abs(windows[0] - windows[1]) / 2, abs=6e-5)
        assert agreement == pytest.approx(100 * mean(mine[0]["agree"] + mine[1]["agree"]), abs=0.06)


def test_perplexity_leaves_nothing_behind_without_a_folder(
    perplexity: ModuleType, model_folder: str, llama_calibration: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.chdir(tmp_path)
    there = set(tmp_path.iterdir())
    arguments = ["--model", model_folder, "--calibration", str(llama_calibration), "--context", "200", "--windows", "1", "--preset", "max", texts[0]]
    assert perplexity.main(arguments) == 0
    assert set(tmp_path.iterdir()) == there and not list(scratch.iterdir())


def test_perplexity_goes_on_in_its_folder(
    perplexity: ModuleType, model_folder: str, llama_calibration: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second run measures what is new, and shows what was asked for."""
    common = ["--model", model_folder, "--calibration", str(llama_calibration), "--context", "200", "--windows", "1", "--out", str(tmp_path / "run"), texts[0]]
    assert perplexity.main([*common, "--preset", "max"]) == 0
    first = rows_of(tmp_path / "run")
    capsys.readouterr()
    assert perplexity.main([*common, "--preset", "high"]) == 0
    second = rows_of(tmp_path / "run")
    assert second[: len(first)] == first and [r["method"] for r in second] == ["fp16", "max", "high"]
    shown = capsys.readouterr().out
    assert "spectralquant high" in shown and "spectralquant max" not in shown


def test_calibration_is_written_where_it_is_missing(perplexity: ModuleType, model_folder: str, texts: list[str], tmp_path: Path) -> None:
    arguments = ["--model", model_folder, "--calibration", str(tmp_path / "own"), "--context", "200", "--windows", "1", "--preset", "max", texts[0]]
    assert perplexity.main(arguments) == 0
    written = tmp_path / "own.safetensors"
    before = written.read_bytes()
    assert perplexity.main(arguments) == 0
    assert written.read_bytes() == before


# What is wrong -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "nowhere.gguf"], "there is no such file"),
        (["--windows", "0"], "windows=0 is out of range"),
        (["--context", "0"], "contexts=0 is out of range"),
        (["--context", "1000000"], "too few for 1 windows"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], text: str, model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("run_perplexity").main(["--model", model_folder, "--windows", "1", *arguments]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("run_perplexity")]
    assert len(errors) == 1 and text in errors[0] and captured.err.rstrip().endswith(errors[0]) and not captured.out


def test_unusable_calibration_is_one_line(model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FP16 could be measured, but it is not what was asked for."""
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    arguments = ["--model", model_folder, "--calibration", str(tmp_path / "broken"), "--context", "200", "--windows", "1", "--preset", "high"]
    assert script("run_perplexity").main(arguments) == 2
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith("run_perplexity") and "high" in error and "broken.safetensors" in error and not captured.out


@pytest.mark.parametrize("arguments", [["--preset", "tiny"], ["--preset", "kivi2-g32"]])
def test_unknown_preset_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script("run_perplexity").main(arguments)
    assert stop.value.code == 2 and f"invalid choice: '{arguments[1]}'" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["book.txt", "=book.txt", "prose="])
def test_text_needs_a_name_and_a_source(perplexity: ModuleType, argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        perplexity.main(["--text", argument])
    assert stop.value.code == 2 and "expected NAME=SOURCE" in capsys.readouterr().err
