"""The recent window of paged sequences: exact copies of their last one to two pages, beside the pages.

A page has room for the codes of its tokens, not for the tokens. What a sequence wrote last is read exact (`CacheConfig.window`), so the page that it writes to
and the one before have an exact copy each, in a fixed number of places that all sequences share; the one not used for longest gives way. Nothing depends on
a copy: where it is gone the codes are read. A copy counts only while page and place carry the same serial number, drawn when the page was begun. So pages may
be handed to others, shared, copied or replaced by anybody, and nobody has to tell.

A query at position n reads units before n // 128 - 1 by their codes and later ones exact: what `cache.segment` does with a window of 128.

Everything is computed where the tensors are, in shapes that depend on the number of sequences and tokens alone.
"""

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralquant.codec.layout import UNIT

HELD_UNITS = 2
"""Pages of a sequence that have an exact copy after a step: the one it writes to, and the one before."""
READING = 16
"""Sequences that may take in a part of a prompt in one step without a want of copies: they read two, and are given two."""


def copies_for(sequences: int) -> int:
    """Exact copies with which so many sequences can run at a time and always find theirs."""
    return HELD_UNITS * (sequences + min(sequences, READING))


@dataclass(frozen=True, slots=True)
class Step:
    """What a step of B sequences and N tokens writes and reads, on the device of the pages.

    Attributes:
        table: [B, M] int32, pages of every sequence.
        before, after: [B] int64, tokens of every sequence before and after this step.
        starts: [B + 1] int64, the first token of every sequence among the N.
        slots: [N] int64, 128 * page + place of every token, -1: not to be written.
        positions: [N] int64.
        serials: [N] int64, of the exact copy of every token's page; 0: it has none.
        rows: [N] int64, where the exact copies keep the token; the last row for those that need not be kept.
        read_pages, read_copies: [B, 2] int64, the last page that was full before this step and the one being written to then, and their
            exact copies; -1: there is none.
        copy_serials: [copies + 1] int64, serial numbers of all copies.
        longest: The most new tokens that a sequence has.
    """

    table: Tensor
    before: Tensor
    after: Tensor
    starts: Tensor
    slots: Tensor
    positions: Tensor
    serials: Tensor
    rows: Tensor
    read_pages: Tensor
    read_copies: Tensor
    copy_serials: Tensor
    longest: int


class RecentPages:
    """Which pages have exact copies, the same for all layers.

    Args:
        copies: Places for exact copies, see `copies_for`.
        pages: Pages there are.
        device: Of the pages.
    """

    def __init__(self, copies: int, pages: int, device: torch.device) -> None:
        self.copies, self.pages = copies, pages
        # One more place: what needs none is written there.
        self._page_of: Tensor = torch.full((copies + 1,), -1, dtype=torch.int64, device=device)
        self._copy_of: Tensor = torch.full((pages,), -1, dtype=torch.int64, device=device)
        self._used: Tensor = torch.zeros(copies + 1, dtype=torch.int64, device=device)
        self._serials: Tensor = torch.zeros(copies + 1, dtype=torch.int64, device=device)
        self._clock: Tensor = torch.ones((), dtype=torch.int64, device=device)
        # Pages that outlive this process must not meet its numbers.
        self._next: Tensor = torch.full((), secrets.randbits(61) + 1, dtype=torch.int64, device=device)

    def advance(self, table: Tensor, before: Tensor, after: Tensor, starts: Tensor, slots: Tensor, longest: int) -> Step:
        """Find the exact copies that a step reads, and give some to the pages that it begins.

        Args:
            table: [B, M] integers, pages of every sequence.
            before, after: [B] integers, tokens of every sequence before and after this step; equal for one that is not there.
            starts: [B + 1] integers, the first token of every sequence among the N.
            slots: [N] integers, see `Step`.
            longest: The most new tokens that a sequence has, which the host knows.
        """
        table, before, after, starts, slots = table.int(), before.long(), after.long(), starts.long(), slots.long()
        self._clock += 1
        read_pages, read_copies = self._reading(table, before, after)
        held_units = torch.stack([after // UNIT - 1, after // UNIT], -1)
        held = self._holding(table, held_units, before, after)
        token = torch.arange(len(slots), device=slots.device)
        sequence = (torch.searchsorted(starts, token, right=True) - 1).clamp(0, len(before) - 1)
        positions = (before[sequence] + token - starts[sequence]).clamp_min(0)
        mine = held_units[sequence] == (positions // UNIT)[:, None]  # [N, 2]
        copy = torch.where(mine, held[sequence], -1).amax(-1)
        copy = torch.where((copy >= 0) & (slots >= 0), copy, self.copies)
        serials = torch.where(copy < self.copies, self._serials[copy], 0)
        rows = copy * UNIT + positions % UNIT
        return Step(table, before, after, starts, slots, positions, serials, rows, read_pages, read_copies, self._serials, longest)

    def _reading(self, table: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Pages and copies [B, 2] of the units that the queries of this step read exact, where they can."""
        units = torch.stack([before // UNIT - 1, before // UNIT], -1)
        there = (units >= 0) & (units * UNIT < before[:, None]) & (after > before)[:, None]
        pages = torch.where(there, _pages_of(table, units), -1)
        return pages, self._touch(self._copies_of(pages))

    def _holding(self, table: Tensor, units: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Copies [B, 2] of units [B, 2] after this step, new ones for those that it begins."""
        there = (units >= 0) & (units * UNIT < after[:, None]) & (after > before)[:, None]
        begun = there & (units * UNIT >= before[:, None])
        pages = torch.where(there, _pages_of(table, units), -1)
        old = self._touch(torch.where(begun, -1, self._copies_of(pages)))
        wanted = begun.flatten()
        rank = wanted.cumsum(0) - 1
        order = self._used[:-1].argsort(stable=True)
        new = order[rank.clamp(0, self.copies - 1)]
        given = wanted & (rank < self.copies) & (self._used[new] < self._clock)
        new = torch.where(given, new, self.copies)
        page = torch.where(given, pages.flatten(), 0)
        self._page_of[new], self._used[new] = page, self._clock
        self._serials[new] = self._next + rank
        self._copy_of[page] = new
        self._next += wanted.sum()
        self._page_of[-1], self._serials[-1], self._copy_of[0] = -1, 0, -1
        return torch.where(begun, torch.where(given, new, -1).view_as(old), old)

    def _copies_of(self, pages: Tensor) -> Tensor:
        """Copies of pages, -1 where there is none."""
        copies = self._copy_of[pages.clamp_min(0)]
        return torch.where((pages >= 0) & (copies >= 0) & (self._page_of[copies] == pages), copies, -1)

    def _touch(self, copies: Tensor) -> Tensor:
        self._used[torch.where(copies >= 0, copies, self.copies).flatten()] = self._clock
        return copies


def _pages_of(table: Tensor, units: Tensor) -> Tensor:
    return table.gather(1, units.clamp(0, table.shape[1] - 1)).long()
