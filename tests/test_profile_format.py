"""Calibration files that a malicious author made: their checksum is right, what they hold is not."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spectralquant.calibration_cache import find_kept
from spectralquant.cli.certificate import describe_certificate
from spectralquant.codec.budget import plane_counts
from spectralquant.codec.codec import build_codec, value_codebooks
from spectralquant.config import Dials
from spectralquant.errors import ProfileError, SpectralQuantError
from spectralquant.integrations.encoder import CHOICES, EncoderEngine, _fingerprint
from spectralquant.presets import PRESETS
from spectralquant.pretrained import describe
from spectralquant.profile import Profile, load_profile, read_fingerprint
from spectralquant.rope import Rotary
from spectralquant.tensor_file import checksum

HIGH = PRESETS["high"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    made = synthetic.profile(dim=32, rotary=Rotary(synthetic.inv_freq(16)), exact_share=0.01)
    layers = {i: replace(layer, missing_mass=torch.ones(2, 3)) for i, layer in made.layers.items()}
    made = replace(made, layers=layers)
    value_codebooks(made, plane_counts(made, HIGH, Dials())[1])
    return made.save(tmp_path / "p")


def forge(path: Path, tensors: dict[str, Tensor | None] | None = None, header: dict[str, Any] | None = None) -> Path:
    """Replace tensors (None: removed) and entries of the header, which are written as JSON unless they are text; the checksum is right again."""
    with safe_open(path, framework="pt") as file:
        metadata, held = dict(file.metadata()), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for kept, changes in ((held, tensors or {}), (metadata, header or {})):
        for name, value in changes.items():
            if value is None:
                kept.pop(name)
            else:
                kept[name] = value if isinstance(value, (str, Tensor)) else json.dumps(value)
    metadata["checksum"] = checksum(held, metadata)
    path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, path, metadata=metadata)
    return path


def entry(path: Path, name: str) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[name])


def test_forging_nothing_changes_nothing(saved: Path) -> None:
    want = load_profile(saved)
    got = load_profile(forge(saved))
    assert got.choices == want.choices and got.layers.keys() == want.layers.keys() and got.codebooks.keys() == want.codebooks.keys()


DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["layers.0.key.basis", "layers.2.value_norm", "layers.0.missing_mass"])
def test_dtypes(saved: Path, name: str, dtype: torch.dtype) -> None:
    with safe_open(saved, framework="pt") as file:
        other = file.get_tensor(name).to(dtype)
    with pytest.raises(ProfileError, match=rf"{name} has dtype {dtype}, expected torch\.float32; calibrate again"):
        load_profile(forge(saved, {name: other}))


@pytest.mark.parametrize(
    "name",
    ["layers.x.key.mean", "layers.-1.key.mean", "layers.00.key.mean", "layers.123456.key.mean", "layers.0.key", "layers", "", "layers.0.key.mean.x", "\x1b[2J",
     "layers.0.codebook.x", "layers.0.codebook.", "layers.0.codebook.-16", "layers.\u0661.key.mean", "x"],
)  # fmt: skip
def test_names(saved: Path, name: str) -> None:
    with pytest.raises(ProfileError, match="there is no tensor called '"):
        load_profile(forge(saved, {name: torch.ones(2, 32)}))


WRONG: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no tensor at all": ({}, "it has 0 layers, expected 1 to 1,024"),
    "missing": ({"layers.0.key.basis": None}, r"layers\.0\.key\.basis is missing"),
    "no heads": ({"layers.0.key.mean": torch.ones(0, 32)}, r"key\.mean has shape \(0, 32\), expected \[H, D\]"),
    "flat": ({"layers.0.key.mean": torch.ones(64)}, r"key\.mean has shape \(64,\)"),
    "wide": ({"layers.0.key.mean": torch.ones(1, 5000)}, r"D from 1 to 1,024"),
    "inv_freq type": ({"layers.0.inv_freq": torch.ones(16)}, r"inv_freq has dtype torch\.float32, expected torch\.float64"),
    "inv_freq long": ({"layers.0.inv_freq": torch.ones(17).double()}, r"inv_freq has shape \(17,\), expected \[R / 2\] with R from 2 to 32"),
    "inv_freq none": ({"layers.0.inv_freq": torch.ones(0).double()}, "inv_freq has shape"),
    "inv_freq square": ({"layers.0.inv_freq": torch.ones(4, 4).double()}, "inv_freq has shape"),
    "inv_freq endless": ({"layers.0.inv_freq": torch.full((16,), math.inf).double()}, r"not finite in layers\.0\.inv_freq"),
    "inv_freq fast": ({"layers.0.inv_freq": torch.full((16,), 1e300, dtype=torch.float64)}, "more than 10000 radians per position"),
    "inv_freq gone": ({"layers.0.inv_freq": None}, "disagree about whether layer 0 has a rotation"),
    "negative variance": ({"layers.2.value.variance": -torch.ones(2, 32)}, r"below zero in layers\.2\.value\.variance"),
    "negative norm": ({"layers.2.value_norm": -torch.ones(2)}, r"below zero in layers\.2\.value_norm"),
    "mass without queries": ({"layers.0.missing_mass": torch.ones(2, 0)}, "missing_mass has shape"),
    "odd planes": ({"layers.0.codebook.24": torch.ones(2, 2, 12, 16)}, "is for 24 planes, expected a multiple of 16 up to 128"),
    "many planes": ({"layers.0.codebook.160": torch.ones(2, 2, 80, 16)}, "is for 160 planes"),
    "book shape": ({"layers.0.codebook.32": torch.ones(2, 2, 8, 16)}, r"expected \[2, B, 32 / B, 32 / B\] for some B"),
    "some books": ({"layers.0.codebook.48": torch.ones(2, 2, 24, 16)}, "codebooks for some layers only"),
    "large book": ({"layers.0.codebook.32": torch.full((2, 2, 16, 16), 1e9)}, "more than 1e"),
}


@pytest.mark.parametrize(("tensors", "text"), WRONG.values(), ids=WRONG)
def test_tensors(saved: Path, tensors: dict[str, Tensor | None], text: str) -> None:
    if not tensors:
        with safe_open(saved, framework="pt") as file:
            tensors = dict.fromkeys(file.keys())
    with pytest.raises(ProfileError, match=rf"{saved.name} can't be used: .*{text}.*; calibrate again"):
        load_profile(forge(saved, tensors))


DEEP: Any = []
for _ in range(60):
    DEEP = [DEEP]
HEADER: dict[str, tuple[str, Any, str]] = {
    "no JSON": ("model", "{", "model is no JSON"),
    "list": ("choices", [], r"choices is \[\], expected an object"),
    "deep": ("certificate", {"a": DEEP}, "certificate is nested more than 32 deep"),
    "endlessly deep": ("model", "[" * 100_000, "model is nested more than 32 deep"),
    "digits": ("peak", '{"0": ' + "1" * 5000 + "}", "peak is no JSON"),
    "gone": ("peak", None, "its header has no 'peak'"),
    "NaN peak": ("peak", {"0": math.nan, "2": 1.0}, "peak of layer 0 is nan"),
    "negative peak": ("peak", {"0": -1, "2": 1.0}, "peak of layer 0 is -1"),
    "text for a number": ("key_error", {"0": "1", "2": 1.0}, "key_error of layer 0 is '1'"),
    "endless error": ("key_error", {"0": math.inf, "2": 1.0}, "key_error of layer 0 is inf"),
    "bool for a number": ("exact_share", {"0": True, "2": 1.0}, "exact_share of layer 0 is True"),
    "negative share": ("exact_share", {"0": -0.5, "2": 1.0}, "expected a number from 0 to 1"),
    "a layer less": ("exact_share", {"0": 0.5}, "exact_share has no '2'"),
    "interleaved": ("interleaved", {"0": 1, "2": False}, "interleaved of layer 0 is 1, expected true or false"),
    "interleaved gone": ("interleaved", {"0": True}, "disagree about whether layer 2 has a rotation"),
    "unknown choice": ("choices", {"better": True}, "choices has 'better', which this release doesn't know"),
    "run": ("choices", {"run": 100}, "run is 100, expected a multiple of 128"),
    "long run": ("choices", {"run": 1 << 40}, "expected an integer from 0 to 4,096"),
    "half a run": ("choices", {"run": 128.5}, "run is 128.5"),
    "flag": ("choices", {"trajectory": "yes"}, "trajectory is 'yes', expected true or false"),
    "shift": ("choices", {"value_shift": 1e9}, "expected a number from -8 to 8"),
    "NaN": ("choices", {"exact_below": math.nan}, "exact_below is nan"),
    "gain": ("choices", {"key_gain": "best"}, "key_gain='best': expected one of"),
    "model": ("model", ["x"], r"model is \['x'\], expected an object"),
    "escape": ("model", {"architecture": "\x1b[2J"}, "all of them printable"),
    "long name": ("model", {"architecture": "x" * 10_000}, "at most 4,096 characters"),
    "huge": ("model", {"layers": 10**30}, "an integer of many digits"),
    "twice": ("model", {"modules": ["a", "a"]}, "listed twice"),
    "certificate": ("certificate", {"kl": "0.1"}, "kl is '0.1', expected a number"),
    "half a certificate": ("certificate", {"kl": 0.1}, "certificate has no 'agreement'"),
    "tokens": ("certificate", {"tokens": "many"}, "tokens is 'many', expected an integer"),
    "menu": ("certificate", {"kl": 0.1, "agreement": 1, "preset": "high", "scored_tokens": 5, "menu": [1]}, "a row of the menu is 1"),
}


@pytest.mark.parametrize(("name", "value", "text"), HEADER.values(), ids=HEADER)
def test_headers(saved: Path, name: str, value: Any, text: str) -> None:
    if name == "choices" and isinstance(value, dict):
        value = {**entry(saved, name), **value}
    with pytest.raises(ProfileError, match=rf"{saved.name} can't be used: .*{text}.*; calibrate again"):
        load_profile(forge(saved, header={name: value}))


@pytest.mark.parametrize("value", ["[]", "3", '"x"', "[" * 5000, "{", '{"a": "\\u001b"}'])
def test_the_fingerprint_alone(saved: Path, value: str) -> None:
    with pytest.raises(ProfileError, match="it is truncated or damaged"):
        read_fingerprint(forge(saved, header={"model": value}))


def test_a_forged_file_among_kept_ones_is_passed_over(saved: Path, calibrations: Path) -> None:
    """It made every look into the folder fail."""
    calibrations.mkdir(parents=True)
    (calibrations / "a.safetensors").write_bytes(forge(saved, header={"model": "[]"}).read_bytes())
    assert find_kept({"architecture": "Fake"}) is None


def test_measured_nothing(saved: Path) -> None:
    """`inspect` and cards show calibrations without a certificate, encoders' for example."""
    profile = load_profile(forge(saved, header={"certificate": {}}))
    assert describe_certificate(profile).startswith("no certificate: nothing is known about its quality")
    assert "Nothing is known about its quality" in describe(profile)


