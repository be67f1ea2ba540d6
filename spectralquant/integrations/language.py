"""The original package's names for language models; `SpectralQuant` and `SpectralQuantEngine` do the same."""

from typing import Any

from transformers import DynamicCache, PreTrainedModel

from spectralquant.cache.hf import SpectralCache
from spectralquant.engine import SpectralQuantEngine


def apply_spectralquant_to_model(model: PreTrainedModel, engine: SpectralQuantEngine) -> PreTrainedModel:
    """`engine.apply_to(model)`."""
    return engine.apply_to(model)


apply_spectralquant_to_llama = apply_spectralquant_to_model
apply_spectralquant_to_mistral = apply_spectralquant_to_model
apply_spectralquant_to_qwen = apply_spectralquant_to_model


def compress_prefill_cache(engine: SpectralQuantEngine, past_key_values: DynamicCache, model: PreTrainedModel) -> tuple[SpectralCache, dict[str, Any]]:
    """(a compressed copy of an uncompressed cache of `model`, `engine.compression_stats` of it)."""
    cache = engine.compress_kv_cache(past_key_values, model)
    return cache, engine.compression_stats(cache)


def prefill_compress(engine: SpectralQuantEngine, model: PreTrainedModel, tokenizer: Any, prompt: Any, **options: Any) -> dict[str, Any]:
    """`engine.compress_prefill(model, tokenizer, prompt, ...)`."""
    return engine.compress_prefill(model, tokenizer, prompt, **options)


def generate_with_compressed_cache(engine: SpectralQuantEngine, model: PreTrainedModel, tokenizer: Any, prompt: Any, **options: Any) -> dict[str, Any]:
    """`engine.generate(model, tokenizer, prompt, ...)`."""
    return engine.generate(model, tokenizer, prompt, **options)
