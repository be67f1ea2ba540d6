"""Shape of a model's keys and values, for methods that can't take every one."""

from transformers import PreTrainedModel


def kv_shape(model: PreTrainedModel) -> tuple[int, int]:
    """(KV heads, head size) of one layer, from the configuration."""
    text = model.config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
