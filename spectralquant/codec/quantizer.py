"""How whitened coordinates become 2-bit planes, and planes become the symbols that decoding multiplies with a matrix.

All quantizers fill the same P planes a token, 2 P bits, so records, cache and attention do not know which one is in use:

    x^ = mean + gain * (symbols - offset) W

- `UniformPlanes`: mid-rise levels are linear in the code and the code in its base-4 digits, so the planes themselves are the symbols, W has
  one row per plane, and the offset 1.5 centres all of them at once. Widths 0, 2, 4, 6, 8. The format of the kernels.
- `LloydMaxBits`: levels come from a table, W has one row per coordinate. Widths 0..8, the codes of a token back to back, least significant bit
  first, two bits to a plane. Less distortion (17 % at 4 bits), read by the PyTorch reference only.
- `JointPlanes` (see `codec.joint`): the planes are the symbols again, so the kernels read it, but W is free and the symbols of a block of
  coordinates are chosen together.

The engine's "joint" codes V that way and K with uniform planes. Errors of V are averaged by attention, so their mean square is what counts; errors of K
that similar keys have in common cancel in the softmax, and the joint search gives similar keys different errors: it takes a quarter off
the mean square error of K and nothing off the KL (docs/log.md).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spectralquant.codebook import lloyd_max_codebook, uniform_codebook
from spectralquant.codec.joint import JointPlanes
from spectralquant.presets import BIT_WIDTHS

EPS = 1e-9
MAX_BITS = 8


@dataclass(frozen=True, slots=True)
class UniformPlanes:
    """H heads of D coordinates in P planes.

    Attributes:
        step: [H, D] float32, quantizer steps; 0 for dropped coordinates.
        top: [H, D] float32, 2^b - 1.
        coordinate: [H, P] int64, the coordinate of each plane.
        shift: [H, P] uint8, twice the digit that each plane holds.
    """

    step: Tensor
    top: Tensor
    coordinate: Tensor
    shift: Tensor
    offset: ClassVar[float] = 1.5

    @property
    def kept(self) -> Tensor:
        """[H, D] bool: coordinates with at least one bit."""
        return self.step > 0

    @property
    def reach(self) -> Tensor:
        """[H, D]: the largest level and half a step, beyond which a coordinate is clipped."""
        return (self.top + 1) / 2 * self.step

    def quantize(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u [B, H, T, D], unit variance -> planes [B, H, T, P] uint8, levels [B, H, T, D]."""
        step, top = self.step[:, None], self.top[:, None]
        code = torch.minimum((u / step.clamp_min(EPS) + (top + 1) / 2).floor().clamp_min(0), top)
        index = self.coordinate[:, None].expand(*code.shape[:-1], -1)
        planes = (code.to(torch.uint8).gather(-1, index) >> self.shift[:, None]) & 3
        return planes, (code - top / 2) * step

    def symbols(self, planes: Tensor, head_axis: int) -> Tensor:
        """planes [..., P] uint8 -> float32 [..., P]; dimension `head_axis` has H entries."""
        return planes.float()

    def rows(self, inverse: Tensor) -> Tensor:
        """W [H, P, D] of `inverse` [H, D, D], whose rows map unit coordinates to vectors."""
        weight = 2.0 ** self.shift.double() * self.step.double().gather(1, self.coordinate)
        return weight[..., None] * inverse.gather(1, self.coordinate[..., None].expand(-1, -1, inverse.shape[-1]))