def test_a_candidate_that_failed_may_be_in_the_menu(saved: Path) -> None:
    row = {"changed": {"run": 0}, "kl": math.nan, "agreement": math.nan, "kept": False}
    told = {"kl": 0.1, "agreement": 0.9, "preset": "high", "scored_tokens": 5, "menu": [row]}
    assert "dropped run=0" in describe_certificate(load_profile(forge(saved, header={"certificate": told})))


# What can be loaded and not computed with -----------------------------------------------------------------------------

UNUSABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "layers.0.key.basis": torch.zeros_like,
    "layers.2.value.basis": torch.ones_like,
    "layers.0.value.basis": lambda t: t * 1e-42,
    "layers.2.key.basis": lambda t: t[..., [0, 0, *range(2, 32)]],
    "layers.0.missing_mass": lambda t: torch.full_like(t, 3e38),
}


@pytest.mark.parametrize("quantizer", ["joint", "uniform", "lloyd-max"])
@pytest.mark.parametrize("name", UNUSABLE)
def test_transforms_that_are_singular(saved: Path, name: str, quantizer: str) -> None:
    with safe_open(saved, framework="pt") as file:
        tensors = {name: UNUSABLE[name](file.get_tensor(name))}
        if name.endswith("mass"):
            tensors["layers.0.key.variance"] = 1e30 * file.get_tensor("layers.0.key.variance")
    profile = load_profile(forge(saved, tensors))
    with pytest.raises(ProfileError, match=r"(can't be inverted|can't be computed with); calibrate again"):
        build_codec(profile, HIGH, Dials(), quantizer=quantizer)


