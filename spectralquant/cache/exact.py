"""Which encoded tokens stay exact: the sinks, and within a bound those that the code would serve badly (`LayerCodec.exact_need`).

The bound holds after every unit of 128 tokens, and of every unit the neediest are taken, so what came in one piece or in many makes no difference. All is
counted where the tokens are, and read from tensors, so a CUDA graph may repeat it. The host has to know one number only: the entries that the store of exact
tokens needs room for.
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

ExactStore = tuple[Tensor, Tensor, Tensor]
"""Slots [B, E] int32 (-1: unused), keys and values [B, H, E, D] of 16 bits, all contiguous; entries in use come first."""


@dataclass(frozen=True, slots=True)
class ExactTokens:
    """What stays exact of some units.

    Attributes:
        tokens: [B, T] int32, places among the units' tokens: those that stay exact first, in ascending order; the rest has no meaning.
        secondary: [B] int64, exact tokens besides the sinks, these units' included.
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

    def after(self, tokens: Tensor) -> Tensor:
        return (tokens.double() * self.share).long() + self.early


def choose_exact(
    codec: LayerCodec, config: CacheConfig, encoded: EncodedUnits, before: Tensor, start: Tensor, secondary: Tensor, records: Tensor
) -> ExactTokens:
    """Choose among the tokens of units, and write the units' gains: those of exact tokens and padding are masked.

    Args:
        codec, config: What should stay exact, and what may.
        encoded: The units.
        before: [] int32, units in front of these.
        start: [B] int64, slots of left padding.
        secondary: [B] int64, exact tokens besides the sinks before these units.
        records: [B, H, U, record_bytes] uint8, their records.
    """
    slots = UNIT * before + torch.arange(encoded.gains.shape[2], device=start.device)
    position = slots - start[:, None]
    need = codec.exact_need(encoded.value_size, codec.relative_error(encoded.key_error))
    wanted = (need > 1) & (position >= config.sinks)
    chosen = within_bound(need.masked_fill(~wanted, 0.0), before, secondary, ExactBound.of(codec, config))
    exact = chosen | ((position >= 0) & (position < config.sinks))
    masked = (exact | (position < 0))[:, None]
    _, key_bytes, _, value_bytes = codec.layout.split(records)
    for to, gains in ((key_bytes, encoded.gains), (value_bytes, encoded.value_gains)):
        to.copy_(pack_gains(gains.masked_fill(masked, MASKED_GAIN).unflatten(2, (-1, UNIT))))
    return ExactTokens(exact.int().argsort(dim=-1, descending=True, stable=True).int(), secondary + chosen.sum(-1))


def within_bound(need: Tensor, before: Tensor, secondary: Tensor, bound: ExactBound) -> Tensor:
    """[B, T] bool: the entries of `need` [B, T] to keep exact: positive ones, unit by unit the largest first, such that after every unit at most what `bound`
    allows are exact.

    Args:
        need: Of the tokens of whole units.
        before: [] int32, units in front of these.
        secondary: [B] int64, how many are exact before.
        bound: What is allowed.
    """
    by_unit = need.unflatten(1, (-1, UNIT))
    allowed = bound.after(UNIT * (before + torch.arange(1, by_unit.shape[1] + 1, device=need.device)))
    wanted = (by_unit > 0).sum(-1).cumsum(1)
    # used_u = min(used_{u-1} + wanted_u, allowed_u), written out: the tightest of all bounds so far.
    used = wanted + torch.minimum((allowed - wanted).cummin(1).values, secondary[:, None])
    taken = used.diff(dim=1, prepend=secondary[:, None])
    rank = by_unit.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return ((by_unit > 0) & (rank < taken[..., None])).flatten(1)


def entries_used(units: Tensor, start: Tensor, secondary: Tensor, sinks: int) -> Tensor:
    """[B] int64, entries of the exact store in use: `secondary` [B] and the sinks among the first `units` [] units."""
    return secondary + (UNIT * units - start).clamp(0, sinks)


def store_exact(exact: ExactTokens, before: Tensor, start: Tensor, secondary: Tensor, sinks: int, keys: Tensor, values: Tensor, store: ExactStore) -> None:
    """Copy the tokens of units that stay exact to the entries after those in use.

    Args:
        exact: What was chosen.
        before: [] int32, units in front of these.
        start: [B] int64, slots of left padding.
        secondary: [B] int64, exact tokens besides the sinks before these units.
        sinks: First tokens of every sequence that stay exact.
        keys, values: [B, H, T, D], the units' tokens, of the store's dtype.
        store: Has room.
    """
    used = entries_used(before, start, secondary, sinks)[:, None]
    total = entries_used(before + keys.shape[2] // UNIT, start, exact.secondary, sinks)[:, None]
    entry = torch.arange(store[0].shape[1], device=start.device)
    is_new = (entry >= used) & (entry < total)
    token = exact.tokens.long().gather(1, (entry - used).clamp(0, keys.shape[2] - 1))
    at = token[:, None, :, None].expand_as(store[1])
    for to, new in zip(store, ((UNIT * before + token).int(), keys.gather(2, at), values.gather(2, at)), strict=True):
        to.copy_(torch.where(is_new if to.dim() == 2 else is_new[:, None, :, None], new, to))
