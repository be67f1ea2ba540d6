"""Registration with transformers: attention function and mask function under one name, always together.

A name without a mask function gets `attention_mask=None` and loses padding and sliding windows without a warning.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from spectralquant.attention.dispatch import attend_packed, make_mask
from spectralquant.attention.tiles import FLASH_DTYPES
from spectralquant.codec.packed import LazyKV, plain_arithmetic, without_gradient
from spectralquant.compat import fitted_mask
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
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, Hq, Q, D], key and value [B, H, T, D] or LazyKV, mask [B, 1, Q, T] bool or None -> [B, Q, Hq, D], None.

    A position bias, [B or 1, Hq, Q, T], and a mask of floats are added to the logits. Codes are read if that only hides, else keys and values are decoded.

    Raises:
        ConfigError: Dropout over packed keys.
    """
    attention_mask = fitted_mask(attention_mask, key.shape[2])
    if position_bias is not None:
        attention_mask = _biased_mask(position_bias, attention_mask, key.shape[2])
    if isinstance(key, LazyKV):
        if dropout:
            raise ConfigError(f"attention dropout of {dropout} can't be applied to packed keys; call model.eval(), or train without a compressed cache")
        attention_mask = _only_hiding(attention_mask)
    if isinstance(key, LazyKV) and (attention_mask is None or attention_mask.dtype == torch.bool):
        out = _over_codes(query, key, attention_mask, scaling, softcap, s_aux)
    else:
        out = dense_attention(module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux, kwargs.get("is_causal"))
    return out.transpose(1, 2).contiguous(), None


def _over_codes(query: Tensor, key: LazyKV, mask: Tensor | None, scaling: float | None, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
    with plain_arithmetic(query.device):
        out = attend_packed(query, key.packed_kv, mask, scaling, softcap, sinks)
    return without_gradient((out,), (query, key))[0]


@LazyKV.implements(nn.functional.scaled_dot_product_attention)
def packed_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`scaled_dot_product_attention` over packed keys and values, for models that call it themselves (Falcon): [B, Hq, Q, D].

    NotImplemented where it hides slots in another way than a mask [B or 1, 1, Q, T] of bool does, or adds to the logits.
    """
    if not (isinstance(key, LazyKV) and isinstance(value, LazyKV)) or is_causal or dropout_p:
        return NotImplemented
    attn_mask = _only_hiding(attn_mask)
    if attn_mask is None:
        if query.shape[2] > 1:  # all see all, which our None does not mean
            return NotImplemented
    elif attn_mask.dtype != torch.bool or attn_mask.dim() != 4 or attn_mask.shape[1] != 1:
        return NotImplemented
    elif attn_mask.shape[0] != query.shape[0]:
        attn_mask = attn_mask.expand(query.shape[0], -1, -1, -1)
    return _over_codes(query, key, attn_mask, scale)


def _only_hiding(mask: Tensor | None) -> Tensor | None:
    """A mask of floats that are 0 or hide (OPT and Falcon before transformers 5) as bool; others as they are."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return ~hidden if bool((hidden | (mask == 0)).all()) else mask


def _biased_mask(bias: Tensor, mask: Tensor | None, length: int) -> Tensor:
    """`bias` [B or 1, Hq, Q, T] with what `mask` hides, bool or float [B, 1, Q, T]; None hides what comes later."""
    if mask is None:
        queries = bias.shape[2]
        mask = torch.ones((queries, length), dtype=torch.bool, device=bias.device).tril(length - queries)
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


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
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = mask is None and bool(is_causal) and query.shape[2] > 1
    flash = query.is_cuda and query.dtype in FLASH_DTYPES and mask is None
    if flash and softcap is None and s_aux is None and not isinstance(key, LazyKV):  # it reads a KV head for its whole group
        return nn.functional.scaled_dot_product_attention(query, key, value, None, dropout, causal, scale=scaling, enable_gqa=groups > 1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
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
