"""A page: 128 tokens of one layer, all its KV heads, in one run of bytes that a block allocator may hand out, share, copy and move as it likes.

    [records: H * record_bytes] [keys: H * E * D B] [values: the same] [serial: 8 B] [exponents: 2 * H * E B] [places: E B] [padding to 128 B]

A record is the unit of one head, as everywhere (`codec.layout`). Up to E tokens of a page stand in it apart from the codes, in 8 bits: attention sinks and
those that their codes would serve badly. `places` says which, 0 .. 127 in ascending order, -1 for none; their gain code is masked. Their numbers are
integers from -127 to 127 times a power of two for each token and head, which 16-bit numbers hold exactly. So a page is complete: whoever has it has its tokens.

Its serial number names the exact copy of all 128 tokens that may lie elsewhere (`paged.recent`), 0 for none.

Page 0 belongs to nobody: what has no place to go is written there, so that a fixed sequence of launches serves any number of tokens.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from spectralquant.codec.layout import GROUPS, PAIRS, UNIT, RecordLayout, byte_order

LARGEST = 127
"""Integer that the largest coordinate of a token in 8 bits is at most."""
_ALIGN = 128
_SERIAL_BYTES = 8


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Byte offsets in a page.

    Attributes:
        record: Of one head.
        heads: KV heads, those of one rank where heads are spread over several.
        head_dim: Their size D.
        exact: E, tokens that a page holds apart from its codes.
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
        """Bytes of the integers of K, or V."""
        return self.heads * self.exact * self.head_dim

    @property
    def exact_begin(self) -> int:
        return self.records_bytes

    @property
    def serial_begin(self) -> int:
        return self.exact_begin + 2 * self.exact_bytes

    @property
    def exponents_begin(self) -> int:
        return self.serial_begin + _SERIAL_BYTES

    @property
    def places_begin(self) -> int:
        return self.exponents_begin + 2 * self.heads * self.exact

    @property
    def page_bytes(self) -> int:
        """A multiple of 128, so that it is a whole number of bytes per token."""
        return -(-(self.places_begin + self.exact) // _ALIGN) * _ALIGN

    @property
    def bytes_per_token(self) -> int:
        return self.page_bytes // UNIT

    def records(self, pages: Tensor) -> Tensor:
        """View [..., H, record_bytes] of pages [..., page_bytes] uint8."""
        return pages[..., : self.records_bytes].unflatten(-1, (self.heads, self.record.record_bytes))

    def integers(self, pages: Tensor) -> Tensor:
        """View [..., 2, H, E, D] int8 of pages: tokens that stand apart, keys and values, without their powers of two."""
        return pages[..., self.exact_begin : self.serial_begin].view(torch.int8).unflatten(-1, (2, self.heads, self.exact, self.head_dim))

    def exponents(self, pages: Tensor) -> Tensor:
        """View [..., 2, H, E] int8 of pages."""
        return pages[..., self.exponents_begin : self.places_begin].view(torch.int8).unflatten(-1, (2, self.heads, self.exact))

    def serials(self, pages: Tensor) -> Tensor:
        """View [...] int64 of pages."""
        return pages[..., self.serial_begin : self.exponents_begin].view(torch.int64)[..., 0]

    def places(self, pages: Tensor) -> Tensor:
        """View [..., E] int8 of pages: tokens that stand apart."""
        return pages[..., self.places_begin : self.places_begin + self.exact].view(torch.int8)


def to_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [..., D] and exponents [...] int8 of x [..., D]: x is nearly integers * 2^exponents, off by at most 1/127 of its largest coordinate."""
    exponents = (x.float().abs().amax(-1) / LARGEST).clamp_min(2.0**-126).log2().ceil().clamp(-100, 100)
    integers = (x.float() * torch.exp2(-exponents)[..., None]).round().clamp(-LARGEST, LARGEST)
    return integers.to(torch.int8), exponents.to(torch.int8)


def from_8_bits(integers: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers [..., D] that `to_8_bits` made these of, in a 16-bit dtype."""
    return (integers.float() * torch.exp2(exponents.float())[..., None]).to(dtype)


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
