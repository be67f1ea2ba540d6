"""benchmarks/decoding.py end to end on a tiny shape: figures are not looked at, what is measured is."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TinyTokenizer, tiny_model

from spectralquant.corpus import get_default_calibration_texts
from spectralquant.errors import ConfigError


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    for name in ("attention", "calibration", "calibration_report", "decoding", "shapes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("decoding")
    for name, value in {"PIECE": 200, "WARM": 2, "TOKENS": 3, "FILL": 300}.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.fixture
def report(script: Any) -> Any:
    sys.modules.pop("decoding_report", None)
    return importlib.import_module("decoding_report")


def run(script: Any, tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    out = tmp_path / "decoding.json"
    script.main(["--shape=tiny", "--context=400", "--batch=1", "--batch=2", "--long=700", "--peak-batch=2", f"--out={out}", *arguments])
    document = json.loads(out.read_text())
    assert "--out=decoding.json" in document["command"] and str(tmp_path) not in document["command"]
    return document["rows"]


def test_every_cache_and_suite_is_measured_and_shown(script: Any, report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = [f"--kind={kind}" for kind in ("dynamic", "static, compiled", "packed", "packed, no graph")]
    rows = run(script, tmp_path, *kinds, "--memory=0.0008")
    cases = {(r["suite"], r["cache"], r.get("context"), r.get("batch")) for r in rows}
    for kind in ("dynamic", "static, compiled", "packed", "packed, no graph"):
        assert {("contexts", kind, 400, 1), ("batches", kind, 700, 2)} <= cases
        assert (("prefix", kind, 700, 2) in cases) == kind.startswith("packed")
    assert {("peak", "packed", 700, 2), ("prompt", "dynamic", 2048, None)} <= cases
    assert all(r["token_ms"] > 0 for r in rows if r["suite"] in ("contexts", "batches", "prefix", "largest"))
    batch = {r["cache"]: r["batch"] for r in rows if r["suite"] == "largest" and r["grows"] == "batch"}
    assert batch.keys() == {"dynamic", "static, compiled", "packed", "packed, no graph"} and min(batch.values()) > 0
    (peak,) = (r for r in rows if r["suite"] == "peak" and r["cache"] == "packed")
    assert peak["planned_bytes"] > 0
    report.main([str(tmp_path / "decoding.json"), f"--images={tmp_path / 'new'}"])
    text = capsys.readouterr().out
    assert all(f"### {suite}" in text for suite in script.SUITES)
    assert "| 400 | 1 | DynamicCache, FP16 |" in text and "| 700 | 2 | 10 | spectralquant |" in text
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"decoding-contexts.png", "decoding-batches.png"}


def test_a_filled_cache_holds_what_was_asked_for(script: Any) -> None:
    bench = script.Bench.of_shape(script.SHAPES["tiny"], "high", script.torch.device("cpu"))
    for kind in ("dynamic", "static, compiled", "packed"):
        cache = bench.filled(kind, 1000, 3, 1100)
        assert int(cache.get_seq_length()) == 1000
    segment, shared = (bench.filled("packed", 1000, 3, 1100, of).coded_layers[1].segment for of in (False, True))
    assert segment.records.shape[0] == 3 and segment.prefix is None and shared.prefix.is_one and segment.packed == shared.packed == 768


def test_a_model_of_its_own_reads_a_text(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: TinyTokenizer) -> None:
    """It is calibrated, and caches hold what it made of the text."""
    calibrate, texts = script.SpectralQuantEngine.calibrate, get_default_calibration_texts(12)
    monkeypatch.setattr(script, "load_model", lambda name: (tiny_model("llama"), tokenizer, "tiny"))
    monkeypatch.setattr(script.SpectralQuantEngine, "calibrate", lambda engine, model, tok: calibrate(engine, model, tok, texts, progress=False))
    kinds = [f"--kind={kind}" for kind in ("dynamic", "static, compiled", "packed")]
    rows = run(script, tmp_path, "--model=folder/tiny.gguf", "--suite=contexts", "--suite=batches", *kinds)
    assert len(rows) == 6 and all(row["token_ms"] > 0 for row in rows) and json.loads((tmp_path / "decoding.json").read_text())["shape"] == "tiny"


@pytest.mark.parametrize("kind", ["hqq, 4 bits", "hqq, 2 bits"])
def test_peers_are_measured_where_they_are_installed(script: Any, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("hqq")
    (row,) = run(script, tmp_path, "--suite=contexts", f"--kind={kind}")
    assert row["token_ms"] > 0


def test_what_does_not_fit_is_said(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise script.torch.OutOfMemoryError("full")

    monkeypatch.setattr(script.Bench, "steps", full)
    rows = run(script, tmp_path, "--suite=batches", "--suite=largest", "--kind=packed, compiled", "--memory=0.001")
    assert rows and all(row["out_of_memory"] for row in rows)


def test_shapes_are_built_with_their_own_heads(script: Any) -> None:
    for name, config in script.SHAPES.items():
        dim = config.hidden_size // config.num_attention_heads
        assert dim in (32, 128) and config.num_attention_heads % config.num_key_value_heads == 0, name
        assert {layer.heads for layer in script.made_up_profile(2, 2, dim).layers.values()} == {2}


def test_numbers_are_checked(script: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="positive"):
        script.main(["--shape=tiny", "--context=0", f"--out={tmp_path / 'x.json'}"])


def test_the_folder_of_results_is_checked_first(script: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        script.main(["--shape=tiny", f"--out={tmp_path / 'missing' / 'x.json'}"])


def test_results_that_are_shown_are_read(report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/performance.md's first row is that of the result file."""
    root = Path(__file__).parents[2]
    results = [str(root / "benchmarks" / "results" / f"decoding-{suite}-h200.json") for suite in ("contexts", "batches", "peers", "prompt")]
    report.main([*results, f"--images={tmp_path}"])
    assert "| 512 | 1 | spectralquant, steps compiled | 6.7 |" in capsys.readouterr().out
    page = (root / "docs" / "performance.md").read_text()
    assert "| 512 | 7.2 ms | 8.1 ms | 6.7 ms |" in page
    rows = json.loads((root / "benchmarks" / "results" / "decoding-qwen-h200.json").read_text())["rows"]
    by_cache = {row["cache"]: row for row in rows if row["context"] == 32_000}
    times = [by_cache[c]["token_ms"] for c in ("dynamic", "hqq, 4 bits", "static, compiled", "packed", "packed, compiled")]
    assert "| 32,000 | {:.0f} ms | {:.0f} ms | {:.1f} ms | {:.1f} ms | {:.1f} ms |".format(*times) in page


@pytest.mark.parametrize("text", [None, "{", "[]", '{"rows": []}', '{"rows": [{"us": 3}]}'])
def test_other_files_are_refused(report: Any, tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"x.json is no result of benchmarks/decoding.py"):
        report.main([str(path)])
