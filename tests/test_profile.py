"""Files: what is written comes back, and what is damaged is refused."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spectralquant.errors import ProfileError
from spectralquant.profile import LayerProfile, Profile, SideProfile, load_profile, read_fingerprint
from spectralquant.rope import Rotary


def make(interleaved: bool = True, **choices: Any) -> Profile:
    return synthetic.profile(dim=32, rotary=Rotary(synthetic.inv_freq(16), interleaved), exact_share=0.0123, **choices)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make().save(tmp_path / "p")


def rewrite(path: Path, header: dict[str, str | None] | None = None, drop: str | None = None) -> None:
    """Save the file again with some metadata replaced (None: removed) and without one tensor."""
    with safe_open(path, framework="pt") as f:
        metadata = dict(f.metadata())
        tensors = {n: f.get_tensor(n).clone() for n in f.keys() if n != drop}  # noqa: SIM118
    for name, value in (header or {}).items():
        if value is None:
            del metadata[name]
        else:
            metadata[name] = value
    save_file(tensors, path, metadata=metadata)


def with_key(profile: Profile, **parts: torch.Tensor) -> Profile:
    """`profile` with tensors of layer 2's K replaced."""
    layer = profile.layers[2]
    return replace(profile, layers={**profile.layers, 2: replace(layer, key=replace(layer.key, **parts))})


def tensors_of(layer: LayerProfile) -> list[torch.Tensor]:
    sides: list[SideProfile] = [layer.key, layer.value]
    mass = [] if layer.missing_mass is None else [layer.missing_mass]
    return [layer.value_norm, *mass, *(t for s in sides for t in (s.mean, s.basis, s.variance))]


@pytest.mark.parametrize("interleaved", [False, True])
def test_load_profile_gives_back_what_was_saved(tmp_path: Path, interleaved: bool) -> None:
    profile = make(interleaved, key_gain="ls", value_shift=0.1, run=128, trajectory=False, exact_below=0.2)
    loaded = load_profile(profile.save(tmp_path / "p"))
    assert [layer.exact_share for layer in loaded.layers.values()] == [layer.exact_share for layer in profile.layers.values()]
    assert (loaded.choices, loaded.exact_share, loaded.model, loaded.certificate) == (
        profile.choices,
        profile.exact_share,
        profile.model,
        profile.certificate,
    )
    assert loaded.layers.keys() == profile.layers.keys()
    for i, layer in profile.layers.items():
        got = loaded.layers[i]
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors_of(got), tensors_of(layer), strict=True))
        assert got.peak == layer.peak
        assert got.rotary is not None and layer.rotary is not None
        assert got.rotary.interleaved == interleaved
        assert torch.equal(got.rotary.inv_freq, layer.rotary.inv_freq) and got.rotary.inv_freq.dtype == torch.float64


def test_load_profile_keeps_layers_without_rotation(tmp_path: Path) -> None:
    assert all(p.rotary is None for p in load_profile(synthetic.profile(dim=32).save(tmp_path / "p")).layers.values())


def test_load_profile_orders_layers_by_number(tmp_path: Path) -> None:
    """Layer 10 comes after layer 9, although its name sorts before."""
    profile = synthetic.profile(dim=16, layers=(9, 10, 0, 2))
    assert list(load_profile(profile.save(tmp_path / "p")).layers) == [0, 2, 9, 10]


@pytest.mark.parametrize("name", ["p", "p.safetensors", "p.v2", "deep/er/p"])
def test_save_adds_the_suffix_and_folders(tmp_path: Path, name: str) -> None:
    path = make().save(tmp_path / name)
    assert path.is_file() and path.suffix == ".safetensors" and path.name.count(".safetensors") == 1
    assert load_profile(tmp_path / name).model == make().model
    assert load_profile(str(path)).model == make().model


def test_save_lets_others_read_what_any_file_does(tmp_path: Path) -> None:
    """Folders of calibrations are shared: files as safetensors makes them are their owner's alone."""
    (tmp_path / "ordinary").write_text("")
    assert make().save(tmp_path / "p").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_save_is_deterministic(tmp_path: Path) -> None:
    """Equal profiles hold the same tensors and checksum; header order is the library's affair."""
    paths = [make().save(tmp_path / name) for name in "ab"]
    metadata = []
    for path in paths:
        with safe_open(path, framework="pt") as f:
            metadata.append(f.metadata())
    assert metadata[0] == metadata[1]


