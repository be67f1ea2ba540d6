"""Look at every attention call of a HuggingFace model.

Most models attend by transformers' attention interface, where a function of our own takes the place of theirs. Others (Falcon, BLOOM, MPT, GPT-Neo, remote
code) multiply queries and keys themselves; there the products inside their attention modules are watched (`products.py`).

The model is left exactly as it was: mode, attention implementation and hooks are restored even after an exception.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from spectralquant.calibration.products import BeforeModule, OnAttention, layer_index, watching_products
from spectralquant.compat import fitted_mask

RECORDER = "spectralquant-recorder"
NAME_DENSE = "spectralquant"
"""Our own attention does soft-cap and sink logits, which stock `sdpa` refuses or drops; used when it is registered."""


@contextmanager
def recording(model: PreTrainedModel, on_attention: OnAttention, before: BeforeModule | None = None) -> Generator[None]:
    """For the length of a with block, call `on_attention` with what every attention call gets, and `before` ahead of every module of a layer."""
    training = model.training
    watched = [module for module in model.modules() if layer_index(module) is not None]
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in watched] if before is not None else []
    try:
        model.eval()
        with _by_interface(model, on_attention) if model._can_set_attn_implementation() else watching_products(watched, on_attention):  # pyright: ignore[reportPrivateUsage]
            yield
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)


@contextmanager
def _by_interface(model: PreTrainedModel, on_attention: OnAttention) -> Generator[None]:
    """Put a function that calls `on_attention` in the place of the model's attention."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        on_attention(module, query, key, value, float(scale), kwargs.get("softcap"))
        return dense(module, query, key, value, fitted_mask(attention_mask, key.shape[2]), **kwargs)

    implementation = str(model.config._attn_implementation)  # pyright: ignore[reportPrivateUsage]
    dense = AttentionInterface()[NAME_DENSE] if NAME_DENSE in AttentionInterface() else AttentionInterface()["sdpa"]
    AttentionInterface.register(RECORDER, attention)
    AttentionMaskInterface.register(RECORDER, sdpa_mask)
    try:
        model.set_attn_implementation(RECORDER)
        yield
    finally:
        model.set_attn_implementation(implementation)
        AttentionInterface._global_mapping.pop(RECORDER, None)  # pyright: ignore[reportPrivateUsage]
        AttentionMaskInterface._global_mapping.pop(RECORDER, None)  # pyright: ignore[reportPrivateUsage]
