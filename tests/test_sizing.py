"""Plans from a configuration alone, against real caches."""

import pytest
import torch
from tiny_models import CONFIGS, TinyTokenizer, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, PreTrainedModel

from spectralquant import SpectralQuantEngine
from spectralquant.errors import UnsupportedModelError
from spectralquant.presets import PRESETS
from spectralquant.sizing import fit, planner_for


def shape_of(config: object) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_real_cache_takes_as_much(family: str, preset: str, tokenizer: TinyTokenizer) -> None:
    model, engine = tiny_model(family, torch.bfloat16), SpectralQuantEngine(compression=preset)
    engine.calibrate(model, tokenizer, [" ".join(f"word{i % 83} and{i % 7}" for i in range(900))], progress=False)
    planner = planner_for(shape_of(CONFIGS[family]), PRESETS[preset], 2)
    with engine.applied_to(model):
        cache = engine.cache(model)
        for tokens in (1499, 1):  # transformers' sliding layers let go of a prompt with the first token behind it
            model.base_model(torch.randint(3, 190, (2, tokens)), past_key_values=cache)
    found = fit(planner, PRESETS[preset], 2, 1500, 0, None)
    assert 0.8 * found.cache < cache.nbytes < 1.01 * found.cache
    assert cache.dense_bytes == pytest.approx(fit(planner, None, 2, 1500, 0, None).cache, rel=0.02)
    assert planner.weights == sum(p.numel() * 2 for p in model.parameters())
    assert planner.codec == pytest.approx(cache.codec_bytes, rel=0.2)


def test_limits_are_where_it_stops_fitting() -> None:
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=131_072,
    )  # fmt: skip
    planner, preset, memory = planner_for(shape_of(config), PRESETS["high"], 2), PRESETS["high"], 80 * 10**9
    assert planner.weights == pytest.approx(16.06e9, rel=0.01)
    plain, ours = fit(planner, None, 4, 32_768, 0, memory), fit(planner, preset, 4, 32_768, 0, memory)
    assert plain.cache == 4 * 32_768 * 2 * 2 * 32 * 8 * 128 and 6.1 < ours.ratio < 6.5
    assert plain.fits and ours.fits and ours.left == memory - ours.total
    for kind, found in ((None, plain), (preset, ours)):
        for batch, context in ((4, found.most_context), (found.most_batch, 32_768)):
            assert fit(planner, kind, batch, context, 0, memory).fits
        assert not fit(planner, kind, 4, found.most_context + 256, 0, memory).fits and not fit(planner, kind, found.most_batch + 1, 32_768, 0, memory).fits
    assert ours.most_context > 6 * plain.most_context


def test_what_cannot_be_compressed_is_refused() -> None:
    with pytest.raises(UnsupportedModelError):
        planner_for(shape_of(MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=99)), PRESETS["high"], 2)
