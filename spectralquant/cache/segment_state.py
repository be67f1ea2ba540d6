"""The content of a segment as plain tensors, for files, and a segment from them. What comes back is checked: a stranger may have written the file."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from spectralquant.cache.exact import entries_used
from spectralquant.cache.segment import CANDIDATES, Segment
from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import UNIT
from spectralquant.codec.prefix import Prefix
from spectralquant.config import CacheConfig
from spectralquant.errors import CacheFileError

_RANKS = {"exact_slots": 2, "start": 1, "prefix_rows": 1}
"""Dimensions of tensors that have not four."""


@dataclass(frozen=True, slots=True)
class SegmentState:
    """Keys and values of B sequences in one layer: what is counted, without room in advance. H KV heads of size D.

    Attributes:
        records: [B, H, U, record_bytes] uint8, packed units, those behind the prefix.
        exact_keys, exact_values: [B, H, E, D], 16-bit; entries in use come first.
        exact_slots: [B, E] int32; -1 marks an unused entry.
        recent_keys, recent_values: [B, H, R, D], 16-bit, the window.
        start: [B] int64, slots of left padding.
        prefix_records: [S, H, U', record_bytes] uint8, units in front that several sequences share, or None.
        prefix_rows: [B] int32, which of the S each sequence begins with, or None.
    """

    records: Tensor
    exact_keys: Tensor
    exact_values: Tensor
    exact_slots: Tensor
    recent_keys: Tensor
    recent_values: Tensor
    start: Tensor
    prefix_records: Tensor | None = None
    prefix_rows: Tensor | None = None

    def require_ranks(self) -> None:
        """Raise CacheFileError unless all tensors have as many dimensions as above, by which `units` and `length` go."""
        for name, tensor in self.tensors().items():
            rank = _RANKS.get(name, 4)
            if tensor.dim() != rank:
                raise CacheFileError(f"{name} has {tensor.dim()} dimensions, expected {rank}")

    def tensors(self) -> dict[str, Tensor]:
        """By name, those that are there."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @property
    def units(self) -> int:
        """Packed units, the prefix's included."""
        return self.records.shape[2] + (0 if self.prefix_records is None else self.prefix_records.shape[2])

    @property
    def length(self) -> int:
        """Tokens of each sequence, padding included."""
        return UNIT * self.units + self.recent_keys.shape[2]


def capture(segment: Segment) -> SegmentState:
    """The content of `segment`; views of its tensors."""
    segment.finish()
    prefix = segment.prefix
    shared = 0 if prefix is None else prefix.units
    used = int((segment.exact_slots >= 0).sum(-1).max()) if segment.exact_slots.numel() else 0
    return SegmentState(
        segment.records[:, :, : segment.packed // UNIT - shared],
        segment.exact_keys[:, :, :used],
        segment.exact_values[:, :, :used],
        segment.exact_slots[:, :used],
        segment.recent_keys[:, :, : segment.recent],
        segment.recent_values[:, :, : segment.recent],
        segment.start,
        None if prefix is None else prefix.records[:, :, :shared],
        None if prefix is None else prefix.rows,
    )


def build_segment(state: SegmentState, codec: LayerCodec, config: CacheConfig, dtype: torch.dtype) -> Segment:
    """A segment with this content, where the codec is.

    Packed units become a prefix, which nobody writes to: on a CPU they stay in the file that they were read from.

    Args:
        state: From `capture`, or from a file.
        codec, config: As they were when the content was coded.
        dtype: Of the model.

    Raises:
        CacheFileError: The tensors don't fit each other, the codec or `config`.
    """
    _require_consistent(state, codec, config, dtype)
    device = codec.value_norm.device
    batch, heads = state.records.shape[:2]
    start = state.start.to(device)
    segment = Segment(codec, config, torch.empty((batch, heads, 0, codec.head_dim), dtype=dtype, device=device), start)
    if state.prefix_records is not None and state.prefix_rows is not None:
        segment.prefix = Prefix(state.prefix_records.to(device).contiguous(), state.prefix_rows.to(device), state.prefix_records.shape[2])
        segment.records = state.records.to(device, copy=True).contiguous()
    elif state.units:
        segment.prefix = Prefix.of(state.records.to(device).contiguous(), state.units)
    segment.packed, segment.recent = UNIT * state.units, state.recent_keys.shape[2]
    segment.reserve_exact(state.exact_slots.shape[1])
    count = state.exact_slots.shape[1]
    segment.exact_slots[:, :count] = state.exact_slots.to(device)
    for to, new in ((segment.exact_keys, state.exact_keys), (segment.exact_values, state.exact_values)):
        to[:, :, :count] = new.to(device)
    segment.secondary = ((segment.exact_slots >= 0) & (segment.exact_slots - start[:, None] >= config.sinks)).sum(-1)
    if segment.recent > config.window + UNIT:
        segment.candidates = CANDIDATES
    segment.reserve_window(segment.recent)
    segment.recent_keys[:, :, : segment.recent] = state.recent_keys.to(device)
    segment.recent_values[:, :, : segment.recent] = state.recent_values.to(device)
    segment.write_lengths()
    return segment


def _require_consistent(state: SegmentState, codec: LayerCodec, config: CacheConfig, dtype: torch.dtype) -> None:
    half, dim, record = codec.exact_dtype_for(dtype), codec.head_dim, codec.layout.record_bytes
    known: dict[str, int] = {"H": codec.heads, "D": dim, "bytes": record}
    _require(state.records, "records", "B H U bytes", torch.uint8, known)
    for name in ("exact_keys", "exact_values"):
        _require(getattr(state, name), name, "B H E D", half, known)
    for name in ("recent_keys", "recent_values"):
        _require(getattr(state, name), name, "B H R D", half, known)
    _require(state.exact_slots, "exact_slots", "B E", torch.int32, known)
    _require(state.start, "start", "B", torch.int64, known)
    if (state.prefix_records is None) != (state.prefix_rows is None):
        raise CacheFileError("prefix_records and prefix_rows come together, one of them is missing")
    if state.prefix_records is not None and state.prefix_rows is not None:
        _require(state.prefix_records, "prefix_records", "S H P bytes", torch.uint8, known)
        _require(state.prefix_rows, "prefix_rows", "B", torch.int32, known)
        _require_range("prefix_rows", state.prefix_rows, 0, len(state.prefix_records) - 1)
    if not known["B"]:
        raise CacheFileError("records hold no sequence, expected at least one")
    if state.recent_keys.shape[2] > config.window + UNIT + CANDIDATES:
        raise CacheFileError(f"recent_keys hold {state.recent_keys.shape[2]} tokens, the window has room for {config.window + UNIT + CANDIDATES}")
    _require_range("start", state.start, 0, torch.iinfo(torch.int32).max)  # after a crop a sequence may have padding alone
    _require_exact(state, config)


def _require_exact(state: SegmentState, config: CacheConfig) -> None:
    """Each sequence has its sinks and other tokens among its packed ones, in order, in the first entries."""
    slots, packed = state.exact_slots, UNIT * state.units
    used = slots >= 0
    _require_range("exact_slots", slots, -1, packed - 1)
    secondary = (used & (slots - state.start[:, None] >= config.sinks)).sum(-1)
    expected = entries_used(torch.tensor(state.units), state.start, secondary, config.sinks)
    in_front = torch.arange(slots.shape[1]) < used.sum(-1, keepdim=True)
    rising = ((slots[:, 1:] > slots[:, :-1]) | ~used[:, 1:]).all()
    if not (torch.equal(used, in_front) and torch.equal(used.sum(-1), expected) and rising):
        raise CacheFileError("exact_slots don't name the first tokens of every sequence and others in order, in front of unused entries")


def _require(tensor: Tensor, name: str, dims: str, dtype: torch.dtype, known: dict[str, int]) -> None:
    """Raise unless `tensor` has these dimensions; a size that is not known yet becomes known."""
    names = dims.split()
    if tensor.dtype != dtype or tensor.dim() != len(names):
        raise CacheFileError(f"{name} is {tensor.dtype} of {tensor.dim()} dimensions, expected {dtype} of [{', '.join(names)}]")
    for dim, size in zip(names, tensor.shape, strict=True):
        if known.setdefault(dim, size) != size:
            raise CacheFileError(f"{name} has shape {tuple(tensor.shape)}, expected [{', '.join(names)}] with {dim} = {known[dim]}")


def _require_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    if tensor.numel() and not low <= int(tensor.min()) <= int(tensor.max()) <= high:
        raise CacheFileError(f"{name} has values from {int(tensor.min())} to {int(tensor.max())}, expected {low} to {high}")
