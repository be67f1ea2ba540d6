"""The two kinds of entries of the store as files.

A *block* has the packed units of 128 tokens in all coded layers, and those of its tokens that stay exact. It is the same for every text that goes on from
there. A *tail* has what a cache holds behind its last packed unit: the recent window, and layers that are not coded. With it a cache comes back as it was, to
the bit; without one the tokens behind the last block are read anew.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spectralquant.archive.lossless import pack_records, unpack_records
from spectralquant.cache.file import TOKEN_IDS, dtype_name, read_dtype, read_flags
from spectralquant.cache.segment_state import SegmentState
from spectralquant.cache.state import CacheState
from spectralquant.codec.layout import UNIT, RecordLayout
from spectralquant.errors import CacheFileError
from spectralquant.tensor_file import FileKind
from spectralquant.untrusted import shown

ENTRY_FILE = FileKind("spectralquant-prefix", 1, "entry of a prefix store", "it is made again when it is needed", CacheFileError)
BLOCK, TAIL = "block", "tail"
PACKED, LOSSLESS = "packed", "lossless"
"""How the records of a block lie in its file: as attention reads them, or in fewer bytes (`archive.lossless`)."""


@dataclass(frozen=True, slots=True)
class Layers:
    """The coded layers of a model: index -> KV heads, in order; what blocks are cut by.

    Attributes:
        heads: KV heads of each.
        head_dim, layout: The same in all.
    """

    heads: dict[int, int]
    head_dim: int
    layout: RecordLayout

    @property
    def total(self) -> int:
        """KV heads of all layers together."""
        return sum(self.heads.values())


@dataclass(frozen=True, slots=True)
class Block:
    """128 tokens in all coded layers. N heads in all layers together.

    Attributes:
        token_ids: [128] int64.
        records: [N, record_bytes] uint8, layer by layer.
        counts: [layers] int32, tokens that stay exact in each.
        places: [sum of counts] int32, which of the 128 they are.
        exact_keys, exact_values: [sum of counts x heads, D], 16-bit: layer by layer [heads, count, D].
        layout: Of the records.
        seconds: What it took to compute them.
    """

    token_ids: Tensor
    records: Tensor
    counts: Tensor
    places: Tensor
    exact_keys: Tensor
    exact_values: Tensor
    layout: RecordLayout
    seconds: float

    @classmethod
    def of(cls, state: CacheState, unit: int, token_ids: Tensor, layout: RecordLayout, seconds: float) -> "Block":
        """One unit of a cache with one sequence without padding."""
        records: list[Tensor] = []
        counts: list[int] = []
        places: list[Tensor] = []
        exact: tuple[list[Tensor], list[Tensor]] = ([], [])
        for segment in state.segments.values():
            records.append(unit_records(segment, unit))
            slots = segment.exact_slots[0]
            own = (slots // UNIT == unit).nonzero()[:, 0]
            counts.append(len(own))
            places.append((slots[own] - UNIT * unit).int())
            for held, tensor in zip(exact, (segment.exact_keys, segment.exact_values), strict=True):
                held.append(tensor[0][:, own].flatten(0, 1))
        keys, values = (torch.cat(held) for held in exact)
        return cls(token_ids, torch.cat(records), torch.tensor(counts, dtype=torch.int32), torch.cat(places), keys, values, layout, seconds)

    def write(self, path: Path, before: str) -> None:
        """Write it; `before` is the name of the block in front."""
        held = {name: getattr(self, name) for name in ("token_ids", "records", "counts", "places", "exact_keys", "exact_values")}
        planes = f"{self.layout.key_planes} {self.layout.value_planes}"
        ENTRY_FILE.write(path, held, {"kind": BLOCK, "before": before, "level": PACKED, "planes": planes, "seconds": repr(self.seconds)}, durable=False)

    @classmethod
    def read(cls, path: Path, layers: Layers) -> "Block":
        """Read and check it.

        Raises:
            CacheFileError: It is missing, damaged, or of another model.
        """
        tensors, header = read_entry(path, BLOCK)
        try:
            if header.get("level") == LOSSLESS:
                tensors["records"] = unpack_records(layers.layout, tensors["records"], (layers.total, 1, 1))[:, 0, 0]
            block = cls(**tensors, layout=layers.layout, seconds=read_seconds(header))
        except (TypeError, KeyError) as error:
            raise CacheFileError(f"{path} is incomplete: {error}") from error
        block._require(path, layers)
        return block

    def _require(self, path: Path, layers: Layers) -> None:
        heads = torch.tensor(list(layers.heads.values()))
        counts = self.counts.long()
        right = (
            self.token_ids.dtype == torch.int64
            and self.token_ids.shape == (UNIT,)
            and self.records.dtype == torch.uint8
            and self.records.shape == (layers.total, layers.layout.record_bytes)
            and self.counts.dtype == self.places.dtype == torch.int32
            and self.counts.shape == heads.shape
            and bool(((counts >= 0) & (counts <= UNIT)).all())
            and self.places.shape == (int(counts.sum()),)
            and bool(((self.places >= 0) & (self.places < UNIT)).all())
            and self.exact_keys.dtype == self.exact_values.dtype
            and self.exact_keys.shape == self.exact_values.shape == (int((counts * heads).sum()), layers.head_dim)
        )
        if not right:
            raise CacheFileError(f"{path} holds no block of this model; {ENTRY_FILE.remedy}")


def archive_block(path: Path) -> int:
    """Write a block anew with its records in fewer bytes; the time of the file stays.

    Returns:
        Bytes saved; 0 where it is archived already, or is no smaller that way.

    Raises:
        CacheFileError: It can't be read.
        DependencyError: The extra "archive" is not installed.
    """
    tensors, header = read_entry(path, BLOCK)
    if header.get("level") != PACKED:
        return 0
    stat, records = path.stat(), tensors.get("records")
    if records is None or records.dim() != 2:
        raise CacheFileError(f"{path} has no records; {ENTRY_FILE.remedy}")
    tensors["records"] = _in_fewer_bytes(path, records, header.get("planes", ""))
    saved = records.nbytes - tensors["records"].nbytes
    if saved <= 0:
        return 0
    ENTRY_FILE.write(path, tensors, {**header, "level": LOSSLESS}, durable=False)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return saved


def _in_fewer_bytes(path: Path, records: Tensor, planes: str) -> Tensor:
    """The payload [M] of records [N, record_bytes] with "P_K P_V" planes."""
    try:
        key, value = map(int, planes.split())
        return pack_records(RecordLayout(key, value), records[:, None, None])
    except ValueError as error:  # ShapeError is one
        raise CacheFileError(f"{path} has planes {planes!r}, expected two multiples of 16 that its records have ({error})") from error


def unit_records(segment: SegmentState, unit: int) -> Tensor:
    """Records [H, record_bytes] of one unit of the first sequence."""
    shared = 0 if segment.prefix_records is None else segment.prefix_records.shape[2]
    if segment.prefix_records is not None and segment.prefix_rows is not None and unit < shared:
        return segment.prefix_records[int(segment.prefix_rows[0]), :, unit]
    return segment.records[0, :, unit - shared]


@dataclass(frozen=True, slots=True)
class Tail:
    """What is behind the last packed unit of a cache with one sequence.

    Attributes:
        token_ids: [r] int64, tokens of the window.
        state: Without packed units and exact tokens.
        units: Blocks in front.
        seconds: What it took to compute it.
    """

    token_ids: Tensor
    state: CacheState
    units: int
    seconds: float

    @classmethod
    def of(cls, state: CacheState, token_ids: Tensor, seconds: float) -> "Tail":
        """Of a cache with this state that holds token_ids [T]; `seconds`: what it took to compute a token."""
        segments = {i: _without_units(segment) for i, segment in state.segments.items()}
        others = {i: {name: t[:1] for name, t in parts.items()} for i, parts in state.others.items()}
        return cls(
            token_ids[UNIT * state.units :], CacheState(segments, others, state.flags, state.dtype), state.units, seconds * len(token_ids[UNIT * state.units :])
        )

    def copy(self) -> "Tail":
        """The same in tensors of its own, on the CPU."""
        tensors = {name: t.to("cpu", copy=True) for name, t in self.state.tensors().items()}
        return replace(self, state=CacheState.of_tensors(tensors, self.state.flags, self.state.dtype))

    def write(self, path: Path, before: str) -> None:
        """Write it; `before` is the name of the block in front."""
        header = {"kind": TAIL, "before": before, "units": str(self.units), "seconds": repr(self.seconds), "flags": json.dumps(self.state.flags)}
        ENTRY_FILE.write(path, {**self.state.tensors(), TOKEN_IDS: self.token_ids}, {**header, "dtype": dtype_name(self.state.dtype)}, durable=False)

    @classmethod
    def read(cls, path: Path) -> "Tail":
        """Read it. Whether it fits the model shows when a cache takes it.

        Raises:
            CacheFileError: It is missing or damaged.
        """
        tensors, header = read_entry(path, TAIL)
        try:
            ids = tensors.pop(TOKEN_IDS)
            state = CacheState.of_tensors(tensors, read_flags(header), read_dtype(header))
            return cls(ids, state, int(header["units"]), read_seconds(header))
        except (CacheFileError, KeyError, ValueError) as error:
            raise CacheFileError(f"{path} can't be used: {error}") from error


def _without_units(segment: SegmentState) -> SegmentState:
    records, keys = segment.records[:1, :, :0], segment.exact_keys[:1, :, :0]
    recent = segment.recent_keys[:1], segment.recent_values[:1]
    return SegmentState(records, keys, keys, segment.exact_slots[:1, :0], *recent, segment.start[:1])


def joined(blocks: Sequence[Block], tail: Tail | None, layers: Layers, half: torch.dtype, dtype: torch.dtype) -> CacheState:
    """The state of a cache that holds the tokens of `blocks` and `tail`.

    Args:
        blocks: In order from the beginning of a text.
        tail: What comes behind them; None: an empty window.
        layers: Of the model.
        half: 16-bit dtype of exact tokens.
        dtype: Of the model.
    """
    count = len(blocks)
    records = torch.empty((layers.total, count, layers.layout.record_bytes), dtype=torch.uint8)
    for i, block in enumerate(blocks):
        records[:, i] = block.records
    places = [block.places.split(block.counts.tolist()) for block in blocks]
    sizes = [[n * h for n, h in zip(block.counts.tolist(), layers.heads.values(), strict=True)] for block in blocks]
    keys = [block.exact_keys.split(size) for block, size in zip(blocks, sizes, strict=True)]
    values = [block.exact_values.split(size) for block, size in zip(blocks, sizes, strict=True)]
    segments: dict[int, SegmentState] = {}
    by_layer = records.split(list(layers.heads.values()))
    for order, (index, heads) in enumerate(layers.heads.items()):
        empty = torch.empty((1, heads, 0, layers.head_dim), dtype=half)
        recent = tail.state.segments.get(index) if tail is not None else None
        slots = [block[order] + UNIT * i for i, block in enumerate(places)]
        exact_keys, exact_values = (
            torch.cat([empty[0], *(part[order].unflatten(0, (heads, -1)) for part in side if len(part[order]))], 1)[None] for side in (keys, values)
        )
        segments[index] = SegmentState(
            by_layer[order][None],
            exact_keys,
            exact_values,
            torch.cat([torch.empty(0, dtype=torch.int32), *slots])[None],
            empty if recent is None else recent.recent_keys,
            empty if recent is None else recent.recent_values,
            torch.zeros(1, dtype=torch.int64),
        )
    others, flags = ({}, {}) if tail is None else (tail.state.others, tail.state.flags)
    return CacheState(segments, others, flags, dtype)


def read_entry(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of an entry of this kind; no link is followed.

    Raises:
        CacheFileError: It is missing, damaged, a link, or of another kind.
    """
    if path.is_symlink():
        raise CacheFileError(f"{path} is a symbolic link, entries of a store are files; {ENTRY_FILE.remedy}")
    tensors, header = ENTRY_FILE.read(path)
    if header.get("kind") != kind:
        raise CacheFileError(f"{path} is a {shown(header.get('kind'))}, expected a {kind}; {ENTRY_FILE.remedy}")
    return tensors, header


def read_seconds(header: dict[str, str]) -> float:
    """What it took to compute an entry."""
    try:
        seconds = float(header.get("seconds", ""))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise CacheFileError(f"seconds is {shown(header.get('seconds'))}, expected a number")
    return seconds
