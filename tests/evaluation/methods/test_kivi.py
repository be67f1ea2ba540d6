"""KIVI and FP16 roundings against loops over groups."""

import numpy as np
import pytest
import torch

from spectralquant.evaluation.methods.fp16 import round_16
from spectralquant.evaluation.methods.kivi import round_keys, round_values

F = np.float32


def rounded_group(group: list[float], bits: int) -> list[float]:
    low, top = min(group), 2**bits - 1
    scale = float(F(np.float16(F(F(max(group)) - F(low)) / F(top))))
    zero = float(F(np.float16(low)))
    return [min(max(round((v - zero) / scale), 0), top) * scale + zero for v in group]


@pytest.mark.parametrize("bits", [2, 4])
def test_keys_share_a_scale_per_channel_along_the_tokens(bits: int) -> None:
    x = torch.randn(2, 2, 16, 3)
    got = round_keys(x, bits, 8)
    for index in np.ndindex(2, 2, 2, 3):
        b, h, group, channel = index
        tokens = slice(8 * group, 8 * group + 8)
        assert got[b, h, tokens, channel].tolist() == pytest.approx(rounded_group(x[b, h, tokens, channel].tolist(), bits), abs=1e-4)


@pytest.mark.parametrize(("bits", "group", "size"), [(2, 4, 4), (4, 8, 8), (2, 32, 8)])
def test_values_share_a_scale_per_token_along_the_channels(bits: int, group: int, size: int) -> None:
    """A group is never longer than the head."""
    x = torch.randn(1, 2, 3, 8)
    got = round_values(x, bits, group)
    for b, h, t, part in np.ndindex(1, 2, 3, 8 // size):
        channels = slice(size * part, size * part + size)
        assert got[b, h, t, channels].tolist() == pytest.approx(rounded_group(x[b, h, t, channels].tolist(), bits), abs=1e-4)


def test_error_falls_with_bits_and_with_smaller_groups() -> None:
    x = torch.randn(1, 2, 128, 128)
    for rounding in (round_keys, round_values):
        errors = [float((rounding(x, bits, group) - x).square().mean()) for bits, group in ((2, 128), (2, 32), (4, 128), (4, 32))]
        assert errors == sorted(errors, reverse=True)


def test_fp16_is_float16_where_the_range_allows_it() -> None:
    x = torch.randn(1, 2, 3, 8)
    assert torch.equal(round_16(x), x.half().float())
    assert torch.equal(round_16(x * 1e6), (x * 1e6).bfloat16().float())
    assert round_16(x.bfloat16()).dtype == torch.bfloat16
