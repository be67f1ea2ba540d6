"""Room of preallocated stores: they grow by an eighth, so appending is amortised O(1) and slack stays small."""

from torch import Tensor

from spectralquant.codec.layout import UNIT

EXACT_AHEAD = 5
"""Exact tokens that a unit may bring (`max_exact_share` of 128)."""


def grown_units(have: int, need: int, ahead: int, expected: int | None) -> int:
    """Units that a store with room for `have` gets room for when it needs `need`; see `Segment.ahead` and `Segment.expected`."""
    more = have + have // 8
    return max(need + ahead, more if expected is None else min(more, expected // UNIT))


def grown(tensor: Tensor, dim: int, size: int, fill: int | None = None) -> Tensor:
    """`tensor` with more room along `dim`; `fill`: what it is filled with, None for nothing."""
    shape, have = list(tensor.shape), tensor.shape[dim]
    shape[dim] = size
    out = tensor.new_empty(shape) if fill is None else tensor.new_full(shape, fill)
    if have:
        out.narrow(dim, 0, have).copy_(tensor)
    return out
