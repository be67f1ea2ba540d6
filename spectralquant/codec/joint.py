"""Joint quantization: a block of coordinates is a sum of codebook vectors, one per plane, chosen together.

    z^ = gain * sum_p (c_p - 1.5) w_p,   c_p in 0..3,   w_p in R^d,   P / B planes for each of B blocks of d = D / B coordinates

Scalar planes are the special case of vectors along the axes with weights 1, 4, 16. Free vectors cost decoding nothing, because it is a product with a
constant matrix either way, and they gain what scalar quantization leaves: fractions of a bit for every coordinate, cells that fill space
better than cubes, and points that are dense where the density is. On Gaussian coordinates with the spectra of SmolLM2's values the mean
squared error at 2.5 bits is 0.72 of the scalar planes' and 0.86 of Lloyd-Max's (benchmarks/results/quantizers-smollm2.json).

This is additive quantization (Babenko & Lempitsky, "Additive quantization for extreme vector compression", 2014) with codebooks of four collinear points.
Training alternates like Lloyd's algorithm: nearest symbols (`search`) for samples, then the least squares vectors for the symbols. Samples are
Gaussian with the block's variances, so a codebook is a function of the spectrum, the number of planes and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spectralquant.allocation import water_fill
from spectralquant.codebook import uniform_codebook
from spectralquant.codec.search import SearchTables, build_tables, nearest_symbols

BLOCK = 16
"""Least coordinates of a block. Blocks of 8 have 3 % more error in V at 2.5 bits, larger ones need a wider search."""
ROUNDS, SAMPLES = 8, 600
"""Training rounds, and samples in each (the last takes three times as many)."""
START_NOISE = 0.3
"""Vectors start as scalar planes plus this share of the standard deviations: from the axes alone training ends in a worse optimum."""
RIDGE = 0.04
"""Ridge of the search as a share of the mean variance: about the error per coordinate in units of a symbol's variance 1.25."""
_AT_ONCE = 64
_TINY = 1e-20


def block_index(dim: int) -> Tensor:
    """[B, d] int64: the coordinates of each block. Coordinates are in descending order of variance and dealt out back and forth, so that all blocks
    have nearly the same spectrum and take the same number of planes; B is a power of two that divides 16, as the plane counts do."""
    blocks = 1
    while blocks < 16 and dim % (2 * blocks) == 0 and dim // (2 * blocks) >= BLOCK:
        blocks *= 2
    index = torch.arange(dim).view(-1, blocks)
    index[1::2] = index[1::2].flip(-1)
    return index.T.contiguous()


