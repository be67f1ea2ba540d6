"""Keys and values into packed units: by the CUDA kernels where they can, by PyTorch everywhere else."""

from functools import cache

import torch
from torch import Tensor

from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.encode_cuda import FusedEncoder, can_encode
from spectralquant.codec.layout import UNIT, pack_planes


def encode_units(codec: LayerCodec, keys: Tensor, values: Tensor, first: int, start: Tensor, records: Tensor, kernels: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Write the codes of whole units into a store. Gains are left to the caller, who knows which tokens stay exact.

    Args:
        codec: The layer's codec.
        keys, values: [B, H, T, D], T a multiple of 128.
        first: Slot of the first of them, a multiple of 128.
        start: [B] int64, slots of left padding.
        records: [B, H, T / 128, record_bytes] uint8, the units to write, a part of a contiguous store.
        kernels: Whether CUDA kernels may do it.

    Returns:
        K gain codes and V gain codes [B, H, T] uint8, and `LayerCodec.key_error` [B, T].
    """
    centred, centred_values = codec.centre_units(keys, first, start), codec.centre_values(values)
    if kernels and can_encode(codec):
        return _encoder_on(keys.device).encode(codec, centred, centred_values, records)
    planes, gains = codec.key.encode(centred)
    value_planes, value_gains = codec.value.encode(centred_values)
    key_codes, _, value_codes, _ = codec.layout.split(records)
    key_codes.copy_(pack_planes(planes.unflatten(2, (-1, UNIT)), "key"))
    value_codes.copy_(pack_planes(value_planes.unflatten(2, (-1, UNIT)), "value"))
    return gains, value_gains, codec.relative_error(codec.key.error(centred, planes, gains))


@cache
def _encoder_on(device: torch.device) -> FusedEncoder:
    return FusedEncoder(device)
