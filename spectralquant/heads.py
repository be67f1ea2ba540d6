"""One head at a time: spectra to look at, and a codec to experiment with. The classes of the original package's API.

Whole models go through `engine.SpectralQuantEngine`; nothing here is on its path.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectralquant.attention.hf import register
from spectralquant.cache.hf import coded_layer_indices
from spectralquant.calibration.fit import fit_profile
from spectralquant.calibration.hf import collect
from spectralquant.codec.budget import semantic_size
from spectralquant.codec.codec import SideCodec, build_codec, map_tensors
from spectralquant.codec.layout import UNIT, RecordLayout, pack_gains, pack_planes, unpack_gains, unpack_planes
from spectralquant.config import Dials, require_int
from spectralquant.corpus import make_samples
from spectralquant.errors import CalibrationError, ConfigError, ShapeError
from spectralquant.presets import resolve_preset
from spectralquant.profile import Choices, Profile, load_profile

SIDES = ("key", "value")


@dataclass(frozen=True, slots=True)
class HeadCalibrationData:
    """Spectrum of K or V of one KV head of size D.

    Attributes:
        layer_idx, head_idx, head_type: Where it is; head_type is "key" or "value".
        eigenvalues: [D] float32, descending, of the covariance in the stored frame.
        eigenvectors: [D, D] float32, one per column.
        d_eff: Coordinates that hold 95 % of the variance.
        spectral_gap: Second to first eigenvalue, inverted: lambda_1 / lambda_2.
        sigma_high, sigma_low: Root mean variance of the first d_eff and of the other coordinates (0 when there are none).
        var_90, var_95: Coordinates that hold 90 % and 95 % of the variance.
        n_samples: Tokens measured.
        head_dim: D.
    """

    layer_idx: int
    head_idx: int
    head_type: str
    eigenvalues: Tensor
    eigenvectors: Tensor
    d_eff: int
    spectral_gap: float
    sigma_high: float
    sigma_low: float
    var_90: int
    var_95: int
    n_samples: int
    head_dim: int


class EigenspectralCalibrator:
    """Measures the plain spectra (identity metric) of every head.

    Args:
        max_tokens_per_layer: Most tokens to look at.
    """

    def __init__(self, max_tokens_per_layer: int = 50_000) -> None:
        self.max_tokens: int = require_int("max_tokens_per_layer", max_tokens_per_layer, 256)
        self._profile: Profile | None = None

    def calibrate(self, model: PreTrainedModel, tokenizer: Any, texts: list[str] | None = None) -> dict[str, Any]:
        """Run the model over `texts` (None: the bundled corpus) and return `summary()`."""
        samples = make_samples(tokenizer, texts, max_tokens=self.max_tokens)
        register()  # soft-caps are ours to apply
        statistics = collect(model, samples.statistics, coded_layer_indices(model))
        choices = Choices(query_metric=False, output_metric=False, token_weights=False)
        self._profile = fit_profile(statistics, choices, {"tokens": statistics.tokens})
        return self.summary()

    def get(self, layer: int, head: int, head_type: str) -> HeadCalibrationData:
        """The spectrum of one head.

        Raises:
            CalibrationError: There is no calibration yet.
            ConfigError: There is no such layer, head or type.
        """
        profile = self.profile
        if head_type not in SIDES or layer not in profile.layers or not 0 <= head < profile.layers[layer].heads:
            raise ConfigError(f"layer={layer}, head={head}, head_type={head_type!r}: expected a coded layer, one of its KV heads, and 'key' or 'value'")
        side = getattr(profile.layers[layer], head_type)
        values, size = side.variance[head], {share: semantic_size(side.variance[head : head + 1], share) for share in (0.90, 0.95)}
        high, low = values[: size[0.95]], values[size[0.95] :]
        return HeadCalibrationData(
            layer,
            head,
            head_type,
            values,
            side.basis[head],
            size[0.95],
            float(values[0] / values[1].clamp_min(1e-20)),
            float(high.mean().sqrt()),
            float(low.mean().sqrt()) if len(low) else 0.0,
            size[0.90],
            size[0.95],
            int(profile.certificate.get("tokens", 0)),
            len(values),
        )

    def iter_heads(self) -> Iterator[HeadCalibrationData]:
        """Every head of every coded layer, keys before values."""
        for index, layer in self.profile.layers.items():
            for side in SIDES:
                yield from (self.get(index, head, side) for head in range(layer.heads))

    def summary(self) -> dict[str, Any]:
        """{n_heads, n_samples, d_eff_mean, d_eff_min, d_eff_max, gap_mean} over all spectra."""
        heads = list(self.iter_heads())
        sizes = [h.d_eff for h in heads]
        gap = sum(h.spectral_gap for h in heads) / len(heads)
        return {
            "n_heads": len(heads),
            "n_samples": heads[0].n_samples,
            "d_eff_mean": sum(sizes) / len(sizes),
            "d_eff_min": min(sizes),
            "d_eff_max": max(sizes),
            "gap_mean": gap,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the spectra to one `.safetensors` file."""
        return self.profile.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what `save`, or an engine's `save_calibration`, wrote."""
        self._profile = load_profile(path)

    @property
    def profile(self) -> Profile:
        """The spectra of the whole model.

        Raises:
            CalibrationError: There is no calibration yet.
        """
        if self._profile is None:
            raise CalibrationError("there is no calibration yet: call calibrate(model, tokenizer) or load(path) first")
        return self._profile