@pytest.mark.parametrize("failing", ["spectralquant.tensor_file.save_file", "os.replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_save_that_fails_leaves_the_old_file_alone(saved: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException) -> None:
    before = saved.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(failing, fail)
        with pytest.raises(type(error)):
            make(key_gain="ls").save(saved)
    assert os.listdir(saved.parent) == [saved.name]  # noqa: PTH208
    assert saved.read_bytes() == before


def test_save_replaces_an_old_file(saved: Path) -> None:
    make(key_gain="ls").save(saved)
    assert load_profile(saved).choices.key_gain == "ls"
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_load_profile_rejects_missing(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"nothing\.safetensors does not exist"):
        load_profile(tmp_path / "nothing")


def test_load_profile_rejects_folder(tmp_path: Path) -> None:
    (tmp_path / "p.safetensors").mkdir()
    with pytest.raises(ProfileError, match="is no file"):
        load_profile(tmp_path / "p")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.05, 0.5, 0.999])
def test_load_profile_rejects_truncated(saved: Path, kept: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ProfileError, match="truncated or damaged"):
        load_profile(saved)


@pytest.mark.parametrize("data", [b"not a calibration", b"\0" * 1000, b"\xff" * 1000])
def test_load_profile_rejects_other_files(saved: Path, data: bytes) -> None:
    saved.write_bytes(data)
    with pytest.raises(ProfileError, match="truncated or damaged"):
        load_profile(saved)


@pytest.mark.parametrize("place", [0.0, 0.1, 0.37, 0.5, 0.81, 1.0])
@pytest.mark.parametrize("bit", [0, 7])
def test_load_profile_rejects_flipped_bits_of_tensors(saved: Path, place: float, bit: int) -> None:
    data = bytearray(saved.read_bytes())
    first = 8 + int.from_bytes(data[:8], "little")
    data[first + int(place * (len(data) - 1 - first))] ^= 1 << bit
    saved.write_bytes(bytes(data))
    with pytest.raises(ProfileError, match="checksum does not match"):
        load_profile(saved)


@pytest.mark.parametrize("place", [0, 7])
def test_load_profile_rejects_flipped_bits_of_the_length(saved: Path, place: int) -> None:
    data = bytearray(saved.read_bytes())
    data[place] ^= 1 << 4
    saved.write_bytes(bytes(data))
    with pytest.raises(ProfileError, match="truncated or damaged"):
        load_profile(saved)


