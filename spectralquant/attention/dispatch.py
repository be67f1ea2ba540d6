"""What attends over packed keys and values: tiles decoded for flash attention where queries are many, else the fused kernel where it can run, else the
PyTorch reference.

Tiles and kernel know one mask, causal order with left padding, which is all that generation needs. Whether a mask is that one costs a look at it, so our
mask function (`make_mask`) looks once per forward pass and leaves a note on the tensor for all layers. A mask without the note belongs to the reference.
Tiles know no soft-cap, and on GPUs no float32, because flash attention doesn't: those stay with the kernel, or without kernels with the reference.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from spectralquant.attention.cuda import FusedAttention
from spectralquant.attention.reference import attend
from spectralquant.attention.tiles import FLASH_DTYPES, attend_tiles
from spectralquant.codec.packed import PackedKV

GPU_ELEMENTS, GPU_LENGTH = 1 << 21, 64
"""Elements of the queries and positions from which tiles serve a GPU. The kernel reads codes once for every 8 rows, so its time grows with the queries; tiles
have the cost of decoding, whatever the queries. On an H100 the two met between 1.6 and 2.1 million elements at head sizes 64 and 128, at 1.2 million at 256.
Flash attention takes positions of a head in blocks of 128; one should be half full at least."""
CPU_ROWS = 128
"""Rows of queries per KV head from which tiles serve a CPU: decoding costs what the reference takes for about 96 (SmolLM2's shape, 2,048 packed tokens)."""
_NOTE = "spectralquant_padding"


def attend_packed(
    query: Tensor, kv: PackedKV, mask: Tensor | None = None, scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """`reference.attend` by whatever is fastest here: arguments and result as there."""
    hidden = kv.padding if kv.causal else (0,) * len(query) if mask is None else getattr(mask, _NOTE, None)
    if hidden == kv.padding and softcap is None and _tiles_pay(query, kv):
        return attend_tiles(query, kv, scale, sinks)
    if hidden == kv.padding and kv.kernels:
        return _fused_on(query.device).attend(query, kv, scale, softcap, sinks)
    return attend(query, kv, mask, scale, softcap, sinks)


def _tiles_pay(query: Tensor, kv: PackedKV) -> bool:
    """Whether `attend_tiles` can take these queries and is the fastest."""
    query_heads, length = query.shape[1:3]
    if query.is_cuda:
        many = length >= GPU_LENGTH and query.numel() >= GPU_ELEMENTS
        return many and kv.kernels and query.dtype in FLASH_DTYPES and torch.backends.cuda.is_flash_attention_available()
    many = query_heads // kv.shape[1] * length >= CPU_ROWS
    return many and query.device.type == "cpu" and query.dtype in (torch.float32, *FLASH_DTYPES)


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