def book_of(saved: Path) -> str:
    with safe_open(saved, framework="pt") as file:
        return next(name.rpartition(".")[2] for name in file.keys() if ".codebook." in name)  # noqa: SIM118


def test_codebooks_that_can_not_be_searched(saved: Path) -> None:
    planes = int(book_of(saved))
    profile = load_profile(forge(saved, {f"layers.{i}.codebook.{planes}": torch.full((2, 2, planes // 2, 16), 1e6) for i in (0, 2)}))
    with pytest.raises(ProfileError, match="codebooks of V of layer 0 in the calibration can't be searched; calibrate again"):
        build_codec(profile, HIGH, Dials(), quantizer="joint")


def test_codebooks_of_other_blocks(saved: Path) -> None:
    planes = int(book_of(saved))
    profile = load_profile(forge(saved, {f"layers.{i}.codebook.{planes}": torch.randn(2, 1, planes, 32) for i in (0, 2)}))
    with pytest.raises(ProfileError, match=f"codebooks of layer 0 for {planes} planes have 1 blocks, expected 2; calibrate again"):
        build_codec(profile, HIGH, Dials(), quantizer="joint")


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("shift", [-8, 0, 8])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_extremes_give_a_codec_or_an_error(saved: Path, share: float, shift: float, scale: float) -> None:
    with safe_open(saved, framework="pt") as file:
        tensors = {name: scale * file.get_tensor(name) for name in file.keys() if name.endswith("variance")}  # noqa: SIM118
    header = {"exact_share": {"0": share, "2": share}, "choices": {**entry(saved, "choices"), "value_shift": shift}}
    profile = load_profile(forge(saved, tensors, header))
    try:
        built = build_codec(profile, HIGH, Dials(), quantizer="uniform")
    except SpectralQuantError:
        return
    keys = torch.randn(1, 2, 128, 32)
    planes = built[0].encode(keys, keys, torch.arange(128), torch.zeros(1, dtype=torch.int64))[0]
    assert planes.shape == (1, 2, 128, built[0].layout.key_planes)


# Encoders -------------------------------------------------------------------------------------------------------------


def encoder_profile(model: nn.Module, names: list[str]) -> Profile:
    return replace(synthetic.profile(dim=32, layers=(0, 1)), choices=CHOICES, model=_fingerprint(model, names))


@pytest.mark.parametrize("names", [["0"], ["0", "1", "2"], []])
def test_modules_and_layers_belong_together(tmp_path: Path, names: list[str]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    path = encoder_profile(model, names).save(tmp_path / "p")
    with pytest.raises(ProfileError, match=f"names {len(names)} modules for layers"):
        EncoderEngine().load(path)


def test_modules_that_are_not_there(tmp_path: Path) -> None:
    """Names are part of the fingerprint, so a file that names other modules of the same weights fits."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    engine = EncoderEngine(bits=4).load(encoder_profile(model, ["0", "7.attention"]).save(tmp_path / "p"))
    with pytest.raises(ProfileError, match=r"modules that Sequential doesn't have \(7\.attention\); calibrate this model"):
        engine.codecs(model)
