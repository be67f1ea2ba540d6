"""Keys and values into packed units, and back: by the CUDA kernels where they can, by PyTorch everywhere else."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.decode_cuda import OUT_DTYPES, plan_decode
from spectralquant.codec.encode_cuda import FusedEncoder, can_encode
from spectralquant.codec.layout import MASKED_GAIN, UNIT, pack_planes, unpack_gains, unpack_planes


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


def decode_units(
    codec: LayerCodec, records: Tensor, which: str, first: int, start: Tensor, out: Tensor, rows: Tensor | None = None, kernels: bool = False
) -> None:
    """Write the dense keys or values of whole units, K at its absolute rotation. A slot that does not count gives the mean.

    Args:
        codec: The layer's codec.
        records: [B, H, T / 128, record_bytes] uint8, a part of a contiguous store.
        which: "key" or "value".
        first: Slot of the first of T, a multiple of 128.
        start: [B] int64, slots of left padding.
        out: [B, R, H, D] of any strides but the last, which is 1.
        rows: [B, T] int32, row of `out` for each slot, -1 for a slot to leave out; None: rows 0 .. T - 1.
        kernels: Whether a CUDA kernel may do it.
    """
    if kernels and out.dtype in OUT_DTYPES:
        plan_decode(codec, records, which, first, start, out, rows).run(records.device)
        return
    slots = torch.arange(first, first + records.shape[2] * UNIT, device=records.device)
    key, key_gain, value, value_gain = codec.layout.split(records)
    codes, gains = (key, key_gain) if which == "key" else (value, value_gain)
    planes, gain_codes = unpack_planes(codes, which).flatten(2, 3), unpack_gains(gains).flatten(2)
    dense = (codec.decode_keys(planes, gain_codes, slots, start) if which == "key" else codec.decode_values(planes, gain_codes)).transpose(1, 2)
    if rows is None:
        out[:, : len(slots)] = dense
        return
    for sequence, source, row in zip(out, dense, rows, strict=True):
        sequence[row[row >= 0].long()] = source[row >= 0].to(out.dtype)


def coded_slots(codec: LayerCodec, records: Tensor) -> Tensor:
    """[B, T] bool for records [B, H, T / 128, record_bytes]: slots whose code counts; the others are in the exact store, or padding. The same for all heads."""
    _, gains, _, _ = codec.layout.split(records[:, 0])
    return unpack_gains(gains).flatten(1) != MASKED_GAIN


@cache
def _encoder_on(device: torch.device) -> FusedEncoder:
    return FusedEncoder(device)
