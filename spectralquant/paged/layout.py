"""A page: 128 tokens of one layer, all its KV heads, in one run of bytes that a block allocator may hand out, share, copy and move as it likes.

    [records: H * record_bytes] [exact keys: H * E * D * 2 B] [exact values: the same] [serial: 8 B] [places: E * 4 B] [padding to 128 B]

A record is the unit of one head, as everywhere (`codec.layout`). Up to E tokens of a page also stand in it exact, in 16 bits: attention sinks and those that their
codes would serve badly. `places` says which, 0 .. 127 in ascending order, -1 for none; their gain code is masked. So a page is complete: whoever has it has
its tokens. Its serial number names the exact copy of all 128 tokens that may lie elsewhere (`paged.recent`), 0 for none.

Page 0 belongs to nobody: what has no place to go is written there, so that a fixed sequence of launches serves any number of tokens.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from spectralquant.codec.layout import GROUPS, PAIRS, UNIT, RecordLayout, byte_order

_ALIGN = 128
_SERIAL_BYTES, _PLACE_BYTES = 8, 4


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Byte offsets in a page.

    Attributes:
        record: Of one head.
        heads: KV heads, those of one rank where heads are spread over several.
        head_dim: Their size D.
        exact: E, tokens that a page holds exact.
    """

    record: RecordLayout
    heads: int
    head_dim: int
    exact: int

    @property
    def records_bytes(self) -> int:
        return self.heads * self.record.record_bytes

    @property
    def exact_bytes(self) -> int:
        """Bytes of the exact keys, or values."""
        return self.heads * self.exact * self.head_dim * 2

    @property
    def exact_keys_begin(self) -> int:
        return self.records_bytes

    @property
    def exact_values_begin(self) -> int:
        return self.records_bytes + self.exact_bytes

    @property
    def serial_begin(self) -> int:
        return self.records_bytes + 2 * self.exact_bytes

    @property
    def places_begin(self) -> int:
        return self.serial_begin + _SERIAL_BYTES

    @property
    def page_bytes(self) -> int:
        """A multiple of 128, so that it is a whole number of bytes per token."""
        used = self.places_begin + _PLACE_BYTES * self.exact
        return -(-used // _ALIGN) * _ALIGN

    @property
    def bytes_per_token(self) -> int:
        return self.page_bytes // UNIT

    def records(self, pages: Tensor) -> Tensor:
        """View [..., H, record_bytes] of pages [..., page_bytes] uint8."""
        return pages[..., : self.records_bytes].unflatten(-1, (self.heads, self.record.record_bytes))

    def exact_keys(self, pages: Tensor, dtype: torch.dtype) -> Tensor:
        """View [..., H, E, D] of pages, in a 16-bit dtype."""
        return self._rows(pages, self.exact_keys_begin, dtype)

    def exact_values(self, pages: Tensor, dtype: torch.dtype) -> Tensor:
        """View [..., H, E, D] of pages, in a 16-bit dtype."""
        return self._rows(pages, self.exact_values_begin, dtype)

    def _rows(self, pages: Tensor, first: int, dtype: torch.dtype) -> Tensor:
        return pages[..., first : first + self.exact_bytes].view(dtype).unflatten(-1, (self.heads, self.exact, self.head_dim))

    def serials(self, pages: Tensor) -> Tensor:
        """View [...] int64 of pages."""
        return pages[..., self.serial_begin : self.places_begin].view(torch.int64)[..., 0]

    def places(self, pages: Tensor) -> Tensor:
        """View [..., E] int32 of pages: tokens that stand exact."""
        return pages[..., self.places_begin : self.places_begin + _PLACE_BYTES * self.exact].view(torch.int32)


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """Where the bits of a token lie in a record, for each of its 128 places.

    Attributes:
        codes: [128, P_K + P_V] int64, the byte of every plane, those of K first.
        shift: [128] uint8, the lower of a token's two bits in these bytes.
        gains: [128, 2] int64, the gain bytes of K and V.
    """

    codes: Tensor
    shift: Tensor
    gains: Tensor


@cache
def token_bytes(layout: RecordLayout, device: torch.device) -> TokenBytes:
    """`TokenBytes` of records of `layout` on `device`."""
    token = torch.arange(UNIT)
    group = token // (16 * PAIRS) * 16 + token % 16
    value_first = layout.key_bytes + UNIT

    def codes(which: str, planes: int) -> Tensor:
        return byte_order(which, planes, torch.device("cpu")).view(GROUPS, planes)[group]

    gain = token % 8 * 16 + token // 8 % 2 * 8 + token // 16
    return TokenBytes(
        torch.cat([codes("key", layout.key_planes), codes("value", layout.value_planes) + value_first], -1).to(device),
        (token // 16 % PAIRS * 2).to(torch.uint8).to(device),
        torch.stack([gain + layout.key_bytes, gain + value_first + layout.value_bytes], -1).to(device),
    )
