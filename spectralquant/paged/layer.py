"""One layer of a paged cache: tokens into pages and exact copies, and attention over them."""

from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from spectralquant.attention.dispatch import attend_packed
from spectralquant.attention.reference import attend
from spectralquant.backend import choose_for_feature, resolve_backend
from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.encode_cuda import can_encode
from spectralquant.codec.layout import UNIT
from spectralquant.config import Backend
from spectralquant.paged.attend_cuda import PagedAttention, fused_on
from spectralquant.paged.layout import PageLayout
from spectralquant.paged.recent import HELD_UNITS, Step
from spectralquant.paged.store import Average, write_tokens
from spectralquant.paged.store_cuda import TokenWriter, writer_on
from spectralquant.paged.view import packed_view


@dataclass(frozen=True, slots=True)
class Scoring:
    """How logits are made.

    Attributes:
        scale: Their factor; None: D^-1/2.
        softcap: They become `softcap * tanh(logits / softcap)`; None: they stay.
        sinks: [H G] logits of an extra softmax column without a value, or None.
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class PagedLayer:
    """Codec and exact copies of one layer. `kernel` attends where no sequence has more than one new token, `writer` writes tokens; None: PyTorch does.

    Args:
        codec: The layer's codec, with the KV heads that this process holds.
        dtype: Of the model.
        exact: Tokens that a page holds exact.
        sinks: First tokens of every sequence that stay exact.
        copies: Exact copies that there are, see `RecentPages`.
        backend: What attends and writes, see `CacheConfig.backend`.
        average: Where several processes hold heads of the layer: which tokens stand apart from their codes is decided by all of them together.
    """

    def __init__(
        self, codec: LayerCodec, dtype: torch.dtype, exact: int, sinks: int, copies: int, backend: Backend = "auto", average: Average | None = None
    ) -> None:
        self.codec, self.sinks, self.average = codec, sinks, average
        self.layout = PageLayout(codec.layout, codec.heads, codec.head_dim, exact)
        self.exact_dtype: torch.dtype = codec.exact_dtype_for(dtype)
        shape, device = ((copies + 1) * UNIT, codec.heads, codec.head_dim), codec.value_norm.device
        choice = choose_for_feature("decode attention", resolve_backend(backend, device))
        self.kernel: PagedAttention | None = fused_on(device) if choice.name == "cuda" and codec.has_planes else None
        choice = choose_for_feature("encoding", resolve_backend(backend, device))
        self.writer: TokenWriter | None = writer_on(device) if choice.name == "cuda" and can_encode(codec) else None
        self.recent_keys: Tensor = torch.zeros(shape, dtype=self.exact_dtype, device=device)
        self.recent_values: Tensor = torch.zeros_like(self.recent_keys)

    def store(self, pages: Tensor, keys: Tensor, values: Tensor, step: Step) -> None:
        """Write the step's keys and values [N, H, D] to their pages and exact copies. pages: [pages, page_bytes] uint8."""
        keys, values = keys.to(self.exact_dtype), values.to(self.exact_dtype)
        if self.writer is not None:
            self.writer.write(self.codec, self.layout, (self.recent_keys, self.recent_values), pages, keys, values, step, self.sinks, self.average)
            return
        write_tokens(self.codec, self.layout, pages, keys, values, step.slots, step.positions, step.serials, self.sinks, self.average)
        self.recent_keys[step.rows], self.recent_values[step.rows] = keys, values

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, pages: Tensor, step: Step, scoring: Scoring, out: Tensor) -> None:
        """Attention of the step's queries over all tokens up to them, once `store` has run. New keys and values are read as they came, a single one rounded to
        16 bits as its exact copy is.

        Where kernels run, a step of one token per sequence is a fixed sequence of launches, which a CUDA graph may repeat once the step has run as it is.

        Args:
            query: [N, H G, D].
            keys, values: [N, H, D], the new ones.
            pages: [pages, page_bytes] uint8.
            step: What the sequences are.
            scoring: How logits are made.
            out: [N, H G, D], written where sequences have new tokens.
        """
        if self.kernel is not None and step.longest <= 1:
            recent = self.recent_keys, self.recent_values
            self.kernel.attend(self.codec, self.layout, recent, query, keys, values, pages, step, scoring.scale, scoring.softcap, scoring.sinks, out)
            return
        starts, before = step.starts.tolist(), step.before.tolist()
        units = self.packed_units(pages, step)
        coded = units.tolist()
        counts = [last - first for first, last in pairwise(starts)]
        single = sorted((i for i, count in enumerate(counts) if count == 1), key=lambda i: coded[i])
        for _, same in groupby(single, key=lambda i: coded[i].bit_length()):  # sequences whose lengths differ by less than half of the longest
            batch = torch.tensor(list(same), device=pages.device)
            new = step.starts[batch]
            out[new] = self._attend_single(query[new], keys[new], values[new], pages, step, batch, units[batch], scoring)
        for i, count in enumerate(counts):
            if count > 1:
                new = slice(starts[i], starts[i + 1])
                out[new] = self._attend_many(query[new], keys[new], values[new], pages, step, i, coded[i], before[i], scoring)

    def packed_units(self, pages: Tensor, step: Step) -> Tensor:
        """[B] int64: units that are read by their codes, those in front. Later ones have exact copies."""
        serial = self.layout.serials(pages)[step.read_pages.clamp_min(0)]
        held = (step.read_copies >= 0) & (serial == step.copy_serials[step.read_copies]) & (serial > 0)
        missing = (step.read_pages >= 0) & ~held
        full = step.before // UNIT
        units = torch.where(missing[:, 0], full, (full - 1).clamp_min(0))
        return torch.where(missing[:, 1], full + 1, units)

    def _attend_single(self, query: Tensor, key: Tensor, value: Tensor, pages: Tensor, step: Step, batch: Tensor, units: Tensor, scoring: Scoring) -> Tensor:
        """query [B, H G, D], key and value [B, H, D]: one position of each of the sequences `batch`, which read `units` [B] units by their codes."""
        before = step.before[batch]
        count = (before - UNIT * units + 1).clamp_min(0)  # raw tokens, the new one last; none where that one stands in a unit that is read by its code
        room = int(count.max())
        keys, values = (x.transpose(1, 2) for x in self._recent(step, batch, units, room))
        last = torch.where(count > 0, count - 1, room)
        keys, values = (_with_row(old, last, new) for old, new in ((keys, key), (values, value)))
        table = step.table[batch, : int(units.max())].long()
        limits = torch.where(count > 0, UNIT * units, before + 1)
        kv = packed_view(self.codec, self.layout, pages, table, limits, keys, values)
        rows = torch.arange(room, device=pages.device)
        mask = torch.cat([rows.new_ones((len(batch), kv.packed), dtype=torch.bool), rows < count[:, None]], -1)[:, None, None]
        return attend(query[:, :, None], kv, mask, scoring.scale, scoring.softcap, scoring.sinks)[:, :, 0]

    def _attend_many(
        self, query: Tensor, keys: Tensor, values: Tensor, pages: Tensor, step: Step, sequence: int, units: int, before: int, scoring: Scoring
    ) -> Tensor:
        """query [Q, H G, D], keys and values [Q, H, D]: the last positions of one sequence, with `before` tokens in front and `units` units read by codes."""
        batch = torch.tensor([sequence], device=pages.device)
        recent = self._recent(step, batch, torch.tensor([units], device=pages.device), max(before - UNIT * units, 0))
        keys, values = (torch.cat([old[0].to(new.dtype), new]).transpose(0, 1)[None] for old, new in zip(recent, (keys, values), strict=True))
        kv = packed_view(self.codec, self.layout, pages, step.table[batch, :units].long(), step.before[batch], keys, values, self.kernel is not None)
        query = query.transpose(0, 1)[None]
        return attend_packed(query, kv, None, scoring.scale, scoring.softcap, scoring.sinks)[0].transpose(0, 1)

    def _recent(self, step: Step, batch: Tensor, units: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """Exact keys and values [B, room, H, D] of the first tokens after `units` [B] units of the sequences `batch`; anything beyond the last one."""
        place = torch.arange(room, device=units.device)
        unit = units[:, None] + place // UNIT  # [B, room]
        which = (unit - step.before[batch, None] // UNIT + 1).clamp(0, HELD_UNITS - 1)
        copy = step.read_copies[batch].gather(1, which)
        rows = torch.where(copy >= 0, copy * UNIT + place % UNIT, 0)
        return self.recent_keys[rows], self.recent_values[rows]


def _with_row(rows: Tensor, at: Tensor, row: Tensor) -> Tensor:
    """rows [B, H, R, D] with row [B, H, D] at `at` [B], which may be R: nowhere."""
    here = torch.arange(rows.shape[2], device=rows.device) == at[:, None]
    return torch.where(here[:, None, :, None], row.to(rows.dtype)[:, :, None], rows)
