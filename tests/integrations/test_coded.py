"""Attention on coded keys and values against dense attention over what the codes decode to."""

from typing import Any

import pytest
import synthetic
import torch
from tolerances import ATTENTION
from torch import Tensor

import spectralquant.integrations.coded as coded
from spectralquant.codec.codec import LayerCodec, build_codec
from spectralquant.config import Dials
from spectralquant.errors import GradientError
from spectralquant.integrations.calls import AttentionCall
from spectralquant.presets import PRESETS


def codec_of(bits: int | None = None, heads: int = 2) -> LayerCodec:
    dials = Dials() if bits is None else Dials(avg_bits=bits, noise_bits=bits, value_noise_bits=bits)
    choices = {"run": 0, "trajectory": False, "add_mass": False, "exact_below": 0.0, "exact_error": 0.0, "value_gain": "search"}
    profile = synthetic.profile(heads, 32, (0,), **choices)
    return build_codec(profile, PRESETS["high"], dials)[0]


def call_of(
    batch: int, tokens: int, queries: int | None = None, groups: int = 1, mask: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> AttentionCall:
    query = torch.randn(batch, 2 * groups, tokens if queries is None else queries, 32)
    key, value = torch.randn(2, batch, 2, tokens, 32)
    return AttentionCall(query.to(dtype), key.to(dtype), value.to(dtype), mask, 0.3)


def decoded(call: AttentionCall, codec: LayerCodec, exact: int = 0) -> AttentionCall:
    """The same call on keys and values as the codec's own encode and decode leave them, token by token."""
    slots, start = torch.arange(call.key.shape[2]), torch.zeros(len(call.key), dtype=torch.int64)
    planes, gains, value_planes, value_gains = codec.encode(call.key, call.value, slots, start)
    key, value = codec.decode_keys(planes, gains, slots, start), codec.decode_values(value_planes, value_gains)
    key[:, :, :exact], value[:, :, :exact] = call.key[:, :, :exact], call.value[:, :, :exact]
    groups = call.query.shape[1] // 2
    return AttentionCall(call.query.float(), key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), call.mask, call.scale)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


def padding() -> Tensor:
    mask = torch.ones(5, 1, 1, 70, dtype=torch.bool)
    mask[1, ..., 30:] = mask[3, ..., 1:] = False
    return mask


CASES: dict[str, dict[str, Any]] = {
    "many short sequences": {"batch": 40, "tokens": 49},
    "one long sequence": {"batch": 1, "tokens": 700},
    "a few of them": {"batch": 3, "tokens": 300},
    "fewer queries than keys": {"batch": 2, "tokens": 130, "queries": 7},
    "groups": {"batch": 2, "tokens": 300, "groups": 3},
    "padding": {"batch": 5, "tokens": 70, "mask": padding()},
    "relative bias": {"batch": 6, "tokens": 49, "mask": torch.randn(1, 2, 49, 49)},
    "bias of every sequence, long": {"batch": 2, "tokens": 300, "mask": 3 * torch.randn(2, 2, 300, 300)},
    "bias of three dimensions": {"batch": 2, "tokens": 60, "mask": torch.randn(2, 60, 60)},
    "two dimensions": {"batch": 2, "tokens": 300, "mask": torch.rand(300, 300) < 0.5},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("exact", [0, 3])
def test_coded_attention(options: dict[str, Any], exact: int, poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded, "TILE", 128)
    monkeypatch.setattr(coded, "QUERIES", 50)
    codec, call = codec_of(), call_of(**options)
    assert error(coded.coded_attention(call, codec, exact), decoded(call, codec, exact).dense()) < ATTENTION


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    codec, call = codec_of(), call_of(2, 100, dtype=dtype)
    got = coded.coded_attention(call, codec)
    assert got.dtype == dtype and error(got, decoded(call, codec).dense()) < {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


def test_a_query_that_sees_nothing_is_zero() -> None:
    mask = torch.ones(2, 1, 50, 50, dtype=torch.bool)
    mask[1, :, 7] = False
    got = coded.coded_attention(call_of(2, 50, mask=mask), codec_of())
    assert (got[1, :, 7] == 0).all() and got.isfinite().all() and (got[1, :, 8] != 0).any()


def test_short_sequences_share_units() -> None:
    """49 tokens a window would fill less than half of a unit each."""
    codec = codec_of()
    tokens = coded.code(codec, *torch.randn(2, 64, 2, 49, 32))
    assert tokens.records.shape == (1, 2, 25, codec.layout.record_bytes)
    assert tokens.nbytes < 0.2 * 2 * 64 * 2 * 49 * 32 * 2


def test_more_bits_are_closer() -> None:
    call = call_of(2, 200)
    errors = [error(coded.coded_attention(call, codec_of(bits)), call.dense()) for bits in (2, 4, 8)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.03


def test_gradients_are_refused() -> None:
    call = call_of(1, 60)
    call.query.requires_grad_(True)
    with pytest.raises(GradientError):
        coded.coded_attention(call, codec_of()).sum().backward()


def test_peak_memory_is_that_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor has queries times keys."""
    monkeypatch.setattr(coded, "TILE", 128)
    monkeypatch.setattr(coded, "QUERIES", 64)
    largest: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, Tensor) else 0)
            return out

    call = call_of(1, 1500)
    with Sizes():
        coded.attend(call, coded.code(codec_of(), call.key, call.value))
    assert max(largest) < 1500 * 1500 / 4
