"""What a cache promises, said a second time without any of its storage: plain tensors, one sequence at a time.

A token is exact, rounded to 16 bits, until its block of 128 leaves the window. Then it is what encoding that block of that sequence alone and decoding it
gives, unless it is a sink or one of the neediest within the bound. A block that is cut by a crop goes back as its code says it is.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spectralquant.cache.exact import EARLY
from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import MASKED_GAIN, UNIT
from spectralquant.config import CacheConfig


@dataclass(frozen=True)
class Codes:
    """One unit of one sequence: planes [H, 128, P] and gains [H, 128] of K, and of V."""

    parts: tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Row:
    """One sequence: slots of left padding, keys and values [H, T, D] as a reader gets them, the codes of its units, slots that stay exact."""

    start: int
    keys: Tensor
    values: Tensor
    codes: tuple[Codes, ...] = ()
    exact: frozenset[int] = frozenset()


@dataclass
class PlainLayer:
    """One layer of a cache. Rows are never written to, so a copy shares them."""

    codec: LayerCodec
    config: CacheConfig
    dtype: torch.dtype
    candidates: int = 0
    rows: list[Row] = field(default_factory=list)
    packed: int = 0
    room: int = 0

    @property
    def length(self) -> int:
        return self.rows[0].keys.shape[1] if self.rows else 0

    @property
    def recent(self) -> int:
        return self.length - self.packed

    def copy(self) -> "PlainLayer":
        return replace(self, rows=list(self.rows))

    def rounded(self, x: Tensor) -> Tensor:
        return x.to(self.codec.exact_dtype_for(self.dtype)).to(self.dtype)

    def update(self, keys: Tensor, values: Tensor, starts: list[int]) -> list[Row]:
        """Take keys and values [B, H, T, D]; returns what attention sees meanwhile. `starts`: of the sequences, where there are none yet."""
        if not self.rows:
            empty = keys[0, :, :0]
            self.rows, self.room = [Row(start, empty, empty) for start in starts], self.config.window + UNIT
        self.pack_due()
        count = keys.shape[2]
        if count <= self.candidates and self.recent + count > self.room:
            self.room = self.config.window + UNIT + self.candidates
        self.rows = [
            replace(row, keys=torch.cat([row.keys, self.rounded(k)], 1), values=torch.cat([row.values, self.rounded(v)], 1))
            for row, k, v in zip(self.rows, keys, values, strict=True)
        ]
        seen = list(self.rows)
        if self.recent > self.room:
            for _ in range(max(self.recent - self.config.window - self.candidates, 0) // UNIT):
                self._pack()
            if self.recent > self.room:
                self.room = self.config.window + UNIT + self.candidates
        return seen

    def pack_due(self) -> None:
        if self.recent >= self.config.window + UNIT:
            self._pack()

    def crop(self, length: int) -> None:
        if length == 0:
            self.clear()
        if length >= self.length:
            return
        keep = min(length // UNIT * UNIT, self.packed)
        back = slice(keep if length < self.packed else length, length)
        for i, row in enumerate(self.rows):
            keys, values = (torch.cat([x[:, : back.start], self.rounded(x[:, back])], 1) for x in (row.keys, row.values))
            self.rows[i] = Row(row.start, keys, values, row.codes[: keep // UNIT], frozenset(s for s in row.exact if s < keep))
        self.packed = keep

    def take(self, rows: list[int]) -> None:
        self.rows = [self.rows[i] for i in rows]

    def clear(self) -> None:
        self.rows, self.packed = [], 0

    def secondary(self, row: Row) -> int:
        """Exact tokens besides the sinks."""
        return sum(slot - row.start >= self.config.sinks for slot in row.exact)

    def allowed(self, packed: int) -> int:
        """Most of them."""
        share = min(self.codec.exact_bound, self.config.max_exact_share)
        return int(packed * share) + (EARLY if share else 0)

    def _pack(self) -> None:
        self.rows = [self._with_unit(row) for row in self.rows]
        self.packed += UNIT

    def _with_unit(self, row: Row) -> Row:
        """`row` with one more unit."""
        codec, unit, start = self.codec, slice(self.packed, self.packed + UNIT), torch.tensor([row.start])
        slots = torch.arange(unit.start, unit.stop)
        keys, values = (x[None, :, unit].to(codec.exact_dtype_for(self.dtype)) for x in (row.keys, row.values))
        planes, gains, value_planes, value_gains = codec.encode(keys, values, slots, start)
        need = codec.exact_need(codec.value_size(values), codec.key_error(keys, planes, gains, slots, start))[0].tolist()
        position = [slot - row.start for slot in slots.tolist()]
        wanted = sorted((i for i in range(UNIT) if need[i] > 1 and position[i] >= self.config.sinks), key=lambda i: (-need[i], i))
        taken = wanted[: self.allowed(unit.stop) - self.secondary(row)]
        exact = [i in taken or 0 <= position[i] < self.config.sinks for i in range(UNIT)]
        hidden = torch.tensor([e or p < 0 for e, p in zip(exact, position, strict=True)])
        gains, value_gains = (g.masked_fill(hidden, MASKED_GAIN) for g in (gains, value_gains))
        coded = (codec.decode_keys(planes, gains, slots, start)[0].to(self.dtype), codec.decode_values(value_planes, value_gains)[0].to(self.dtype))
        new = [x.clone() for x in (row.keys, row.values)]
        for x, decoded in zip(new, coded, strict=True):
            x[:, unit] = torch.where(torch.tensor(exact)[None, :, None], x[:, unit], decoded)
        codes = Codes((planes[0], gains[0], value_planes[0], value_gains[0]))
        return Row(row.start, *new, (*row.codes, codes), row.exact | {unit.start + i for i in range(UNIT) if exact[i]})
