"""Shapes of well-known models, for models of random weights: speed and memory do not depend on values."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

THETA = 500_000.0
SHAPES: dict[str, PretrainedConfig] = {
    "qwen2.5-1.5b": Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        max_position_embeddings=131_072, tie_word_embeddings=True,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=131_072,
    ),
    "llama-3.1-70b": LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        max_position_embeddings=131_072,
    ),
    "mistral-7b": MistralConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=32_768, sliding_window=None,
    ),
    "tiny": LlamaConfig(
        vocab_size=199, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=131_072,
    ),
}  # fmt: skip


def random_model(config: PretrainedConfig, device: torch.device) -> Any:
    """A causal language model of this shape with random bfloat16 weights."""
    config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
