"""One layer's storage: packed records, exact tokens, recent window. No HuggingFace in here.

Buffers are preallocated and grow geometrically (by an eighth), so appending is amortised O(1) and slack stays small; all of it
counts in `nbytes`. A token enters the window exact. When the window holds 128 tokens more than `window`, its
oldest 128 are packed at the start of the next update, so attention always sees the tokens of its own call exactly. Updates
that do not fit the window (prefill, chunks) go through a temporary copy, at most one layer's at a time.

Packed units are never written again, so what copies, repeated rows and beams begin with is held once (`share`): their units up to there become a prefix, and
later ones go to a store behind it.

On a GPU nobody waits for a prompt's packing either: how many of its tokens stay exact is known to the host a layer later, and only then are they copied
(`finish`).

An operation that fails, out of memory or interrupted, leaves the content as it was (`all_or_nothing`): nothing that counts is written to, what replaces it is
a new tensor. Only what the device counts, and what lies behind it, may be ahead of the host's counts then; it follows from these, and is written anew before
it is read again (`finish`).

What decoding repeats, `encode_block`, `store_block` and `append`, is a fixed sequence of launches: what is there and where to write follows from tensors
(`lengths`, `secondary`, `chosen`), so a CUDA graph can replay it. The host keeps counts of its own for shapes and room (`count_block`, `count_step`) and asks
the device for one number only, a call or a block: how many exact tokens there will be, `exact_need`, known once all is encoded and before it is stored.

Exact tokens are 16-bit, as in the FP16 cache this one replaces: models in float16 and bfloat16 keep their own dtype, float32 models
use float16, or bfloat16 where calibration saw values within a factor 4 of float16's range.
"""

import itertools
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralquant.backend import choose_for_feature, resolve_backend
from spectralquant.cache import exact, exact_cuda
from spectralquant.cache.append_cuda import append_token
from spectralquant.cache.growth import EXACT_AHEAD, grown, grown_units
from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import UNIT
from spectralquant.codec.packed import PackedKV, plain_arithmetic
from spectralquant.codec.prefix import Prefix
from spectralquant.codec.units import encode_units
from spectralquant.config import CacheConfig
from spectralquant.errors import BackendError, ShapeError
from spectralquant.readback import Readback
from spectralquant.stopwatch import Stopwatch

_moves = itertools.count()
_OWN = ("records", "recent_keys", "recent_values", "start", "lengths", "secondary", "exact_keys", "exact_values", "exact_slots")
"""Tensors [B, ...] of a segment that nobody else writes to."""
CANDIDATES = 128
"""Tokens of assisted decoding that may be refused at once without a trace in the cache. The window's buffer grows by as many when that many come."""


