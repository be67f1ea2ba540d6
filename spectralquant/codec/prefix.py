"""Packed units that several sequences begin with, held once.

Codes of a unit are never written again, so copies of a cache, repeated rows and beams can read the same ones. What grows, is moved or is dropped is the
sequences' own: later units, exact tokens and the window.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first units of B sequences.

    Attributes:
        records: [S, H, U, record_bytes] uint8, contiguous; nobody writes to it.
        rows: [B] int32, which of the S each sequence begins with.
        units: How many of the U units count.
    """

    records: Tensor
    rows: Tensor
    units: int

    @classmethod
    def of(cls, records: Tensor, units: int) -> "Prefix":
        """The first `units` of records [B, H, U, record_bytes], each sequence its own; no copy."""
        return cls(records, torch.arange(len(records), dtype=torch.int32, device=records.device), units)

    @property
    def is_one(self) -> bool:
        """Whether all sequences begin alike."""
        return len(self.records) == 1

    def read(self, first: int, last: int) -> Tensor:
        """Records [B, H, last - first, record_bytes] of these units, a copy."""
        return self.records[:, :, first:last].index_select(0, self.rows)

    def read_one(self, first: int, last: int) -> Tensor:
        """Records [1, H, last - first, record_bytes] of these units where all sequences begin alike; no copy."""
        return self.records[:, :, first:last]

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> "Prefix":
        """The prefix of the sequences that `fn` picks along dimension 0."""
        return replace(self, rows=fn(self.rows))

    def to(self, device: torch.device) -> "Prefix":
        """The same on another device."""
        return replace(self, records=self.records.to(device), rows=self.rows.to(device))

    def cut(self, units: int) -> "Prefix | None":
        """The first `units` of it; None for nothing."""
        return replace(self, units=min(units, self.units)) if units else None

    def without_unused(self) -> "Prefix":
        """The same without sequences that none begins with. Waits for the device."""
        used, rows = self.rows.unique(return_inverse=True)
        return self if len(used) == len(self.records) else replace(self, records=self.records[used.long()], rows=rows.int())
