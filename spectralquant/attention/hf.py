"""Registration with transformers: attention function and mask function under one name, always together.

A name without a mask function gets `attention_mask=None` and loses padding and sliding windows without a warning.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from spectralquant.attention.dispatch import attend_packed, make_mask
from spectralquant.codec.packed import LazyKV, plain_arithmetic, without_gradient
from spectralquant.errors import ConfigError

NAME = "spectralquant"


def register() -> str:
    """Make the attention implementation known to transformers (idempotent) and return its name. No model changes by this."""
    AttentionInterface.register(NAME, spectral_attention)
    AttentionMaskInterface.register(NAME, make_mask)
    return NAME


@torch.compiler.disable  # whether keys are packed, and how many, is seen when it runs
def spectral_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, Hq, Q, D], key and value [B, H, T, D] or LazyKV, mask [B, 1, Q, T] bool or None -> [B, Q, Hq, D], None.

    Raises:
        ConfigError: Dropout over packed keys.
    """
    if isinstance(key, LazyKV):
        if dropout:
            raise ConfigError(f"attention dropout of {dropout} can't be applied to packed keys; call model.eval(), or train without a compressed cache")
        with plain_arithmetic(query.device):
            out = attend_packed(query, key.packed_kv, attention_mask, scaling, softcap, s_aux)
        (out,) = without_gradient((out,), (query, key))
    else:
        out = dense_attention(module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux, kwargs.get("is_causal"))
    return out.transpose(1, 2).contiguous(), None


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
    is_causal: bool | None = None,
) -> Tensor:
    """Full-precision attention, [B, Hq, Q, D]; with soft-cap and sink logits, which `sdpa` can't do."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = mask is None and bool(is_causal) and query.shape[2] > 1
    if softcap is None and s_aux is None:
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scaling)
    scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(scores.shape[-1] - scores.shape[-2])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        column = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = nn.functional.dropout(scores.softmax(-1).nan_to_num(0.0), dropout, module.training)
    return (weights[..., : value.shape[-2]] @ value.float()).to(query.dtype)
