"""Encode and decode against the formulas of the module."""

from dataclasses import replace
from typing import Any

import oracles
import pytest
import synthetic
import torch
from tolerances import CODE_FLIPS, DISTORTION, FLOAT32, GAIN_ROUNDING

from spectralquant.codebook import uniform_codebook
from spectralquant.codec.codec import LayerCodec, SideCodec, build_codec, codec_nbytes
from spectralquant.codec.layout import MASKED_GAIN, gain_codes, gain_values
from spectralquant.codec.quantizer import UniformPlanes
from spectralquant.config import Dials
from spectralquant.presets import PRESETS
from spectralquant.profile import Profile
from spectralquant.rope import Rotary

GAINS = ["ls", "unbiased", "search", "wide"]
HIGH, NO_DIALS = PRESETS["high"], Dials()
ROTARY = Rotary(synthetic.inv_freq(32))


def side_codec(profile: Profile, layer: int = 0, preset: str = "high") -> SideCodec:
    return build_codec(profile, PRESETS[preset], NO_DIALS)[layer].key


def uniform(side: SideCodec) -> UniformPlanes:
    assert isinstance(side.quantizer, UniformPlanes)
    return side.quantizer


def z_of(profile: Profile, x: torch.Tensor, layer: int = 0) -> torch.Tensor:
    """z of vectors x with the mean already subtracted, float64."""
    return x.double() @ profile.layers[layer].key.basis.double()


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("gain", GAINS)
def test_decode_error_is_the_predicted_distortion(preset: str, gain: str) -> None:
    """For "ls"; "unbiased" pays for its lack of shrinkage, by a factor of 1 / (1 - D), "search" and "wide" gain a little."""
    profile = synthetic.profile(dim=96, rotary=None, key_gain=gain)
    side, part = side_codec(profile, preset=preset), profile.layers[0].key
    x = synthetic.samples(part, 3000) - part.mean[:, None]
    error = z_of(profile, side.decode(*side.encode(x)) - x).square().sum(-1).mean(-1)[0]
    bits = (uniform(side).top.double() + 1).log2().round().long()
    table = torch.tensor([1.0] + [uniform_codebook(b).distortion for b in range(1, 9)], dtype=torch.float64)
    variance, kept = part.variance.double(), bits > 0
    coded, dropped = (variance * table[bits] * kept).sum(-1), (variance * ~kept).sum(-1)
    if gain == "unbiased":
        coded = coded / (1 - coded / (variance * kept).sum(-1))
    ratio = error / (coded + dropped)
    assert ((ratio > 0.9) & (ratio < 1)).all() if gain in ("search", "wide") else ((ratio - 1).abs() < DISTORTION).all()


@pytest.mark.parametrize("gain", GAINS)
def test_decode_is_linear_in_the_planes_of_the_codes(gain: str) -> None:
    """x^ is the codebook level of every coordinate, times sd, gain and A^-1: planes are only a way to write codes."""
    profile = synthetic.profile(key_gain=gain, decay=0.1)
    side, part = side_codec(profile), profile.layers[0].key
    planes, codes = side.encode(synthetic.samples(part, 50) - part.mean[:, None])
    level = torch.zeros((*planes.shape[:-1], 64), dtype=torch.float64)
    for head in range(2):
        for plane in range(planes.shape[-1]):
            level[:, head, :, side.quantizer.coordinate[head, plane]] += (planes[:, head, :, plane].long() << int(side.quantizer.shift[head, plane])).double()
    z = (level - uniform(side).top.double()[:, None] / 2) * uniform(side).step.double()[:, None] * part.variance.double().sqrt()[:, None]
    want = z @ torch.linalg.inv(part.basis.double()) * gain_values(codes).double()[..., None]
    assert (side.decode(planes, codes) - want).norm() < FLOAT32 * want.norm()


def test_encode_ls_gain_minimises_the_error() -> None:
    """No other gain is closer than rounding explains: the best gain for the decoded shape is 1, up to half a gain step."""
    profile = synthetic.profile(key_gain="ls", decay=0.06)
    side, part = side_codec(profile), profile.layers[0].key
    x = synthetic.samples(part, 400) - part.mean[:, None]
    z, decoded = z_of(profile, x), z_of(profile, side.decode(*side.encode(x)))
    best = (z * decoded).sum(-1) / decoded.square().sum(-1)
    assert best.min() > 1 / GAIN_ROUNDING and best.max() < GAIN_ROUNDING


