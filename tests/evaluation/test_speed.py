"""Speed and memory: what is measured and counted. Figures of clocks are not looked at."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyTokenizer, tiny_model
from transformers import PreTrainedModel

from spectralquant import SpectralQuantEngine
from spectralquant.compat import cache_argument
from spectralquant.errors import ConfigError
from spectralquant.evaluation import speed
from spectralquant.evaluation.speed import SpeedPlan, Ticks, bench
from spectralquant.profile import load_profile

Measured = tuple[dict[str, Any], Path]
"""What `bench` returned, and the folder it wrote to."""
PLAN = SpeedPlan("tiny", ("high", "max"), (150, 600), new_tokens=5, repeats=2)


@pytest.fixture(scope="module")
def measured(llama: PreTrainedModel, tokenizer: TinyTokenizer, llama_calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("bench") / "new"
    return bench(PLAN, llama, tokenizer, load_profile(llama_calibration), folder, "spectralquant bench", progress=False), folder


def test_a_row_per_context_and_cache(measured: Measured) -> None:
    document, folder = measured
    rows = document["rows"]
    assert [(row["context"], row["cache"]) for row in rows] == [(c, n) for c in (150, 600) for n in ("fp16", "high", "max")]
    assert all(row["tokens"] == row["context"] + 5 + document["warm_up"] for row in rows)  # the last token of all is not fed again
    assert all(row["new_tokens"] == 5 and row["repeats"] == 2 and row["peak_bytes"] is None for row in rows)
    for row in rows:
        for name in ("prompt_s", "tokens_per_s"):
            assert 0 < row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert json.loads((folder / "bench.json").read_text()) == json.loads(json.dumps(document))
    assert document["command"] == "spectralquant bench" and document["plan"]["presets"] == ("high", "max") and document["versions"]["torch"]


def test_bytes_are_those_of_the_caches(measured: Measured, llama: PreTrainedModel, tokenizer: TinyTokenizer, engine: SpectralQuantEngine) -> None:
    """Uncompressed: 3 layers of K and V, 2 heads of 32, in float32. Compressed: what a cache holds after as many tokens of the same prompt."""
    found = {(row["context"], row["cache"]): row for row in measured[0]["rows"]}
    plain, packed = found[600, "fp16"], found[600, "high"]
    assert plain["cache_bytes"] == plain["tokens"] * 3 * 2 * 2 * 32 * 4
    assert plain["fp16_bytes"] == packed["fp16_bytes"] == plain["cache_bytes"] // 2
    ids = speed._prompt(PLAN, tokenizer)
    assert ids.shape == (1, 600)
    with engine.applied_to(llama):
        cache = engine.cache(llama)
        llama.generate(ids, attention_mask=torch.ones_like(ids), **cache_argument(llama, cache), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert (packed["cache_bytes"], packed["codec_bytes"]) == (cache.nbytes, cache.codec_bytes)


def test_the_calibration_lies_in_the_folder(measured: Measured, llama_calibration: Path) -> None:
    mine, given = load_profile(measured[1] / "calibration.safetensors"), load_profile(llama_calibration)
    assert mine.model == given.model and torch.equal(mine.layers[0].key.variance, given.layers[0].key.variance)


def test_the_model_is_as_it_was(llama: PreTrainedModel, tokenizer: TinyTokenizer, llama_calibration: Path) -> None:
    before = llama.config._attn_implementation
    document = bench(SpeedPlan("tiny", ("high",), (40,), 2, 1), llama, tokenizer, load_profile(llama_calibration), progress=False)
    assert llama.config._attn_implementation == before and len(document["rows"]) == 2


def test_memory_that_runs_out_is_a_row(llama: PreTrainedModel, tokenizer: TinyTokenizer, llama_calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = speed._generate

    def starve(model: Any, tokenizer: Any, make_cache: Any, ids: torch.Tensor, *rest: Any) -> dict[str, Any]:
        if ids.shape[1] > 100:
            raise torch.OutOfMemoryError("no more")
        return original(model, tokenizer, make_cache, ids, *rest)

    monkeypatch.setattr(speed, "_generate", starve)
    rows = bench(SpeedPlan("tiny", (), (50, 200), 2, 1), llama, tokenizer, load_profile(llama_calibration), progress=False)["rows"]
    assert "cache_bytes" in rows[0] and rows[1] == {"cache": "fp16", "context": 200, "out_of_memory": True}


def test_ticks_note_the_tokens_they_are_told() -> None:
    ticks, scores = Ticks(torch.device("cpu"), (0, 2)), torch.ones(1, 3)
    for count in (1, 1, 2, 2):
        assert ticks(torch.ones(1, 1), scores) is scores
        assert len(ticks.times) == count
    assert ticks.times == sorted(ticks.times)


def test_a_context_longer_than_the_model_reads(tokenizer: TinyTokenizer, llama_calibration: Path) -> None:
    with pytest.raises(ConfigError, match=r"contexts=4090 with 128 new tokens is 42\d\d tokens, the model reads 4096; choose a shorter one"):
        bench(SpeedPlan("tiny", ("high",), (512, 4090)), tiny_model("llama"), tokenizer, load_profile(llama_calibration), progress=False)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"contexts": ()}, "contexts is empty"),
        ({"contexts": (0,)}, "contexts=0 is out of range"),
        ({"new_tokens": 0}, "new_tokens=0 is out of range"),
        ({"repeats": 0}, "repeats=0 is out of range"),
        ({"presets": ("higher",)}, "compression='higher' is no preset"),
    ],
)
def test_plan_rejects(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SpeedPlan("tiny", **settings)