@dataclass(frozen=True, slots=True)
class JointPlanes:
    """H heads of D coordinates in B blocks, P planes in all.

    Attributes:
        codebook: [H, B, P / B, D / B] float32, vectors of unit coordinates (standard deviation 1).
        scale: [H, D] float32, standard deviations: errors count in units of the spectrum, not of unit coordinates.
        kept: [H, D] bool, coordinates that the gain is taken from.
        index: [B, D / B] int64, see `block_index`.
    """

    codebook: Tensor
    scale: Tensor
    kept: Tensor
    index: Tensor
    offset: ClassVar[float] = 1.5

    def quantize(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u [B, H, T, D], unit variance -> planes [B, H, T, P] uint8, levels [B, H, T, D]."""
        batch, heads, count = u.shape[:3]
        blocks = len(self.index)
        scale, book = self._block_scale(), self.codebook.flatten(0, 1)
        vectors = u[..., self.index].permute(1, 3, 0, 2, 4).reshape(heads * blocks, batch * count, -1)
        symbols = nearest_symbols(vectors * scale[:, None], self.scaled_rows(), _ridge(scale.square()))

        def in_tokens(x: Tensor) -> Tensor:  # [H * blocks, batch * T, n] -> [batch, H, T, blocks, n]
            return x.view(heads, blocks, batch, count, -1).permute(2, 0, 3, 1, 4)

        levels = torch.empty_like(u)
        levels[..., self.index.flatten()] = in_tokens(symbols @ book).flatten(-2)
        return (in_tokens(symbols) + self.offset).to(torch.uint8).flatten(-2), levels

    def _block_scale(self) -> Tensor:
        """[H B, d]."""
        return self.scale[:, self.index].flatten(0, 1)

    def scaled_rows(self) -> Tensor:
        """[H B, P / B, d], the codebooks of coordinates with their standard deviations."""
        return self.codebook.flatten(0, 1) * self._block_scale()[:, None]

    def tables(self) -> SearchTables:
        """Of all H B codebooks, as `quantize` searches them."""
        return build_tables(self.scaled_rows(), _ridge(self._block_scale().square()))

    def searchable(self) -> bool:
        """Whether `tables` can be made: codebooks of a damaged calibration may be too large for their ridge."""
        try:
            made = self.tables()
        except RuntimeError:  # LinAlgError, by a name that is exported
            return False
        return bool(made.filters.isfinite().all() and made.reach.isfinite().all() and made.weight.isfinite().all())

    def symbols(self, planes: Tensor, head_axis: int) -> Tensor:
        """planes [..., P] uint8 -> float32 [..., P]; dimension `head_axis` has H entries."""
        return planes.float()

    def rows(self, inverse: Tensor) -> Tensor:
        """W [H, P, D] of `inverse` [H, D, D], whose rows map unit coordinates to vectors."""
        by_block = inverse[:, self.index]  # [H, B, d, D]
        return (self.codebook.to(inverse.dtype) @ by_block).flatten(1, 2)


def fit_codebooks(variance: Tensor, planes: int, device: torch.device | str = "cpu", progress: Callable[[int], None] = lambda n: None) -> Tensor:
    """Codebooks [N, B, P / B, D / B] float32 on the CPU, in unit coordinates, of N heads.

    Args:
        variance: [N, D] float32, descending.
        planes: P, a multiple of 16.
        device: Where to train. The samples are the same everywhere, sums may round differently.
        progress: Called with the number of heads done so far.
    """
    index = block_index(variance.shape[-1])
    scaled = variance.float() / variance.float().mean(-1, keepdim=True).clamp_min(_TINY)
    blocks = scaled[:, index].clamp_min(1e-8)  # [N, B, d]
    out: list[Tensor] = []
    for part in blocks.split(max(_AT_ONCE // len(index), 1)):
        flat = part.flatten(0, 1)
        book = _train(flat.to(device), _scalar_planes(flat, planes // len(index)).to(device)).cpu()
        out.append((book / flat.sqrt()[:, None]).unflatten(0, part.shape[:2]))
        progress(sum(map(len, out)))
    return torch.cat(out)


def _train(variance: Tensor, book: Tensor) -> Tensor:
    """Codebooks [G, P, d] for Gaussian vectors of variances [G, d], from the start `book`."""
    generator = torch.Generator().manual_seed(0)
    deviation = variance.sqrt()[:, None]
    book = book + START_NOISE * deviation * torch.randn(book.shape[1:], generator=generator).to(book)
    eye = torch.eye(book.shape[1], device=book.device)
    for round_ in range(ROUNDS):
        count = SAMPLES * (3 if round_ == ROUNDS - 1 else 1)
        samples = deviation * torch.randn((count, book.shape[2]), generator=generator).to(book)
        book = _by_length(book)
        symbols = nearest_symbols(samples, book, _ridge(variance))
        book = torch.linalg.solve(symbols.mT @ symbols + 1e-5 * count * eye, symbols.mT @ samples)
    return _by_length(book)


def _scalar_planes(variance: Tensor, planes: int) -> Tensor:
    """[G, P, d]: the vectors that make the sum the water-filled scalar quantizer of `variance` [G, d]."""
    bits = water_fill(variance, 2 * planes)
    steps = torch.tensor([0.0] + [uniform_codebook(b).step or 0.0 for b in range(1, 9)])[bits] * variance.sqrt()
    digits = torch.arange(4)
    weight = torch.where(2 * digits < bits[..., None], steps[..., None] * 4.0**digits, 0.0)  # [G, d, 4]
    spread = torch.diag_embed(weight.mT).flatten(1, 2)  # [G, 4 * d, d]
    chosen = (weight.mT.flatten(1) > 0).int().argsort(dim=1, descending=True, stable=True)[:, :planes]
    return spread.gather(1, chosen[..., None].expand(-1, -1, variance.shape[-1]))


def _by_length(book: Tensor) -> Tensor:
    order = book.square().sum(-1).argsort(dim=-1, stable=True)
    return book.gather(1, order[..., None].expand_as(book))


def _ridge(variance: Tensor) -> Tensor:
    return RIDGE * variance.mean(-1).clamp_min(_TINY)
