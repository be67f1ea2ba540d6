"""Lengths that leave the buffers of the beginning far behind."""

import pytest
import torch
from near_lossless import NEAR, Pair, packed_tokens, relative, tokens
from transformers import AutoModelForCausalLM, LlamaConfig


@pytest.fixture(scope="module")
def small() -> Pair:
    """Two layers, two heads, and positions enough."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=199, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        max_position_embeddings=65_536, rope_theta=1e6, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Pair.of(AutoModelForCausalLM.from_config(config).eval())


def test_more_than_three_thousand_new_tokens(small: Pair) -> None:
    prompt, cache = tokens(40), small.cache()
    out = small.generate(prompt, cache, max_new_tokens=3200)
    assert out.shape[1] == 3240 and packed_tokens(cache) == 3072
    small.require_greedy(out, 40)


@torch.no_grad()
def test_context_beyond_32k(small: Pair) -> None:
    """Read in chunks; the last tokens see all of it as the uncompressed model does."""
    prompt, more, results = tokens(33_000), tokens(8), []
    for cache in (small.cache(), small.dense()):
        small.generate(prompt, cache, max_new_tokens=1, prefill_chunk_size=4096)
        assert cache.get_seq_length() == 33_000
        results.append(small.forward(more, cache))
    assert relative(*results) < NEAR