def test_encode_gains_by_error() -> None:
    """The search beats the least squares fit, which beats the unbiased gain."""
    errors = []
    for gain in ("search", "ls", "unbiased"):
        profile = synthetic.profile(key_gain=gain, decay=0.06)
        side, part = side_codec(profile, preset="max"), profile.layers[0].key
        x = synthetic.samples(part, 2000) - part.mean[:, None]
        errors.append(float(z_of(profile, side.decode(*side.encode(x)) - x).square().sum()))
    assert errors[0] < 0.98 * errors[1] < 0.98 * errors[2]


@pytest.mark.parametrize("quantizer", ["uniform", "lloyd-max"])
def test_encode_wide_gain_keeps_vectors_that_are_far_off_in_one_direction(quantizer: str) -> None:
    """Vectors with one coordinate of 20 deviations are clipped by a search near the least squares gain, where levels end at four (those of a table of 8
    bits go farther). Nothing gets worse."""
    x, errors = synthetic.samples(synthetic.profile().layers[0].key, 400), {}
    for gain in ("search", "wide"):
        profile = synthetic.profile(key_gain=gain, decay=0.02)
        side, part = build_codec(profile, HIGH, Dials(avg_bits=8, noise_bits=8, value_noise_bits=8), quantizer=quantizer)[0].key, profile.layers[0].key
        z = z_of(profile, x - part.mean[:, None])
        z[:, :, ::10, 0] += 20 * part.variance.double().sqrt()[:, None, 0]
        centred = (z @ torch.linalg.inv(part.basis.double())).float()
        off = (z_of(profile, side.decode(*side.encode(centred))) - z).square().sum(-1)
        errors[gain] = off[:, :, ::10].mean(), off[:, :, 1::10].mean()
    assert errors["wide"][0] <= (0.5 if quantizer == "uniform" else 1.0) * errors["search"][0]
    assert errors["wide"][1] <= errors["search"][1]


@pytest.mark.parametrize("decay", [0.02, 0.06, 0.15])
def test_encode_search_gain_is_near_the_best_of_all(decay: float) -> None:
    """Against every gain code within an octave to either side, tried one by one."""
    profile = synthetic.profile(key_gain="search", decay=decay)
    side, part = side_codec(profile), profile.layers[0].key
    x = synthetic.samples(part, 500) - part.mean[:, None]
    z, planes, codes = z_of(profile, x), *side.encode(x)
    deviation = part.variance.double().sqrt()[:, None]

    def error_with(code: torch.Tensor) -> torch.Tensor:
        gain = gain_values(code)[..., None]
        _, levels = side.quantizer.quantize((z / deviation).float() / gain)
        return (levels * gain * deviation - z).square().sum(-1)

    found = z_of(profile, side.decode(planes, codes) - x).square().sum(-1)
    best = torch.stack([error_with((codes.int() + step).to(torch.uint8)) for step in range(-8, 9)]).amin(0)
    assert (found >= best * (1 - FLOAT32)).all()
    assert found.sum() < 1.08 * best.sum()


def test_encode_unbiased_gain_keeps_the_energy() -> None:
    """<z, z^> = <z, z> over the coded coordinates, up to half a gain step per token and closely on average."""
    profile = synthetic.profile(key_gain="unbiased", decay=0.06)
    side, part = side_codec(profile), profile.layers[0].key
    x = synthetic.samples(part, 2000) - part.mean[:, None]
    kept = side.quantizer.kept[:, None]
    z, decoded = z_of(profile, x) * kept, z_of(profile, side.decode(*side.encode(x)))
    ratio = (z * decoded).sum(-1) / z.square().sum(-1)
    assert ratio.min() > 1 / GAIN_ROUNDING and ratio.max() < GAIN_ROUNDING
    assert (ratio.mean() - 1).abs() < 0.005


