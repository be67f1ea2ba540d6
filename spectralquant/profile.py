"""Profile: everything calibration hands to the codec, frozen, in one `.safetensors` file.

A profile holds transforms and spectra, not bit widths: one calibration serves every preset, and the widths follow from
the spectra by `allocation.water_fill`. Codebooks that were trained for a plane count are kept with it.

Loading runs no code (safetensors and JSON only) and checks, in this order, that the file can be
read, its format version, the checksum over tensors and header, and all that it holds (see `profile_format`): a checksum is no signature. Whether it
belongs to a model is checked by `Profile.require_model`.
"""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from spectralquant.errors import ProfileError
from spectralquant.profile_format import certificate_of, check_choices, check_tensors, layer_indices, model_of, per_layer, rotated
from spectralquant.rope import Rotary
from spectralquant.tensor_file import FileKind, with_suffix
from spectralquant.untrusted import shown

FORMAT_VERSION = 5
_FILE = FileKind("spectralquant", FORMAT_VERSION, "calibration file", "calibrate again, or restore it", ProfileError)
KEY, VALUE = "key", "value"
NORM_FLOOR = 1e-12
"""Least |v|^2 of a token: a head of zeros, as pruning leaves them, has values of the usual size, not attention sinks."""


@dataclass(frozen=True, slots=True)
class SideProfile:
    """K or V of one layer. H KV heads of size D; all float32.

    Attributes:
        mean: [H, D], subtracted before coding (K: before rotary embedding when the layer is anchored).
        basis: [H, D, D], the matrix A of `z = (x - mean) A`.
        variance: [H, D], variance of z, descending.
    """

    mean: Tensor
    basis: Tensor
    variance: Tensor


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """One attention layer.

    Attributes:
        key, value: The two transforms.
        value_norm: [H] float32, median of |v|^2 over calibration tokens: the scale against which sinks are recognised.
        peak: Largest |k| or |v| seen: decides which 16-bit dtype holds exact tokens of float32 models.
        rotary: Rotation of the keys, or None for the plain frame.
        key_error: Median error of the K codes as a multiple of what the spectrum predicts: below 1 where few large keys make the variance.
        exact_share: Share of the mid-text tokens that should stay exact (see `Choices`) in calibration.
        missing_mass: [H, G] float32, what the logits of coded tokens lack for each query head, per unit of K's expected error (see `calibration.mass`), or
            None where it is not known: nothing is added then.
    """

    key: SideProfile
    value: SideProfile
    value_norm: Tensor
    peak: float
    rotary: Rotary | None = None
    key_error: float = 1.0
    exact_share: float = 0.0
    missing_mass: Tensor | None = None

    @property
    def heads(self) -> int:
        return self.key.mean.shape[0]

    @property
    def head_dim(self) -> int:
        return self.key.mean.shape[1]

    def of_heads(self, heads: slice) -> "LayerProfile":
        """The profile of some of its KV heads."""
        key, value = (SideProfile(side.mean[heads], side.basis[heads], side.variance[heads]) for side in (self.key, self.value))
        mass = None if self.missing_mass is None else self.missing_mass[heads]
        return replace(self, key=key, value=value, value_norm=self.value_norm[heads], missing_mass=mass)


GAINS = ("ls", "unbiased", "search", "wide")
"""Ways to choose the stored gain, see `codec.codec`."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What calibration chose from its menu, by measured KL.

    Attributes:
        query_metric: K is coded in the metric of the logits, E[q^T q].
        output_metric: V is coded in the metric of the layer's output, W_O W_O^T.
        token_weights: Statistics of K and V weight tokens by how much their errors are felt.
        key_gain, value_gain: "ls", "unbiased", "search" or "wide" (see `codec.codec`).
        value_shift: Bits per element that V has more than K.
        planes_first: As many planes as the promise allows, exact tokens from what is left; else room for the exact tokens of calibration text first.
        exact_below: A token stays exact when its |v|^2 is below this share of the layer's median; 0 turns it off.
        exact_error: A token stays exact when the error of its K code, in the metric of K, is above this multiple of the layer's median; 0
            turns it off.
        run: Tokens per anchored run of the K frame; 0 is the plain frame.
        trajectory: The mean of K turns with its position in the run (else it is constant in the stored frame).
        add_mass: The logits of coded tokens get what their mass lacks (see `calibration.mass`).
    """

    query_metric: bool = True
    output_metric: bool = True
    token_weights: bool = True
    key_gain: str = "search"
    value_gain: str = "unbiased"
    value_shift: float = 0.25
    planes_first: bool = False
    exact_below: float = 0.06
    exact_error: float = 4.0
    run: int = 256
    trajectory: bool = True
    add_mass: bool = True

    def __post_init__(self) -> None:
        for name in ("key_gain", "value_gain"):
            if getattr(self, name) not in GAINS:
                raise ProfileError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(GAINS)}")


