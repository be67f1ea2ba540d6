"""Packed records without loss in fewer bytes: planes that are alike lie together, and zstandard codes them.

A byte of a record holds tokens that are 16 apart, because that is how a warp reads them. Here it holds four neighbours in the text. A row is one plane of one
head of one sequence; rows are sorted by how often the outer symbols 0 and 3 occur in them, in steps of 1/24, so that one Huffman table fits what it codes.
"""

import struct

import torch
from torch import Tensor

from spectralquant.archive.entropy import bytes_tensor, compress, expand
from spectralquant.codec.layout import UNIT, RecordLayout, pack_gains, pack_planes, unpack_gains, unpack_planes
from spectralquant.errors import CacheFileError, ShapeError

CLASSES = 24
"""Steps of the share of outer symbols."""
_HEAD = struct.Struct("<III")  # bytes of the frames


def pack_records(layout: RecordLayout, records: Tensor) -> Tensor:
    """Payload [N] uint8, on the CPU, of records [B, H, U, record_bytes] uint8, on any device."""
    if records.dim() != 4 or records.shape[-1] != layout.record_bytes or records.dtype != torch.uint8:
        raise ShapeError(f"records are {records.dtype} of shape {tuple(records.shape)}, expected uint8 [B, H, U, {layout.record_bytes}]")
    key, key_gain, value, value_gain = layout.split(records.cpu())
    rows = torch.cat([_to_rows(key, "key"), _to_rows(value, "value")])
    kinds = _outer_share(rows)
    gains = torch.cat([unpack_gains(g).flatten() for g in (key_gain, value_gain)])
    frames = [compress(t.numpy().tobytes()) for t in (kinds, rows[kinds.argsort(stable=True)], gains)]
    return bytes_tensor(_HEAD.pack(*map(len, frames)) + b"".join(frames))


def unpack_records(layout: RecordLayout, payload: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Records [B, H, U, record_bytes] uint8, on the CPU, of a payload [N] uint8 of `pack_records`.

    Args:
        layout: Of the records.
        payload: As a file has it.
        shape: (B, H, U) as the caller has checked it: what it comes to is all that is allocated.

    Raises:
        CacheFileError: The payload is damaged.
    """
    batch, heads, units = shape
    key, kinds_at, end = _frames(payload)
    count = batch * heads * (layout.key_planes + layout.value_planes)
    width = units * UNIT // 4
    kinds = bytes_tensor(expand(key, count))
    ordered = bytes_tensor(expand(kinds_at, count * width)).view(count, width)
    gains = bytes_tensor(expand(end, 2 * batch * heads * units * UNIT)).view(2, batch, heads, units, UNIT)
    rows = torch.empty_like(ordered)
    rows[kinds.argsort(stable=True)] = ordered
    keys, values = rows.split([batch * heads * layout.key_planes, batch * heads * layout.value_planes])
    parts = [_from_rows(keys, "key", shape), pack_gains(gains[0]), _from_rows(values, "value", shape), pack_gains(gains[1])]
    return torch.cat(parts, -1)


def payload_bytes(payload: Tensor) -> bytes:
    """The bytes of a payload, which has to be one of uint8.

    Raises:
        CacheFileError: It is something else.
    """
    if payload.dtype != torch.uint8 or payload.dim() != 1:
        raise CacheFileError(f"a payload of the archive is {payload.dtype} of shape {tuple(payload.shape)}, expected uint8 [N]; store the prefix again")
    return payload.cpu().numpy().tobytes()


def _frames(payload: Tensor) -> list[bytes]:
    data = payload_bytes(payload)
    sizes = _HEAD.unpack(data[: _HEAD.size]) if len(data) >= _HEAD.size else (0, 0, 0)
    if _HEAD.size + sum(sizes) != len(data):
        raise CacheFileError(
            f"a payload of the archive has {len(data)} bytes, its parts come to {_HEAD.size + sum(sizes)}; it is damaged: store the prefix again"
        )
    first, second = _HEAD.size + sizes[0], _HEAD.size + sizes[0] + sizes[1]
    return [data[_HEAD.size : first], data[first:second], data[second:]]


def _to_rows(codes: Tensor, which: str) -> Tensor:
    """Packed codes [B, H, U, bytes] -> [B H P, U 32], a plane to a row, four tokens to a byte."""
    a, b, c, d = unpack_planes(codes, which).permute(0, 1, 4, 2, 3).flatten(3).unflatten(-1, (-1, 4)).unbind(-1)
    return (a | (b << 2) | (c << 4) | (d << 6)).flatten(0, 2)


def _from_rows(rows: Tensor, which: str, shape: tuple[int, int, int]) -> Tensor:
    """Inverse of `_to_rows`."""
    batch, heads, units = shape
    planes = torch.stack([(rows >> s) & 3 for s in (0, 2, 4, 6)], -1).view(batch, heads, len(rows) // max(batch * heads, 1), units, UNIT)
    return pack_planes(planes.permute(0, 1, 3, 4, 2).contiguous(), which)


def _outer_share(rows: Tensor) -> Tensor:
    """[N] uint8: the share of symbols 0 and 3 in rows [N, W], in steps of 1 / `CLASSES`. Counted in integers: the same everywhere."""
    outer = sum(((((rows >> s) ^ (rows >> (s + 1))) & 1) == 0).sum(-1) for s in (0, 2, 4, 6))
    total = max(4 * rows.shape[-1], 1)
    return (torch.as_tensor(outer) * CLASSES // total).to(torch.uint8)
