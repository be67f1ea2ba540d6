"""Attention over pages by the fused kernel, kernels/attend.cu, for steps in which no sequence has more than one new token: `PagedLayer.attend` in two launches.

The first, kernels/pages.cu, looks at the pages' serial numbers and writes how much of every sequence is read by its codes; the second attends. Both are
planned from sizes that the host knows, and what they share is made anew each time, so a CUDA graph may repeat them.
"""

from functools import cache

import torch
from torch import Tensor

from spectralquant.attention.cuda import FusedAttention, Store, Workspace, check_steps, plan_over
from spectralquant.attention.cuda import Launch as AttentionLaunch
from spectralquant.attention.kernel_constants import KernelConstants
from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import UNIT
from spectralquant.errors import ShapeError
from spectralquant.kernels.launch import Launch
from spectralquant.paged.layout import PageLayout
from spectralquant.paged.recent import HELD_UNITS, Step

_THREADS = 256
_COPIED, _READ = 16, 8
"""Bytes of a record that are copied at a time, and of an exact token that are read."""


class PagedAttention:
    """The kernel on pages of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._fused = FusedAttention(device)

    def attend(
        self, codec: LayerCodec, layout: PageLayout, recent: tuple[Tensor, Tensor], query: Tensor, keys: Tensor, values: Tensor, pages: Tensor, step: Step,
        scale: float | None, softcap: float | None, sinks: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        """Arguments as `plan_attend` takes them; tokens of `out` that belong to no sequence stay as they are.

        Raises:
            BackendError: The kernel can't be built.
        """
        constants = self._fused.constants_of(codec)
        anchors = self._fused.anchors_of(constants, step.table.shape[1])
        planned = plan_attend(constants, anchors, layout, recent, query, keys, values, pages, step, scale, softcap, sinks, out, self._fused.blocks)
        self.run(*planned)

    def run(self, counting: Launch, attention: AttentionLaunch) -> None:
        """Launch what was planned on torch's current stream."""
        counting.run(self.device)
        self._fused.launch(attention)


@cache
def fused_on(device: torch.device) -> PagedAttention:
    return PagedAttention(device)


def plan_attend(
    constants: KernelConstants, anchors: Tensor, layout: PageLayout, recent: tuple[Tensor, Tensor], query: Tensor, keys: Tensor, values: Tensor, pages: Tensor,
    step: Step, scale: float | None, softcap: float | None, sinks: Tensor | None, out: Tensor, blocks: int,
) -> tuple[Launch, AttentionLaunch]:  # fmt: skip
    """Everything but the two launches, on any device.

    Args:
        constants: Of the layer's codec.
        anchors: See `anchor_table`, for as many units as the step's table has columns.
        layout: Of the pages.
        recent: Exact copies of keys and values [*, H, D].
        query: [N, H G, D].
        keys, values: [N, H, D], the new ones.
        pages: [pages, page_bytes] uint8; a row may be longer.
        step: No sequence has more than one new token.
        scale, softcap, sinks: See `Scoring`.
        out: [N, H G, D], contiguous.
        blocks: As many as can run at once.

    Raises:
        ShapeError: A tensor does not lie as the kernel needs it.
    """
    if pages.stride(1) != 1 or pages.stride(0) % _COPIED or pages.data_ptr() % _COPIED:
        raise ShapeError(f"pages have strides {pages.stride()} at {pages.data_ptr():#x}: expected rows of bytes that begin at multiples of {_COPIED}")
    if not out.is_contiguous():
        raise ShapeError(f"out has strides {out.stride()}: expected a contiguous tensor, such as query.new_empty(query.shape)")
    batch, columns = step.table.shape
    queries = (query if query.stride(-1) == 1 else query.contiguous())[:, :, None]
    check_steps(queries, batch, layout.heads, columns, columns * layout.exact, HELD_UNITS * UNIT)
    partials, tickets = Workspace.sizes(queries, batch, layout.heads, blocks)
    counts = step.table.new_empty(2 * batch + tickets)
    lengths, workspace = counts[: 2 * batch], Workspace(queries.new_empty(partials, dtype=torch.float32), counts[2 * batch :], blocks)
    before, after, reads, copies, serials = (x.contiguous() for x in (step.before, step.after, step.read_pages, step.read_copies, step.copy_serials))
    counting = Launch(
        "pages.cu", "count_units", {},
        (pages, before, after, reads, copies, serials, lengths, workspace.tickets, pages.stride(0), layout.serial_begin, batch, tickets),
        -(-max(batch, tickets) // _THREADS), _THREADS, 0,
    )  # fmt: skip
    new_keys, new_values = (_readable(x.to(recent[0].dtype)) for x in (keys, values))
    table = step.table if step.table.stride(1) == 1 else step.table.contiguous()
    store = Store(
        batch, layout.heads, recent[0].dtype, {"USE_PREFIX": 0, "USE_PAGES": 1},
        (pages, table, *recent, copies, new_keys, new_values, step.starts.contiguous(), lengths),
        (pages.stride(0), table.stride(0), *new_keys.stride()[:2], *new_values.stride()[:2]),
        (layout.exact, layout.exact_begin, layout.exponents_begin, layout.places_begin),
    )  # fmt: skip
    return counting, plan_over(store, queries, constants, anchors, workspace, scale, softcap, sinks, out)


def _readable(x: Tensor) -> Tensor:
    """x [N, H, D] of 16 bits, copied unless all its rows can be read in pieces of 8 bytes."""
    elements = _READ // x.element_size()
    return x if x.stride(2) == 1 and x.stride(0) % elements == x.stride(1) % elements == x.data_ptr() % _READ == 0 else x.contiguous()
