"""Attention over a PackedKV by the fused kernel, kernels/attend.cu: one launch, the same function as `reference.attend`.

The kernel knows causal order and left padding; other masks belong to the reference. It reads lengths from device memory, holds scores and
sums in float32, exact tokens and their queries in their own dtype, coded queries in float16 scaled by powers of two, so bfloat16 never
passes through the range of float16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectralquant.attention.kernel_constants import KernelConstants, build_constants, turn_table
from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import UNIT
from spectralquant.codec.packed import PackedKV
from spectralquant.codec.prefix import Prefix
from spectralquant.errors import BackendError
from spectralquant.kernels.compiler import load

THREADS, TILE = 256, 32
"""Of a block, and exact tokens of a step; kernels/attend_shapes.cuh has the same."""
_LOG2E = 1.4426950408889634
_SHARED_LIMIT = 227 * 1024
_SPARE_RUNS = 64


class FusedAttention:
    """The kernel on one CUDA device, with the constants of the codecs it has met.

    Args:
        device: An NVIDIA GPU of compute capability 8.0 or newer, see `backend.resolve_backend`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.blocks: int = torch.cuda.get_device_properties(device).multi_processor_count
        self._constants: dict[int, tuple[LayerCodec, KernelConstants]] = {}  # the codec too: its id stays its own
        self._anchors: dict[tuple[int, ...], list[Tensor]] = {}  # ever longer ones: a CUDA graph of another cache may still read the earlier
        self._workspaces: dict[int, Workspace] = {}  # by stream: launches on one stream follow each other

    def attend(self, query: Tensor, kv: PackedKV, scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        """`reference.attend` with the mask of causal order and left padding: arguments and result as there.

        Raises:
            BackendError: The codec has no planes, or the kernel can't be built.
        """
        return self.run(self.plan(query, kv, scale, softcap, sinks))

    def plan(self, query: Tensor, kv: PackedKV, scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None) -> "Launch":
        """Everything that `attend` allocates, for one or more runs on these very tensors, also inside a CUDA graph."""
        constants = self.constants_of(kv.codec)
        return plan_launch(query, kv, constants, self.anchors_of(constants, kv.room), self._workspace(query, kv), scale, softcap, sinks)

    def run(self, launch: "Launch") -> Tensor:
        """Launch on torch's current stream; the result as of `attend`. Runs of one plan may not overlap."""
        self.launch(launch)
        return launch.out.transpose(1, 2)

    def launch(self, launch: "Launch") -> None:
        """Launch what was planned for any store on torch's current stream."""
        kernel = load("attend.cu", launch.definitions, "attend", self.device)
        kernel(launch.blocks, THREADS, launch.shared_bytes, [a.data_ptr() if isinstance(a, Tensor) else a for a in launch.arguments])

    def _workspace(self, query: Tensor, kv: PackedKV) -> "Workspace":
        stream = torch.cuda.current_stream(self.device).cuda_stream
        found, need = self._workspaces.get(stream), Workspace.sizes(query, len(query), kv.raw_keys.shape[1], self.blocks)
        if found is None or found.partials.numel() < need[0] or found.tickets.numel() < need[1]:
            found = self._workspaces[stream] = Workspace.make(*need, self.blocks, self.device)
        return found

    def constants_of(self, codec: LayerCodec) -> KernelConstants:
        """Those of a layer, made once."""
        if id(codec) not in self._constants:
            self._constants[id(codec)] = (codec, build_constants(codec))
        return self._constants[id(codec)][1]

    def anchors_of(self, constants: KernelConstants, units: int) -> Tensor:
        """A table that covers so many units, the same one for all layers that turn alike."""
        run = constants.definitions["RUN"]
        key, need = (run, hash(tuple(constants.rates.tolist()))), runs_of(units, run)
        tables = self._anchors.setdefault(key, [])
        if not tables or len(tables[-1]) < need:
            tables.append(anchor_table(constants, need + need // 2 + _SPARE_RUNS, self.device))
        return tables[-1]


def rows_of(queries: int) -> tuple[int, int]:
    """Rows of queries that the kernel takes at a time, and how many times, for the queries of one KV head (query heads times positions)."""
    rows = 4 if queries <= 4 else 8
    return rows, -(-queries // rows)


def runs_of(units: int, run: int) -> int:
    """Entries that the kernel may read of a table of runs: four at a time, up to the last of so many units."""
    return units * UNIT // run + 4 if run else 1


def anchor_table(constants: KernelConstants, runs: int, device: torch.device) -> Tensor:
    """[runs, D / 2, 2] float32, see `turn_table`, at the first positions of runs."""
    return turn_table(constants.rates, torch.arange(runs) * constants.definitions["RUN"], device)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory that launches on one stream share.

    Attributes:
        partials: Float32, room for two partial results of every block.
        tickets: int32, one for each KV head, group of rows and sequence; zeros before and after every launch.
        blocks: Of a launch: as many as can run at once.
    """

    partials: Tensor
    tickets: Tensor
    blocks: int

    @staticmethod
    def sizes(query: Tensor, batch: int, heads: int, blocks: int) -> tuple[int, int]:
        """Elements of `partials` and `tickets` that attention of `query` [*, H G, Q, D] over `heads` KV heads of `batch` sequences needs."""
        _, query_heads, positions, dim = query.shape
        rows, row_groups = rows_of(query_heads // heads * positions)
        return blocks * 2 * rows * (dim + 2), heads * row_groups * batch

    @classmethod
    def make(cls, partials: int, tickets: int, blocks: int, device: torch.device) -> "Workspace":
        return cls(torch.empty(partials, dtype=torch.float32, device=device), torch.zeros(tickets, dtype=torch.int32, device=device), blocks)


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch of the kernel, ready to go.

    Attributes:
        definitions: Compile-time definitions.
        arguments: In the kernel's order: tensors (their address is passed), int (64 bits), numpy scalars.
        blocks, shared_bytes: Of the launch.
        out: [B, Q, H G, D], or [N, H G, D] of pages, written by it.
    """

    definitions: dict[str, int]
    arguments: Sequence[Any]
    blocks: int
    shared_bytes: int
    out: Tensor


@dataclass(frozen=True, slots=True)
class Store:
    """Where the tokens of B sequences lie, as a variant of the kernel reads it.

    Attributes:
        batch, heads: Sequences and KV heads.
        dtype: Of exact tokens, float16 or bfloat16.
        variant: Compile-time definitions.
        tensors, strides, sizes: Arguments, in the kernel's order.
    """

    batch: int
    heads: int
    dtype: torch.dtype
    variant: dict[str, int]
    tensors: tuple[Tensor, ...]
    strides: tuple[int, ...]
    sizes: tuple[int, ...]


def plan_launch(
    query: Tensor,
    kv: PackedKV,
    constants: KernelConstants,
    anchors: Tensor,
    workspace: Workspace,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Launch:
    """Everything of `attend` but the launch itself, on any device. `anchors`: see `anchor_table`."""
    batch, query_heads, positions, dim = query.shape
    check_steps(query, batch, kv.raw_keys.shape[1], kv.room, kv.exact_slots.shape[1], kv.raw_keys.shape[2])
    return plan_over(_store_of(kv), query, constants, anchors, workspace, scale, softcap, sinks, query.new_empty((batch, positions, query_heads, dim)))


def plan_over(
    store: Store,
    query: Tensor,
    constants: KernelConstants,
    anchors: Tensor,
    workspace: Workspace,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    out: Tensor,
) -> Launch:
    """A launch for queries [*, H G, Q, D] over any store, whose result goes to `out`."""
    _, query_heads, positions, dim = query.shape
    groups = query_heads // store.heads
    rows, row_groups = rows_of(groups * positions)
    softcapped, float_query = softcap is not None, query.dtype == torch.float32
    definitions = {
        **constants.definitions,
        "FLOAT_QUERY": int(float_query),
        "IS_BF16": int(store.dtype == torch.bfloat16),
        "USE_SOFTCAP": int(softcapped),
        "USE_SINKS": int(sinks is not None),
        "COLUMNS": rows // 4,
        **store.variant,
    }
    definitions |= _placement(definitions)
    factor = (dim**-0.5 if scale is None else scale) * (1.0 if softcapped else _LOG2E)
    mass = query.new_zeros(query_heads, dtype=torch.float32) if constants.missing_mass is None else constants.missing_mass
    arguments = (
        query, *store.tensors,
        constants.transform, constants.table, constants.scales, anchors, constants.turns, constants.value_rows, constants.value_mean,
        mass, (sinks.float().contiguous() if sinks is not None else constants.scales), out,
        workspace.partials, workspace.tickets,
        *(query.stride(i) for i in range(3)), *store.strides,
        *(np.int32(x) for x in (store.batch, store.heads, groups, positions, *store.sizes)),
        np.int32(row_groups), np.int32(workspace.blocks // (store.heads * row_groups)),
        np.int32(constants.rotary_pairs), np.int32(constants.interleaved), np.float32(factor), np.float32(softcap or 0.0),
    )  # fmt: skip
    return Launch(definitions, arguments, workspace.blocks, shared_bytes(definitions), out)


def _store_of(kv: PackedKV) -> Store:
    """One after another in memory, the first units perhaps in a prefix."""
    batch, heads, units, _ = kv.records.shape
    exact, dim = kv.exact_slots.shape[1], kv.raw_keys.shape[-1]
    raw = [_rows(t.to(kv.exact_keys.dtype)) for t in (kv.raw_keys, kv.raw_values)]
    prefix = kv.prefix or Prefix(kv.records, kv.lengths, 0)
    tensors = (
        kv.records.contiguous(), prefix.records, prefix.rows, kv.exact_keys.contiguous(), kv.exact_values.contiguous(), kv.exact_slots.contiguous(),
        *raw, kv.start.contiguous(), kv.lengths.contiguous(),
    )  # fmt: skip
    return Store(
        batch, heads, kv.exact_keys.dtype, {"USE_PREFIX": int(kv.prefix is not None), "USE_PAGES": 0},
        tensors, (), (units, exact, raw[0].stride(1) // dim, prefix.units, prefix.records.shape[2]),
    )  # fmt: skip


def check_steps(query: Tensor, batch: int, heads: int, units: int, exact: int, raw: int) -> None:
    """The kernel numbers its steps (attend_schedule.cuh) with 32 bits: of queries [*, H G, Q, D] of `batch` sequences that have room for so many units, exact
    tokens and raw ones.

    Raises:
        BackendError: They are too many.
    """
    row_groups = rows_of(query.shape[1] // heads * query.shape[2])[1]
    steps = heads * row_groups * batch * (units + -(-exact // TILE) + -(-raw // TILE))
    if steps >= 1 << 31:
        raise BackendError(f"attention takes {steps} steps, expected fewer than 2^31; use fewer sequences or fewer new tokens at a time")


def _rows(x: Tensor) -> Tensor:
    """x [B, H, R, D], copied unless it is the start of every head's rows in a contiguous store [B, H, capacity, D]."""
    _, heads, _, dim = x.shape
    return x if x.stride() == (heads * x.stride(1), x.stride(1), dim, 1) and x.stride(1) % dim == 0 else x.contiguous()


def _placement(definitions: dict[str, int]) -> dict[str, int]:
    """What fits into shared memory beside the records: the table, read for every unit, before the transform, read for every run."""
    for transform, table in ((1, 1), (0, 1)):
        placed = {"TRANSFORM_IN_SHARED": transform, "TABLE_IN_SHARED": table}
        if shared_bytes({**definitions, **placed}) <= _SHARED_LIMIT:
            return placed
    return {"TRANSFORM_IN_SHARED": 0, "TABLE_IN_SHARED": 0}


def shared_bytes(definitions: dict[str, int]) -> int:
    """Dynamic shared memory of a block: `Shared` in kernels/attend_shapes.cuh."""
    d = definitions
    dim, rows, mean_chunks = d["D"], 4 * d["COLUMNS"], d["CB"] + d["SPLIT_BIAS"]
    state = 4 * rows * (d["CV"] * 16 + dim + 3)
    record = (d["CK"] + d["CV"]) * 512 + 2 * UNIT
    transform = (d["CK"] + mean_chunks) * dim // 16 * 512 if d["TRANSFORM_IN_SHARED"] else 16
    table = max(d["RUN"] // 16 * mean_chunks * 512, 16) if d["TABLE_IN_SHARED"] else 16
    fixed = 4 * rows * (dim + 16) + dim // 16 * 2 * 32 * 8 + 8 * rows + 4 * 8 * rows + max(state, 8 * (d["CK"] + mean_chunks + 1) * 256) + 4
    total = transform + table + 8 * (-(-max(record, state, 16 * rows * THREADS // 8) // 16) * 16) + fixed
    return -(-total // 128) * 128
