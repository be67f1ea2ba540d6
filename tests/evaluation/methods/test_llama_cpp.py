"""llama.cpp's formats against scalar loops, and the rotation against its definition."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods import Subject, find_method
from spectralquant.evaluation.methods.llama_cpp import hadamard, round_keys_turned, round_q4_0, round_q8_0, round_values_turned

CPU = torch.device("cpu")
F = np.float32


def q8_0(block: np.ndarray) -> list[float]:
    largest = F(max(abs(v) for v in block))
    d = F(largest / F(127))
    inverse = F(1) / d if d else F(0)
    return [float(F(np.rint(F(v * inverse))) * F(np.float16(d))) for v in block]


def q4_0(block: np.ndarray) -> list[float]:
    peak = F(0)
    for v in block:
        if abs(v) > abs(peak):
            peak = v
    d = F(peak / F(-8))
    inverse = F(1) / d if d else F(0)
    codes = [min(15, int(F(F(v * inverse) + F(8.5)))) for v in block]
    assert all(0 <= c <= 15 for c in codes)
    return [float(F(c - 8) * F(np.float16(d))) for c in codes]


@pytest.mark.parametrize(("rounding", "oracle"), [(round_q8_0, q8_0), (round_q4_0, q4_0)])
def test_format_is_the_scalar_loop(rounding: Callable[[Tensor], Tensor], oracle: Callable[[np.ndarray], list[float]]) -> None:
    x = torch.randn(2, 2, 3, 64) * torch.tensor([0.01, 1.0, 50.0])[:, None]
    x[0, 0, 0] = 0
    x[0, 0, 1, :2] = torch.tensor([-9.0, 9.0])  # a tie of magnitude: the first value decides the sign
    x[0, 1, 1, :2] = torch.tensor([9.0, -9.0])
    want = [v for block in x.reshape(-1, 32).numpy() for v in oracle(block)]
    assert rounding(x).flatten().tolist() == want


def test_q4_0_uses_the_end_of_its_range_on_the_side_of_the_peak() -> None:
    x = torch.linspace(-1, 0.5, 32)
    decoded = round_q4_0(x[None])[0]
    assert decoded[0] == -1 and decoded.unique().numel() <= 13
    torch.testing.assert_close(round_q4_0(-x[None])[0], -decoded, rtol=0, atol=0.13)


def test_error_falls_with_bits() -> None:
    x = torch.randn(1, 2, 50, 128)
    errors = [float((rounding(x) - x).square().mean()) for rounding in (round_q8_0, round_q4_0)]
    assert errors[0] < 1e-3 * errors[1] * 10 < 1


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_hadamard_is_the_parity_of_common_bits(size: int) -> None:
    want = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]) / size**0.5
    torch.testing.assert_close(hadamard(size, CPU), want)
    torch.testing.assert_close(want @ want, torch.eye(size), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dim", "key_size", "value_size"), [(32, 32, 32), (64, 64, 64), (128, 128, 64), (192, 64, 64), (256, 256, 64)])
def test_keys_are_turned_by_the_largest_matrix_and_values_by_64(dim: int, key_size: int, value_size: int) -> None:
    x = torch.randn(1, 2, 3, dim)
    for rounding, size in ((round_keys_turned, key_size), (round_values_turned, value_size)):
        matrix = torch.block_diag(*[hadamard(size, CPU)] * (dim // size))
        torch.testing.assert_close(rounding(x), round_q4_0(x @ matrix) @ matrix, rtol=1e-4, atol=1e-5)


def test_rotation_helps_where_a_channel_sticks_out() -> None:
    x = torch.randn(1, 2, 100, 64)
    x[..., 5] += 30
    error = [float((rounding(x) - x)[..., 6:32].square().mean()) for rounding in (round_q4_0, round_keys_turned)]
    assert error[1] < error[0] / 4


def subject(head_dim: int) -> Any:
    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, num_key_value_heads=2, head_dim=head_dim, num_hidden_layers=1)
    return Subject(SimpleNamespace(config=config), None, Path())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("name", "dims"), [("q8_0", (80, 16)), ("q4_0", (80, 16)), ("q4_0-hadamard", (80, 96, 16))])
def test_heads_that_do_not_fit_are_refused(name: str, dims: tuple[int, ...]) -> None:
    for dim in dims:
        with pytest.raises(ConfigError, match=f"'{name}'.*have size {dim}, expected a multiple"):
            find_method(name).prepare(subject(dim))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 3, 64, dtype=dtype)
    assert {f(x).dtype for f in (round_q8_0, round_q4_0, round_keys_turned, round_values_turned)} == {dtype}