@pytest.mark.parametrize("part", ["mean", "basis", "variance"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_load_profile_rejects_numbers_that_are_not_finite(tmp_path: Path, part: str, value: float) -> None:
    profile = make()
    tensor = getattr(profile.layers[2].key, part).clone()
    tensor.view(-1)[3] = value
    path = with_key(profile, **{part: tensor}).save(tmp_path / "p")
    with pytest.raises(ProfileError, match=rf"not finite in layers\.2\.key\.{part}"):
        load_profile(path)


@pytest.mark.parametrize(
    ("part", "shape"),
    [("basis", (2, 32, 31)), ("basis", (2, 32)), ("basis", (1, 32, 32)), ("variance", (2, 31)), ("variance", (1, 32)), ("variance", (2, 32, 1))],
)
def test_load_profile_rejects_wrong_shapes(tmp_path: Path, part: str, shape: tuple[int, ...]) -> None:
    path = with_key(make(), **{part: torch.ones(shape)}).save(tmp_path / "p")
    with pytest.raises(ProfileError, match=rf"layers\.2\.key\.{part} has shape"):
        load_profile(path)


@pytest.mark.parametrize("shape", [(2, 32), (3,)])
def test_load_profile_rejects_wrong_shape_of_value_norms(tmp_path: Path, shape: tuple[int, ...]) -> None:
    profile = make()
    path = replace(profile, layers={0: replace(profile.layers[0], value_norm=torch.ones(shape))}).save(tmp_path / "p")
    with pytest.raises(ProfileError, match=r"layers\.0\.value_norm has shape"):
        load_profile(path)


@pytest.mark.parametrize("shape", [(2,), (3, 4), (2, 4, 1)])
def test_load_profile_rejects_wrong_shape_of_missing_mass(tmp_path: Path, shape: tuple[int, ...]) -> None:
    profile = make()
    path = replace(profile, layers={0: replace(profile.layers[0], missing_mass=torch.ones(shape))}).save(tmp_path / "p")
    with pytest.raises(ProfileError, match=r"layers\.0\.missing_mass has shape"):
        load_profile(path)


def test_load_profile_keeps_the_missing_mass_of_layers_that_have_one(tmp_path: Path) -> None:
    profile = make()
    mass = torch.randn(2, 5)
    loaded = load_profile(replace(profile, layers={**profile.layers, 2: replace(profile.layers[2], missing_mass=mass)}).save(tmp_path / "p"))
    assert loaded.layers[0].missing_mass is None
    got = loaded.layers[2].missing_mass
    assert got is not None and torch.equal(got, mass)


@pytest.mark.parametrize("version", ["0", "2", "3.0", "", None])
def test_load_profile_rejects_other_versions(saved: Path, version: str | None) -> None:
    rewrite(saved, {"version": version})
    with pytest.raises(ProfileError, match=r"format version .* this release reads 5"):
        load_profile(saved)


@pytest.mark.parametrize("name", ["pt", "SpectralQuant", None])
def test_load_profile_rejects_other_formats(saved: Path, name: str | None) -> None:
    rewrite(saved, {"format": name})
    with pytest.raises(ProfileError, match="no calibration file of this package"):
        load_profile(saved)


def test_load_profile_rejects_safetensors_without_header(saved: Path) -> None:
    save_file({"x": torch.ones(2)}, saved)
    with pytest.raises(ProfileError, match="no calibration file of this package"):
        load_profile(saved)


@pytest.mark.parametrize("drop", ["layers.0.value.basis", "layers.2.value_norm", "layers.2.inv_freq"])
def test_load_profile_rejects_missing_tensors(saved: Path, drop: str) -> None:
    rewrite(saved, drop=drop)
    with pytest.raises(ProfileError, match="checksum does not match"):
        load_profile(saved)


@pytest.mark.parametrize("name", ["choices", "exact_share", "model", "certificate", "peak", "interleaved"])
def test_load_profile_rejects_missing_header_entries(saved: Path, name: str) -> None:
    rewrite(saved, {name: None})
    with pytest.raises(ProfileError, match="checksum does not match"):
        load_profile(saved)


@pytest.mark.parametrize(("name", "value"), [("choices", json.dumps({"run": 8})), ("exact_share", "0.5"), ("peak", "{}"), ("model", "{}")])
def test_load_profile_rejects_changed_header_entries(saved: Path, name: str, value: str) -> None:
    """The checksum covers what is no tensor too."""
    rewrite(saved, {name: value})
    with pytest.raises(ProfileError, match="checksum does not match"):
        load_profile(saved)


def test_require_model_accepts_its_own(saved: Path) -> None:
    profile = load_profile(saved)
    profile.require_model(dict(profile.model))


@pytest.mark.parametrize("change", [{"weights": "abd"}, {"layers": 3}, {"more": 1}, {"architecture": None}])
def test_require_model_rejects_another_model(saved: Path, change: dict[str, Any]) -> None:
    """The text names what differs, and only that."""
    profile = load_profile(saved)
    name = next(iter(change))
    with pytest.raises(ProfileError, match=f"another model \\({name}: file has [^;]*; calibrate"):
        profile.require_model({**profile.model, **change})


def test_read_fingerprint_is_that_of_the_profile(saved: Path) -> None:
    assert read_fingerprint(saved) == load_profile(saved).model


def test_read_fingerprint_rejects_what_load_profile_does(saved: Path, tmp_path: Path) -> None:
    rewrite(saved, {"version": "1"})
    with pytest.raises(ProfileError, match="format version 1"):
        read_fingerprint(saved)
    with pytest.raises(ProfileError, match="does not exist"):
        read_fingerprint(tmp_path / "nothing.safetensors")
    saved.write_bytes(b"short")
    with pytest.raises(ProfileError, match="truncated or damaged"):
        read_fingerprint(saved)


def test_require_model_compares_no_weights_that_are_not_known(saved: Path) -> None:
    profile = load_profile(saved)
    profile.require_model({**profile.model, "weights": None})
    with pytest.raises(ProfileError, match="another model \\(layers: "):
        profile.require_model({**profile.model, "weights": None, "layers": 3})


def test_require_model_rejects_a_model_with_less_in_its_fingerprint(saved: Path) -> None:
    profile = load_profile(saved)
    with pytest.raises(ProfileError, match="weights: file has 'abc', model has None"):
        profile.require_model({k: v for k, v in profile.model.items() if k != "weights"})