@dataclass(frozen=True, slots=True)
class CompressedHead:
    """Keys or values of one head, packed: codes [U, bytes], gains [U, 128] uint8, for `length` tokens."""

    codes: Tensor
    gains: Tensor
    length: int

    @property
    def nbytes(self) -> int:
        return self.codes.untyped_storage().nbytes() + self.gains.untyped_storage().nbytes()


class HeadEngine:
    """Packs keys and values of one head in the plain frame, and attends over them.

    Args:
        calibrator: Spectra, in their stored frame.
        layer, head: Which head.
        compression: Preset whose widths are used.
    """

    head_dim: int
    layout: RecordLayout

    def __init__(self, calibrator: EigenspectralCalibrator, layer: int, head: int, compression: str = "high") -> None:
        data = calibrator.get(layer, head, "key")
        codec = build_codec(calibrator.profile, resolve_preset(compression), Dials())[layer]
        self.head_dim, self.layout = data.head_dim, codec.layout
        self._key, self._value = (_one_head(side, head) for side in (codec.key, codec.value))

    def compress_keys(self, keys: Tensor) -> CompressedHead:
        """keys [T, D], in the frame of the calibration, -> packed codes."""
        return self._compress(keys, "key", self._key)

    def compress_values(self, values: Tensor) -> CompressedHead:
        """values [T, D] -> packed codes."""
        return self._compress(values, "value", self._value)

    def decompress(self, packed: CompressedHead, which: str) -> Tensor:
        """[T, D] float32 of what `compress_keys` ("key") or `compress_values` ("value") packed."""
        side = self._key if which == "key" else self._value
        planes, gains = unpack_planes(packed.codes, which).flatten(0, 1), unpack_gains(packed.gains).flatten()
        return (side.decode(planes[None, None], gains[None, None])[0, 0] + side.mean)[: packed.length]

    def attention(self, query: Tensor, keys: CompressedHead, values: CompressedHead, scale: float | None = None) -> Tensor:
        """softmax(q K^T scale) V of queries [N, D] over packed keys and values, [N, D]."""
        scores = query.float() @ self.decompress(keys, "key").T * (self.head_dim**-0.5 if scale is None else scale)
        return scores.softmax(-1) @ self.decompress(values, "value")

    def bytes_per_token(self) -> float:
        """Bytes of K and V of one token, codes and gains."""
        return self.layout.bytes_per_token

    def to(self, device: torch.device | str) -> "HeadEngine":
        """This engine with its constants on `device`."""
        self._key, self._value = (map_tensors(side, lambda t: t.to(device)) for side in (self._key, self._value))
        return self

    def _compress(self, x: Tensor, which: str, side: SideCodec) -> CompressedHead:
        if x.dim() != 2 or x.shape[1] != self.head_dim:
            raise ShapeError(f"{which}s have shape {tuple(x.shape)}; expected [T, {self.head_dim}]")
        missing = -len(x) % UNIT
        padded = torch.nn.functional.pad(x.float() - side.mean, (0, 0, 0, missing))
        planes, gains = side.encode(padded[None, None])
        units = (-1, UNIT)
        return CompressedHead(pack_planes(planes[0, 0].unflatten(0, units), which), pack_gains(gains[0, 0].unflatten(0, units)), len(x))


def _one_head(side: SideCodec, head: int) -> SideCodec:
    return map_tensors(side, lambda t: t[head : head + 1].clone())
