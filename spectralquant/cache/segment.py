"""One layer's storage: packed records, exact tokens, recent window. No HuggingFace in here.

Buffers are preallocated and grow geometrically (by an eighth), so appending is amortised O(1) and slack stays small; all of it
counts in `nbytes`. A token enters the window exact. When the window holds 128 tokens more than `window`, its
oldest 128 are packed at the start of the next update, so attention always sees the tokens of its own call exactly. Updates
that do not fit the window (prefill, chunks) go through a temporary copy, at most one layer's at a time.

What decoding repeats, `encode_block`, `store_block` and `append`, is a fixed sequence of launches: where to write follows from tensors (`lengths`,
`secondary`), so a CUDA graph can replay it. The host keeps counts of its own for shapes and room (`count_block`, `count_step`) and asks the device for one
number only: how many exact tokens there are with those of a block, `exact_need`, known once it is encoded, before it leaves the window.

Exact tokens are 16-bit, as in the FP16 cache this one replaces: models in float16 and bfloat16 keep their own dtype, float32 models
use float16, or bfloat16 where calibration saw values within a factor 4 of float16's range.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from spectralquant.backend import choose_for_feature, resolve_backend
from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import MASKED_GAIN, UNIT, pack_gains, unpack_gains
from spectralquant.codec.packed import PackedKV
from spectralquant.codec.units import encode_units
from spectralquant.config import CacheConfig
from spectralquant.errors import BackendError, ShapeError

EARLY = 4
"""Exact tokens that a layer may have beyond its share: secondary sinks come at the first delimiters of a text, before a share allows any. Like the
sinks they are few per sequence, whatever its length."""
EXACT_AHEAD = 5
"""Exact tokens that a unit may bring (`max_exact_share` of 128)."""


class Segment:
    """Keys and values of B sequences in one layer.

    Args:
        codec: The layer's codec.
        config: What stays exact.
        keys: [B, H, *, D]: gives batch, heads, dtype and device.
        start: [B] int64, slots of left padding.

    Attributes:
        ahead: Units more than are needed that a store gets room for when it grows: what a CUDA graph reads should seldom move.
        encoded: The window's oldest block is in `records` already, as the unit after the last one that counts. Whoever launches `encode_block` sets it.

    Raises:
        ShapeError: `keys` has other heads or another head size than the codec.
        BackendError: `config` asks for kernels that can't run here or can't read this codec.
    """

    def __init__(self, codec: LayerCodec, config: CacheConfig, keys: Tensor, start: Tensor) -> None:
        batch, heads, _, dim = keys.shape
        want = codec.key.encode_matrix.shape[:2]
        if (heads, dim) != tuple(want):
            raise ShapeError(f"keys have {heads} heads of size {dim}, the calibration has {want[0]} of size {want[1]}; calibrate this model")
        self.codec, self.config, self.start, self.dtype = codec, config, start, keys.dtype
        self.tile_tokens = config.tile_on(keys.device.type)
        self.kernels = use_kernels(codec, config, keys.device)
        self.encode_kernels = choose_for_feature("encoding", resolve_backend(config.backend, keys.device)).name == "cuda"
        self.ahead = 0
        self.encoded = False
        self._padding: tuple[int, ...] | None = None
        self.lengths = torch.zeros((batch, 2), dtype=torch.int32, device=keys.device)  # units packed, tokens in the window
        self.packed = self.recent = 0  # tokens in the packed store and in the window
        self.records = keys.new_empty((batch, heads, 0, codec.layout.record_bytes), dtype=torch.uint8)
        dtype = codec.exact_dtype if keys.dtype == torch.float32 else keys.dtype
        self.recent_keys = torch.empty((batch, heads, config.window + UNIT, dim), dtype=dtype, device=keys.device)
        self.recent_values = torch.empty_like(self.recent_keys)
        self.exact_keys = self.recent_keys.new_empty((batch, heads, 0, dim))
        self.exact_values = torch.empty_like(self.exact_keys)
        self.exact_slots = torch.empty((batch, 0), dtype=torch.int32, device=keys.device)
        self.secondary = torch.zeros(batch, dtype=torch.int64, device=keys.device)  # exact tokens besides the sinks

    @property
    def length(self) -> int:
        return self.packed + self.recent

    def tensors(self) -> list[Tensor]:
        """Every tensor whose storage this segment holds (the codec's constants are counted apart)."""
        return [*self.encode_tensors(), self.exact_keys, self.exact_values, self.exact_slots]

    def encode_tensors(self) -> list[Tensor]:
        """Those that `encode_block` uses: all but the exact store."""
        return [self.records, self.recent_keys, self.recent_values, self.start, self.lengths, self.secondary]

    def update(self, keys: Tensor, values: Tensor) -> PackedKV | None:
        """Append keys and values [B, H, T, D]. Returns what attention reads, or None when nothing was stored before."""
        was_empty, count = self.length == 0, keys.shape[-2]
        self.pack_ready()
        if self.recent + count <= self.recent_keys.shape[-2]:
            self.recent_keys[:, :, self.recent : self.recent + count] = keys
            self.recent_values[:, :, self.recent : self.recent + count] = values
            self.recent += count
            self.lengths[:, 1] += count
            return None if was_empty else self._view(self.recent_keys[:, :, : self.recent], self.recent_values[:, :, : self.recent], self.lengths)
        if self.recent:
            keys = torch.cat([self.recent_keys[:, :, : self.recent].to(keys.dtype), keys], -2)
            values = torch.cat([self.recent_values[:, :, : self.recent].to(values.dtype), values], -2)
        view = None if was_empty else self._view(keys, values, self.lengths + torch.tensor([0, count], dtype=torch.int32, device=keys.device))
        self._replace_recent(keys, values)
        return view

    @property
    def tokens_left(self) -> int:
        """Tokens that the window has room for; without any its oldest block is due."""
        return self.config.window + UNIT - self.recent

    @property
    def can_encode(self) -> bool:
        """Whether the window holds a block that is not encoded."""
        return self.recent >= UNIT and not self.encoded

    @property
    def run_offset(self) -> int:
        """Slots between the window's first token and the start of its run of the anchored frame: what `encode_block` can't read from a tensor."""
        return self.packed % self.codec.frame.run if self.codec.frame is not None else 0

    def pack_ready(self) -> None:
        """Pack the window's oldest block if it is due."""
        if self.tokens_left > 0:
            return
        if not self.encoded:
            self.reserve_unit()
            self.encode_block()
        self.reserve_exact(int(self.exact_need()))
        self.store_block()
        self.count_block()

    def encode_block(self) -> None:
        """Write the window's oldest 128 tokens as the unit after the last one that counts. Launches only; room is there (`reserve_unit`)."""
        keys, values = self.recent_keys[:, :, :UNIT], self.recent_values[:, :, :UNIT]
        record = self.records.new_empty((*self.records.shape[:2], 1, self.records.shape[3]))
        self._encode(keys, values, record)
        self.records.index_copy_(2, self._next_unit(), record)

    def exact_need(self) -> Tensor:
        """Entries that the exact store needs for the encoded block, a tensor of one int64."""
        return (self._exact_used() + self._exact_of_block().sum(-1)).max()

    def store_block(self) -> None:
        """Move the encoded block out of the window: its exact tokens go to the exact store, and its unit counts. Launches only; room is there
        (`reserve_exact`); the host's counts follow by `count_block`."""
        self._store(self._exact_of_block(), self.recent_keys[:, :, :UNIT], self.recent_values[:, :, :UNIT], UNIT)
        for buffer in (self.recent_keys, self.recent_values):
            buffer[:, :, :-UNIT] = buffer[:, :, UNIT:].clone()
        self.lengths[:, 1] -= UNIT

    def count_block(self) -> None:
        """Note that the encoded block has left the window."""
        self.packed, self.recent, self.encoded = self.packed + UNIT, self.recent - UNIT, False

    def append(self, keys: Tensor, values: Tensor) -> PackedKV:
        """`update` with one token per sequence, keys and values [B, H, 1, D], in launches alone: the token goes where `lengths` says, and what attention
        reads has the same addresses every time. The window has room; the host's counts follow by `count_step`."""
        place = self.lengths[:1, 1].long()
        self.recent_keys.index_copy_(2, place, keys.to(self.recent_keys.dtype))
        self.recent_values.index_copy_(2, place, values.to(self.recent_values.dtype))
        self.lengths[:, 1] += 1
        rows = self.recent_keys.shape[2] if self.kernels else self.recent + 1  # kernels read lengths, the reference reads shapes
        return self._view(self.recent_keys[:, :, :rows], self.recent_values[:, :, :rows], self.lengths, causal=True)

    def count_step(self) -> None:
        """Note that the window has the token of one more `append`."""
        self.recent += 1

    @property
    def padding(self) -> tuple[int, ...]:
        """`start` on the host; read once."""
        if self._padding is None:
            self._padding = tuple(self.start.tolist())
        return self._padding

    def _view(self, raw_keys: Tensor, raw_values: Tensor, lengths: Tensor, causal: bool = False) -> PackedKV:
        return PackedKV(
            self.codec, self.records, self.packed, self.exact_keys, self.exact_values, self.exact_slots,
            raw_keys, raw_values, self.start, self.padding, lengths, self.dtype, self.tile_tokens, self.kernels, causal,
        )  # fmt: skip

    def _replace_recent(self, keys: Tensor, values: Tensor) -> None:
        """Make keys and values, slots packed .., the window: pack all full blocks but the last `window` tokens."""
        count = keys.shape[-2]
        blocks = max(count - self.config.window, 0) // UNIT * UNIT
        for first in range(0, blocks, self.tile_tokens):
            last = min(first + self.tile_tokens, blocks)
            self._pack(keys[:, :, first:last], values[:, :, first:last], reserve=blocks - first)
        self.recent = count - blocks
        self.recent_keys[:, :, : self.recent] = keys[:, :, blocks:]
        self.recent_values[:, :, : self.recent] = values[:, :, blocks:]
        self._write_lengths()

    def _write_lengths(self) -> None:
        self.lengths[:, 0] = self.packed // UNIT
        self.lengths[:, 1] = self.recent

    def _pack(self, keys: Tensor, values: Tensor, reserve: int) -> None:
        """Pack slots packed .. packed + T - 1; T a multiple of 128. `reserve`: tokens still to come, this call's included."""
        keys, values = keys.to(self.recent_keys.dtype), values.to(self.recent_keys.dtype)  # the same bits whether they waited in the window or not
        first, units = self.packed // UNIT, keys.shape[-2] // UNIT
        self._reserve_units(first + reserve // UNIT)
        exact = self._encode(keys, values, self.records[:, :, first : first + units])
        more = exact.sum(-1)
        need, most = torch.stack([(self._exact_used() + more).max(), more.max()]).tolist()
        self.reserve_exact(need)
        self._store(exact, keys, values, most)
        self.packed, self.encoded = self.packed + units * UNIT, False

    def _next_unit(self) -> Tensor:
        """[1] int64: the unit after the last one that counts."""
        return self.lengths[:1, 0].long()

    def _next_slots(self, count: int) -> Tensor:
        """[T] int64: `count` slots from the start of that unit."""
        return self._next_unit() * UNIT + torch.arange(count, device=self.lengths.device)

    def _encode(self, keys: Tensor, values: Tensor, records: Tensor) -> Tensor:
        """Write keys and values [B, H, T, D] of the next slots to records [B, H, T / 128, *]; gains of tokens that stay exact, [B, T] bool, are masked."""
        slots, first = self._next_slots(keys.shape[-2]), self.run_offset
        start = self.start - (slots[:1] - first)  # positions are slots minus starts, and units at equal offsets in a run differ in nothing else
        gains, value_gains, key_error = encode_units(self.codec, keys, values, first, start, records, self.encode_kernels)
        exact = self._choose_exact(values, slots, key_error)
        masked = (exact | (slots[None] < self.start[:, None]))[:, None]
        _, key_bytes, _, value_bytes = self.codec.layout.split(records)
        key_bytes.copy_(pack_gains(gains.masked_fill(masked, MASKED_GAIN).unflatten(2, (-1, UNIT))))
        value_bytes.copy_(pack_gains(value_gains.masked_fill(masked, MASKED_GAIN).unflatten(2, (-1, UNIT))))
        return exact

    def _choose_exact(self, values: Tensor, slots: Tensor, key_error: Tensor) -> Tensor:
        """[B, T] bool: sinks, and within the bound the tokens that the code would serve badly; key_error [B, T]."""
        position = slots[None] - self.start[:, None]
        sinks = (position >= 0) & (position < self.config.sinks)
        need = self.codec.exact_need(values, key_error)
        wanted = (need > 1) & (position >= self.config.sinks)
        return sinks | self._within_bound(need.masked_fill(~wanted, 0.0))

    def _within_bound(self, need: Tensor) -> Tensor:
        """The entries of `need` [B, T] to keep exact: positive ones, unit by unit the largest first, such that after every unit at most
        `EARLY` and a share `exact_bound` of the tokens packed so far are exact. What came in one piece or in many makes no difference."""
        by_unit = need.unflatten(1, (-1, UNIT))
        tokens = UNIT * (self._next_unit() + torch.arange(1, by_unit.shape[1] + 1, device=need.device)).double()
        share = min(self.codec.exact_bound, self.config.max_exact_share)
        allowed = (tokens * share).long() + (EARLY if share else 0)
        wanted = (by_unit > 0).sum(-1).cumsum(1)
        # used_u = min(used_{u-1} + wanted_u, allowed_u), written out: the tightest of all bounds so far.
        used = wanted + torch.minimum((allowed - wanted).cummin(1).values, self.secondary[:, None])
        taken = used.diff(dim=1, prepend=self.secondary[:, None])
        rank = by_unit.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return ((by_unit > 0) & (rank < taken[..., None])).flatten(1)

    def _exact_used(self) -> Tensor:
        """[B] int64: entries of the exact store that are in use, sinks and others."""
        return self.secondary + (self._next_unit() * UNIT - self.start).clamp(0, self.config.sinks)

    def _exact_of_block(self) -> Tensor:
        """[B, 128] bool: tokens of the encoded block that stay exact, as the gains in its record say."""
        gains = self.codec.layout.split(self.records[:, :1].index_select(2, self._next_unit()))[1]
        return (unpack_gains(gains[:, 0, 0]) == MASKED_GAIN) & (self._next_slots(UNIT) >= self.start[:, None])

    def _store(self, exact: Tensor, keys: Tensor, values: Tensor, most: int) -> None:
        """Copy the `exact` [B, T] of the next slots, `most` of a sequence or fewer, to the exact store, and count their units."""
        slots, heads, dim = self._next_slots(exact.shape[1]), *keys.shape[1::2]
        if min(most, self.exact_slots.shape[1]):
            # All sequences write `most` entries: after its last one a sequence writes that one again, and one without any writes what is there.
            count = exact.sum(-1, keepdim=True)
            nth = torch.minimum(torch.arange(most, device=exact.device), (count - 1).clamp_min(0))
            token = exact.int().argsort(dim=-1, descending=True, stable=True).gather(1, nth)
            place = (self._exact_used()[:, None] + nth).clamp_max(self.exact_slots.shape[1] - 1)
            _overwrite(self.exact_slots, place, slots.int()[token], count > 0)
            token, place = (x[:, None, :, None].expand(-1, heads, -1, dim) for x in (token, place))
            _overwrite(self.exact_keys, place, keys.gather(2, token), (count > 0)[..., None, None])
            _overwrite(self.exact_values, place, values.gather(2, token), (count > 0)[..., None, None])
        self.secondary += (exact & (slots[None] - self.start[:, None] >= self.config.sinks)).sum(-1)
        self.lengths[:, 0] += exact.shape[1] // UNIT

    def reserve_unit(self) -> bool:
        """Make room for one more unit than count. Returns whether the store has moved."""
        return self._reserve_units(self.packed // UNIT + 1)

    def _reserve_units(self, need: int) -> bool:
        have = self.records.shape[2]
        if need > have:
            size = max(need + self.ahead, have + have // 8)
            self.records = _grow(self.records, 2, size, fill=0)
        return need > have

    def reserve_exact(self, need: int) -> None:
        """Make room for `need` entries of the exact store."""
        have = self.exact_slots.shape[1]
        if need > have:
            size = max(need + self.ahead * EXACT_AHEAD, have + have // 8)
            self.exact_slots = _grow(self.exact_slots, 1, size, fill=-1)
            self.exact_keys = _grow(self.exact_keys, 2, size, fill=0)
            self.exact_values = _grow(self.exact_values, 2, size, fill=0)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens. Tokens of a block that is cut go back to the window as their code says they are."""
        if length >= self.length:
            return
        self.encoded = False
        if length >= self.packed:
            self.recent = length - self.packed
            self._write_lengths()
            return
        keep = length // UNIT * UNIT
        view = self._view(self.recent_keys[:, :, :0], self.recent_values[:, :, :0], self.lengths)
        back = length - keep
        keys, values = (view.dense(which)[:, :, keep:length] for which in ("key", "value"))
        dropped = self.exact_slots >= keep
        self.secondary = self.secondary - (dropped & (self.exact_slots - self.start[:, None] >= self.config.sinks)).sum(-1)
        order = dropped.int().argsort(dim=-1, stable=True)  # used entries stay in front
        self.exact_slots = self.exact_slots.masked_fill(dropped, -1).gather(1, order)
        index = order[:, None, :, None].expand_as(self.exact_keys)
        self.exact_keys, self.exact_values = self.exact_keys.gather(2, index), self.exact_values.gather(2, index)
        self.packed, self.recent = keep, 0
        self.recent_keys[:, :, :back], self.recent_values[:, :, :back] = keys, values
        self.recent = back
        self._write_lengths()

    def map_batch(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn`, which picks rows of dimension 0 and returns new storage, to every tensor."""
        mapped = [fn(t) for t in self.tensors()]
        self.records, self.recent_keys, self.recent_values, self.start, self.lengths, self.secondary, *mapped = mapped
        self.exact_keys, self.exact_values, self.exact_slots = mapped
        self._padding = None

    def copy(self) -> "Segment":
        """An independent segment with the same content; the codec's constants are shared."""
        other = object.__new__(Segment)
        other.__dict__.update(self.__dict__)
        other.map_batch(torch.Tensor.clone)
        return other


def use_kernels(codec: LayerCodec, config: CacheConfig, device: torch.device) -> bool:
    """Whether attention over codes of `codec` on `device` is the fused kernel's."""
    choice = choose_for_feature("decode attention", resolve_backend(config.backend, device))
    if choice.name == "cuda" and not codec.has_planes:
        if config.backend == "cuda":
            raise BackendError("backend='cuda' can't be used: quantizer='lloyd-max' has levels that no kernel reads; use 'joint' or 'uniform'")
        return False
    return choice.name == "cuda"


def _grow(tensor: Tensor, dim: int, size: int, fill: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    out = tensor.new_full(shape, fill)
    out.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return out


def _overwrite(store: Tensor, place: Tensor, new: Tensor, where: Tensor) -> None:
    """store[.., place, ..] = new along the dimension of entries (1 of two, 2 of four), and what is there where `where` is false."""
    dim = store.dim() // 2
    store.scatter_(dim, place, torch.where(where, new, store.gather(dim, place)))
