"""What a codec is known by: two that agree read each other's records."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from torch import Tensor

from spectralquant.codec.budget import plane_counts
from spectralquant.config import Dials
from spectralquant.presets import CompressionPreset
from spectralquant.profile import LayerProfile, Profile
from spectralquant.tensor_file import update_digest


def codec_identity(profile: Profile, preset: CompressionPreset, dials: Dials, quantizer: str) -> str:
    """A digest over all that `build_codec` makes constants from, 32 hexadecimal digits: the calibration's content, what is spent and how, and the codebooks in
    use, which may differ where they were trained on different devices.
    """
    _, value_planes = plane_counts(profile, preset, dials)
    spent = {"ratio": preset.ratio, "dials": asdict(dials), "quantizer": quantizer, "choices": asdict(profile.choices)}
    if dials.any_set:
        spent["preset"] = asdict(preset)  # whose dials stand in for those that are not set
    digest = hashlib.sha256(json.dumps(spent, sort_keys=True, default=str).encode())
    books = profile.codebooks.get(value_planes, {}) if quantizer == "joint" and not dials.any_set else {}
    for index, layer in sorted(profile.layers.items()):
        digest.update(f"{index} {layer.peak!r} {layer.key_error!r} {layer.exact_share!r}".encode())
        for name, tensor in {**_tensors(layer), **({"codebook": books[index]} if books else {})}.items():
            update_digest(digest, name, tensor.cpu())
    return digest.hexdigest()[:32]


def _tensors(layer: LayerProfile) -> dict[str, Tensor]:
    sides: dict[str, Any] = {"key": layer.key, "value": layer.value}
    held = {f"{name}.{part}": getattr(side, part) for name, side in sides.items() for part in ("mean", "basis", "variance")}
    held["value_norm"] = layer.value_norm
    if layer.missing_mass is not None:
        held["missing_mass"] = layer.missing_mass
    if layer.rotary is not None:
        held["interleaved" if layer.rotary.interleaved else "halves"] = layer.rotary.inv_freq
    return held
