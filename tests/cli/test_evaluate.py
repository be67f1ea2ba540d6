"""`spectralquant evaluate` from the command line."""

import json
from pathlib import Path

import pytest

from spectralquant.cli.main import main
from spectralquant.evaluation.methods import METHODS


def test_list_names_all_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--out", "unused", "--method", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in METHODS)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--method", "fp17"], "method 'fp17' is unknown"),
        (["--chunk", "17"], "chunk=17"),
        (["--text", "book.txt"], "--text book.txt: expected NAME=SOURCE"),
        (["--needle-depth", "1.5"], "needle_depths=(1.5,)"),
        (["--calibration", "nowhere"], "--calibration nowhere: there is no such file"),
        (["nowhere.gguf"], "there is no such file"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--out", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.real
def test_evaluate_smollm2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FP16 is far better than 4-bit KIVI, which is better than 2-bit KIVI; the report is written."""
    methods = [argument for name in ("fp16", "kivi4-g32", "kivi2-g32") for argument in ("--method", name)]
    out = tmp_path / "run"
    assert main(["evaluate", "--out", str(out), *methods, "--context", "300", "--windows", "2", "--scored", "32", "--seed", "5"]) == 0
    lines = {(row["text"], row["method"]): row for row in json.loads((out / "report.json").read_text())["language"]}
    for text in ("prose", "code"):
        fp16, kivi4, kivi2 = (lines[text, name]["kl"] for name in ("fp16", "kivi4-g32", "kivi2-g32"))
        assert fp16 < 1e-4 < kivi4 < kivi2
    assert "KIVI 4-bit, groups of 32" in capsys.readouterr().out and (out / "kl_against_bits.png").stat().st_size > 10_000
