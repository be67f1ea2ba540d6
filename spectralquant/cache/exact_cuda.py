"""`exact.choose_exact` and the copying of exact tokens by the CUDA kernels of kernels/exact.cu: three launches for what PyTorch does in eighty."""

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from spectralquant.cache.exact import ExactBound, ExactTokens
from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import UNIT, RecordLayout
from spectralquant.codec.quantizer import EPS
from spectralquant.codec.units import EncodedUnits
from spectralquant.config import CacheConfig
from spectralquant.kernels.launch import Launch

_CHOOSING, _BOUND = 4 * UNIT + 16 + 16, 16
"""Bytes of `Choosing` and `UnitBound` of kernels/exact.cu."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The launches of `exact_need` and `choose_exact`, ready to go, and what they leave."""

    launches: tuple[Launch, Launch]
    exact: ExactTokens


def choose_exact(codec: LayerCodec, config: CacheConfig, encoded: EncodedUnits, first: int, start: Tensor, secondary: Tensor, records: Tensor) -> ExactTokens:
    """`exact.choose_exact` on a CUDA device.

    Raises:
        BackendError: The kernels can't be built.
    """
    choice = plan_choice(codec, config, encoded, first, start, secondary, records)
    for launch in choice.launches:
        launch.run(records.device)
    return choice.exact


def plan_choice(codec: LayerCodec, config: CacheConfig, encoded: EncodedUnits, first: int, start: Tensor, secondary: Tensor, records: Tensor) -> Choice:
    """Everything of `choose_exact` but the launches, on any device."""
    batch, heads, count = encoded.gains.shape
    units, bound = count // UNIT, ExactBound.of(codec, config)
    room = config.sinks + bound.after(first + count)
    need = encoded.value_size.new_empty((batch, count))
    wanted, tokens = (start.new_empty((batch, n), dtype=torch.int32) for n in (units, room))
    after = torch.empty_like(secondary)
    per_error = 1 / (heads * max(codec.key_expected, EPS) * codec.exact_error) if codec.exact_error > 0 else 0.0
    definitions = _definitions(codec.layout, codec.head_dim)
    measure = (
        encoded.key_error, encoded.value_size, codec.value_norm, start, need, wanted,
        heads, units, first, config.sinks, numpy.float32(codec.exact_below), numpy.float32(per_error),
    )  # fmt: skip
    choose = (
        need, wanted, start, secondary, encoded.gains, encoded.value_gains, records, after, tokens,
        heads, units, first, config.sinks, records.stride(1), room, bound.early, float(bound.share),
    )  # fmt: skip
    launches = (
        Launch("exact.cu", "exact_need", definitions, measure, batch * units, UNIT, 16),
        Launch("exact.cu", "choose_exact", definitions, choose, batch * units, UNIT, _CHOOSING + _BOUND * units),
    )
    return Choice(launches, ExactTokens(tokens, after))


def plan_copies(
    layout: RecordLayout,
    exact: ExactTokens,
    secondary: Tensor,
    first: int,
    start: Tensor,
    sinks: int,
    most: int,
    keys: Tensor,
    values: Tensor,
    to: tuple[Tensor, Tensor, Tensor],
) -> Launch:
    """The launch that copies exact tokens to the end of the used entries, on any device.

    Args:
        layout: Of the records.
        exact: What was chosen.
        secondary: [B] int64 before the choice.
        first: Slot of the first token of the call.
        start: [B] int64, slots of left padding.
        sinks: First tokens of every sequence.
        most: Tokens to copy of the sequence that has most.
        keys, values: [B, H, T, D], 16-bit, of the call.
        to: Slots [B, E] int32, keys and values [B, H, E, D] of the exact store, contiguous, with room.
    """
    slots, exact_keys, exact_values = to
    batch, heads, count, dim = keys.shape
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    arguments = (
        keys, values, exact.tokens, secondary, exact.secondary, start, slots, exact_keys, exact_values, heads, count, first, sinks,
        most, exact.tokens.shape[1], slots.shape[1], *keys.stride()[:3], *values.stride()[:3],
    )  # fmt: skip
    return Launch("exact.cu", "store_exact", _definitions(layout, dim), arguments, batch * most, UNIT, 0)


def _definitions(layout: RecordLayout, dim: int) -> dict[str, int]:
    return {"D": dim, "KEY_PLANES": layout.key_planes, "VALUE_PLANES": layout.value_planes}
