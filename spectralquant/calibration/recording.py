"""Look at every attention call of a HuggingFace model.

The model is left exactly as it was: mode, attention implementation and hooks are restored even after an exception.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

RECORDER = "spectralquant-recorder"
NAME_DENSE = "spectralquant"
"""Our own attention does soft-cap and sink logits, which stock `sdpa` refuses or drops; used when it is registered."""

OnAttention = Callable[[nn.Module, Tensor, Tensor, Tensor, float, float | None], None]
"""(module, query [B, Hq, Q, D], key [B, H, T, D], value, scale, soft-cap or None)."""
BeforeModule = Callable[[nn.Module, Any, dict[str, Any]], None]
"""A forward pre-hook with keyword arguments."""


@contextmanager
def recording(model: PreTrainedModel, on_attention: OnAttention, before: BeforeModule | None = None) -> Iterator[None]:
    """For the length of a with block, call `on_attention` with what every attention call gets, and `before` ahead of every module of a layer."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        on_attention(module, query, key, value, float(scale), kwargs.get("softcap"))
        return dense(module, query, key, value, attention_mask, **kwargs)

    implementation, training = str(model.config._attn_implementation), model.training
    dense = AttentionInterface()[NAME_DENSE] if NAME_DENSE in AttentionInterface() else AttentionInterface()["sdpa"]
    AttentionInterface.register(RECORDER, attention)
    AttentionMaskInterface.register(RECORDER, sdpa_mask)
    hooks = []
    if before is not None:
        watched = (module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int))
        hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in watched]
    try:
        model.eval()
        model.set_attn_implementation(RECORDER)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(implementation)
        model.train(training)
        AttentionInterface._global_mapping.pop(RECORDER, None)
        AttentionMaskInterface._global_mapping.pop(RECORDER, None)
