"""The command line."""

import json
from pathlib import Path

import pytest

from spectralquant.cli.main import main


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"standard", "high", "max", "ultra"}


def test_inspect(llama_calibration: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(llama_calibration)]) == 0
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM: 3 coded layers" in shown and "certificate" in shown


def test_inspect_missing_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.real
def test_demo(smollm2_calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "figures.json"
    arguments = [
        "demo",
        "--preset",
        "high",
        "--prompt",
        "Say hello. " * 90,
        "--max-new-tokens",
        "4",
        "--calibration",
        str(smollm2_calibration),
        "--json",
        str(target),
    ]
    assert main(arguments) == 0
    runs = json.loads(target.read_text())["runs"]
    assert [r["method"] for r in runs] == ["FP16", "high"]
    assert runs[1]["cache_bytes"] < runs[0]["cache_bytes"] and 0 <= runs[1]["kl"] < 0.1
    assert "ratio" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--max-new-tokens", "0"], ["--model", "nowhere.gguf"]], ids=str)
def test_demo_rejects(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    assert "expected" in (text := capsys.readouterr().err) or "no such file" in text