@dataclass(frozen=True, slots=True)
class Profile:
    """A whole calibration.

    Attributes:
        layers: Layer index in the model -> its profile. Layers that are not coded (sliding window, recurrent) are absent.
        choices: See `Choices`.
        model: Fingerprint of the model, a flat dictionary (see `calibration.hf.fingerprint`).
        certificate: What calibration measured: tokens, seconds, the menu's table, KL and agreement of the winner.
        codebooks: Planes of V -> layer index -> joint codebooks [H, B, P / B, D / B] (see `codec.joint`) trained so far. They follow from the spectra, so
            one that is missing is trained when a codec needs it.
    """

    layers: dict[int, LayerProfile]
    choices: Choices
    model: dict[str, Any]
    certificate: dict[str, Any] = field(default_factory=dict)
    codebooks: dict[int, dict[int, Tensor]] = field(default_factory=dict)

    @property
    def exact_share(self) -> float:
        """Mean over layers."""
        return sum(layer.exact_share for layer in self.layers.values()) / max(len(self.layers), 1)

    def require_model(self, fingerprint: dict[str, Any]) -> None:
        """Raise ProfileError unless the profile was made for the model with this fingerprint, or names no model at all (see `original_format`).

        A fingerprint that says `"weights": None` is of a model whose weights can't be compared (see `model_folder`): all else has to agree.
        """
        wrong = differences(self.model, fingerprint) if self.model else []
        if wrong:
            detail = "; ".join(f"{k}: file has {shown(self.model.get(k))}, model has {shown(fingerprint.get(k))}" for k in wrong)
            raise ProfileError(f"this calibration was made for another model ({detail}); calibrate this model instead")

    def require_encoder(self) -> None:
        """Raise ProfileError unless the profile names the modules of an encoder, one for each layer (see `integrations.encoder`)."""
        modules = self.model.get("modules")
        if not isinstance(modules, list):
            raise ProfileError("this calibration is a language model's, not an encoder's; load it with SpectralQuant.load_calibration")
        if list(self.layers) != list(range(len(modules))):
            raise ProfileError(f"this calibration names {len(modules)} modules for layers {[*self.layers][:9]}; expected one layer a module: calibrate again")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file aside, then rename it: a crash never leaves half a file. Returns the path, with `.safetensors` added if missing."""
        target = with_suffix(path)
        header = {
            "choices": json.dumps(asdict(self.choices)),
            "model": json.dumps(self.model, sort_keys=True),
            "certificate": json.dumps(self.certificate),
            "peak": json.dumps({i: p.peak for i, p in self.layers.items()}),
            "key_error": json.dumps({i: p.key_error for i, p in self.layers.items()}),
            "exact_share": json.dumps({i: p.exact_share for i, p in self.layers.items()}),
            "interleaved": json.dumps({i: p.rotary.interleaved for i, p in self.layers.items() if p.rotary}),
        }
        _FILE.write(target, _to_tensors(self), header)
        return target


def differences(kept: dict[str, Any], fingerprint: dict[str, Any]) -> list[str]:
    """The entries by which the fingerprint in a file and that of a model differ, see `Profile.require_model`."""
    unknown = {"weights"} if fingerprint.get("weights", "") is None else set[str]()
    return sorted(k for k in (kept.keys() | fingerprint.keys()) - unknown if kept.get(k) != fingerprint.get(k))


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Read and check a profile.

    Raises:
        ProfileError: The file is missing, not ours, truncated, of another version, or damaged; the text says which.
    """
    target = with_suffix(path)
    tensors, header = _FILE.read(target)
    try:
        return _from_tensors(tensors, header)
    except ValueError as error:
        raise ProfileError(f"{target} can't be used: {error}; calibrate again") from error


def read_fingerprint(path: Path) -> dict[str, Any]:
    """The fingerprint of the model that a calibration file was made for. Only the header is read, and no checksum compared.

    Raises:
        ProfileError: As `load_profile`, as far as the header tells.
    """
    with _FILE.opened(path) as (_, header):
        return model_of(header)


def _to_tensors(profile: Profile) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for i, layer in profile.layers.items():
        for name, side in ((KEY, layer.key), (VALUE, layer.value)):
            for part in ("mean", "basis", "variance"):
                out[f"layers.{i}.{name}.{part}"] = getattr(side, part)
        out[f"layers.{i}.value_norm"] = layer.value_norm
        if layer.missing_mass is not None:
            out[f"layers.{i}.missing_mass"] = layer.missing_mass.float()
        if layer.rotary is not None:
            out[f"layers.{i}.inv_freq"] = layer.rotary.inv_freq
    for planes, books in profile.codebooks.items():
        out.update({f"layers.{i}.codebook.{planes}": book for i, book in books.items()})
    return out


def _from_tensors(tensors: dict[str, Tensor], header: dict[str, str]) -> Profile:
    """The profile of a file with this content, or a ValueError that says what is wrong with it."""
    check_tensors(tensors)
    indices = layer_indices(tensors)
    interleaved, numbers = rotated(header, tensors, indices), per_layer(header, indices)
    layers: dict[int, LayerProfile] = {}
    for i in indices:
        sides = {n: SideProfile(*(tensors[f"layers.{i}.{n}.{p}"] for p in ("mean", "basis", "variance"))) for n in (KEY, VALUE)}
        rotary = Rotary(tensors[f"layers.{i}.inv_freq"], interleaved[i]) if i in interleaved else None
        mass, (peak, key_error, exact_share) = tensors.get(f"layers.{i}.missing_mass"), (numbers[name][i] for name in ("peak", "key_error", "exact_share"))
        layers[i] = LayerProfile(sides[KEY], sides[VALUE], tensors[f"layers.{i}.value_norm"], peak, rotary, key_error, exact_share, mass)
    codebooks: dict[int, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        match name.split("."):
            case ["layers", i, "codebook", planes]:
                codebooks.setdefault(int(planes), {})[int(i)] = tensor
            case _:
                pass
    if any(books.keys() != layers.keys() for books in codebooks.values()):
        raise ValueError("it has codebooks for some layers only")
    choices = Choices(**check_choices(header, asdict(Choices())))
    return Profile(layers, choices, model_of(header), certificate_of(header), codebooks)
