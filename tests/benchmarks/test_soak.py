"""benchmarks/soak.py and benchmarks/state_machine.py on little: what they count, and that they notice."""

import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spectralquant.cache.hf import SpectralCache
from spectralquant.cache.segment import Segment


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    for each in (name, "calibration", "calibration_report"):
        monkeypatch.delitem(sys.modules, each, raising=False)
    return importlib.import_module(name)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory and files are read from /proc")
def test_soak_of_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = imported("soak", monkeypatch)
    for name, value in {"PROMPT": 150, "NEW": 8, "TURNS": 2, "SAMPLED_PREFIXES": 5}.items():
        monkeypatch.setattr(script, name, value)
    out, plot = tmp_path / "soak.json", tmp_path / "soak.svg"
    script.main(["--model=tiny", "--batch=2", "--tokens=100", "--prefixes=20", f"--out={out}", f"--plot={plot}"])
    document = json.loads(out.read_text())
    samples = document["decoding"]["samples"]
    assert samples[-1]["done"] >= 100 and {s["kind"] for s in samples} == {"fresh", "growing", "prefixes", "copies", "failing"}
    assert document["store"]["hits"] >= 4 and document["store"]["evicted"] > 0 and document["store"]["largest_bytes"] <= document["store"]["max_bytes"]
    assert "<svg" in plot.read_text()


def test_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds that differ are no growth; growth is found, with the scatter that there is."""
    script, make = imported("soak", monkeypatch), torch.Generator().manual_seed(1)
    noise = torch.randn(200, generator=make).tolist()
    samples = [{"done": 500 * i, "kind": "ab"[i % 2], **dict.fromkeys(script.UNITS, 7.0)} for i in range(200)]
    for i, one in enumerate(samples):
        one["tensors"] = 100.0 * (i % 2)
        one["rss_bytes"] = 1e6 + 3 * one["done"] + 50 * noise[i]
    found = script.slopes(samples)
    assert found["samples"] == 150 and found["files"]["per_1000"] == found["files"]["standard_error"] == 0
    assert abs(found["tensors"]["per_1000"]) < 1e-9
    assert abs(found["rss_bytes"]["per_1000"] - 3000) < 4 * found["rss_bytes"]["standard_error"] < 10
    assert script.slopes(samples[:2]) == {}


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Counter[str], str | None]]:
    """`run_programs` with so many at a time."""
    script = imported("state_machine", monkeypatch)

    def run(kind: str, at_a_time: int, steps: int) -> tuple[Counter[str], str | None]:
        monkeypatch.setattr(script, "AT_A_TIME", at_a_time)
        return script.run_programs(kind, 1, steps)

    return run


def test_random_programs_find_what_is_wrong(programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a crop to leave exact tokens of later slots, for instance."""
    done, failure = programs("cache", 3, 6)
    assert failure is None and done["programs"] >= 3 and done["checks"] > 3
    monkeypatch.setattr(Segment, "_settle", Segment.write_lengths)
    _, failure = programs("cache", 60, 12)
    assert failure is not None and failure.startswith(("AssertionError", "CacheFileError")) and "state.begin(" in failure


def test_random_programs_of_generate(programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They notice a call that leaves a cache longer than its text, for instance."""
    done, failure = programs("generate", 2, 5)
    assert failure is None and done["programs"] >= 2 and done["turn"] > 0
    monkeypatch.setattr(SpectralCache, "roll_back", lambda cache, length: None)
    _, failure = programs("generate", 20, 10)
    assert failure is not None and "AssertionError" in failure and "state.begin(" in failure
