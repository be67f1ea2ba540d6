"""The packed layout: the one place in Python that knows where a bit lives.

A *unit* is 128 tokens of one KV head, a *plane* is 2 bits per token. 16 planes of a unit are a *chunk* of 512 bytes: one
16-byte load per lane of a warp. A 32-bit word of a chunk holds, for one fragment register of `mma.m16n8k16`, a pair of
adjacent k-indices (low and high half word) for 8 sub-tiles of 16 tokens (bit pair `2j`), so that a mask turns it into tensor
core operands. With lane = 4 r + c and word a = 2 a1 + a0:

    K (rows are tokens, k is planes):  token = 16 j + 8 a0 + r,              plane = 8 a1 + 2 c + half
    V (rows are planes, k is tokens):  token = 16 j + 8 a1 + 2 c + half,     plane = 8 a0 + r

Words are little-endian: byte = 2 half + (j >= 4), bits 2 (j % 4). A *record* is one unit of one head, contiguous:

    [K chunks: P_K / 16 * 512 B] [K gains: 128 B] [V chunks: P_V / 16 * 512 B] [V gains: 128 B]

Gains are one byte per token, `2^((code - 128) / 8)`; byte 16 r + 8 a0 + j belongs to token 16 j + 8 a0 + r. Code 0 is reserved: the
token's packed slot is masked (it lives in the exact store, or is padding).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectralquant.errors import ShapeError

UNIT = 128
"""Tokens per unit."""
CHUNK_PLANES = 16
CHUNK_BYTES = UNIT * CHUNK_PLANES * 2 // 8
MASKED_GAIN = 0
"""Gain code of a token whose packed slot does not count."""
GAIN_OFFSET, GAIN_STEPS = 128, 8
"""Gain = 2^((code - GAIN_OFFSET) / GAIN_STEPS)."""

# Axes of a chunk in memory order: r 8, c 4, a1 2, a0 2, half 2, jhi 2 (a byte holds jlo 0..3 in its bit pairs).
_CHUNK_AXES = (8, 4, 2, 2, 2, 2)


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """Byte offsets in a record of `key_planes` + `value_planes` planes."""

    key_planes: int
    value_planes: int

    def __post_init__(self) -> None:
        for name in ("key_planes", "value_planes"):
            planes = getattr(self, name)
            if planes <= 0 or planes % CHUNK_PLANES:
                raise ShapeError(f"{name}={planes}: the packed layout holds a positive multiple of {CHUNK_PLANES} planes")

    @property
    def key_bytes(self) -> int:
        return self.key_planes // CHUNK_PLANES * CHUNK_BYTES

    @property
    def value_bytes(self) -> int:
        return self.value_planes // CHUNK_PLANES * CHUNK_BYTES

    @property
    def record_bytes(self) -> int:
        return self.key_bytes + self.value_bytes + 2 * UNIT

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token and KV head, codes and gains of K and V together."""
        return self.record_bytes / UNIT

    def split(self, records: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views (K codes, K gains, V codes, V gains) of records [..., record_bytes] uint8."""
        sizes = [self.key_bytes, UNIT, self.value_bytes, UNIT]
        key, key_gain, value, value_gain = records.split(sizes, dim=-1)
        return key, key_gain, value, value_gain


def pack_key_planes(planes: Tensor) -> Tensor:
    """planes [..., 128, P] uint8 in 0..3 -> [..., P / 16 * 512] bytes, K order."""
    *lead, _, count = planes.shape
    x = planes.reshape(*lead, 2, 4, 2, 8, count // 16, 2, 4, 2)  # jhi jlo a0 r | chunk a1 c half
    x = _merge_pairs(x, axis=len(lead) + 1)  # jhi a0 r chunk a1 c half
    return _permute_tail(x, len(lead), (3, 2, 5, 4, 1, 6, 0)).flatten(len(lead))


def pack_value_planes(planes: Tensor) -> Tensor:
    """planes [..., 128, P] uint8 in 0..3 -> [..., P / 16 * 512] bytes, V order."""
    *lead, _, count = planes.shape
    x = planes.reshape(*lead, 2, 4, 2, 4, 2, count // 16, 2, 8)  # jhi jlo a1 c half | chunk a0 r
    x = _merge_pairs(x, axis=len(lead) + 1)  # jhi a1 c half chunk a0 r
    return _permute_tail(x, len(lead), (4, 6, 2, 1, 5, 3, 0)).flatten(len(lead))


def unpack_key_planes(packed: Tensor) -> Tensor:
    """Inverse of `pack_key_planes`: [..., bytes] -> [..., 128, P] uint8."""
    *lead, size = packed.shape
    x = packed.reshape(*lead, size // CHUNK_BYTES, *_CHUNK_AXES)  # chunk r c a1 a0 half jhi
    x = _permute_tail(x, len(lead), (6, 4, 1, 0, 3, 2, 5))  # jhi a0 r chunk a1 c half
    return _split_pairs(x, axis=len(lead) + 1).reshape(*lead, UNIT, size // CHUNK_BYTES * CHUNK_PLANES)


def unpack_value_planes(packed: Tensor) -> Tensor:
    """Inverse of `pack_value_planes`: [..., bytes] -> [..., 128, P] uint8."""
    *lead, size = packed.shape
    x = packed.reshape(*lead, size // CHUNK_BYTES, *_CHUNK_AXES)
    x = _permute_tail(x, len(lead), (6, 3, 2, 5, 0, 4, 1))  # jhi a1 c half chunk a0 r
    return _split_pairs(x, axis=len(lead) + 1).reshape(*lead, UNIT, size // CHUNK_BYTES * CHUNK_PLANES)


def pack_gains(codes: Tensor) -> Tensor:
    """Gain codes [..., 128] uint8 in token order -> record order."""
    return _permute_tail(codes.unflatten(-1, (8, 2, 8)), codes.dim() - 1, (2, 1, 0)).flatten(-3)


def unpack_gains(packed: Tensor) -> Tensor:
    """Gain codes [..., 128] uint8 in record order -> token order."""
    return pack_gains(packed)  # (j, a0, r) and (r, a0, j) are each other's transpose


def gain_values(codes: Tensor) -> Tensor:
    """float32 gains of gain codes; a masked slot gets 0, so it contributes nothing whatever its codes are."""
    gain = torch.exp2((codes.float() - GAIN_OFFSET) / GAIN_STEPS)
    return torch.where(codes == MASKED_GAIN, 0.0, gain)


def gain_codes(gains: Tensor) -> Tensor:
    """Nearest gain codes (1..255, uint8) of positive float32 gains."""
    return (gains.log2() * GAIN_STEPS).round().add(GAIN_OFFSET).clamp(1, 255).to(torch.uint8)


def _merge_pairs(x: Tensor, axis: int) -> Tensor:
    a, b, c, d = x.unbind(axis)
    return a | (b << 2) | (c << 4) | (d << 6)


def _split_pairs(x: Tensor, axis: int) -> Tensor:
    return torch.stack([(x >> shift) & 3 for shift in (0, 2, 4, 6)], axis)


def _permute_tail(x: Tensor, lead: int, order: tuple[int, ...]) -> Tensor:
    return x.permute(*range(lead), *(lead + i for i in order))
