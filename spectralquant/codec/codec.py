"""Encode and decode one layer's K or V: the specification that every kernel is compared with.

    z = (x - mean) A,   code_i = floor(z_i / (sd_i g step_i) + 2^(b_i - 1)) clipped to 0 .. 2^b_i - 1,   g = rms of z_i / sd_i over kept i
    x^ = mean + gain * sum_p (c_p - 1.5) W_p,   W_p = 4^digit(p) step_i sd_i (A^-1)_i,   i = coordinate of plane p

`c_p` is the p-th plane, a base-4 digit of the code: because a uniform mid-rise level is linear in its code, decoding is one product with a
constant matrix W [P, D], and attention can work on the planes themselves. The stored gain is refit after quantization:

- "rms": g itself;  "ls": <z, q> / <q, q>, the least squares fit;  "unbiased": <z, z> / <z, q>, which makes <z, z^> = <z, z>: a
  mean-square quantizer returns shrunken values, and attention averages noise away but not shrinkage.

K of an anchored layer is coded as `k R(-t0)`, t0 the position of the first token of its run of `run` tokens, minus the trajectory
mean `mean R(j)`, j the offset in the run. Computed in float32; 8-bit log gains cover 2^-15.9 .. 2^15.9.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectralquant.codebook import uniform_codebook
from spectralquant.codec.budget import coordinate_bits, plane_counts
from spectralquant.codec.layout import RecordLayout, gain_codes, gain_values
from spectralquant.config import Dials
from spectralquant.presets import CompressionPreset
from spectralquant.profile import LayerProfile, Profile, SideProfile
from spectralquant.rope import Rotary

EPS = 1e-9


@dataclass(frozen=True, slots=True)
class SideCodec:
    """Constants of K or V of one layer; float32 on the layer's device.

    Attributes:
        encode_matrix: [H, D, D], A with column i divided by sd_i: u = (x - mean) @ encode_matrix has unit variance.
        decode_matrix: [H, P, D], W.
        mean: [1, H, D], or [run, H, D] for a trajectory mean.
        scale: [H, D], sd_i.
        step: [H, D], quantizer steps in units of sd_i; 0 for dropped coordinates.
        top: [H, D], 2^b_i - 1 (float).
        plane_coordinate: [H, P] int64.
        plane_shift: [H, P] uint8, 2 * digit(p).
        gain: Which gain is stored.
    """

    encode_matrix: Tensor
    decode_matrix: Tensor
    mean: Tensor
    scale: Tensor
    step: Tensor
    top: Tensor
    plane_coordinate: Tensor
    plane_shift: Tensor
    gain: str

    @property
    def nbytes(self) -> int:
        tensors = (self.encode_matrix, self.decode_matrix, self.mean, self.scale, self.step, self.top, self.plane_coordinate, self.plane_shift)
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def encode(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """centred [B, H, T, D] (mean already subtracted, any float dtype) -> planes [B, H, T, P] uint8, gain codes [B, H, T] uint8."""
        u = centred.float() @ self.encode_matrix
        kept = (self.step > 0).float()[:, None]
        rms = ((u * u * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True)).sqrt().clamp_min(EPS)
        step, top = self.step[:, None], self.top[:, None]
        code = torch.minimum((u / rms / step.clamp_min(EPS) + (top + 1) / 2).floor().clamp_min(0), top)
        shape = (code - top / 2) * step * self.scale[:, None]
        gain = self._gain(u * self.scale[:, None] * kept, shape, rms)
        index = self.plane_coordinate[:, None].expand(*code.shape[:-1], -1)
        planes = (code.to(torch.uint8).gather(-1, index) >> self.plane_shift[:, None]) & 3
        return planes, gain_codes(gain.squeeze(-1))

    def _gain(self, z: Tensor, shape: Tensor, rms: Tensor) -> Tensor:
        if self.gain == "rms":
            return rms
        cross = (z * shape).sum(-1, keepdim=True).clamp_min(EPS)
        if self.gain == "ls":
            return (cross / (shape * shape).sum(-1, keepdim=True).clamp_min(EPS)).clamp_min(EPS)
        return ((z * z).sum(-1, keepdim=True) / cross).clamp_min(EPS)

    def decode(self, planes: Tensor, codes: Tensor) -> Tensor:
        """planes [B, H, T, P], gain codes [B, H, T] -> [B, H, T, D] float32, mean not added."""
        return ((planes.float() - 1.5) @ self.decode_matrix) * gain_values(codes)[..., None]


@dataclass(frozen=True, slots=True)
class LayerCodec:
    """K and V of one layer, the frame of K, and how exact tokens are recognised.

    Attributes:
        key, value: The two codecs.
        layout: Record layout, the same in every layer.
        rotary: Rotation of the anchored frame, or None for the plain frame.
        run: Tokens per anchored run, 0 in the plain frame.
        value_norm: [H] float32, medians of |v|^2.
        exact_below: See `Choices`.
    """

    key: SideCodec
    value: SideCodec
    layout: RecordLayout
    rotary: Rotary | None
    run: int
    value_norm: Tensor
    exact_below: float

    @property
    def nbytes(self) -> int:
        rotary = 0 if self.rotary is None else self.rotary.inv_freq.untyped_storage().nbytes()
        return self.key.nbytes + self.value.nbytes + rotary + self.value_norm.untyped_storage().nbytes()

    @property
    def head_dim(self) -> int:
        return self.key.encode_matrix.shape[-1]

    def anchors(self, slots: Tensor, start: Tensor) -> Tensor:
        """Position of the first token of each slot's run: [B, T], for slots [T] and sequence starts [B] (slots of left padding)."""
        return (slots // self.run * self.run)[None] - start[:, None]

    def encode(self, keys: Tensor, values: Tensor, slots: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """K planes, K gain codes, V planes, V gain codes of keys and values [B, H, T, D] in cache slots [T]."""
        x = keys.float()
        if self.rotary is not None:
            x = self.rotary.rotate(x, -self.anchors(slots, start)[:, None])
        x = x - self.key_mean(slots)
        planes, gains = self.key.encode(x)
        value_planes, value_gains = self.value.encode(values.float() - self.value.mean[0][:, None])
        return planes, gains, value_planes, value_gains

    def decode_keys(self, planes: Tensor, gains: Tensor, slots: Tensor, start: Tensor) -> Tensor:
        """Inverse of the K half of `encode`: [B, H, T, D] float32."""
        x = self.key.decode(planes, gains) + self.key_mean(slots)
        return x if self.rotary is None else self.rotary.rotate(x, self.anchors(slots, start)[:, None])

    def decode_values(self, planes: Tensor, gains: Tensor) -> Tensor:
        """Inverse of the V half of `encode`: [B, H, T, D] float32."""
        return self.value.decode(planes, gains) + self.value.mean[0][:, None]

    def key_mean(self, slots: Tensor) -> Tensor:
        """Mean of K in the stored frame, [H, T, D] (T = 1 when it does not depend on the slot)."""
        mean = self.key.mean if self.key.mean.shape[0] == 1 else self.key.mean[slots % self.run]
        return mean.transpose(0, 1)


def build_codec(profile: Profile, preset: CompressionPreset, dials: Dials, device: torch.device | str = "cpu") -> dict[int, LayerCodec]:
    """Codecs of all coded layers, by layer index, all with the same record layout."""
    layout = RecordLayout(*plane_counts(profile, preset, dials))
    return {i: _build_layer(layer, profile, layout, preset, dials, torch.device(device)) for i, layer in profile.layers.items()}


def _build_layer(
    layer: LayerProfile, profile: Profile, layout: RecordLayout, preset: CompressionPreset, dials: Dials, device: torch.device
) -> LayerCodec:
    choices = profile.choices
    rotary, run = (layer.rotary, choices.run) if choices.run else (None, 0)
    mean = layer.key.mean[None]
    if rotary is not None and choices.trajectory:
        mean = rotary.rotate(layer.key.mean[None].double(), torch.arange(run)[:, None]).float()
    key_bits = coordinate_bits(layer.key.variance, layout.key_planes, dials, preset, dials.noise_bits)
    value_bits = coordinate_bits(layer.value.variance, layout.value_planes, dials, preset, dials.value_noise_bits)
    return LayerCodec(
        _build_side(layer.key, key_bits, mean, choices.key_gain, device),
        _build_side(layer.value, value_bits, layer.value.mean[None], choices.value_gain, device),
        layout,
        rotary if rotary is None else Rotary(rotary.inv_freq.to(device), rotary.interleaved),
        run if rotary is not None else 0,
        layer.value_norm.to(device),
        choices.exact_below,
    )


def _build_side(side: SideProfile, bits: Tensor, mean: Tensor, gain: str, device: torch.device) -> SideCodec:
    scale = side.variance.double().clamp_min(1e-20).sqrt()
    steps = torch.tensor([0.0] + [uniform_codebook(b).step or 0.0 for b in range(1, 9)], dtype=torch.float64)[bits]
    digits = bits // 2
    # Planes in coordinate order, digits of a coordinate together; every head has the same number of them.
    heads, planes = bits.shape[0], int(digits[0].sum())
    coordinate = torch.arange(bits.shape[1]).expand(heads, -1).flatten().repeat_interleave(digits.flatten()).view(heads, planes)
    first = (digits.cumsum(-1) - digits).gather(1, coordinate)
    digit = torch.arange(planes)[None] - first
    weight = 4.0**digit * (steps * scale).gather(1, coordinate)
    inverse = torch.linalg.inv(side.basis.double())
    decode = weight[..., None] * inverse.gather(1, coordinate[..., None].expand(-1, -1, inverse.shape[-1]))
    return SideCodec(
        (side.basis.double() / scale[:, None]).float().to(device),
        decode.float().to(device),
        mean.contiguous().to(device),
        scale.float().to(device),
        steps.float().to(device),
        (2.0**bits - 1).float().to(device),
        coordinate.contiguous().to(device),
        (2 * digit).to(torch.uint8).to(device),
        gain,
    )
