"""`exact.choose_exact` and `exact.store_exact` by the CUDA kernels of kernels/exact.cu: three launches for what PyTorch does in eighty."""

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from spectralquant.cache.exact import ExactBound, ExactStore, ExactTokens
from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import UNIT
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


def choose_exact(
    codec: LayerCodec, config: CacheConfig, encoded: EncodedUnits, before: Tensor, start: Tensor, secondary: Tensor, records: Tensor
) -> ExactTokens:
    """`exact.choose_exact` on a CUDA device.

    Raises:
        BackendError: The kernels can't be built.
    """
    choice = plan_choice(codec, config, encoded, before, start, secondary, records)
    for launch in choice.launches:
        launch.run(records.device)
    return choice.exact


def plan_choice(codec: LayerCodec, config: CacheConfig, encoded: EncodedUnits, before: Tensor, start: Tensor, secondary: Tensor, records: Tensor) -> Choice:
    """Everything of `choose_exact` but the launches, on any device."""
    batch, heads, count = encoded.gains.shape
    units, bound, definitions = count // UNIT, ExactBound.of(codec, config), {"D": codec.head_dim}
    need = encoded.value_size.new_empty((batch, count))
    wanted, tokens = (start.new_empty((batch, n), dtype=torch.int32) for n in (units, count))
    after = torch.empty_like(secondary)
    per_error = 1 / (heads * max(codec.key_expected, EPS) * codec.exact_error) if codec.exact_error > 0 else 0.0
    measure = (
        encoded.key_error, encoded.value_size, codec.value_norm, start, before, need, wanted,
        heads, units, config.sinks, numpy.float32(codec.exact_below), numpy.float32(per_error),
    )  # fmt: skip
    _, key_gains, _, value_gains = codec.layout.split(records)
    choose = (
        need, wanted, start, before, secondary, encoded.gains, encoded.value_gains, key_gains, value_gains, after, tokens,
        heads, units, config.sinks, records.stride(1), records.stride(2), bound.early, float(bound.share),
    )  # fmt: skip
    launches = (
        Launch("exact.cu", "exact_need", definitions, measure, batch * units, UNIT, 16),
        Launch("exact.cu", "choose_exact", definitions, choose, batch * units, UNIT, _CHOOSING + _BOUND * units),
    )
    return Choice(launches, ExactTokens(tokens, after))


def store_exact(exact: ExactTokens, before: Tensor, start: Tensor, secondary: Tensor, sinks: int, keys: Tensor, values: Tensor, store: ExactStore) -> None:
    """`exact.store_exact` on a CUDA device.

    Raises:
        BackendError: The kernel can't be built.
    """
    batch, heads, count, dim = keys.shape
    room = store[0].shape[1]
    most = min(room, count)
    if not most:
        return
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    arguments = (
        keys, values, exact.tokens, secondary, exact.secondary, start, before, *store,
        heads, count, sinks, most, room, *keys.stride()[:3], *values.stride()[:3],
    )  # fmt: skip
    Launch("exact.cu", "store_exact", {"D": dim}, arguments, batch * most, UNIT, 0).run(keys.device)
