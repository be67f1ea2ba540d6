"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) as the codec needs it: a rotation by any position.

Row vectors; `x R(p)` is x rotated to position p. R(a) R(b) = R(a + b) and R(-a) = R(a)^T. Angles are computed in float64:
at position 131,072 a float32 angle is off by up to 0.008 rad.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rotary:
    """The rotation of one layer.

    Attributes:
        inv_freq: [R / 2] float64, radians per position; the first R of the D coordinates turn.
        interleaved: Pairs are (2i, 2i + 1) (GPT-J style) instead of (i, i + R/2) (GPT-NeoX, Llama style).
    """

    inv_freq: Tensor
    interleaved: bool = False

    @property
    def dim(self) -> int:
        return 2 * len(self.inv_freq)

    def cos_sin(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """cos and sin, [..., R] each in the pair layout, of `positions` [...] (may be negative)."""
        angle = positions.double()[..., None] * self.inv_freq.to(positions.device)
        angle = angle.repeat_interleave(2, -1) if self.interleaved else torch.cat([angle, angle], -1)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def partner(self, x: Tensor) -> Tensor:
        """The quarter turn of every pair: (a, b) -> (-b, a). x: [..., R]."""
        if self.interleaved:
            return torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x R(p). x: [..., D] float; positions broadcast against x.shape[:-1]."""
        cos, sin = self.cos_sin(positions, x.dtype)
        turning = x[..., : self.dim]
        turned = turning * cos + self.partner(turning) * sin
        return turned if self.dim == x.shape[-1] else torch.cat([turned, x[..., self.dim :].expand(*turned.shape[:-1], -1)], -1)

    def average_rotated(self, moment: Tensor, positions: Tensor) -> Tensor:
        """Mean over `positions` [n] of R(p)^T M R(p), for second moments `moment` M = E[x^T x], [..., D, D] float64.

        Expanding x R = x c + J(x) s makes the mean an elementwise product of four D x D kernels, so any number of
        positions costs one pass. Coordinates beyond R have c = 1, s = 0.
        """
        extra = moment.shape[-1] - self.dim
        cos, sin = self.cos_sin(positions, torch.float64)
        cos = torch.nn.functional.pad(cos, (0, extra), value=1.0)
        sin = torch.nn.functional.pad(sin, (0, extra))
        count = len(positions)
        right = self._partner_columns(moment)
        both = self._partner_columns(right.mT).mT
        left = self._partner_columns(moment.mT).mT
        cs = cos.T @ sin / count
        return moment * (cos.T @ cos / count) + right * cs + left * cs.T + both * (sin.T @ sin / count)

    def _partner_columns(self, m: Tensor) -> Tensor:
        return torch.cat([self.partner(m[..., : self.dim]), torch.zeros_like(m[..., self.dim :])], -1)
