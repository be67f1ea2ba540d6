"""benchmarks/prefix.py on a tiny model: with an archive model that is not there yet, it is made, and used from then on."""

import importlib
import json
import sys
from pathlib import Path

import pytest


def test_a_row_with_archives(tmp_path: Path, model_folder: str, llama_calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    for name in ("prefix", "calibration", "calibration_report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    script, out, archive = importlib.import_module("prefix"), tmp_path / "out.json", tmp_path / "archive.safetensors"
    rows, written = [], set()
    for _ in range(2):
        options = [f"--model={model_folder}", f"--calibration={llama_calibration}", f"--archive={archive}", "--tokens=400", "--repeats=1", f"--out={out}"]
        monkeypatch.setattr(sys, "argv", ["prefix.py", *options])
        script.main()
        rows += json.loads(out.read_text())["rows"]
        written.add(archive.stat().st_mtime_ns)
    assert len(written) == 1 and rows[0]["archive_bytes"] == rows[1]["archive_bytes"] < rows[0]["file_bytes"] < rows[0]["fp16_bytes"]
    assert rows[0]["archive_ratio"] == pytest.approx(rows[0]["fp16_bytes"] / rows[0]["archive_bytes"])
    assert all(rows[1][name] > 0 for name in ("archive_save_s", "archive_load_s", "archive_first_token_s"))
