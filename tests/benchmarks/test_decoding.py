"""benchmarks/decoding.py end to end on a tiny shape: figures are not looked at, what is measured is."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from spectralquant.errors import ConfigError


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    for name in ("attention", "calibration", "calibration_report", "decoding"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("decoding")


def test_every_cache_is_measured(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "PIECE", 200)
    out = tmp_path / "decoding.json"
    script.main(["--shape=tiny", "--context=400", "--batch=2", "--tokens=3", f"--out={out}"])
    document = json.loads(out.read_text())
    assert [row["cache"] for row in document["rows"]] == list(script.KINDS)
    assert all(row["context"] == 400 and row["batch"] == 2 and row["prefill_s"] > 0 for row in document["rows"])
    assert document["command"].endswith("--out=decoding.json")


def test_shapes_are_built_with_their_own_heads(script) -> None:
    for name, config in script.SHAPES.items():
        dim = config.hidden_size // config.num_attention_heads
        assert dim in (32, 128) and config.num_attention_heads % config.num_key_value_heads == 0, name
        assert {layer.heads for layer in script.made_up_profile(2, 2, dim).layers.values()} == {2}


def test_numbers_are_checked(script, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="positive"):
        script.main(["--shape=tiny", "--context=0", f"--out={tmp_path / 'x.json'}"])
