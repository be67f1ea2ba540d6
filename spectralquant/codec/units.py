"""Keys and values into packed units: by the CUDA kernels where they can, by PyTorch everywhere else."""

from functools import cache

import torch
from torch import Tensor

from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.encode_cuda import FusedEncoder, can_encode
from spectralquant.codec.layout import UNIT, pack_planes


def encode_units(
    codec: LayerCodec, keys: Tensor, values: Tensor, slots: Tensor, start: Tensor, records: Tensor, kernels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the codes of whole units into a store. Gains are left to the caller, who knows which tokens stay exact.

    Args:
        codec: The layer's codec.
        keys, values: [B, H, T, D], T a multiple of 128.
        slots: [T] int64, consecutive.
        start: [B] int64, slots of left padding.
        records: [B, H, T / 128, record_bytes] uint8, the units to write, a part of a contiguous store.
        kernels: Whether CUDA kernels may do it.

    Returns:
        K gain codes and V gain codes [B, H, T] uint8, and `LayerCodec.key_error` [B, T].
    """
    if kernels and can_encode(codec):
        return _encoder_on(keys.device).encode(codec, keys, values, slots, start, records)
    planes, gains, value_planes, value_gains = codec.encode(keys, values, slots, start)
    key_codes, _, value_codes, _ = codec.layout.split(records)
    key_codes.copy_(pack_planes(planes.unflatten(2, (-1, UNIT)), "key"))
    value_codes.copy_(pack_planes(value_planes.unflatten(2, (-1, UNIT)), "value"))
    return gains, value_gains, codec.key_error(keys, planes, gains, slots, start)


@cache
def _encoder_on(device: torch.device) -> FusedEncoder:
    return FusedEncoder(device)
