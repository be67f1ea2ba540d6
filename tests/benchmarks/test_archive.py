"""benchmarks/archive.py on a tiny model: what it says of a window is there and agrees with itself."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from tiny_models import TinyTokenizer, tiny_model


def test_lines_of_a_window(tmp_path: Path, llama_calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    for name in ("archive", "calibration", "calibration_report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    script = importlib.import_module("archive")
    monkeypatch.setattr(script, "load_model", lambda name, dtype: (tiny_model("llama"), TinyTokenizer(), "tiny"))
    text, out = tmp_path / "text.txt", tmp_path / "archive.json"
    text.write_text(" ".join(str(i * i) for i in range(3000)))
    options = ["--context=520", "--windows=2", "--scored=16", "--tokens=3000", "--sensitivity=1", "--rate=-8", "--rate=8"]
    script.main([f"--text=squares={text}", f"--calibration={llama_calibration}", *options, f"--out={out}"])
    found = json.loads(out.read_text())
    lines = [line for line in found["lines"] if line["window"] == 0]
    assert [line["method"] for line in lines] == ["high", "lossless", "archive -8", "archive -8, high", "archive 8", "archive 8, high"]
    assert len(found["lines"]) == 2 * len(lines) and all(line["windows"] == 2 for line in found["summary"])
    size = {line["method"]: line["bytes"] for line in lines}
    assert size["lossless"] < size["high"] and size["archive 8"] < size["archive -8"] == size["archive -8, high"]
    assert lines[1]["same"] and all(line["kl"] >= 0 for line in lines)
    assert lines[2]["kl"] < lines[4]["kl"]
    assert all(min(pair) >= 0 for pair in found["fit"]["sensitivity"].values()) and found["fit"]["constant_bytes"] > 0
