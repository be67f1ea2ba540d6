"""FP16 beside presets: figures are those of the caches, and a cache that loses nothing loses nothing."""

from pathlib import Path

import pytest
from tiny_models import TinyTokenizer
from transformers import PreTrainedModel

from spectralquant import SpectralQuantEngine
from spectralquant.evaluation.side_by_side import UNCOMPRESSED, bundled_prompts, compare


def test_bundled_prompts() -> None:
    titles = [title for title, _ in bundled_prompts()]
    assert len(titles) == len(set(titles)) == 4 and all(len(text) > 100 for _, text in bundled_prompts())


def test_runs(llama: PreTrainedModel, llama_calibration: Path, tokenizer: TinyTokenizer) -> None:
    engines = {name: SpectralQuantEngine(compression=name) for name in ("high", "ultra")}
    for engine in engines.values():
        engine.load_calibration(llama_calibration)
    fp16, high, ultra = compare("title", " ".join(f"word{i}" for i in range(700)), engines, llama, tokenizer, 8)
    assert [r.method for r in (fp16, high, ultra)] == [UNCOMPRESSED, "high", "ultra"] and {r.prompt for r in (fp16, high, ultra)} == {"title"}
    assert fp16.kl == 0 and fp16.agreement == 1 and fp16.ratio == 1
    assert high.kl > 0 and ultra.kl > 0 and high.fp16_bytes == fp16.fp16_bytes == fp16.cache_bytes
    assert ultra.cache_bytes < high.cache_bytes < fp16.cache_bytes and high.ratio > high.ratio_with_codec
    assert fp16.context == 701 and fp16.new_tokens <= 8 and all(r.tokens_per_second > 0 for r in (fp16, high, ultra))


@pytest.mark.parametrize("words", [5, 100])
def test_nothing_is_lost_before_anything_is_packed(words: int, llama: PreTrainedModel, engine: SpectralQuantEngine, tokenizer: TinyTokenizer) -> None:
    fp16, high = compare("short", "word " * words, {"high": engine}, llama, tokenizer, 4)
    assert high.text == fp16.text and high.kl == pytest.approx(0, abs=1e-5) and high.agreement == 1
