"""Both scalar quantizers: what is packed is what is decoded, and it costs the bits and the distortion that the codebooks say."""

import pytest
import synthetic
import torch
from tolerances import DISTORTION

from spectralquant.codebook import distortion_table, lloyd_max_codebook
from spectralquant.codec.budget import coordinate_bits
from spectralquant.codec.codec import build_codec
from spectralquant.codec.quantizer import SCALAR_WIDTHS, LloydMaxBits, build_quantizer
from spectralquant.config import Dials
from spectralquant.presets import PRESETS

CPU, HIGH = torch.device("cpu"), PRESETS["high"]


def widths(name: str, planes: int = 48, dim: int = 48) -> torch.Tensor:
    variance = torch.stack([torch.exp(-0.05 * torch.arange(dim)), torch.exp(-0.12 * torch.arange(dim))])
    return coordinate_bits(variance, planes, Dials(), HIGH, "key", name)


@pytest.mark.parametrize("name", list(SCALAR_WIDTHS))
def test_symbols_give_back_the_levels(name: str) -> None:
    """symbols (of planes) - offset, times W of the identity, are the levels that quantize reported."""
    made = build_quantizer(widths(name), name, CPU)
    planes, levels = made.quantize(torch.randn(3, 2, 100, 48))
    assert planes.shape == (3, 2, 100, 48) and planes.dtype == torch.uint8 and planes.max() == 3
    rows = made.rows(torch.eye(48, dtype=torch.float64).expand(2, -1, -1)).float()
    torch.testing.assert_close((made.symbols(planes, head_axis=1) - made.offset) @ rows, levels, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(SCALAR_WIDTHS))
def test_symbols_take_the_head_dimension_anywhere(name: str) -> None:
    made = build_quantizer(widths(name), name, CPU)
    planes, _ = made.quantize(torch.randn(3, 2, 64, 48))
    want = made.symbols(planes, head_axis=1)
    got = made.symbols(planes.unflatten(2, (4, 16))[None], head_axis=2)
    assert torch.equal(got[0].flatten(2, 3), want)


@pytest.mark.parametrize("name", list(SCALAR_WIDTHS))
def test_quantize_has_the_distortion_of_its_codebooks(name: str) -> None:
    bits = widths(name)
    u = torch.randn(1, 2, 40_000, 48)
    _, levels = build_quantizer(bits, name, CPU).quantize(u)
    got = (u - levels).square().mean((0, 2)).double()
    want = torch.tensor(distortion_table(tuple(range(9)), name), dtype=torch.float64)[bits]
    assert ((got.sum(-1) / want.sum(-1) - 1).abs() < DISTORTION).all()


def test_lloyd_max_bit_string() -> None:
    """Codes back to back, least significant bit first: coordinate by coordinate from the bits of the planes."""
    bits = widths("lloyd-max")
    made = build_quantizer(bits, "lloyd-max", CPU)
    assert isinstance(made, LloydMaxBits) and {1, 3} & set(bits.flatten().tolist())
    u = torch.randn(1, 2, 5, 48)
    planes, _ = made.quantize(u)
    for head in range(2):
        for token in range(5):
            string = "".join(f"{int(p) & 1}{int(p) >> 1}" for p in planes[0, head, token])
            at = 0
            for i, width in enumerate(bits[head].tolist()):
                code = int(string[at : at + width][::-1] or "0", 2)
                at += width
                if width:
                    assert code == int(lloyd_max_codebook(width).assign(u[0, head, token, i : i + 1]))
            assert at == len(string)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_lloyd_max_has_less_error_in_the_same_bytes(preset: str) -> None:
    profile = synthetic.profile(dim=64, key_gain="ls", decay=0.06)
    part, errors, records = profile.layers[0].key, [], []
    for name in SCALAR_WIDTHS:
        codec = build_codec(profile, PRESETS[preset], Dials(), quantizer=name)[0]
        torch.manual_seed(0)
        x = synthetic.samples(part, 3000) - part.mean[:, None]
        errors.append(float(((codec.key.decode(*codec.key.encode(x)) - x) @ part.basis).square().sum()))
        records.append(codec.layout.record_bytes)
    assert records[0] == records[1] and errors[1] < 0.95 * errors[0]
