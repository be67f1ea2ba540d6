"""Keys and values into packed units, and units into planes: by the CUDA kernels where they can, by PyTorch everywhere else."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.decode_cuda import plan_unpack
from spectralquant.codec.encode_cuda import FusedEncoder, can_encode
from spectralquant.codec.layout import UNIT, RecordLayout, gain_values, pack_planes, unpack_gains, unpack_planes


@dataclass(frozen=True, slots=True)
class EncodedUnits:
    """What is known of tokens whose codes are in the store.

    Attributes:
        gains, value_gains: [B, H, T] uint8, gain codes of K and V.
        key_error: [B, H, T] float32, |z - z^|^2 of K.
        value_size: [B, H, T] float32, |v|^2.
    """

    gains: Tensor
    value_gains: Tensor
    key_error: Tensor
    value_size: Tensor


def encode_units(codec: LayerCodec, keys: Tensor, values: Tensor, before: Tensor, start: Tensor, records: Tensor, kernels: bool) -> EncodedUnits:
    """Write the codes of whole units into a store. Gains are left to the caller, who knows which tokens stay exact.

    Args:
        codec: The layer's codec.
        keys, values: [B, H, T, D], T a multiple of 128.
        before: [] int32, units in front of these: a tensor, so that a CUDA graph may repeat the launches for the next ones.
        start: [B] int64, slots of left padding.
        records: [B, H, T / 128, record_bytes] uint8, the units to write, a part of a contiguous store.
        kernels: Whether CUDA kernels may do it.
    """
    if kernels and can_encode(codec):
        key, value, value_size = _encoder_on(keys.device).encode(codec, keys, values, before, start, records)
        assert key.error is not None
        return EncodedUnits(key.gains, value.gains, key.error, value_size)
    centred, centred_values = codec.centre_units(keys, before, start), codec.centre_values(values)
    planes, gains = codec.key.encode(centred)
    value_planes, value_gains = codec.value.encode(centred_values)
    key_codes, _, value_codes, _ = codec.layout.split(records)
    key_codes.copy_(pack_planes(planes.unflatten(2, (-1, UNIT)), "key"))
    value_codes.copy_(pack_planes(value_planes.unflatten(2, (-1, UNIT)), "value"))
    return EncodedUnits(gains, value_gains, codec.key.error(centred, planes, gains), codec.value_size(values))


def unpack_units(layout: RecordLayout, records: Tensor, which: str, kernels: bool) -> tuple[Tensor, Tensor]:
    """Planes [B, H, U * 128, P] uint8 and gains [B, H, U * 128] float32 (0: masked) of one side, in token order.

    Args:
        layout: Of the records.
        records: [B, H, U, record_bytes] uint8, a part of a contiguous store.
        which: "key" or "value".
        kernels: Whether CUDA kernels may do it.
    """
    if kernels:
        launch = plan_unpack(layout, records, which)
        launch.run()
        return launch.planes, launch.gains
    key, key_gain, value, value_gain = layout.split(records)
    codes, gains = (key, key_gain) if which == "key" else (value, value_gain)
    return unpack_planes(codes, which).flatten(2, 3), gain_values(unpack_gains(gains).flatten(2))


@cache
def _encoder_on(device: torch.device) -> FusedEncoder:
    return FusedEncoder(device)
