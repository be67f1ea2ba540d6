"""FP8 roundings against the format's definition, value by value."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from spectralquant.evaluation.methods.fp8 import round_scaled, round_unscaled


def e4m3_values() -> list[tuple[float, int]]:
    """All (value, mantissa) >= 0: 4 exponent bits with bias 7, 3 mantissa bits, no infinity; exponent 15 with mantissa 7 is NaN."""
    pairs = [(m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7), m) for e in range(16) for m in range(8)]
    return pairs[:-1]


def nearest_e4m3(x: float) -> float:
    """Nearest value; of two at the same distance the one with the even mantissa."""
    value, _ = min(e4m3_values(), key=lambda pair: (abs(pair[0] - abs(x)), pair[1] % 2))
    return -value if x < 0 else value


def interesting() -> list[float]:
    values = [v for v, _ in e4m3_values()]
    middles = [(a + b) / 2 for a, b in pairwise(values)]
    return [s * v for v in [*values, *middles, 449.0, 470.0, 1e5, 2.0**-10 * 0.99] for s in (1, -1)] + torch.randn(50).mul(30).tolist()


def test_unscaled_is_the_nearest_value_and_saturates() -> None:
    x = torch.tensor(interesting())
    assert round_unscaled(x).tolist() == [nearest_e4m3(v) for v in x.tolist()]


@pytest.mark.parametrize("size", [1e-3, 1.0, 3e4])
def test_scaled_is_the_nearest_value_under_a_float16_scale(size: float) -> None:
    x = torch.randn(2, 2, 3, 8) * size
    got = round_scaled(x)
    for vector, decoded in zip(x.reshape(-1, 8).numpy(), got.reshape(-1, 8).tolist(), strict=True):
        scale = np.float32(np.float16(np.abs(vector).max() / np.float32(448)))
        want = [float(np.float32(nearest_e4m3(float(np.float32(v / scale)))) * scale) for v in vector]
        assert decoded == pytest.approx(want, rel=1e-6)


def test_scaled_error_is_relative_however_large_the_vector() -> None:
    x = torch.randn(1, 2, 5, 64)
    small, large = round_scaled(x), round_scaled(x * 4096) / 4096
    torch.testing.assert_close(small, large, rtol=2e-3, atol=1e-4)
    assert ((small - x).abs() <= x.abs() / 16 + x.abs().amax(-1, keepdim=True) / 448 * 2.0**-9).all()


def test_zeros_stay_zeros_and_nothing_becomes_nan() -> None:
    assert (round_scaled(torch.zeros(1, 1, 2, 8)) == 0).all()
    assert round_scaled(torch.tensor([[[[1e-9, 0.0, 0.0, 0.0]]]])).isfinite().all()
    assert round_unscaled(torch.tensor([1e30, -1e30])).tolist() == [448.0, -448.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 3, 16, dtype=dtype)
    assert round_scaled(x).dtype == round_unscaled(x).dtype == dtype


def test_a_key_bias_ruins_the_unscaled_format_only() -> None:
    x = torch.randn(1, 2, 20, 32)
    x[..., 0] += 2000
    assert (round_unscaled(x)[..., 0] == 448).all()
    assert ((round_scaled(x) - x).abs()[..., 0] / x[..., 0]).max() < 0.07
