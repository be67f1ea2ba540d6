"""benchmarks/ablations.py on a tiny model: every step can be built, lines are kept and not measured again."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import TinyTokenizer, tiny_model

from spectralquant.codec.quantizer import QUANTIZERS
from spectralquant.profile import Choices


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    for name in ("ablations", "calibration", "calibration_report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("ablations")
    monkeypatch.setattr(module, "load_model", lambda name, dtype: (tiny_model("llama"), TinyTokenizer(), "tiny"))
    return module


def test_steps_change_what_there_is_to_change(script: ModuleType) -> None:
    names = set(Choices.__dataclass_fields__) | {"quantizer", "tokens"}
    for step, change in script.STEPS.items():
        assert change.keys() <= names and change.get("quantizer", "joint") in QUANTIZERS
        assert (step == "as shipped") == (not any(getattr(Choices(), k, None) != v and (k, v) != ("quantizer", "joint") for k, v in change.items()))


def test_lines_are_measured_once(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "ablations.json"
    text.write_text(" ".join(str(i * i) for i in range(3000)))
    common = [f"--text=squares={text}", "--context=260", "--windows=2", "--scored=16", f"--out={out}"]
    script.main([*common, "--step=as shipped", "--step=K in the plain frame"])
    first = json.loads(out.read_text())["lines"]
    assert [line["step"] for line in first] == ["as shipped", "K in the plain frame"]
    assert all(len(line["texts"]["squares"]["kl_per_window"]) == 2 and line["texts"]["squares"]["kl"] >= 0 for line in first)
    assert first[0]["texts"] != first[1]["texts"]
    calls = []
    monkeypatch.setattr(script, "collect", lambda *a: calls.append(a))
    script.main([*common, "--step=as shipped"])
    assert not calls and json.loads(out.read_text())["lines"] == first
