"""Brute-force oracles in float64: slow, short, and written from the docstrings rather than from the code."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def packed_words(planes: Tensor, which: str) -> bytes:
    """Planes [128, P] packed word by word: chunk, lane = 4 r + c, word a = 2 a1 + a0, bit 16 half + 2 j, little-endian."""
    out = bytearray()
    for chunk in range(planes.shape[1] // 16):
        for lane in range(32):
            r, c = divmod(lane, 4)
            for a in range(4):
                a1, a0 = divmod(a, 2)
                word = 0
                for j, half in itertools.product(range(8), range(2)):
                    if which == "key":
                        token, plane = 16 * j + 8 * a0 + r, 8 * a1 + 2 * c + half
                    else:
                        token, plane = 16 * j + 8 * a1 + 2 * c + half, 8 * a0 + r
                    word |= int(planes[token, 16 * chunk + plane]) << (16 * half + 2 * j)
                out += word.to_bytes(4, "little")
    return bytes(out)


def packed_gains(codes: Tensor) -> bytes:
    """Gain codes [128] in record order: byte 16 r + 8 a0 + j belongs to token 16 j + 8 a0 + r."""
    out = bytearray(128)
    for r, a0, j in itertools.product(range(8), range(2), range(8)):
        out[16 * r + 8 * a0 + j] = int(codes[16 * j + 8 * a0 + r])
    return bytes(out)


def gaussian_distortion(levels: Tensor) -> float:
    """E[(x - nearest level)^2] of a unit-variance Gaussian, by the midpoint rule on a fine grid."""
    edges = np.linspace(-12.0, 12.0, 480_001)
    x = (edges[1:] + edges[:-1]) / 2
    values = np.sort(levels.double().numpy())
    nearest = values[np.searchsorted((values[1:] + values[:-1]) / 2, x)]
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return float(((x - nearest) ** 2 * density).sum() * (edges[1] - edges[0]))


def cheapest_allocation(variance: Sequence[float], budget: int, table: dict[int, float]) -> float:
    """Least distortion of any assignment of the widths in `table` that spends exactly `budget` bits, by enumeration."""
    choices = (w for w in itertools.product(table, repeat=len(variance)) if sum(w) == budget)
    return min(sum(v * table[b] for v, b in zip(variance, w, strict=True)) for w in choices)


def rotated(x: Tensor, inv_freq: Tensor, position: float, interleaved: bool) -> Tensor:
    """x [..., D] rotated to one position: pair i is a complex number multiplied by exp(i position inv_freq_i)."""
    half, out = len(inv_freq), x.double().clone()
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    pair = torch.complex(out[..., first], out[..., second]) * torch.exp(1j * position * inv_freq.double())
    out[..., first], out[..., second] = pair.real, pair.imag
    return out


def weighted_error(error: Tensor, metric: Tensor) -> Tensor:
    """e S e^T of errors [n, D] under a metric [D, D]."""
    return torch.einsum("nd,de,ne->n", error.double(), metric.double(), error.double())


def nearest_point_error(x: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """min over all 4^P symbol vectors of |x - s W|^2: x [G, N, d], book [G, P, d] -> [G, N]."""
    values = [-1.5, -0.5, 0.5, 1.5]
    points = torch.tensor(list(itertools.product(values, repeat=book.shape[1]))) @ book  # [G, 4^P, d]
    return torch.cdist(x, points).square().amin(-1)
