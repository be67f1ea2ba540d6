"""A PackedKV whose first units stand in a store of their own, in another order of sequences and with room to spare."""

from dataclasses import replace

import torch

from spectralquant.codec.packed import PackedKV
from spectralquant.codec.prefix import Prefix


def with_prefix(kv: PackedKV, units: int) -> PackedKV:
    """The same content as `kv`, which has none."""
    order = torch.arange(len(kv.start), device=kv.start.device).roll(1)
    spare = torch.full_like(kv.records[:, :, :1], 0xAA)
    records = torch.cat([kv.records[order][:, :, :units], spare], 2)
    return replace(kv, records=kv.records[:, :, units:].contiguous(), prefix=Prefix(records, order.argsort().int(), units))