@pytest.mark.parametrize("gain", GAINS)
def test_encode_scales_with_its_input(gain: str) -> None:
    """Sixteen times the vector: the same planes, 32 more in the gain code."""
    profile = synthetic.profile(key_gain=gain)
    side, part = side_codec(profile), profile.layers[0].key
    x = synthetic.samples(part, 100) - part.mean[:, None]
    planes, codes = side.encode(x)
    more_planes, more_codes = side.encode(16 * x)
    assert torch.equal(planes, more_planes)
    assert torch.equal(codes.int() + 32, more_codes.int())


@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e4])
def test_encode_planes_never_exceed_3(gain: str, scale: float) -> None:
    """One coordinate far outside its range as well as ordinary ones; gains are never masked, decoding stays finite."""
    side = side_codec(synthetic.profile(key_gain=gain, decay=0.1))
    x = torch.randn(1, 2, 300, 64) * scale
    x[..., 0] *= 1000
    planes, codes = side.encode(x)
    assert planes.dtype == codes.dtype == torch.uint8
    assert planes.max() <= 3 and codes.min() >= 1
    assert side.decode(planes, codes).isfinite().all()


def test_encode_uses_every_digit() -> None:
    """All four values of every plane occur: no plane is wasted on Gaussian data."""
    profile = synthetic.profile()
    side, part = side_codec(profile), profile.layers[0].key
    planes, _ = side.encode(synthetic.samples(part, 4000) - part.mean[:, None])
    for digit in range(4):
        assert (planes == digit).any(2).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_encode_takes_any_float_dtype(dtype: torch.dtype) -> None:
    side = side_codec(synthetic.profile())
    x = torch.randn(1, 2, 40, 64).to(dtype)
    for got, want in zip(side.encode(x), side.encode(x.float()), strict=True):
        assert torch.equal(got, want)


def test_encode_is_token_by_token() -> None:
    side = side_codec(synthetic.profile())
    x = torch.randn(2, 2, 256, 64)
    planes, codes = side.encode(x)
    alone_planes, alone_codes = side.encode(x[:, :, 100:101])
    assert (planes[:, :, 100:101] != alone_planes).double().mean() <= CODE_FLIPS * 10
    assert (codes[:, :, 100:101].int() - alone_codes.int()).abs().max() <= 1


def test_masked_gains_decode_to_the_mean() -> None:
    profile = synthetic.profile(rotary=None)
    codec = build_codec(profile, HIGH, NO_DIALS)[2]
    slots, start = torch.arange(20), torch.zeros(1, dtype=torch.int64)
    masked = torch.full((1, 2, 20), MASKED_GAIN, dtype=torch.uint8)
    for part, planes, decode in (
        (profile.layers[2].key, codec.layout.key_planes, lambda p: codec.decode_keys(p, masked, slots, start)),
        (profile.layers[2].value, codec.layout.value_planes, lambda p: codec.decode_values(p, masked)),
    ):
        got = decode(torch.randint(0, 4, (1, 2, 20, planes), dtype=torch.uint8))
        assert torch.equal(got, part.mean[None, :, None].expand_as(got))


@pytest.fixture
def anchored() -> LayerCodec:
    return build_codec(synthetic.profile(rotary=ROTARY, run=32), HIGH, NO_DIALS)[0]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("trajectory", [False, True])
@pytest.mark.parametrize("start", [1, 31, 32, 1000])
def test_encode_anchored_is_independent_of_the_start(interleaved: bool, trajectory: bool, start: int) -> None:
    """Keys before rotation, the same in the same slots: left padding turns them, and must not change what is stored."""
    rotary = Rotary(ROTARY.inv_freq, interleaved)
    profile = synthetic.profile(rotary=rotary, run=32, trajectory=trajectory)
    codec = build_codec(profile, HIGH, NO_DIALS)[0]
    slots = torch.arange(2000, 2256)
    keys = synthetic.samples(profile.layers[0].key, 256, batch=2)
    starts = torch.tensor([0, start])
    turned = rotary.rotate(keys.double(), (slots[None] - starts[:, None])[:, None])
    turned[1] = rotary.rotate(keys[0].double(), slots - start)
    planes, codes, _, _ = codec.encode(turned, keys, slots, starts)
    assert (planes[0] != planes[1]).double().mean() < CODE_FLIPS
    assert (codes[0].int() - codes[1].int()).abs().max() <= 1
    decoded = codec.decode_keys(planes[:1].expand(2, -1, -1, -1), codes[:1].expand(2, -1, -1), slots, starts)
    want = rotary.rotate(decoded[0].double(), torch.tensor(-start))
    assert (decoded[1] - want).norm() < 3 * FLOAT32 * want.norm()


