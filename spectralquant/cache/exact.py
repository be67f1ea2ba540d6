"""Which encoded tokens stay exact: the sinks, and within a bound those that the code would serve badly (`LayerCodec.exact_need`).

The bound holds after every unit of 128 tokens, and of every unit the neediest are taken, so what came in one piece or in many makes no difference. All is
counted where the tokens are; the host asks once a call how many are exact, because it has to make room for them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import MASKED_GAIN, UNIT, pack_gains
from spectralquant.codec.units import EncodedUnits
from spectralquant.config import CacheConfig

EARLY = 4
"""Exact tokens that a layer may have beyond its share: secondary sinks come at the first delimiters of a text, before a share allows any. Like the
sinks they are few per sequence, whatever its length."""


@dataclass(frozen=True, slots=True)
class ExactTokens:
    """What stays exact of one call.

    Attributes:
        tokens: [B, n] int32, places in the call in ascending order; what is beyond a sequence's count has no meaning.
        secondary: [B] int64, exact tokens besides the sinks, this call's included.
    """

    tokens: Tensor
    secondary: Tensor


@dataclass(frozen=True, slots=True)
class ExactBound:
    """Most exact tokens besides the sinks: `early` and a `share` of the tokens packed so far."""

    share: float
    early: int

    @staticmethod
    def of(codec: LayerCodec, config: CacheConfig) -> "ExactBound":
        share = min(codec.exact_bound, config.max_exact_share)
        return ExactBound(share, EARLY if share else 0)

    def after(self, tokens: int) -> int:
        return int(tokens * self.share) + self.early


def sinks_among(first: int, padding: int, sinks: int) -> int:
    """Sinks among the slots before `first` of a sequence with `padding` slots of left padding."""
    return min(max(first - padding, 0), sinks)


def choose_exact(codec: LayerCodec, config: CacheConfig, encoded: EncodedUnits, first: int, start: Tensor, secondary: Tensor, records: Tensor) -> ExactTokens:
    """Choose among the tokens of units, and write the units' gains: those of exact tokens and padding are masked.

    Args:
        codec, config: What should stay exact, and what may.
        encoded: The units, from slot `first` on.
        first: A multiple of 128.
        start: [B] int64, slots of left padding.
        secondary: [B] int64, exact tokens besides the sinks before these units.
        records: [B, H, U, record_bytes] uint8, their records.
    """
    slots = torch.arange(first, first + encoded.gains.shape[2], device=start.device)
    position = slots - start[:, None]
    need = codec.exact_need(encoded.value_size, codec.relative_error(encoded.key_error))
    wanted = (need > 1) & (position >= config.sinks)
    chosen = within_bound(need.masked_fill(~wanted, 0.0), first, secondary, ExactBound.of(codec, config))
    exact = chosen | ((position >= 0) & (position < config.sinks))
    masked = (exact | (position < 0))[:, None]
    _, key_bytes, _, value_bytes = codec.layout.split(records)
    for to, gains in ((key_bytes, encoded.gains), (value_bytes, encoded.value_gains)):
        to.copy_(pack_gains(gains.masked_fill(masked, MASKED_GAIN).unflatten(2, (-1, UNIT))))
    tokens = exact.int().argsort(dim=-1, descending=True, stable=True)[:, : int(exact.sum(-1).max())]
    return ExactTokens(tokens.int(), secondary + chosen.sum(-1))


def within_bound(need: Tensor, first: int, secondary: Tensor, bound: ExactBound) -> Tensor:
    """[B, T] bool: the entries of `need` [B, T] to keep exact: positive ones, unit by unit the largest first, such that after every unit at most what `bound`
    allows are exact.

    Args:
        need: Of the tokens of whole units, the first in slot `first`.
        first: A multiple of 128.
        secondary: [B] int64, how many are exact before.
        bound: What is allowed.
    """
    by_unit = need.unflatten(1, (-1, UNIT))
    tokens = first + UNIT * torch.arange(1, by_unit.shape[1] + 1, device=need.device, dtype=torch.float64)
    allowed = (tokens * bound.share).long() + bound.early
    wanted = (by_unit > 0).sum(-1).cumsum(1)
    # used_u = min(used_{u-1} + wanted_u, allowed_u), written out: the tightest of all bounds so far.
    used = wanted + torch.minimum((allowed - wanted).cummin(1).values, secondary[:, None])
    taken = used.diff(dim=1, prepend=secondary[:, None])
    rank = by_unit.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return ((by_unit > 0) & (rank < taken[..., None])).flatten(1)
