"""What a generation takes, against what it took."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyTokenizer, tiny_model
from transformers import PreTrainedModel

from spectralquant import SpectralQuant
from spectralquant.byte_counts import parse_bytes, told_bytes
from spectralquant.cache.hf import SpectralCache
from spectralquant.compat import cache_argument
from spectralquant.corpus import get_default_calibration_texts
from spectralquant.engine import SpectralQuantEngine
from spectralquant.errors import ConfigError, MemoryLimitError
from spectralquant.memory import ForwardCost, largest


def filled(engine: SpectralQuantEngine, model: PreTrainedModel, batch: int, prompt: int, new: int) -> SpectralCache:
    cache, ids = engine.cache(model), torch.randint(3, 99, (batch, prompt + new), device=model.device)
    cache.expect(prompt + new)
    with torch.no_grad():
        model(ids[:, :prompt], **cache_argument(model, cache))
        for i in range(prompt, prompt + new):
            model(ids[:, i : i + 1], **cache_argument(model, cache))
    return cache


@pytest.mark.parametrize(("batch", "prompt", "new"), [(1, 50, 0), (2, 1000, 0), (1, 3000, 1), (3, 300, 700)])
def test_the_cache_is_what_was_planned(engine: SpectralQuantEngine, llama: PreTrainedModel, batch: int, prompt: int, new: int) -> None:
    """Codes and window to the byte; exact tokens, whose number depends on the text, within the codec's bound."""
    cache, plan = filled(engine, llama, batch, prompt, new), engine.memory_plan(llama, batch, prompt, new)
    segments = [layer.segment for layer in cache.coded_layers]
    assert plan.packed == sum(s.records.nbytes for s in segments)
    assert plan.window == sum(s.recent_keys.nbytes + s.recent_values.nbytes for s in segments)
    assert plan.dense_cache == cache.dense_bytes and plan.context == prompt + new
    exact = sum(s.exact_keys.nbytes + s.exact_values.nbytes + s.exact_slots.nbytes for s in segments)
    assert abs(plan.exact - exact) <= 0.05 * cache.nbytes
    assert plan.weights == sum(p.nbytes for p in {id(p): p for p in llama.parameters()}.values()) + sum(b.nbytes for b in llama.buffers())
    assert plan.forward == 0 and plan.total == plan.weights + plan.codec + plan.cache


def test_layers_with_a_sliding_window_are_planned(tokenizer: TinyTokenizer) -> None:
    model, engine = tiny_model("gemma2"), SpectralQuantEngine()
    engine.calibrate(model, tokenizer, get_default_calibration_texts(12), progress=False)
    plan = engine.memory_plan(model, 1, 2000)
    coded = len(engine.profile_codec(model))
    assert plan.other > 0 and plan.ratio > 1 and coded < model.config.get_text_config().num_hidden_layers
    assert plan.other < plan.dense_cache - plan.other


@pytest.fixture
def quant(llama: PreTrainedModel, llama_calibration: Path) -> SpectralQuant:
    quant = SpectralQuant()
    quant.load_calibration(llama_calibration)
    return quant


def test_a_limit_is_kept_before_anything_is_allocated(
    quant: SpectralQuant, llama: PreTrainedModel, tokenizer: TinyTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5] * 300, [6] * 40]
    need = quant.memory_plan(llama, 2, 300, 400).cache
    assert quant.generate(llama, tokenizer, prompts, max_new_tokens=400, max_memory=need)["stats"]["compressed_bytes"] <= need * 1.05
    monkeypatch.setattr(quant.engine, "cache", lambda model: pytest.fail("a cache was made"))
    with pytest.raises(MemoryLimitError, match=r"a cache of 2 x 700 tokens takes .*; 1 x 700 tokens would fit, or 2 x [1-6]\d\d"):
        quant.generate(llama, tokenizer, prompts, max_new_tokens=400, max_memory=need - 1)
    with pytest.raises(MemoryLimitError, match="of 4 x 700"):
        quant.generate(llama, tokenizer, prompts, max_new_tokens=400, max_memory=need, num_beams=2)


@pytest.mark.parametrize("limit", [0, -5, "12 parsecs", "GB", True, 1.5, None.__class__, "1e400"])
def test_limits_are_checked(quant: SpectralQuant, llama: PreTrainedModel, tokenizer: TinyTokenizer, limit: Any) -> None:
    with pytest.raises(ConfigError, match=r"max_memory=.*'12GB'"):
        quant.generate(llama, tokenizer, [5, 6], max_new_tokens=2, max_memory=limit)


def test_bytes_in_words() -> None:
    assert [parse_bytes("x", v) for v in (7, "12GB", "1.5 kb", "3m", "40")] == [7, 12 * 10**9, 1500, 3 * 10**6, 40]
    assert [told_bytes(n) for n in (12, 1500, 2_000_000, 12_340_000_000)] == ["12 bytes", "1.5 kB", "2 MB", "12.3 GB"]


def testlargest() -> None:
    assert [largest(lambda n, m=m: n <= m, 9) for m in (-1, 0, 4, 9, 20)] == [0, 0, 4, 9, 9]


@pytest.mark.parametrize("call", [1, 4])
def test_running_out_of_memory_is_told(
    quant: SpectralQuant, llama: PreTrainedModel, tokenizer: TinyTokenizer, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """In the prompt, and later. Afterwards engine and model work, and a cache that was given is what it was."""
    want = quant.generate(llama, tokenizer, [5] * 300, max_new_tokens=8)["tokens"]
    calls, mlp = [0], llama.model.layers[1].mlp
    forward = mlp.forward

    def failing(x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x)

    with monkeypatch.context() as patch:
        patch.setattr(mlp, "forward", failing)
        with pytest.raises(MemoryLimitError, match=r"a cache of 1 x 308 tokens .*prefill_chunk_size=4096"):
            quant.generate(llama, tokenizer, [5] * 300, max_new_tokens=8)
    assert quant.generate(llama, tokenizer, [5] * 300, max_new_tokens=8)["tokens"] == want


def test_forward_cost_is_a_line() -> None:
    assert ForwardCost(100, 2.5).of(40) == 200


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "prompt", "new"), [(1, 8192, 0), (3, 4096, 300)])
def test_the_peak_is_what_was_planned(batch: int, prompt: int, new: int) -> None:
    model, engine = tiny_model("llama", torch.bfloat16).cuda(), SpectralQuantEngine()
    engine.calibrate(model, TinyTokenizer(), get_default_calibration_texts(12), progress=False)
    plan = engine.memory_plan(model, batch, prompt, new)
    ids = torch.randint(3, 99, (batch, prompt), device="cuda")
    cache = engine.cache(model)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.generate(ids, past_key_values=cache, max_new_tokens=new + 1, min_new_tokens=new + 1, pad_token_id=0)
    got = torch.cuda.max_memory_allocated() - before
    assert abs(plan.cache + plan.forward - got) < 0.05 * got + 32 * 2**20  # what libraries keep for the stream of graphs