@dataclass(frozen=True, slots=True)
class LloydMaxBits:
    """H heads of D coordinates in 2 P bits.

    Attributes:
        width: [H, D] int64, 0..8.
        coordinate: [H, 2 P] int64, the coordinate of each bit.
        shift: [H, 2 P] int64, the significance of each bit in its code.
        levels: [9, 256] float32, codebooks by width; a dropped coordinate has the one level 0.
    """

    width: Tensor
    coordinate: Tensor
    shift: Tensor
    levels: Tensor
    offset: ClassVar[float] = 0.0

    @property
    def kept(self) -> Tensor:
        """[H, D] bool: coordinates with at least one bit."""
        return self.width > 0

    @property
    def reach(self) -> Tensor:
        """[H, D]: the largest level."""
        return self.levels.amax(-1)[self.width]

    def quantize(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u [B, H, T, D], unit variance -> planes [B, H, T, P] uint8, levels [B, H, T, D]."""
        width = self.width[:, None].expand(u.shape)
        code = torch.zeros_like(width)
        for bits in self.width.unique().tolist():
            if bits:
                code = torch.where(width == bits, lloyd_max_codebook(bits).assign(u).long(), code)
        index = self.coordinate[:, None].expand(*u.shape[:-1], -1)
        pairs = ((code.gather(-1, index) >> self.shift[:, None]) & 1).unflatten(-1, (-1, 2))
        return (pairs[..., 0] | (pairs[..., 1] << 1)).to(torch.uint8), self.levels[width, code]

    def symbols(self, planes: Tensor, head_axis: int) -> Tensor:
        """planes [..., P] uint8 -> levels [..., D] float32; dimension `head_axis` has H entries."""
        bits = torch.stack([planes & 1, planes >> 1], -1).flatten(-2).long()
        shape = [1] * bits.dim()
        shape[head_axis], shape[-1] = self.coordinate.shape
        index, shift = self.coordinate.view(shape).expand(bits.shape), self.shift.view(shape)
        shape[-1] = self.width.shape[1]
        width = self.width.view(shape).expand(*bits.shape[:-1], -1)
        code = torch.zeros_like(width).scatter_add_(-1, index, bits << shift)
        return self.levels[width, code]

    def rows(self, inverse: Tensor) -> Tensor:
        """W [H, D, D]: `inverse` itself."""
        return inverse


Quantizer = UniformPlanes | LloydMaxBits | JointPlanes
SCALAR_WIDTHS: dict[str, tuple[int, ...]] = {"uniform": BIT_WIDTHS, "lloyd-max": tuple(range(MAX_BITS + 1))}
"""Scalar quantizer -> the widths that it can store."""
QUANTIZERS = ("joint", *SCALAR_WIDTHS)
"""What an engine can be told to use."""


def scalar_of(quantizer: str) -> str:
    """The scalar quantizer that K has, and V where widths are dialled, under `quantizer`."""
    return "uniform" if quantizer == "joint" else quantizer


def build_quantizer(bits: Tensor, name: str, device: torch.device) -> UniformPlanes | LloydMaxBits:
    """The scalar quantizer `name` for widths `bits` [H, D] int64, whose rows have equal sums."""
    if name == "uniform":
        steps = torch.tensor([0.0] + [uniform_codebook(b).step or 0.0 for b in range(1, MAX_BITS + 1)])[bits]
        coordinate, digit = _places(bits // 2)
        return UniformPlanes(steps.to(device), (2.0**bits - 1).float().to(device), coordinate.to(device), (2 * digit).to(torch.uint8).to(device))
    levels = torch.zeros(MAX_BITS + 1, 2**MAX_BITS)
    for b in range(1, MAX_BITS + 1):
        levels[b, : 2**b] = lloyd_max_codebook(b).levels
    coordinate, digit = _places(bits)
    return LloydMaxBits(bits.to(device), coordinate.to(device), digit.to(device), levels.to(device))


def _places(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(coordinate, digit), [H, n] each, of n digits in coordinate order, `counts` [H, D] of them to a coordinate."""
    heads, total = counts.shape[0], int(counts[0].sum())
    coordinate = torch.arange(counts.shape[1]).expand(heads, -1).flatten().repeat_interleave(counts.flatten()).view(heads, total)
    return coordinate.contiguous(), torch.arange(total)[None] - (counts.cumsum(-1) - counts).gather(1, coordinate)