@pytest.mark.parametrize("trajectory", [False, True])
def test_decode_keys_of_masked_gains_is_the_mean_on_its_trajectory(trajectory: bool) -> None:
    profile = synthetic.profile(rotary=ROTARY, run=32, trajectory=trajectory)
    codec = build_codec(profile, HIGH, NO_DIALS)[0]
    slots, start = torch.arange(90, 110), torch.tensor([7])
    planes = torch.randint(0, 4, (1, 2, 20, codec.layout.key_planes), dtype=torch.uint8)
    got = codec.decode_keys(planes, torch.zeros(1, 2, 20, dtype=torch.uint8), slots, start)
    for i, slot in enumerate(slots.tolist()):
        position = slot - 7 if trajectory else slot // 32 * 32 - 7
        want = oracles.rotated(profile.layers[0].key.mean, ROTARY.inv_freq, position, False)
        torch.testing.assert_close(got[0, :, i].double(), want, rtol=1e-4, atol=1e-5)


def test_decode_keys_error_is_as_small_as_without_rotation(anchored: LayerCodec) -> None:
    """A trajectory frame sees k R(j) - mean R(j): keys that are exactly the turned mean come back exactly."""
    profile = synthetic.profile(rotary=ROTARY, run=32)
    slots, start = torch.arange(500, 628), torch.tensor([3])
    keys = ROTARY.rotate(profile.layers[0].key.mean[None, :, None].double(), slots - 3)
    planes, codes, _, _ = anchored.encode(keys, keys, slots, start)
    got = anchored.decode_keys(planes, codes, slots, start)
    torch.testing.assert_close(got.double(), keys, rtol=0, atol=1e-3)


@pytest.mark.parametrize("trajectory", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [32, 20])
def test_mean_scores_are_products_with_the_turned_mean(trajectory: bool, interleaved: bool, pairs: int) -> None:
    """Also for partial rotary, where the last coordinates stay."""
    rotary = Rotary(synthetic.inv_freq(pairs), interleaved)
    codec = build_codec(synthetic.profile(rotary=rotary, run=32, trajectory=trajectory), HIGH, NO_DIALS)[0]
    assert codec.frame is not None
    queries, mean = torch.randn(2, 3, 5, 64), codec.key.mean
    got = codec.frame.mean_scores(queries, mean)
    for j in range(32):
        turned = oracles.rotated(mean, rotary.inv_freq, j if trajectory else 0, interleaved)
        want = torch.einsum("hrnd,hd->hrn", queries.double(), turned)
        torch.testing.assert_close(got[..., j].double(), want, rtol=1e-4, atol=1e-4)


def test_anchors_is_the_position_of_the_first_token_of_a_run(anchored: LayerCodec) -> None:
    assert anchored.frame is not None
    slots, starts = torch.arange(100), torch.tensor([0, 5, 40])
    got = anchored.frame.anchors(slots, starts)
    assert got.tolist() == [[s - s % 32 - start for s in range(100)] for start in starts.tolist()]


def test_build_codec_gives_every_layer_the_same_layout() -> None:
    codecs = build_codec(synthetic.profile(layers=(1, 4, 7)), HIGH, NO_DIALS)
    assert list(codecs) == [1, 4, 7] and len({c.layout for c in codecs.values()}) == 1
    for codec in codecs.values():
        assert codec.key.decode_matrix.shape == (2, codec.layout.key_planes, 64)
        assert codec.value.decode_matrix.shape == (2, codec.layout.value_planes, 64)