class Segment:
    """Keys and values of B sequences in one layer.

    Args:
        codec: The layer's codec.
        config: What stays exact.
        keys: [B, H, *, D]: gives batch, heads, dtype and device.
        start: [B] int64, slots of left padding.

    Attributes:
        candidates: Tokens of an update that may be cropped right after it, so that no block with one of them is packed before the next update.
        ahead: Units more than are needed that a store gets room for when it grows: what a CUDA graph reads should seldom move.
        expected: Tokens that there will be at most, where that is known: stores don't grow beyond them in advance.
        encoded: The window's oldest block is in `records` already, as the unit after the last one that counts. Whoever launches `encode_block` sets it.
        chosen: What stays exact of that block.
        records: [B, H, U, record_bytes], units behind those of `prefix`.
        prefix: Units in front, held once for several sequences and copies; None: there are none.
        watch: Takes the time of packing, where somebody wants to know it.
        move, exact_move: Numbers of the last moves, where a tensor was replaced by another: of the exact store, and of the rest. No two moves of any segments
            have the same, so as long as both stay, all tensors are where they were.

    Raises:
        ShapeError: `keys` has other heads or another head size than the codec.
        BackendError: `config` asks for kernels that can't run here or can't read this codec.
    """

    codec: LayerCodec
    config: CacheConfig
    start: Tensor
    dtype: torch.dtype
    encoded: bool
    move: int
    exact_move: int
    packed: int
    recent: int
    recent_keys: Tensor
    recent_values: Tensor
    exact_keys: Tensor
    exact_values: Tensor

    def __init__(self, codec: LayerCodec, config: CacheConfig, keys: Tensor, start: Tensor) -> None:
        batch, heads, _, dim = keys.shape
        want = codec.key.encode_matrix.shape[:2]
        if (heads, dim) != tuple(want):
            raise ShapeError(f"keys have {heads} heads of size {dim}, the calibration has {want[0]} of size {want[1]}; calibrate this model")
        self.codec, self.config, self.start, self.dtype = codec, config, start, keys.dtype
        self.tile_tokens: int = config.tile_on(keys.device.type)
        self.kernels: bool = use_kernels(codec, config, keys.device)
        self.encode_kernels: bool = choose_for_feature("encoding", resolve_backend(config.backend, keys.device)).name == "cuda"
        self.candidates = 0
        self.ahead = 0
        self.expected: int | None = None
        self.encoded = False
        self.watch: Stopwatch | None = None
        self.move, self.exact_move = next(_moves), next(_moves)
        self._padding: tuple[int, ...] | None = None
        self._unfinished: _Unfinished | None = None
        self._unsettled = False  # `lengths`, `secondary` and unused entries of `exact_slots` may not be what the host's counts say
        self.lengths: Tensor = torch.zeros((batch, 2), dtype=torch.int32, device=keys.device)  # units packed, tokens in the window
        self.packed = self.recent = 0  # tokens in the packed store and in the window
        self.records: Tensor = keys.new_empty((batch, heads, 0, codec.layout.record_bytes), dtype=torch.uint8)
        self.prefix: Prefix | None = None
        dtype = codec.exact_dtype_for(keys.dtype)
        self.recent_keys = torch.empty((batch, heads, config.window + UNIT, dim), dtype=dtype, device=keys.device)
        self.recent_values = torch.empty_like(self.recent_keys)
        self.exact_keys = self.recent_keys.new_empty((batch, heads, 0, dim))
        self.exact_values = torch.empty_like(self.exact_keys)
        self.exact_slots: Tensor = torch.empty((batch, 0), dtype=torch.int32, device=keys.device)
        self.secondary: Tensor = torch.zeros(batch, dtype=torch.int64, device=keys.device)  # exact tokens besides the sinks
        self.chosen: exact.ExactTokens = exact.ExactTokens(torch.empty((batch, UNIT), dtype=torch.int32, device=keys.device), torch.empty_like(self.secondary))

    @property
    def length(self) -> int:
        return self.packed + self.recent

    def tensors(self) -> list[Tensor]:
        """Every tensor whose storage this segment holds (the codec's constants are counted apart)."""
        self.finish()
        own = [getattr(self, name) for name in _OWN]
        shared = [] if self.prefix is None else [self.prefix.records, self.prefix.rows]
        return [*own, self.chosen.tokens, self.chosen.secondary, *shared]

    @property
    def _shared_units(self) -> int:
        return 0 if self.prefix is None else self.prefix.units

    def share(self) -> None:
        """Let copies and other rows of this segment read its packed units instead of copying them. What a prefix holds already stays as it is, and units behind
        it are copied: a prefix of a prefix would cost attention more than it saves."""
        self.finish()
        if self.prefix is not None or not self.packed:
            return
        units = self.packed // UNIT
        with self.all_or_nothing():
            self.prefix = Prefix.of(self.records, units)
            self.records = self.records[:, :, units : units + self.encoded].clone()  # an encoded block doesn't count yet
            self.move = next(_moves)

    def update(self, keys: Tensor, values: Tensor) -> PackedKV | None:
        """Append keys and values [B, H, T, D], or nothing of them where that fails.

        Returns:
            What attention reads, or None when nothing was stored before.

        Raises:
            ShapeError: `keys` has another batch, number of heads or head size.
        """
        self._require_shape(keys)
        was_empty = self.length == 0
        self.finish()
        self.pack_ready()
        with self.all_or_nothing():
            return self._append(keys, values, was_empty)

    @contextmanager
    def all_or_nothing(self) -> Generator[None]:
        """For a with block that changes the content: where it fails, everything is as before."""
        before = dict(self.__dict__)
        try:
            yield
        except BaseException:
            self.__dict__.update(before, encoded=False, _unsettled=True)
            raise

    def require_batch(self, batch: int) -> None:
        """Raise ShapeError unless `batch` sequences are held."""
        if batch != len(self.start):
            raise ShapeError(
                f"keys of {batch} sequences came to a cache that holds {len(self.start)}; give it the same batch, "
                "or repeat or select its rows first (cache.batch_repeat_interleave, cache.batch_select_indices)"
            )

    def _require_shape(self, keys: Tensor) -> None:
        self.require_batch(len(keys))
        _, heads, _, dim = self.recent_keys.shape
        if (keys.shape[1], keys.shape[3]) != (heads, dim):
            raise ShapeError(f"keys have {keys.shape[1]} heads of size {keys.shape[3]}, the cache {heads} of size {dim}; it was made for another model")

    def _append(self, keys: Tensor, values: Tensor, was_empty: bool) -> PackedKV | None:
        count = keys.shape[-2]
        if count <= self.candidates:
            self.reserve_window(self.recent + count)
        if self.recent + count <= self.recent_keys.shape[-2]:
            self.recent_keys[:, :, self.recent : self.recent + count] = keys
            self.recent_values[:, :, self.recent : self.recent + count] = values
            self.recent += count
            self.lengths[:, 1] += count
            return None if was_empty else self._view(self.recent_keys[:, :, : self.recent], self.recent_values[:, :, : self.recent], self.lengths)
        if self.recent:
            keys = torch.cat([self.recent_keys[:, :, : self.recent].to(keys.dtype), keys], -2)
            values = torch.cat([self.recent_values[:, :, : self.recent].to(values.dtype), values], -2)
        view = None
        if not was_empty:
            lengths = self.lengths.clone()
            lengths[:, 1] += count
            view = self._view(keys, values, lengths)
        self._replace_recent(keys, values)
        return view

    def reserve_window(self, need: int) -> None:
        """Make room for `need` tokens in the window."""
        if need > self.recent_keys.shape[2]:
            self.recent_keys, self.recent_values = (grown(t, 2, self._window_room, fill=0) for t in (self.recent_keys, self.recent_values))
            self.move = next(_moves)

    @property
    def _window_room(self) -> int:
        """Tokens that the window may come to hold."""
        return self.config.window + UNIT + self.candidates

    @property
    def tokens_left(self) -> int:
        """Tokens that the window has room for; without any its oldest block is due."""
        return self.config.window + UNIT - self.recent

    @property
    def can_encode(self) -> bool:
        """Whether the window holds a block that is not encoded."""
        return self.recent >= UNIT and not self.encoded

    def pack_ready(self) -> None:
        """Pack the window's oldest block if it is due."""
        if self.tokens_left > 0:
            return
        with self.watched(), self.all_or_nothing():
            if not self.encoded:
                self.reserve_unit()
                self.encode_block()
            self.reserve_exact(int(self.exact_need()))
            self._store(self.chosen, self.lengths[0, 0], self.recent_keys[:, :, :UNIT], self.recent_values[:, :, :UNIT])
            self.secondary.copy_(self.chosen.secondary)
            self._replace_window(self.recent_keys[:, :, UNIT : self.recent], self.recent_values[:, :, UNIT : self.recent], self.packed + UNIT)
            self.write_lengths()

    def encode_block(self) -> None:
        """Write the window's oldest 128 tokens as the unit after the last one that counts. Launches only; room is there (`reserve_unit`)."""
        keys, values = self.recent_keys[:, :, :UNIT], self.recent_values[:, :, :UNIT]
        record = self.records.new_empty((*self.records.shape[:2], 1, self.records.shape[3]))
        chosen = self._encode(keys, values, self.lengths[0, 0], record)
        self.records.index_copy_(2, self.lengths[:1, 0].long() - self._shared_units, record)
        self.chosen.tokens.copy_(chosen.tokens)
        self.chosen.secondary.copy_(chosen.secondary)

    def exact_need(self) -> Tensor:
        """Entries that the exact store needs for the encoded block, a tensor of one int64."""
        return self.chosen.secondary.max() + self.config.sinks

    def store_block(self) -> None:
        """Move the encoded block out of the window, as `pack_ready` does, but in launches alone and with every tensor where it was; room is there
        (`reserve_exact`). The host's counts follow by `count_block`; where that is not reached nobody knows what the window holds."""
        self._store(self.chosen, self.lengths[0, 0], self.recent_keys[:, :, :UNIT], self.recent_values[:, :, :UNIT])
        self.secondary.copy_(self.chosen.secondary)
        self.lengths[:, 0] += 1
        for buffer in (self.recent_keys, self.recent_values):
            buffer[:, :, :-UNIT] = buffer[:, :, UNIT:].clone()
        self.lengths[:, 1] -= UNIT

    def count_block(self) -> None:
        """Note that the encoded block has left the window."""
        self.packed, self.recent, self.encoded = self.packed + UNIT, self.recent - UNIT, False

    def append(self, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> PackedKV:
        """`update` with one token per sequence, keys and values [B, H, 1, D], in launches alone: the token goes where `lengths` says, and what attention
        reads has the same addresses every time. The window has room; the host's counts follow by `count_step`. `seen`: what the kernel reads in the place
        of `lengths`."""
        keys, values = (x.to(self.recent_keys.dtype) for x in (keys, values))
        if self.encode_kernels:
            append_token(keys, values, self.recent_keys, self.recent_values, self.lengths)
        else:
            place = self.lengths[:1, 1].long()
            self.recent_keys.index_copy_(2, place, keys)
            self.recent_values.index_copy_(2, place, values)
            self.lengths[:, 1] += 1
        rows = self.recent_keys.shape[2] if self.kernels else self.recent + 1  # kernels read lengths, the reference reads shapes
        return self._view(self.recent_keys[:, :, :rows], self.recent_values[:, :, :rows], self.lengths if seen is None else seen, causal=True)

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
            raw_keys, raw_values, self.start, self.padding, lengths, self.dtype, self.tile_tokens, self.kernels, causal, self.prefix,
        )  # fmt: skip

    def _replace_recent(self, keys: Tensor, values: Tensor) -> None:
        """Make keys and values, slots packed .., the window: pack all full blocks but the last `window` tokens."""
        count = keys.shape[-2]
        blocks = max(count - self.config.window - self.candidates, 0) // UNIT * UNIT
        with self.watched():
            for first in range(0, blocks, self.tile_tokens):
                last = min(first + self.tile_tokens, blocks)
                self._pack(keys[:, :, first:last], values[:, :, first:last], reserve=blocks - first)
        self._replace_window(keys[:, :, blocks:], values[:, :, blocks:], self.packed)
        self.write_lengths()

    def _replace_window(self, keys: Tensor, values: Tensor, packed: int) -> None:
        """Let `packed` tokens in the store count, and in the window keys and values [B, H, T, D], in new buffers."""
        count, room = keys.shape[2], self.recent_keys.shape[2]
        size = room if count <= room else self._window_room
        window = [x.new_empty((*x.shape[:2], size, x.shape[3])) for x in (self.recent_keys, self.recent_values)]
        for to, tokens in zip(window, (keys, values), strict=True):
            to[:, :, :count] = tokens
        self.recent_keys, self.recent_values = window
        self.packed, self.recent, self.encoded, self.move = packed, count, False, next(_moves)

    def write_lengths(self) -> None:
        """Let the device count what the host counts."""
        self.lengths[:, 0].fill_(self.packed // UNIT)
        self.lengths[:, 1].fill_(self.recent)

    def watched(self) -> AbstractContextManager[None]:
        """`watch` runs in this block, if there is one."""
        return nullcontext() if self.watch is None else self.watch.running()

    def _pack(self, keys: Tensor, values: Tensor, reserve: int) -> None:
        """Pack slots packed .. packed + T - 1; T a multiple of 128. `reserve`: tokens still to come, this call's included."""
        self.finish()
        keys, values = keys.to(self.recent_keys.dtype), values.to(self.recent_keys.dtype)  # the same bits whether they waited in the window or not
        first, units = self.packed // UNIT - self._shared_units, keys.shape[-2] // UNIT
        self._reserve_units(first + reserve // UNIT)
        before = self.lengths.new_full((), self.packed // UNIT)  # `lengths` follow when all is packed
        chosen = self._encode(keys, values, before, self.records[:, :, first : first + units])
        secondary = Readback(chosen.secondary)
        secondary.send()
        self._unfinished = _Unfinished(chosen, keys, values, self.packed, before, secondary)
        self.packed, self.encoded = self.packed + units * UNIT, False
        if not waits_later(keys.device):
            self.finish()

    def finish(self) -> None:
        """Store what stays exact of the last update, if that is still to be done; and where an operation has failed, what the device counts. Everything but
        attention with the last update's result does so first."""
        if self._unsettled:
            self._settle()
        last = self._unfinished
        if last is None:
            return
        with self.watched(), plain_arithmetic(self.records.device), self.all_or_nothing():
            self.reserve_exact(max(last.secondary.read()) + self.config.sinks)
            self._store(last.chosen, last.before, last.keys, last.values)
            self.secondary.copy_(last.chosen.secondary)
            self._unfinished = None

    def distrust(self) -> None:
        """Say that what the device counts may be wrong: a step failed on its way."""
        self._unsettled = True

    def _settle(self) -> None:
        """Let the device count what the host counts, and the exact store hold nothing else."""
        stored = self.packed if self._unfinished is None else self._unfinished.first
        with plain_arithmetic(self.records.device):
            counts = (self.exact_slots >= 0) & (self.exact_slots < stored)  # those in front: entries are in the order of their slots
            self.exact_slots = self.exact_slots.masked_fill(~counts, -1)
            self.secondary = (counts & (self.exact_slots - self.start[:, None] >= self.config.sinks)).sum(-1)
            self.write_lengths()
        self.exact_move, self._unsettled = next(_moves), False

    def _encode(self, keys: Tensor, values: Tensor, before: Tensor, records: Tensor) -> exact.ExactTokens:
        """Write keys and values [B, H, T, D] of the units after `before` [] int32 to records [B, H, T / 128, *], and choose what stays exact."""
        encoded = encode_units(self.codec, keys, values, before, self.start, records, self.encode_kernels)
        choose = exact_cuda.choose_exact if self.encode_kernels else exact.choose_exact
        return choose(self.codec, self.config, encoded, before, self.start, self.secondary, records)

    def _store(self, chosen: exact.ExactTokens, before: Tensor, keys: Tensor, values: Tensor) -> None:
        """Copy the chosen tokens of units, keys and values [B, H, T, D], to the exact store, behind those that `secondary` counts; `before`: [] int32, units
        in front of them."""
        store = exact_cuda.store_exact if self.encode_kernels else exact.store_exact
        to = self.exact_slots, self.exact_keys, self.exact_values
        store(chosen, before, self.start, self.secondary, self.config.sinks, keys, values, to)

    def reserve_unit(self) -> bool:
        """Make room for one more unit than count. Returns whether the store has moved."""
        return self._reserve_units(self.packed // UNIT - self._shared_units + 1)

    def _reserve_units(self, need: int) -> bool:
        have = self.records.shape[2]
        if need > have:
            size = grown_units(have, need, self.ahead, None if self.expected is None else self.expected - self._shared_units * UNIT)
            self.records = grown(self.records, 2, size)
            self.move = next(_moves)
        return need > have

    def reserve_exact(self, need: int) -> None:
        """Make room for `need` entries of the exact store."""
        have = self.exact_slots.shape[1]
        if need > have:
            size = max(need + self.ahead * EXACT_AHEAD, have + have // 8)
            with self.all_or_nothing():
                self.exact_slots = grown(self.exact_slots, 1, size, fill=-1)
                self.exact_keys = grown(self.exact_keys, 2, size, fill=0)
                self.exact_values = grown(self.exact_values, 2, size, fill=0)
                self.exact_move = next(_moves)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens. Tokens of a block that is cut go back to the window as their code says they are."""
        if self._unfinished is None or length > self._unfinished.first:
            self.finish()  # else all of it goes
        if length >= self.length:
            return
        with self.all_or_nothing():
            if length >= self.packed:
                self.recent, self.encoded = length - self.packed, False
                self.write_lengths()
                return
            keep = length // UNIT * UNIT
            view = self._view(self.recent_keys[:, :, :0], self.recent_values[:, :, :0], self.lengths)
            keys, values = (view.dense(which)[:, :, keep:length] for which in ("key", "value"))
            self._replace_window(keys, values, keep)
            self._unfinished = None
            if self.prefix is not None:
                self.prefix = self.prefix.cut(keep // UNIT)
            self._settle()

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Take the sequences that `fn` picks along dimension 0, into new storage; a prefix stays where it is."""
        self._map(fn, lambda prefix: prefix.map_rows(fn))

    def drop_unused(self) -> None:
        """Free what no sequence begins with any more. Waits for the device."""
        if self.prefix is not None:
            self.prefix, self.move = self.prefix.without_unused(), next(_moves)

    def to(self, device: torch.device) -> None:
        """Move every tensor."""
        self._map(lambda t: t.to(device), lambda prefix: prefix.to(device))

    def _map(self, fn: Callable[[Tensor], Tensor], of_prefix: Callable[[Prefix], Prefix]) -> None:
        self.finish()
        with self.all_or_nothing():
            for name in _OWN:
                setattr(self, name, fn(getattr(self, name)))
            self.chosen = exact.ExactTokens(fn(self.chosen.tokens), fn(self.chosen.secondary))
            self.prefix = None if self.prefix is None else of_prefix(self.prefix)
            self._padding = None
            self.move, self.exact_move = next(_moves), next(_moves)

    def copy(self) -> "Segment":
        """An independent segment with the same content; the codec's constants and packed units are shared."""
        self.share()
        other = object.__new__(Segment)
        other.__dict__.update(self.__dict__)
        other.map_rows(torch.Tensor.clone)
        return other


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """Units whose codes are written and whose exact tokens are chosen, but not in the exact store.

    Attributes:
        chosen: What stays exact.
        keys, values: [B, H, T, D], the units' tokens.
        first: Slot of the first of them.
        before: [] int32, units in front, for launches.
        secondary: Exact tokens besides the sinks then, on their way to the host.
    """

    chosen: exact.ExactTokens
    keys: Tensor
    values: Tensor
    first: int
    before: Tensor
    secondary: Readback


def waits_later(device: torch.device) -> bool:
    """Whether the host has something to launch while `device` finds out how many tokens stay exact."""
    return device.type == "cuda"


def use_kernels(codec: LayerCodec, config: CacheConfig, device: torch.device) -> bool:
    """Whether attention over codes of `codec` on `device` is the fused kernel's."""
    choice = choose_for_feature("decode attention", resolve_backend(config.backend, device))
    if choice.name == "cuda" and not codec.has_planes:
        if config.backend == "cuda":
            raise BackendError("backend='cuda' can't be used: quantizer='lloyd-max' has levels that no kernel reads; use 'joint' or 'uniform'")
        return False
    return choice.name == "cuda"
