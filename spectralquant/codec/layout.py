"""The packed layout: the one place in Python that knows where a bit lives.

A *unit* is 128 tokens of one KV head, a *plane* is 2 bits per token. 16 planes of a unit are a *chunk* of 512 bytes: one
16-byte load per lane of a warp. A 32-bit word of a chunk holds, for one fragment register of `mma.m16n8k16`, a pair of
adjacent k-indices (low and high half word) for 8 sub-tiles of 16 tokens (bit pair `2j`), so that a mask turns it
into tensor core operands. With lane = 4 r + c and word a = 2 a1 + a0:

    K (rows are tokens, k is planes):  token = 16 j + 8 a0 + r,              plane = 8 a1 + 2 c + half
    V (rows are planes, k is tokens):  token = 16 j + 8 a1 + 2 c + half,     plane = 8 a0 + r

Words are little-endian: byte = 2 half + (j >= 4), bits 2 (j % 4). So a byte holds one plane of the four tokens 64 jhi + 16 jlo + low,
jlo = 0..3 in its bit pairs, for one of 32 groups (jhi, low): the same for K and V, which differ only in where the byte lies. A
*record* is one unit of one head, contiguous:

    [K chunks: P_K / 16 * 512 B] [K gains: 128 B] [V chunks: P_V / 16 * 512 B] [V gains: 128 B]

Gains are one byte per token, `2^((code - 128) / 8)`; byte 16 r + 8 a0 + j belongs to token 16 j + 8 a0 + r. Code 0 is reserved: the
token's packed slot is masked (it lives in the exact store, or is padding).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from spectralquant.errors import ShapeError

UNIT = 128
"""Tokens per unit."""
CHUNK_PLANES = 16
CHUNK_BYTES = UNIT * CHUNK_PLANES * 2 // 8
MASKED_GAIN, MAX_GAIN = 0, 255
"""Gain code of a token whose packed slot does not count, and the largest one."""
GAIN_OFFSET, GAIN_STEPS = 128, 8
"""Gain = 2^((code - GAIN_OFFSET) / GAIN_STEPS)."""

GROUPS = 32
"""Bytes that hold one plane of a unit; each holds 4 tokens."""
PAIRS = 4


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


@cache
def byte_order(which: str, planes: int, device: torch.device) -> Tensor:
    """[32 * planes] int64: where the byte of (group, plane), group-major, lies in the packed codes of a unit."""
    group, plane = torch.meshgrid(torch.arange(GROUPS), torch.arange(planes), indexing="ij")
    jhi, low, in_chunk = group // 16, group % 16, plane % CHUNK_PLANES
    row, k = (low, in_chunk) if which == "key" else (in_chunk, low)  # of the fragment
    r, a0 = row % 8, row // 8
    half, c, a1 = k % 2, k // 2 % 4, k // 8
    offset = r * 64 + c * 16 + a1 * 8 + a0 * 4 + half * 2 + jhi
    return (plane // CHUNK_PLANES * CHUNK_BYTES + offset).flatten().to(device)


def pack_planes(planes: Tensor, which: str) -> Tensor:
    """planes [..., 128, P] uint8 in 0..3 -> [..., P / 16 * 512] bytes; `which` is "key" or "value"."""
    count = planes.shape[-1]
    a, b, c, d = planes.unflatten(-2, (2, PAIRS, 16)).unbind(-3)  # jhi jlo low
    merged = (a | (b << 2) | (c << 4) | (d << 6)).flatten(-3)
    order = byte_order(which, count, planes.device)
    return torch.empty_like(merged).scatter_(-1, order.expand_as(merged), merged)


def unpack_pairs(packed: Tensor, which: str) -> Tensor:
    """Packed codes [..., bytes] -> uint8 planes [4, ..., 32, P], token = 64 (group // 16) + 16 pair + group % 16.

    The order in which bytes come apart without a transpose; `pairs_to_tokens` gives token order.
    """
    count = packed.shape[-1] // CHUNK_BYTES * CHUNK_PLANES
    order = byte_order(which, count, packed.device)
    by_group = packed.gather(-1, order.expand(*packed.shape[:-1], -1)).unflatten(-1, (GROUPS, count))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.int32, device=packed.device).view(PAIRS, *[1] * by_group.dim())
    return ((by_group.view(torch.int32)[None] >> shifts) & 0x03030303).view(torch.uint8)


def unpack_planes(packed: Tensor, which: str) -> Tensor:
    """Inverse of `pack_planes`: [..., bytes] -> [..., 128, P] uint8 in token order."""
    pairs = unpack_pairs(packed, which).unflatten(-2, (2, 16))  # pair ... jhi low P
    return pairs.movedim(0, -3).flatten(-4, -2)


def pack_gains(codes: Tensor) -> Tensor:
    """Gain codes [..., 128] uint8 in token order -> record order."""
    return codes.unflatten(-1, (8, 2, 8)).transpose(-1, -3).flatten(-3)


def unpack_gains(packed: Tensor) -> Tensor:
    """Gain codes [..., 128] uint8 in record order -> token order."""
    return pack_gains(packed)  # (j, a0, r) and (r, a0, j) are each other's transpose


def gain_values(codes: Tensor) -> Tensor:
    """float32 gains of gain codes; a masked slot gets 0, so it contributes nothing whatever its codes are."""
    gain = torch.exp2((codes.float() - GAIN_OFFSET) / GAIN_STEPS)
    return torch.where(codes == MASKED_GAIN, 0.0, gain)


def gain_codes(gains: Tensor) -> Tensor:
    """Nearest gain codes (1..MAX_GAIN, uint8) of positive float32 gains."""
    return (gains.log2() * GAIN_STEPS).round().add(GAIN_OFFSET).clamp(1, MAX_GAIN).to(torch.uint8)
