"""Sequences of a paged cache as a PackedKV, for attention in PyTorch: their codes are copied out of the pages, 6.5 times smaller than what they stand for."""

import torch
from torch import Tensor

from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import MASKED_GAIN, UNIT, pack_gains
from spectralquant.codec.packed import PackedKV
from spectralquant.paged.layout import PageLayout, from_8_bits

TILE_TOKENS, GPU_TILE_TOKENS = 2048, 32_768
"""Tokens of one layer that attention in PyTorch unpacks at a time, on a CPU and on a GPU."""


def packed_view(
    codec: LayerCodec, layout: PageLayout, pages: Tensor, table: Tensor, limits: Tensor, raw_keys: Tensor, raw_values: Tensor, kernels: bool = False
) -> PackedKV:
    """What B sequences have in pages, and raw tokens behind it.

    Args:
        codec, layout: Of the layer.
        pages: [pages, page_bytes] uint8.
        table: [B, U] int64, the pages of every sequence, of longer and shorter ones.
        limits: [B] int64, tokens of every sequence that are read from them; what the pages have beyond is hidden.
        raw_keys, raw_values: [B, H, R, D].
        kernels: Whether CUDA kernels may read it.
    """
    batch, units = table.shape
    own = pages[table]  # [B, U, page_bytes]
    slots = torch.arange(units * UNIT, device=pages.device).view(1, units, UNIT)
    hidden = pack_gains(slots >= limits[:, None, None])[:, :, None]  # [B, U, 1, 128]
    records = layout.records(own)
    _, key_gains, _, value_gains = layout.record.split(records)
    for gains in (key_gains, value_gains):
        gains.masked_fill_(hidden, MASKED_GAIN)
    places = layout.places(own).long()
    exact_slots = torch.where(places >= 0, places + slots[:, :, :1], -1).flatten(1)
    exact_slots = exact_slots.masked_fill(exact_slots >= limits[:, None], -1).int()
    dtype = codec.exact_dtype_for(raw_keys.dtype)
    exact = from_8_bits(layout.integers(own), layout.exponents(own), dtype).permute(2, 0, 3, 1, 4, 5).flatten(3, 4)  # [2, B, H, U E, D]
    exact_keys, exact_values = exact.masked_fill((exact_slots < 0)[:, None, :, None], 0.0)  # unused entries are of anything
    start = torch.zeros(batch, dtype=torch.int64, device=pages.device)
    lengths = torch.tensor([[units, raw_keys.shape[2]]], dtype=torch.int32, device=pages.device).expand(batch, -1)
    tile = TILE_TOKENS if pages.device.type == "cpu" else GPU_TILE_TOKENS
    return PackedKV(
        codec, records.transpose(1, 2).contiguous(), units * UNIT, exact_keys, exact_values, exact_slots, raw_keys, raw_values, start, (0,) * batch, lengths,
        raw_keys.dtype, tile, kernels, causal=True,
    )  # fmt: skip
