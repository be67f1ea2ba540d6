"""Attention of many queries over a PackedKV: packed slots are decoded tile by tile, and torch's flash attention does the rest.

    out = sum_i w_i out_i,    w_i = exp(lse_i - lse),    lse = log sum_i exp(lse_i)

over parts i: exact and raw tokens in causal order, and tiles of coded ones, which every query sees. Log-sum-exps are natural; that of a tile grows by
`missing_mass` first, of a query head each. Attention on codes itself (`reference`, `cuda`) pays for the codes with every query, decoding pays once a KV head.

A tile holds only slots that count, one after another, so flash attention needs no mask but the number of them. On a GPU that number stays there: sequences are
stretches of rows with a length each, in one call. A part's out has the dtype of the query, sums of parts are float32. Decoded keys are rounded to the
model's dtype, as those of an uncompressed cache are.

Extra memory at its peak: one tile, K and V of `TILE_TOKENS` tokens of all sequences together or of `MIN_TILE` of each, or of `tile_tokens` of each if that is
less, in the dtype of the query; exact and raw tokens once more; and in the shape of the query a copy of it, a part, and part and sum in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralquant.codec.layout import UNIT
from spectralquant.codec.packed import PackedKV
from spectralquant.codec.units import coded_slots, decode_units

TILE_TOKENS, MIN_TILE = 16_384, 1024
"""Coded tokens decoded at a time, all sequences together, and the fewest of each sequence. Long, because merging a part
reads and writes the whole output."""
FLASH_DTYPES = (torch.float16, torch.bfloat16)
"""What flash attention computes in on a GPU."""


@dataclass(slots=True)
class _Part:
    """Attention of N rows of queries over some of what they see; a row that saw nothing has zeros and -inf."""

    out: Tensor  # [N, Hq, D] float32 where parts are merged
    lse: Tensor  # [N, Hq] float32

    def merge(self, other: "_Part") -> None:
        weight = (other.lse - self.lse).sigmoid_().nan_to_num_(0.0)  # both saw nothing: -inf less -inf
        self.out.lerp_(other.out.to(self.out.dtype), weight[..., None])
        self.lse = torch.logaddexp(self.lse, other.lse)


@dataclass(frozen=True, slots=True)
class _Stretches:
    """Keys and values of B sequences as stretches of rows.

    Attributes:
        keys, values: [rows, H, D].
        first, count: [B] int32, first row and number of rows of each sequence.
        most: Bound of `count` on the host.
    """

    keys: Tensor
    values: Tensor
    first: Tensor
    count: Tensor
    most: int


@torch.no_grad()
def attend_tiles(query: Tensor, kv: PackedKV, scale: float | None = None, sinks: Tensor | None = None) -> Tensor:
    """`reference.attend` with the mask of causal order and left padding and no soft-cap: arguments and result as there; gives no gradients.

    On a CPU for queries in float32 or `FLASH_DTYPES`, on a GPU in `FLASH_DTYPES`, at least two positions of them.
    """
    batch, query_heads, length, dim = query.shape
    rows = query.transpose(1, 2).reshape(batch * length, query_heads, dim)
    factor = dim**-0.5 if scale is None else scale
    attend = _flash_on_gpu if query.is_cuda else _flash_on_cpu
    total = attend(rows, _uncoded(kv, query.dtype), factor, True)
    total.out = total.out.float()
    for tile in _tiles(kv, query.dtype):
        part = attend(rows, tile, factor, False)
        if kv.codec.missing_mass is not None:
            part.lse = part.lse + kv.codec.missing_mass.flatten()
        total.merge(part)
    if sinks is not None:
        total.out *= (total.lse - sinks.float()).sigmoid_()[..., None]
    return total.out.to(query.dtype).view(batch, length, query_heads, dim).transpose(1, 2)


def _uncoded(kv: PackedKV, dtype: torch.dtype) -> _Stretches:
    """Exact tokens before raw ones, in which queries are the last rows: they see all of the former, and the latter in causal order."""
    valid, raw = kv.exact_valid(), kv.raw_keys.shape[2]
    order = valid.int().argsort(dim=1, stable=True)  # those that count stand last, next to the raw ones

    def joined(exact: Tensor, recent: Tensor) -> Tensor:
        exact = exact.gather(2, order[:, None, :, None].expand_as(exact))
        return torch.cat([exact.to(dtype), recent.to(dtype)], 2).transpose(1, 2).flatten(0, 1)

    keys, values = joined(kv.exact_keys, kv.raw_keys), joined(kv.exact_values, kv.raw_values)
    count = raw + valid.sum(1) - (kv.start - kv.packed).clamp(0, raw)  # where padding reaches the raw tokens nothing is exact
    most = valid.shape[1] + raw
    first = most * torch.arange(1, len(count) + 1, device=count.device) - count
    return _Stretches(keys, values, first.int(), count.int(), most)


def _tiles(kv: PackedKV, dtype: torch.dtype) -> Iterator[_Stretches]:
    """Decoded tiles of the packed slots; each takes the place of the one before. A prefix that all sequences have is decoded once: its tiles are stretches
    of one sequence, which all queries see."""
    prefix, units = kv.prefix, kv.packed // UNIT
    parts = [(kv.units, kv.start, 0, units)]
    if prefix is not None and prefix.is_one:
        parts = [(prefix.read_one, kv.start[:1], 0, prefix.units), (kv.units, kv.start, prefix.units, units)]
    rows = max(len(start) * _tile_units(kv, len(start), last - first) for _, start, first, last in parts) * UNIT
    buffers = [kv.records.new_empty((rows, *kv.raw_keys.shape[1::2]), dtype=dtype) for _ in range(2)]
    for read, start, begin, end in parts:
        step = _tile_units(kv, len(start), end - begin)
        for first in range(begin, end, step or 1):
            tile = [b[: len(start) * step * UNIT].unflatten(0, (len(start), -1)) for b in buffers]
            yield _decoded(kv, read(first, min(first + step, end)), start, first, tile)


def _tile_units(kv: PackedKV, batch: int, units: int) -> int:
    """Units of each sequence in a tile."""
    return min(kv.tile_tokens // UNIT, max(TILE_TOKENS // batch, MIN_TILE) // UNIT, units)


def _decoded(kv: PackedKV, records: Tensor, start: Tensor, first: int, buffers: list[Tensor]) -> _Stretches:
    """Units first .. of records [B, H, U, record_bytes], decoded into buffers [B, R, H, D] for K and V: slots that count, one after another."""
    counts = coded_slots(kv.codec, records)
    rows = torch.where(counts, counts.cumsum(1) - 1, -1).int()
    for which, out in zip(("key", "value"), buffers, strict=True):
        decode_units(kv.codec, records, which, first * UNIT, start, out, rows, kv.kernels)
    batch, size = buffers[0].shape[:2]
    begins = size * torch.arange(batch, dtype=torch.int32, device=start.device)
    keys, values = (out.flatten(0, 1) for out in buffers)
    return _Stretches(keys, values, begins, counts.sum(1, dtype=torch.int32), size)


def _flash_on_gpu(query: Tensor, part: _Stretches, scale: float, causal: bool) -> _Part:
    """Attention of the queries of every sequence, [N, Hq, D] for N / B > 1 of each; `causal`: the last query sees all rows, the one before it one less."""
    length = len(query) // len(part.count)
    starts = torch.arange(0, len(query) + 1, length, dtype=torch.int32, device=query.device)
    bounds = torch.nn.functional.pad(part.first, (0, 1), value=len(part.keys))  # where stretches begin; `count` says where they end
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, part.keys, part.values, starts, bounds, length, part.most, 0.0, causal, False, scale=scale, seqused_k=part.count
    )
    return _Part(out, lse.masked_fill_(lse == torch.inf, -torch.inf).T)  # +inf: saw nothing


def _flash_on_cpu(query: Tensor, part: _Stretches, scale: float, causal: bool) -> _Part:
    """The same, sequence by sequence."""
    length = len(query) // len(part.count)
    out = _Part(torch.zeros_like(query, dtype=torch.float32), query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32))
    for i, (first, count) in enumerate(zip(part.first.tolist(), part.count.tolist(), strict=True)):
        seeing = min(length, count) if causal else length
        before = count - seeing if causal else count  # rows that all of these queries see
        rows = slice((i + 1) * length - seeing, (i + 1) * length)
        keys, values = part.keys[first : first + count], part.values[first : first + count]
        for here, square in ((slice(0, before), False), (slice(before, count), True)):
            if keys[here].shape[0]:
                found = _flash_of_one(query[rows], keys[here], values[here], scale, square)
                seen = _Part(out.out[rows], out.lse[rows])
                seen.merge(found)
                out.lse[rows] = seen.lse
    return out


def _flash_of_one(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> _Part:
    """Of one sequence, [n, Hq, D] and [m, H, D]; causal: n = m."""
    heads = keys.shape[1]
    by_group = query.unflatten(1, (heads, -1)).permute(1, 2, 0, 3)  # [H, G, n, D]
    keys, values = (x.transpose(0, 1)[:, None].expand(-1, by_group.shape[1], -1, -1) for x in (keys, values))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(by_group, keys, values, 0.0, causal, scale=scale)
    return _Part(out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2))
