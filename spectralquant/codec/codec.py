"""Encode and decode one layer's K or V: the specification that every kernel is compared with.

    z = (x - mean) A,   code_i = floor(z_i / (sd_i g step_i) + 2^(b_i - 1)) clipped to 0 .. 2^b_i - 1,   g = rms of z_i / sd_i over kept i
    x^ = mean + gain * sum_p (c_p - 1.5) W_p,   W_p = 4^digit(p) step_i sd_i (A^-1)_i,   i = coordinate of plane p

`c_p` is the p-th plane, a base-4 digit of the code: because a uniform mid-rise level is linear in its code, decoding is one product with a
constant matrix W [P, D], and attention can work on the planes themselves. W may also be any other matrix whose codes are found by a search (see
`codec.joint`), or have one row per coordinate and levels from a table (`codec.quantizer`). The stored gain is not g:

- "ls": <z, q> / <q, q>, the least squares fit to the quantized shape q;
- "unbiased": <z, z> / <z, q>, which makes <z, z^> = <z, z>: a mean-square quantizer returns shrunken values, and attention averages noise
  away but not shrinkage;
- "search": stored gains have steps of 9 %, and a key whose length is off is off by that share of its largest logits. So codes are taken for
  the gain that will be stored, for the least squares one and its neighbours, and the gain with the least |z - z^| is kept;
- "wide": the same with two gains more: the least at which no coordinate is clipped, and the one halfway there. A vector that is far off in one
  direction (a rare token's value in the first layer, which depends on the token alone) is clipped under all others. In no kernel; the search for
  joint codes is that of "search".

K of an anchored layer is coded as `k R(-t0)`, t0 the position of the first token of its run of `run` tokens, minus the trajectory
mean `mean R(j)`, j the offset in the run. Computed in float32; 8-bit log gains cover 2^-15.9 .. 2^15.9.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spectralquant.codebook import distortion_table
from spectralquant.codec.budget import coordinate_bits, exact_bounds, plane_counts
from spectralquant.codec.joint import JointPlanes, block_index, fit_codebooks
from spectralquant.codec.layout import GAIN_STEPS, MAX_GAIN, UNIT, RecordLayout, gain_codes, gain_values
from spectralquant.codec.quantizer import EPS, MAX_BITS, LloydMaxBits, Quantizer, build_quantizer, scalar_of
from spectralquant.config import Dials
from spectralquant.errors import ProfileError
from spectralquant.presets import CompressionPreset
from spectralquant.profile import NORM_FLOOR, LayerProfile, Profile, SideProfile
from spectralquant.rope import Rotary

NEAR_GAINS = (0, -1, 1)
"""Gain codes that "search" tries, relative to the least squares one. Five are no better than three."""
INVERSE_ERROR = 1e-3
"""Of the product of a transform and its inverse in float64, a thousand times what a condition number of 10^9 leaves."""
TINY = 1e-30
"""Floor of squares in the units of a model, which may be small: a head whose values are 1e-6 has the gains of any other."""


@dataclass(frozen=True, slots=True)
class SideCodec:
    """Constants of K or V of one layer; float32 on the layer's device.

    Attributes:
        encode_matrix: [H, D, D], A with column i divided by sd_i: u = (x - mean) @ encode_matrix has unit variance.
        decode_matrix: [H, S, D], W; S is the quantizer's number of symbols.
        mean: [H, D].
        scale: [H, D], sd_i.
        quantizer: How unit coordinates become planes.
        gain: Which gain is stored.
    """

    encode_matrix: Tensor
    decode_matrix: Tensor
    mean: Tensor
    scale: Tensor
    quantizer: Quantizer
    gain: str

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in tensors_of(self))

    def encode(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """centred [B, H, T, D] (mean already subtracted, any float dtype) -> planes [B, H, T, P] uint8, gain codes [B, H, T] uint8."""
        u = centred.float() @ self.encode_matrix
        kept = self.quantizer.kept.float()[:, None]
        rms = ((u * u * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True)).sqrt().clamp_min(EPS)
        planes, levels = self.quantizer.quantize(u / rms)
        codes = gain_codes(self._gain(u * self.scale[:, None] * kept, levels * self.scale[:, None]).squeeze(-1))
        return self._search(u, self._tried(u, codes.int())) if self.gain in ("search", "wide") else (planes, codes)

    def _gain(self, z: Tensor, shape: Tensor) -> Tensor:
        product = (z * shape).sum(-1, keepdim=True)
        cross = product.clamp_min(TINY)
        if self.gain == "unbiased":  # below EPS a vector's shape is chance, and may point away from it
            return torch.where(product > 0, (z * z).sum(-1, keepdim=True) / cross, 0.0).clamp_min(EPS)
        return (cross / (shape * shape).sum(-1, keepdim=True).clamp_min(TINY)).clamp_min(EPS)

    def _tried(self, u: Tensor, start: Tensor) -> list[Tensor]:
        """Gain codes [B, H, T] to try for u [B, H, T, D], whose least squares ones are `start`."""
        near = [start + step for step in NEAR_GAINS]
        if self.gain == "search" or isinstance(self.quantizer, JointPlanes):
            return near
        unclipped = torch.where(self.quantizer.kept[:, None], u.abs() / self.quantizer.reach[:, None].clamp_min(EPS), 0.0).amax(-1)
        farther = (gain_codes(unclipped.clamp_min(EPS) * 2 ** (0.5 / GAIN_STEPS)).int() - start).clamp_min(0)  # rounded up
        return [*near, start + farther // 2, start + farther]

    def _search(self, u: Tensor, tried: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Planes and gain codes of u [B, H, T, D] with the least error, of the gain codes `tried`, each [B, H, T]."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for codes in tried:
            codes = codes.clamp(1, MAX_GAIN).to(torch.uint8)
            gain = gain_values(codes)[..., None]
            planes, levels = self.quantizer.quantize(u / gain)
            found.append((((levels * gain - u) * self.scale[:, None]).square().sum(-1), planes, codes))
        error, planes, codes = (torch.stack(parts) for parts in zip(*found, strict=True))
        best = error.argmin(0, keepdim=True)
        return planes.gather(0, best[..., None].expand_as(planes[:1]))[0], codes.gather(0, best)[0]

    def decode(self, planes: Tensor, codes: Tensor) -> Tensor:
        """planes [B, H, T, P], gain codes [B, H, T] -> [B, H, T, D] float32, mean not added."""
        symbols = self.quantizer.symbols(planes, head_axis=1) - self.quantizer.offset
        return (symbols @ self.decode_matrix) * gain_values(codes)[..., None]

    def error(self, centred: Tensor, planes: Tensor, codes: Tensor) -> Tensor:
        """|z - z^|^2, the error in the metric of the basis, [B, H, T]: centred [B, H, T, D] as given to `encode`, and what it returned."""
        off = (centred.float() - self.decode(planes, codes)) @ self.encode_matrix * self.scale[:, None]
        return off.square().sum(-1)


@dataclass(frozen=True, slots=True)
class LayerCodec:
    """K and V of one layer, the frame of K, and how exact tokens are recognised.

    Attributes:
        key, value: The two codecs.
        key_expected: Mean over all heads of the layer of E|z - z^|^2 = sum_i sd_i^2 D(b_i) of K.
        layout: Record layout, the same in every layer.
        frame: The anchored frame, or None for the plain frame.
        value_norm: [H] float32, medians of |v|^2.
        exact_below: See `Choices`.
        exact_error: Tokens whose K error is above this multiple of the expected one stay exact.
        exact_bound: Largest share of the packed tokens that may stay exact, what the preset's promise leaves to this layer.
        exact_dtype: 16-bit dtype that holds exact tokens of a float32 model.
        missing_mass: [H, G] float32, added to the logits of coded tokens, see `calibration.mass`; None adds nothing.
    """

    key: SideCodec
    value: SideCodec
    key_expected: float
    layout: RecordLayout
    frame: "AnchoredFrame | None"
    value_norm: Tensor
    exact_below: float
    exact_error: float
    exact_bound: float
    exact_dtype: torch.dtype
    missing_mass: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of the constants of this layer; the frame's tables are shared by all layers and counted once by `codec_nbytes`."""
        own = [self.value_norm, *([] if self.missing_mass is None else [self.missing_mass])]
        return self.key.nbytes + self.value.nbytes + sum(t.untyped_storage().nbytes() for t in own)

    @property
    def has_planes(self) -> bool:
        """Whether levels are sums of planes, which kernels read, and not entries of tables."""
        return not any(isinstance(side.quantizer, LloydMaxBits) for side in (self.key, self.value))

    @property
    def heads(self) -> int:
        return self.key.encode_matrix.shape[0]

    @property
    def head_dim(self) -> int:
        return self.key.encode_matrix.shape[-1]

    def exact_dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """16-bit dtype that holds exact tokens of a model in `dtype`."""
        return self.exact_dtype if dtype == torch.float32 else dtype

    def encode(self, keys: Tensor, values: Tensor, slots: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """K planes, K gain codes, V planes, V gain codes of keys and values [B, H, T, D] in cache slots [T]."""
        planes, gains = self.key.encode(self.centre_keys(keys, slots, start))
        value_planes, value_gains = self.value.encode(self.centre_values(values))
        return planes, gains, value_planes, value_gains

    def key_error(self, keys: Tensor, planes: Tensor, gains: Tensor, slots: Tensor, start: Tensor) -> Tensor:
        """Error of the K codes as a multiple of the expected one, mean over heads, [B, T]; arguments as for, and from, `encode`."""
        return self.relative_error(self.key.error(self.centre_keys(keys, slots, start), planes, gains))

    def relative_error(self, error: Tensor) -> Tensor:
        """Errors of K [B, H, T] as a multiple of the expected one, mean over heads, [B, T]."""
        return error.mean(1) / max(self.key_expected, EPS)

    def value_size(self, values: Tensor) -> Tensor:
        """|v|^2 of values [B, H, T, D], [B, H, T] float32."""
        return values.float().square().sum(-1)

    def exact_need(self, value_size: Tensor, key_error: Tensor) -> Tensor:
        """How much tokens should stay exact, [B, T]: above 1 they should, the higher the more. Those are secondary attention sinks, whose value is
        far smaller than usual, and tokens whose K code is far off.

        Args:
            value_size: [B, H, T] from `value_size`.
            key_error: [B, T] from `key_error`.
        """
        need = torch.zeros_like(key_error)
        if self.exact_below > 0:
            size = (value_size.clamp_min(NORM_FLOOR) / self.value_norm[:, None]).mean(1)
            need = self.exact_below / size.clamp_min(1e-12)
        if self.exact_error > 0:
            need = torch.maximum(need, key_error / self.exact_error)
        return need

    def centre_keys(self, keys: Tensor, slots: Tensor, start: Tensor) -> Tensor:
        """Keys in the stored frame, mean taken off, float32."""
        x = keys.float()
        if self.frame is not None:
            x = self.frame.rotary.rotate(x, -self.frame.anchors(slots, start)[:, None])
        return x - self.key_mean(slots)

    def centre_units(self, keys: Tensor, before: Tensor, start: Tensor) -> Tensor:
        """`centre_keys` of keys [B, H, T, D], T a multiple of 128, in the slots after the first `before` [] units: a unit has one anchor."""
        x, frame = keys.float().unflatten(2, (-1, UNIT)), self.frame
        mean = self.key.mean[:, None, None]
        if frame is not None:
            units = before + torch.arange(x.shape[2], device=keys.device)
            x = frame.rotary.rotate(x, -frame.anchors(UNIT * units, start)[:, None, :, None])
            if frame.trajectory:
                by_unit = self.key_mean(torch.arange(frame.run, device=keys.device)).unflatten(1, (-1, UNIT))
                mean = by_unit[:, units % by_unit.shape[1]]
        return (x - mean).flatten(2, 3)

    def centre_values(self, values: Tensor) -> Tensor:
        """Values, mean taken off, float32."""
        return values.float() - self.value.mean[:, None]

    def decode_keys(self, planes: Tensor, gains: Tensor, slots: Tensor, start: Tensor) -> Tensor:
        """Inverse of the K half of `encode`: [B, H, T, D] float32."""
        x = self.key.decode(planes, gains) + self.key_mean(slots)
        return x if self.frame is None else self.frame.rotary.rotate(x, self.frame.anchors(slots, start)[:, None])

    def decode_values(self, planes: Tensor, gains: Tensor) -> Tensor:
        """Inverse of the V half of `encode`: [B, H, T, D] float32."""
        return self.value.decode(planes, gains) + self.value.mean[:, None]

    def key_mean(self, slots: Tensor) -> Tensor:
        """Mean of K in the stored frame, [H, T, D] (T = 1 when it does not depend on the slot)."""
        mean = self.key.mean[:, None]
        if self.frame is None or not self.frame.trajectory:
            return mean
        return self.frame.rotary.rotate(mean, slots % self.frame.run)


@dataclass(frozen=True, slots=True)
class AnchoredFrame:
    """The frame of K: keys are turned back by the position of the first token of their run. Shared by layers of equal rotation.

    Attributes:
        rotary: The rotation.
        run: Tokens per run.
        trajectory: The mean turns with the offset in the run.
        turns: [2 D, run] float32, cos and sin of every coordinate at every offset: q . (mean R(j)) = [q mean, q mean'] turns_j,
            where mean' is the quarter turn of the mean.
    """

    rotary: Rotary
    run: int
    trajectory: bool
    turns: Tensor

    def anchors(self, slots: Tensor, start: Tensor) -> Tensor:
        """Position of the first token of each slot's run: [B, T], for slots [T] and sequence starts [B] (slots of left padding)."""
        return (slots // self.run * self.run)[None] - start[:, None]

    def mean_scores(self, turned: Tensor, mean: Tensor) -> Tensor:
        """q . (mean R(j)), [..., H, R, N, run], for queries [..., H, R, N, D] in the frame of each run and mean [H, D]."""
        mean = mean[:, None, None]
        if not self.trajectory:
            return (turned * mean).sum(-1, keepdim=True).expand(*turned.shape[:-1], self.run)
        extra = mean.shape[-1] - self.rotary.dim
        quarter = torch.nn.functional.pad(self.rotary.partner(mean[..., : self.rotary.dim]), (0, extra))
        return torch.cat([turned * mean, turned * quarter], -1) @ self.turns


def codec_nbytes(codecs: Iterable[LayerCodec]) -> int:
    """Bytes of all constants of a model's codec, shared tables once."""
    codecs = list(codecs)
    frames = {id(c.frame): c.frame.turns.untyped_storage().nbytes() for c in codecs if c.frame is not None}
    return sum(c.nbytes for c in codecs) + sum(frames.values())


def place_codecs(codecs: dict[int, LayerCodec], devices: dict[int, torch.device]) -> dict[int, LayerCodec]:
    """`codecs`, each on its layer's device; layers without one stay where they are. What layers of one device share stays shared."""
    moved: dict[tuple[int, torch.device], Any] = {}

    def place(value: Any, device: torch.device) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if not is_dataclass(value):
            return value
        key = (id(value), device)
        if key not in moved:
            moved[key] = replace(value, **{f.name: place(getattr(value, f.name), device) for f in fields(value)})  # pyright: ignore[reportArgumentType]
        return moved[key]

    return {i: place(codec, devices[i]) if i in devices and devices[i] != codec.value_norm.device else codec for i, codec in codecs.items()}


def build_codec(
    profile: Profile,
    preset: CompressionPreset,
    dials: Dials,
    device: torch.device | str = "cpu",
    quantizer: str = "uniform",
    progress: Callable[[float], None] = lambda share: None,
    heads: slice = slice(None),
) -> dict[int, LayerCodec]:
    """Codecs of all coded layers, by layer index, all with the same record layout.

    Args:
        profile: Transforms and spectra. Codebooks that `quantizer` needs and the profile lacks are trained and added to it.
        preset, dials: What to spend. Dialled widths are widths of scalar quantizers: they leave "joint" with uniform planes.
        device: Where the constants go.
        quantizer: See `codec.quantizer.QUANTIZERS`.
        progress: Called with the share of the codebooks trained so far.
        heads: KV heads to make codecs for, where a process holds some of a model's. Sizes and codes are the same as with all of them.

    Raises:
        ConfigError, ShapeError: The sizes can't be had with this preset, dials or heads.
        ProfileError: The profile has transforms or codebooks that can't be computed with.
    """
    layout = RecordLayout(*plane_counts(profile, preset, dials))
    frames: dict[tuple[tuple[float, ...], bool], AnchoredFrame] = {}
    bounds = exact_bounds(profile, preset, dials, layout.key_planes + layout.value_planes)
    choices, device = profile.choices, torch.device(device)
    books: dict[int, Tensor] = {}
    if quantizer == "joint" and not dials.any_set:
        books = value_codebooks(profile, layout.value_planes, device, progress)
    scalar = scalar_of(quantizer)
    out: dict[int, LayerCodec] = {}
    for index, whole in profile.layers.items():
        frame, layer, book = None, whole.of_heads(heads), books.get(index)
        if layer.rotary is not None and choices.run:
            same = (tuple(layer.rotary.inv_freq.tolist()), layer.rotary.interleaved)
            frame = frames.setdefault(same, _build_frame(layer, choices.run, choices.trajectory, device))
        key_bits = coordinate_bits(whole.key.variance, layout.key_planes, dials, preset, "key", scalar)
        value_bits = coordinate_bits(layer.value.variance, layout.value_planes, dials, preset, "value", scalar)
        expected = _expected_error(whole.key, key_bits, scalar)
        missing = None if layer.missing_mass is None else layer.missing_mass * expected
        if not math.isfinite(expected) or (missing is not None and not bool(missing.isfinite().all())):
            raise ProfileError(f"layer {index} of the calibration expects errors of {expected:g}, which can't be computed with; calibrate again")
        out[index] = LayerCodec(
            _build_side(f"K of layer {index}", layer.key, key_bits[heads], choices.key_gain, scalar, None, device),
            _build_side(f"V of layer {index}", layer.value, value_bits, choices.value_gain, scalar, None if book is None else book[heads], device),
            expected,
            layout,
            frame,
            layer.value_norm.to(device),
            choices.exact_below,
            choices.exact_error * layer.key_error,
            bounds[index],
            torch.float16 if layer.peak < torch.finfo(torch.float16).max / 4 else torch.bfloat16,
            None if missing is None else missing.to(device),
        )
    return out


def _build_frame(layer: LayerProfile, run: int, trajectory: bool, device: torch.device) -> AnchoredFrame:
    assert layer.rotary is not None
    cos, sin = layer.rotary.cos_sin(torch.arange(run))
    extra = layer.head_dim - layer.rotary.dim  # coordinates that do not turn: cos 1, sin 0
    turns = torch.cat([torch.nn.functional.pad(cos, (0, extra), value=1.0), torch.nn.functional.pad(sin, (0, extra))], -1)
    rotary = Rotary(layer.rotary.inv_freq.to(device), layer.rotary.interleaved)
    return AnchoredFrame(rotary, run, trajectory, turns.T.contiguous().to(device))


def value_codebooks(
    profile: Profile, planes: int, device: torch.device | str = "cpu", progress: Callable[[float], None] = lambda share: None
) -> dict[int, Tensor]:
    """Layer index -> codebooks of V at `planes` planes, from the profile, or trained now on `device` and added to it (SmolLM2: some seconds on two cores).

    Raises:
        ProfileError: Those of the profile have other blocks than this release searches.
    """
    if planes not in profile.codebooks:
        variance = torch.cat([layer.value.variance for layer in profile.layers.values()])
        heads = [layer.heads for layer in profile.layers.values()]
        books = fit_codebooks(variance, planes, device, lambda done: progress(done / len(variance)))
        own = (book.clone() for book in books.split(heads))  # storage of their own: it is counted in `nbytes`
        profile.codebooks[planes] = dict(zip(profile.layers, own, strict=True))
    for index, book in profile.codebooks[planes].items():
        blocks = len(block_index(profile.layers[index].head_dim))
        if book.shape[1] != blocks:
            raise ProfileError(f"codebooks of layer {index} for {planes} planes have {book.shape[1]} blocks, expected {blocks}; calibrate again")
    return profile.codebooks[planes]


def _expected_error(side: SideProfile, bits: Tensor, quantizer: str) -> float:
    distortion = torch.tensor(distortion_table(tuple(range(MAX_BITS + 1)), quantizer), dtype=torch.float64)[bits]
    return float((side.variance.double() * distortion).sum(-1).mean())


def _build_side(what: str, side: SideProfile, bits: Tensor, gain: str, scalar: str, book: Tensor | None, device: torch.device) -> SideCodec:
    """Constants of one side: jointly quantized with the codebooks `book`, or without any by the scalar quantizer `scalar`."""
    scale = side.variance.double().clamp_min(1e-20).sqrt()
    inverted, singular = torch.linalg.inv_ex(side.basis.double())
    inverse = scale[..., None] * inverted
    encode = (side.basis.double() / scale[:, None]).float().contiguous()  # kernels read rows, a basis may come transposed

    def quantizer(where: torch.device) -> Quantizer:
        if book is None:
            return build_quantizer(bits, scalar, where)
        return JointPlanes(book.to(where), scale.float().to(where), (bits > 0).to(where), block_index(bits.shape[1]).to(where))

    there = quantizer(torch.device("cpu"))  # float64, which some devices lack
    decode = there.rows(inverse).float()
    off = side.basis.double() @ inverted - torch.eye(bits.shape[1], dtype=torch.float64)  # rounding hides that columns depend on each other from the inverse
    if bool(singular.any()) or not bool((off.abs() < INVERSE_ERROR).all() and encode.isfinite().all() and decode.isfinite().all()):
        raise ProfileError(f"the transform of {what} in the calibration can't be inverted; calibrate again")
    if isinstance(there, JointPlanes) and not there.searchable():
        raise ProfileError(f"the codebooks of {what} in the calibration can't be searched; calibrate again")
    return SideCodec(encode.to(device), decode.to(device), side.mean.to(device), scale.float().to(device), quantizer(device), gain)


def tensors_of(side: SideCodec) -> list[Tensor]:
    """Every tensor of one side's constants."""
    own = [side.encode_matrix, side.decode_matrix, side.mean, side.scale]
    return own + [value for f in fields(side.quantizer) if isinstance(value := getattr(side.quantizer, f.name), Tensor)]


def map_tensors(side: SideCodec, fn: Callable[[Tensor], Tensor]) -> SideCodec:
    """`side` with `fn` applied to every tensor that has a head dimension in front."""
    per_head = [f.name for f in fields(side.quantizer) if f.name not in ("levels", "index")]
    quantizer = replace(side.quantizer, **{name: fn(getattr(side.quantizer, name)) for name in per_head})
    return replace(side, quantizer=quantizer, **{n: fn(getattr(side, n)) for n in ("encode_matrix", "decode_matrix", "mean", "scale")})
