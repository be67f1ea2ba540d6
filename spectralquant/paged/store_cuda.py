"""Tokens to their pages by CUDA kernels: `PagedLayer.store` in five launches for every 512 tokens, with codes up to rounding those of `store.write_tokens`.

K and V are whitened, a block of threads for a token and head (whiten.cu), and coded as whole units are (encode_scalar.cu, encode_joint.cu), into records that
hold the step's tokens one after another. tokens.cu then decides which stand apart from their codes, and moves codes and copies to their places.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.encode_cuda import Encoding, FusedEncoder
from spectralquant.codec.layout import UNIT
from spectralquant.codec.quantizer import EPS
from spectralquant.kernels.launch import Launch
from spectralquant.paged.layout import PageLayout
from spectralquant.paged.recent import Step
from spectralquant.paged.store import Average, over_processes

AT_ONCE = 512
"""Tokens of five launches."""
_THREADS = 256


class TokenWriter:
    """The kernels on the device of an encoder."""

    def __init__(self, encoder: FusedEncoder) -> None:
        self._encoder = encoder

    def write(
        self, codec: LayerCodec, layout: PageLayout, recent: tuple[Tensor, Tensor], pages: Tensor, keys: Tensor, values: Tensor, step: Step, sinks: int,
        average: Average | None = None,
    ) -> None:  # fmt: skip
        """Write a step's keys and values [N, H, D], of the dtype of the exact copies `recent` [*, H, D], to these and to pages [pages, page_bytes] uint8.
        `average`: see `store.write_tokens`.

        Raises:
            BackendError: The kernels can't be built.
        """
        keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
        for first in range(0, len(keys), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            some = replace(step, **{name: getattr(step, name)[part] for name in ("slots", "positions", "serials", "rows")})
            self._write(codec, layout, recent, pages, keys[part], values[part], some, sinks, average)

    def _write(
        self, codec: LayerCodec, layout: PageLayout, recent: tuple[Tensor, Tensor], pages: Tensor, keys: Tensor, values: Tensor, step: Step, sinks: int,
        average: Average | None,
    ) -> None:  # fmt: skip
        units = -(-len(keys) // UNIT)
        records = pages.new_empty((1, layout.heads, units, layout.record.record_bytes))
        key, value, sizes = self._encoder.encode_tokens(codec, keys, values, step.positions, records)
        if average is not None and key.error is not None:
            error, sizes = over_processes(codec, key.error, sizes, average)
            key = replace(key, error=error)
        self._encoder.run(plan_write(codec, layout, recent, pages, keys, values, step, sinks, records, key, value, sizes))


@cache
def writer_on(device: torch.device) -> TokenWriter:
    return TokenWriter(FusedEncoder(device))


def plan_write(
    codec: LayerCodec, layout: PageLayout, recent: tuple[Tensor, Tensor], pages: Tensor, keys: Tensor, values: Tensor, step: Step, sinks: int, records: Tensor,
    key: Encoding, value: Encoding, sizes: Tensor,
) -> Launch:  # fmt: skip
    """Everything of the last launch but itself, on any device.

    Args:
        codec, layout, recent, pages, keys, values, step, sinks: As for `TokenWriter.write`.
        records: [1, H, units, record_bytes], codes of the step's tokens one after another.
        key, value, sizes: What belongs to them, from `FusedEncoder.encode_tokens`.
    """
    definitions = {"D": layout.head_dim, "PK": layout.record.key_planes, "PV": layout.record.value_planes, "IS_BF16": int(keys.dtype == torch.bfloat16)}
    arguments = (
        pages, step.slots, step.positions, step.serials, step.rows, records, key.gains, value.gains, key.error, sizes, codec.value_norm, keys, values, *recent,
        len(keys), layout.heads, records.shape[2], pages.stride(0), *keys.stride()[:2], *values.stride()[:2],
        layout.exact, layout.exact_begin, layout.serial_begin, layout.exponents_begin, layout.places_begin, sinks,
        np.float32(codec.exact_below), np.float32(codec.exact_error * max(codec.key_expected, EPS)),
    )  # fmt: skip
    return Launch("tokens.cu", "write_tokens", definitions, arguments, len(keys), _THREADS, 4 * (UNIT + 1))
