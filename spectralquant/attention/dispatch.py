"""What attends over packed keys and values: the fused kernel where it can, the PyTorch reference everywhere else.

The kernel knows one mask, causal order with left padding, which is all that generation needs. Whether a mask is that one costs a look at it, so our mask
function (`make_mask`) looks once per forward pass and leaves a note on the tensor for all layers. A mask without the note belongs to the reference.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from spectralquant.attention.cuda import FusedAttention
from spectralquant.attention.reference import attend
from spectralquant.codec.packed import PackedKV

_NOTE = "spectralquant_padding"


def attend_packed(
    query: Tensor, kv: PackedKV, mask: Tensor | None = None, scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """`reference.attend` by whatever is fastest here: arguments and result as there."""
    hidden = kv.padding if kv.causal else (0,) * len(query) if mask is None else getattr(mask, _NOTE, None)
    if kv.kernels and hidden == kv.padding:
        return _fused_on(query.device).attend(query, kv, scale, softcap, sinks)
    return attend(query, kv, mask, scale, softcap, sinks)


@cache
def _fused_on(device: torch.device) -> FusedAttention:
    return FusedAttention(device)


def make_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' `sdpa_mask`: [B, 1, Q, T] bool, or None for plain causal order. Notes what padding a mask of nothing else hides."""
    mask = sdpa_mask(*args, **kwargs)
    if mask is not None and kwargs.get("mask_function", causal_mask_function) is causal_mask_function:
        setattr(mask, _NOTE, _left_padding(kwargs.get("attention_mask"), mask))
    return mask


def _left_padding(tokens: Tensor | None, mask: Tensor) -> tuple[int, ...] | None:
    """Slots of left padding of each sequence, or None where `tokens` [B, T], 0 for padding, hides others as well."""
    if tokens is None:
        return (0,) * len(mask)
    if tokens.shape != (len(mask), mask.shape[-1]):
        return None
    real = tokens.bool()
    first, count = torch.stack([real.int().argmax(-1), real.sum(-1)]).tolist()
    return tuple(first) if all(f + c == tokens.shape[1] for f, c in zip(first, count, strict=True)) else None
