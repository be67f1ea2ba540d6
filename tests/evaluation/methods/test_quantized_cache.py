"""transformers' QuantizedCache: sizes, the residual, quanto's codes against a loop, and what is said when it can't run."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel, cache_utils

from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods import Prepared, Subject, find_method
from spectralquant.evaluation.methods.quantized_cache import _PaddedHqq

NAMES = ("quanto-int4", "quanto-int2", "hqq-int4", "hqq-int2")


def require(name: str) -> None:
    """Skip where a backend is missing, or where nothing can compile what quanto needs."""
    if name.startswith("hqq"):
        pytest.importorskip("hqq")
    else:
        pytest.importorskip("optimum.quanto")
        if not (shutil.which("ninja") and (shutil.which("c++") or shutil.which("g++"))):
            pytest.skip("quanto needs ninja and a C++ compiler")


def subject(model: PreTrainedModel, tmp_path: Path) -> Subject:
    return Subject(model, None, tmp_path)


@pytest.fixture(params=NAMES)
def prepared(request: pytest.FixtureRequest, llama: PreTrainedModel, tmp_path: Path) -> tuple[str, Prepared]:
    require(request.param)
    return request.param, find_method(request.param).prepare(subject(llama, tmp_path))


def fill(cache: Any, tokens: int, layers: int = 3) -> list[tuple[Tensor, Tensor]]:
    made = [(torch.randn(1, 2, tokens, 32), torch.randn(1, 2, tokens, 32)) for _ in range(layers)]
    for i, (keys, values) in enumerate(made):
        cache.update(keys, values, i)
    return made


@pytest.mark.parametrize("tokens", [256, 301])
def test_size_is_codes_and_two_16_bit_numbers_per_64(prepared: tuple[str, Prepared], tokens: int) -> None:
    name, method = prepared
    cache = method.cache()
    fill(cache, tokens)
    want = int(name[-1]) + 32 / 64
    padding = (want + 1) * 64 * 3 / (tokens * 64)  # at most three rows of 64
    assert want <= method.bits(cache) <= want + (padding if tokens % 4 else 0)


def test_first_update_is_coded_whole_and_later_tokens_wait(prepared: tuple[str, Prepared]) -> None:
    _, method = prepared
    cache = method.cache()
    [(keys, _), *_] = fill(cache, 301)
    assert method.exact(cache) == 0
    new = torch.randn(1, 2, 100, 32)
    read, _ = cache.update(new, new, 0)
    assert method.exact(cache) == 100 and torch.equal(read[:, :, 301:], new)
    assert 0 < float((read[:, :, :301] - keys).abs().mean()) < 0.5
    cache.update(new[:, :, :28], new[:, :, :28], 0)
    assert method.exact(cache) == 0
    read, _ = cache.update(new[:, :, :1], new[:, :, :1], 0)
    assert read.shape[2] == 430 and not torch.equal(read[:, :, 301:401], new)


def test_error_falls_with_bits(llama: PreTrainedModel, tmp_path: Path) -> None:
    keys = torch.randn(1, 2, 301, 32)
    for backend in ("quanto", "hqq"):
        errors = []
        for bits in (2, 4):
            require(backend)
            cache = find_method(f"{backend}-int{bits}").prepare(subject(llama, tmp_path)).cache()
            cache.update(keys, keys, 0)
            read, _ = cache.update(keys[:, :, :1], keys[:, :, :1], 0)
            errors.append(float((read[:, :, :301] - keys).square().mean()))
        assert errors[1] < errors[0] / 8


@pytest.mark.parametrize("bits", [2, 4])
def test_quanto_rounds_rows_of_64_between_their_ends(bits: int, llama: PreTrainedModel, tmp_path: Path) -> None:
    require("quanto")
    cache = find_method(f"quanto-int{bits}").prepare(subject(llama, tmp_path)).cache()
    keys, top = torch.randn(1, 2, 3, 32), 2**bits - 1
    cache.update(keys, keys, 0)
    read, _ = cache.update(keys[:, :, :1], keys[:, :, :1], 0)
    got = read[:, :, :3].reshape(-1, 64)
    for row, decoded in zip(keys.reshape(-1, 64).tolist(), got.tolist(), strict=True):
        low, scale = min(row), (max(row) - min(row)) / top
        want = [min(max(round((v - low) / scale), 0), top) * scale + low for v in row]
        assert decoded == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
def test_rows_of_zeros_do_not_move_the_others(bits: int) -> None:
    """The same as HQQ without packing, which takes any number of rows."""
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    x = torch.randn(1, 1, 5, 64)
    options: dict[str, Any] = {"nbits": bits, "axis": 1, "group_size": 64, "device": "cpu", "compute_dtype": torch.float32}
    plain, meta = quantizer.quantize(x, bitpack=False, **options)
    want = quantizer.dequantize(plain, {**meta, "compute_dtype": torch.float32})
    padded = _PaddedHqq(quantizer)
    codes, meta = padded.quantize(x, **options)
    got = padded.dequantize(codes, {**meta, "compute_dtype": torch.float32})
    assert got.shape == x.shape and codes.numel() == -(-5 * bits // 8) * 64
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("name", "check", "line"), [("quanto-int4", "is_optimum_quanto_available", "optimum-quanto"), ("hqq-int2", "is_hqq_available", "hqq")])
def test_missing_package_is_named(name: str, check: str, line: str, llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_utils, check, lambda: False)
    with pytest.raises(ConfigError, match=f"'{name}'.*pip install {line}"):
        find_method(name).prepare(subject(llama, tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_sliding_window_models_are_refused(name: str, tmp_path: Path) -> None:
    require(name)
    with pytest.raises(ConfigError, match=f"'{name}'.*does not take this model"):
        find_method(name).prepare(subject(tiny_model("gemma2"), tmp_path))


def test_heads_must_fill_groups(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 KV heads of size 32; expected a product that is a multiple of 64"):
        find_method("quanto-int4").prepare(subject(tiny_model("qwen2"), tmp_path))


def test_a_backend_that_can_not_compile_says_why(llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optimum.quanto")

    def broken(self: Any, coded: Any) -> Any:
        raise RuntimeError("Ninja is required to load C++ extensions\nlong log")

    monkeypatch.setattr(cache_utils.QuantoQuantizedLayer, "_dequantize", broken)
    with pytest.raises(ConfigError, match=r"does not run on cpu here \(Ninja is required to load C\+\+ extensions\).*C\+\+ compiler"):
        find_method("quanto-int2").prepare(subject(llama, tmp_path))
