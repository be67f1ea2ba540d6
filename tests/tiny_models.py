"""Tiny random models built from configurations: no download, a second each."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

COMMON: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON, head_dim=32),
    "qwen2": Qwen2Config(**{**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1}),  # no head_dim: hidden / heads
    "qwen3": Qwen3Config(**COMMON, head_dim=32),
    "mistral-sliding": MistralConfig(**COMMON, head_dim=32, sliding_window=64),
    "gemma2": Gemma2Config(**COMMON, head_dim=32, sliding_window=64, query_pre_attn_scalar=32),
}


CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of `family`; weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[family]), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name and parameter.dim() == 2:
                parameter.mul_(4.0)
    return model.eval()


def save_tiny_model(folder: Path, family: str = "llama") -> None:
    """The tiny model, and a tokenizer of transformers' own with one token per character and a chat template."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "\n"]
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*special, *map(chr, range(32, 127))])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"(.|\n)"), "isolated")
    core.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    tiny_model(family).save_pretrained(folder)


class TinyTokenizer:
    """Words become ids by a fixed hash; enough of transformers' tokenizer interface for this package."""

    pad_token_id = 0
    eos_token_id = 2
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None) -> Any:
        ids = [1] * add_special_tokens + [3 + sum(map(ord, word)) * 31 % 190 for word in text.split()]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(str(int(i)) for i in ids)

    def apply_chat_template(self, messages: Any, tokenize: bool = False, add_generation_prompt: bool = True) -> str:
        return " ".join(f"{m['role']} {m['content']}" for m in messages)