def test_build_codec_shares_frames_of_equal_rotations() -> None:
    same = build_codec(synthetic.profile(rotary=ROTARY, run=32), HIGH, NO_DIALS)
    assert same[0].frame is same[2].frame is not None
    frame_bytes = same[0].frame.turns.numel() * 4  # pyright: ignore[reportOptionalMemberAccess]
    assert codec_nbytes(same.values()) == same[0].nbytes + same[2].nbytes + frame_bytes


@pytest.mark.parametrize(("rotary", "run"), [(None, 32), (ROTARY, 0)])
def test_build_codec_plain_frame_without_rotation_or_run(rotary: Rotary | None, run: int) -> None:
    codec = build_codec(synthetic.profile(rotary=rotary, run=run), HIGH, NO_DIALS)[0]
    assert codec.frame is None
    slots = torch.arange(8)
    assert torch.equal(codec.key_mean(slots), codec.key.mean[:, None])


@pytest.mark.parametrize(("peak", "dtype"), [(10.0, torch.float16), (60_000.0, torch.bfloat16)])
def test_build_codec_exact_dtype_holds_the_peak(peak: float, dtype: torch.dtype) -> None:
    profile = synthetic.profile(layers=(0,))
    object.__setattr__(profile.layers[0], "peak", peak)
    assert build_codec(profile, HIGH, NO_DIALS)[0].exact_dtype == dtype


@pytest.mark.parametrize("noise", [0, 2, 4])
def test_build_codec_with_dials_decodes_what_it_encodes(noise: int) -> None:
    """The higher the tail's width, the smaller the error."""
    profile, errors = synthetic.profile(dim=64), []
    for bits in (noise, noise + 2):
        side = build_codec(profile, HIGH, Dials(noise_bits=bits, d_eff_variance=0.5))[0].key
        part = profile.layers[0].key
        torch.manual_seed(1)
        x = synthetic.samples(part, 500) - part.mean[:, None]
        errors.append(float(z_of(profile, side.decode(*side.encode(x)) - x).square().sum()))
    assert errors[1] < errors[0]


def test_gain_codes_of_encode_match_the_distortion_of_no_gain_rounding() -> None:
    """Codes are taken for the stored gain, so its rounding costs nothing: an exact gain for the same codes takes 2 % off at most."""
    profile = synthetic.profile(dim=96, key_gain="search", decay=0.06)
    side, part = side_codec(profile), profile.layers[0].key
    x = synthetic.samples(part, 1000) - part.mean[:, None]
    planes, codes = side.encode(x)
    assert codes.min() > gain_codes(torch.tensor([0.1]))[0]
    z, decoded = z_of(profile, x), z_of(profile, side.decode(planes, codes))
    best = ((z * decoded).sum(-1) / decoded.square().sum(-1))[..., None]
    assert (z - decoded).square().sum() < 1.02 * (z - best * decoded).square().sum()


@pytest.mark.parametrize("first", [0, 128, 512])
@pytest.mark.parametrize("choices", [{}, {"trajectory": False}, {"run": 0}, {"run": 512}], ids=str)
@pytest.mark.parametrize("pairs", [32, 16])
def test_centre_units_is_centre_keys(first: int, choices: dict[str, Any], pairs: int) -> None:
    """To the last bit, partial rotations and padding included."""
    profile = synthetic.profile(2, 64, (0,), rotary=Rotary(synthetic.inv_freq(pairs)), **choices)
    codec = build_codec(profile, PRESETS["high"], Dials())[0]
    keys, start = torch.randn(2, 2, 384, 64), torch.tensor([0, 37])
    assert torch.equal(codec.centre_units(keys, torch.tensor(first // 128), start), codec.centre_keys(keys, torch.arange(first, first + 384), start))


def test_encode_matrix_is_laid_out_for_kernels() -> None:
    """Eigenvectors may come transposed; kernels read rows."""
    profile = synthetic.profile(2, 64, (0,))
    layer = profile.layers[0]
    key, value = (replace(side, basis=side.basis.mT.contiguous().mT) for side in (layer.key, layer.value))
    codec = build_codec(replace(profile, layers={0: replace(layer, key=key, value=value)}), HIGH, NO_DIALS)[0]
    assert codec.key.encode_matrix.is_contiguous() and codec.value.encode_matrix.is_contiguous()
