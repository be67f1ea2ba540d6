"""Joint quantization: fewer errors than any scalar quantizer in the same bytes, and the same records, cache and attention."""

from pathlib import Path

import pytest
import synthetic
import torch
from tolerances import FLOAT32

from spectralquant.codec.codec import build_codec, codec_nbytes, value_codebooks
from spectralquant.codec.joint import JointPlanes, block_index, fit_codebooks
from spectralquant.codec.quantizer import UniformPlanes
from spectralquant.config import Dials
from spectralquant.presets import PRESETS
from spectralquant.profile import Profile, load_profile

HIGH = PRESETS["high"]


@pytest.mark.parametrize("dim", [32, 48, 64, 80, 96, 112, 128, 160, 256])
def test_blocks_share_out_coordinates_and_planes_evenly(dim: int) -> None:
    index = block_index(dim)
    assert sorted(index.flatten().tolist()) == list(range(dim))
    assert 16 % len(index) == 0 and index.shape[1] >= 16
    assert int(index.sum(-1).max() - index.sum(-1).min()) <= dim // 2  # nearly the same spectrum


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("decay", [0.01, 0.06])
def test_less_error_than_scalar_quantizers_in_the_same_bytes(preset: str, decay: float) -> None:
    profile = synthetic.profile(layers=(0,), decay=decay)
    part, errors = profile.layers[0].value, {}
    for name in ("uniform", "lloyd-max", "joint"):
        codec = build_codec(profile, PRESETS[preset], Dials(), quantizer=name)[0]
        torch.manual_seed(0)
        x = synthetic.samples(part, 2000) - part.mean[:, None]
        errors[name] = float(((codec.value.decode(*codec.value.encode(x)) - x) @ part.basis).square().sum())
        errors[f"{name} bytes"] = codec.layout.record_bytes
    assert errors["joint bytes"] == errors["uniform bytes"]
    if codec.layout.value_planes == codec.head_dim and decay < 0.05:  # flat, one plane a coordinate: training starts in a local optimum and stays
        assert errors["joint"] < 1.01 * errors["uniform"]
    else:
        assert errors["joint"] < 0.78 * errors["uniform"] and errors["joint"] < 0.9 * errors["lloyd-max"]


def test_keys_stay_scalar_and_dials_turn_it_off() -> None:
    profile = synthetic.profile(layers=(0,))
    codec = build_codec(profile, HIGH, Dials(), quantizer="joint")[0]
    assert isinstance(codec.key.quantizer, UniformPlanes) and isinstance(codec.value.quantizer, JointPlanes)
    dialled = build_codec(profile, HIGH, Dials(avg_bits=3), quantizer="joint")[0]
    assert isinstance(dialled.value.quantizer, UniformPlanes)


def test_symbols_give_back_the_levels() -> None:
    codec = build_codec(synthetic.profile(layers=(0,), heads=3), HIGH, Dials(), quantizer="joint")[0]
    made, u = codec.value.quantizer, torch.randn(2, 3, 40, 64)
    planes, levels = made.quantize(u)
    assert planes.dtype == torch.uint8 and planes.max() == 3 and planes.shape == (2, 3, 40, codec.layout.value_planes)
    rows = made.rows(torch.eye(64, dtype=torch.float64).expand(3, -1, -1)).float()
    torch.testing.assert_close((made.symbols(planes, head_axis=1) - made.offset) @ rows, levels, rtol=FLOAT32, atol=FLOAT32)


def test_heads_and_rows_do_not_depend_on_each_other() -> None:
    made = build_codec(synthetic.profile(layers=(0,), heads=2), HIGH, Dials(), quantizer="joint")[0].value.quantizer
    u = torch.randn(3, 2, 128, 64)
    planes, _ = made.quantize(u)
    alone, _ = made.quantize(u[1:2].contiguous())
    assert torch.equal(alone[0], planes[1])


def test_codebooks_are_a_function_of_the_spectrum() -> None:
    variance = torch.stack([torch.exp(-0.05 * torch.arange(64.0)), torch.exp(-0.02 * torch.arange(64.0))])
    first = fit_codebooks(variance, 80)
    assert torch.equal(first, fit_codebooks(variance, 80))
    assert torch.equal(first, fit_codebooks(2**-20 * variance, 80))  # unit coordinates know no scale
    assert first.shape == (2, 4, 20, 16)


@pytest.mark.parametrize("variance", [torch.zeros(1, 64), torch.cat([torch.ones(1, 3), torch.zeros(1, 61)], 1), torch.ones(1, 64) * 1e20])
def test_degenerate_spectra(variance: torch.Tensor) -> None:
    assert fit_codebooks(variance, 64).isfinite().all()


def test_progress_reaches_the_end() -> None:
    seen: list[int] = []
    fit_codebooks(torch.ones(40, 32), 16, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 40 and len(seen) > 1


def test_bytes_of_the_constants_do_not_depend_on_who_trained_the_codebooks(tmp_path: Path) -> None:
    profile = synthetic.profile(heads=2)
    trained = codec_nbytes(build_codec(profile, HIGH, Dials(), quantizer="joint").values())
    loaded = load_profile(profile.save(tmp_path / "p"))
    assert trained == codec_nbytes(build_codec(loaded, HIGH, Dials(), quantizer="joint").values())


def test_profile_keeps_what_was_trained(tmp_path: Path) -> None:
    profile = synthetic.profile(heads=2)
    books = value_codebooks(profile, 80)
    loaded = load_profile(profile.save(tmp_path / "p"))
    assert loaded.codebooks.keys() == {80} and value_codebooks(loaded, 80) is loaded.codebooks[80]
    assert all(torch.equal(loaded.codebooks[80][i], books[i]) for i in profile.layers)
    fresh = Profile(profile.layers, profile.choices, profile.model)
    assert all(torch.equal(value_codebooks(fresh, 80)[i], books[i]) for i in profile.layers)
