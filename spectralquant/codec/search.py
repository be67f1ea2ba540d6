"""The symbols whose sum of codebook vectors comes nearest to a vector: K-best search.

Given rows w_p of a codebook and x, find s in {-3/2, -1/2, 1/2, 3/2}^P with small |x - s W|^2. There are 4^P candidates and more rows than
dimensions, so this is the closest-point problem of an underdetermined lattice, well known from multi-antenna receivers (Guo & Nilsson, "Algorithm and
implementation of the K-best sphere decoding", 2006; Cui & Tellambura, "An efficient generalized sphere decoder for rank-deficient MIMO systems", 2005).
With a ridge term r |s|^2 the Gram matrix has a Cholesky factor U and

    |x - s W|^2 + r |s|^2 = const + |(s - t) U^T|^2,      t = x W^T (W W^T + r I)^-1

so symbols are decided one by one from the last row to the first, each seeing the ones decided before it. The `paths` best
partial decisions stay alive (r |s|^2 is taken out of the comparison again), each tries its two nearest symbols, and the best complete one wins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PATHS = 8
"""Decisions kept alive. 16 take 3 % off the error of 8, 4 add 7 % (docs/log.md)."""
_CHUNK_CPU, _CHUNK = 512, 16_384
"""Vectors per pass: few on a CPU, so that the search lives in its cache; many elsewhere, where every operation is a launch."""


@dataclass(frozen=True, slots=True)
class SearchTables:
    """What the search needs of G codebooks [G, P, d].

    Attributes:
        filters: [G, d, P], x @ filters is t.
        reach: [G, P, P], row p: how later decisions move the centre of symbol p.
        weight: [G, P], of a symbol's squared distance from its centre.
        ridge: [G].
    """

    filters: Tensor
    reach: Tensor
    weight: Tensor
    ridge: Tensor


def build_tables(codebook: Tensor, ridge: Tensor) -> SearchTables:
    """Tables of `codebook` [G, P, d] float32 with `ridge` [G], see `nearest_symbols`."""
    gram = codebook @ codebook.mT + ridge[:, None, None] * torch.eye(codebook.shape[1], device=codebook.device)
    lower = torch.linalg.cholesky(gram)
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    filters = torch.cholesky_solve(codebook, lower).mT
    return SearchTables(filters.contiguous(), (lower / diagonal[:, None]).mT.contiguous(), diagonal.square(), ridge)


def nearest_symbols(x: Tensor, codebook: Tensor, ridge: Tensor, paths: int = PATHS) -> Tensor:
    """Symbols of vectors under G codebooks.

    Args:
        x: [G, N, d] float32.
        codebook: [G, P, d] float32, rows best in ascending order of length: the last is decided first.
        ridge: [G] float32, positive.
        paths: Decisions kept alive.

    Returns:
        [G, N, P] float32 in {-1.5, -0.5, 0.5, 1.5}.
    """
    tables = build_tables(codebook, ridge)
    pieces = x.split(_CHUNK_CPU if x.device.type == "cpu" else _CHUNK, 1)
    return torch.cat([_decide(piece @ tables.filters, tables, paths) for piece in pieces], 1)


def _decide(target: Tensor, tables: SearchTables, paths: int) -> Tensor:
    """Symbols [G, N, P] near `target` [G, N, P]."""
    groups, count, planes = target.shape
    target = target.mT.contiguous()
    error = target.new_zeros((groups, planes, count, 1))  # s - t of what is decided
    metric = target.new_zeros((groups, count, 1))
    reach, weight, ridge = tables.reach, tables.weight, tables.ridge[:, None, None, None]
    for p in range(planes - 1, -1, -1):
        alive = metric.shape[-1]
        moved = (reach[:, p, None, p + 1 :] @ error[:, p + 1 :].flatten(2)).view(groups, count, alive)
        centre = target[:, p, :, None] - moved
        low = (centre + 1.5).floor_().clamp_(0, 2).sub_(1.5)
        symbol = torch.stack([low, low + 1], -1)
        metric = metric[..., None] + weight[:, p, None, None, None] * (symbol - centre[..., None]).square_() - ridge * symbol.square()
        metric, symbol = metric.flatten(2), symbol.flatten(2)
        if metric.shape[-1] > paths:
            metric, best = metric.topk(paths, -1, largest=False, sorted=False)
            symbol, parent = symbol.gather(-1, best), best // 2
        else:
            parent = (torch.arange(metric.shape[-1], device=target.device) // 2).expand_as(metric)
        kept = error.new_empty((groups, planes, count, metric.shape[-1]))
        torch.gather(error[:, p + 1 :], -1, parent[:, None].expand(-1, planes - 1 - p, -1, -1), out=kept[:, p + 1 :])
        kept[:, p] = symbol - target[:, p, :, None]
        error = kept
    best = metric.argmin(-1)[:, None, :, None].expand(-1, planes, -1, 1)
    return (error.gather(-1, best)[..., 0] + target).mT.mul(2).round_().div_(2)
