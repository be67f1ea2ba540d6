"""Attention of an encoder on coded keys and values.

A call's tokens are coded in the plain frame, one by one, so those of all sequences and windows of a batch lie in one row of units and no short sequence
wastes a unit. Attention decodes a tile at a time: extra memory is the codes, one tile of keys and values, and the logits of one block of queries over a tile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from spectralquant.attention.softmax import RunningSoftmax
from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import UNIT, pack_gains
from spectralquant.codec.packed import plain_arithmetic, without_gradient
from spectralquant.codec.units import decode_units, encode_units
from spectralquant.integrations.calls import AttentionCall

TILE, QUERIES = 2048, 512
"""Tokens coded or decoded and queries taken at a time, at most; the former a multiple of 128."""


@dataclass(frozen=True, slots=True)
class CodedTokens:
    """Keys and values of B sequences of T tokens.

    Attributes:
        codec: Their codec.
        records: [1, H, U, record_bytes] uint8: token t of sequence b is number b T + t.
        shape: [B, H, T, D].
        exact_keys, exact_values: [B, H, E, D], the first tokens of every sequence as they came.
    """

    codec: LayerCodec
    records: Tensor
    shape: torch.Size
    exact_keys: Tensor
    exact_values: Tensor

    @property
    def nbytes(self) -> int:
        """Of codes and exact tokens."""
        return self.records.nbytes + self.exact_keys.nbytes + self.exact_values.nbytes

    def decode(self, sequences: slice, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys and values [b, H, last - first, D] of some sequences; of several only all their tokens."""
        begin, end, _ = sequences.indices(self.shape[0])
        length = self.shape[2]
        whole = end - begin > 1
        tokens = (begin * length, end * length) if whole else (begin * length + first, begin * length + last)
        parts = [self._decode(which, *tokens).unflatten(1, (end - begin, -1)).transpose(0, 1) for which in ("key", "value")]
        for part, exact in zip(parts, (self.exact_keys, self.exact_values), strict=True):
            count = max(min(exact.shape[2], last) - first, 0)
            part[:, :, :count] = exact[sequences, :, first : first + count]
        return parts[0], parts[1]

    def _decode(self, which: str, first: int, last: int) -> Tensor:
        """[H, last - first, D] float32, tokens by number."""
        begin, end = first // UNIT, -(-last // UNIT)
        heads, dim = self.shape[1], self.shape[3]
        out = torch.empty((1, (end - begin) * UNIT, heads, dim), device=self.records.device)
        start = torch.zeros(1, dtype=torch.int64, device=self.records.device)
        decode_units(self.codec, self.records[:, :, begin:end], which, begin * UNIT, start, out)
        return out[0, first - begin * UNIT : last - begin * UNIT].transpose(0, 1)


def code(codec: LayerCodec, key: Tensor, value: Tensor, exact: int = 0) -> CodedTokens:
    """Code keys and values [B, H, T, D], a tile at a time; the first `exact` tokens of every sequence stay as they are (and are coded as well)."""
    batch, heads, length, dim = key.shape
    count = batch * length
    keys, values = (x.transpose(0, 1).reshape(1, heads, count, dim) for x in (key, value))
    records = torch.empty((1, heads, -(-count // UNIT), codec.layout.record_bytes), dtype=torch.uint8, device=key.device)
    for first in range(0, count, TILE):
        tile = slice(first, first + TILE)
        _code_tile(codec, keys[:, :, tile], values[:, :, tile], records[:, :, first // UNIT : -(-min(first + TILE, count) // UNIT)])
    return CodedTokens(codec, records, key.shape, key[:, :, :exact].clone(), value[:, :, :exact].clone())


def _code_tile(codec: LayerCodec, keys: Tensor, values: Tensor, records: Tensor) -> None:
    """Write tokens [1, H, n, D] to whole units; in the plain frame it does not matter which."""
    keys, values = (pad(x.float(), (0, 0, 0, -x.shape[2] % UNIT)) for x in (keys, values))
    none = torch.zeros(1, dtype=torch.int64, device=keys.device)
    encoded = encode_units(codec, keys, values, none[0].int(), none, records, kernels=False)
    _, key_gains, _, value_gains = codec.layout.split(records)
    for to, gains in ((key_gains, encoded.gains), (value_gains, encoded.value_gains)):
        to.copy_(pack_gains(gains.unflatten(2, (-1, UNIT))))


def coded_attention(call: AttentionCall, codec: LayerCodec, exact: int = 0) -> Tensor:
    """`call.dense()` on keys and values as their codes say, [B, Hq, Q, D] in the dtype of the query. Gives no gradients: `backward` raises GradientError."""
    with plain_arithmetic(call.query.device):
        tokens = code(codec, call.key.detach(), call.value.detach(), exact)
        out = attend(call, tokens)
    return without_gradient((out,), (call.query, call.key, call.value))[0]


def attend(call: AttentionCall, tokens: CodedTokens) -> Tensor:
    """Attention of the call's queries to `tokens`: several sequences at a time where they are short, one tile by tile where it is long."""
    batch, _, length, _ = tokens.shape
    together = max(TILE // length, 1)
    out = torch.empty_like(call.query, memory_format=torch.contiguous_format)
    for first in range(0, batch, together):
        rows = slice(first, min(first + together, batch))
        out[rows] = _attend_rows(call.query[rows], _rows_of(call.mask, rows), call.scale, tokens, rows)
    return out


def _rows_of(mask: Tensor | None, rows: slice) -> Tensor | None:
    return mask if mask is None or mask.dim() < 4 or mask.shape[0] == 1 else mask[rows]


def _attend_rows(query: Tensor, mask: Tensor | None, scale: float, tokens: CodedTokens, rows: slice) -> Tensor:
    """Tile by tile, in float32."""
    length = tokens.shape[2]
    tiles = [(0, length)] if rows.stop - rows.start > 1 else [(t, min(t + TILE, length)) for t in range(0, length, TILE)]
    blocks = [slice(q, q + QUERIES) for q in range(0, query.shape[2], QUERIES)]
    states = [RunningSoftmax.empty(query[:, :, block].shape[:-1], query.shape[-1], query.device) for block in blocks]
    room = query.new_empty(query.shape[:2].numel() * min(QUERIES, query.shape[2]) * min(TILE, length), dtype=torch.float32)  # one for all logits
    for first, last in tiles:
        key, value = tokens.decode(rows, first, last)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
        for block, state in zip(blocks, states, strict=True):
            part = query[:, :, block].float() * scale
            scores = torch.matmul(part, key.mT, out=room[: part.shape[:3].numel() * key.shape[2]].view(*part.shape[:3], -1))
            state.total += state.add(_masked(scores, mask, block, slice(first, last)), overwrite=True) @ value
    return torch.cat([state.result() for state in states], 2).to(query.dtype)


def _masked(scores: Tensor, mask: Tensor | None, queries: slice, keys: slice) -> Tensor:
    if mask is None:
        return scores
    part = mask[..., queries if mask.dim() > 1 and mask.shape[-2] > 1 else slice(None), keys if mask.shape[-1] > 1 else slice(None)]
    return scores.masked_fill_(~part, -torch.inf) if part.dtype == torch.bool else scores.add_(part)
