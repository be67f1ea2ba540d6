"""A layer's codec as the fused attention kernel reads it: matrices in tensor-core fragment order, float16, scaled by powers of two.

With q' a query in the frame of a run, W the decode matrix of K and G = [mean R(j)] over the offsets j of a run,

    q . k^_j = gain_j ((s_j - 1.5) . q' W^T) + q' G_j,        G = A B of low rank (a run of 256 tokens turns slow pairs hardly at all)

so the kernel maps q' once per run to planes and to the rank of G, by one matrix [W^T, A], and adds products with columns of B to its scores. Queries come as
rotary pairs: row 16 k + i of the matrix is the lower coordinate of pair 8 k + i for i < 8, the upper one of pair 8 k + i - 8 beyond.

Components of G are in order of what they do to scores. Only the first 16 may be large; where they are, both factors and the queries are sums of two
float16 numbers. In the plain frame G is one column, the mean itself, whose score the kernel computes in float32.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from spectralquant.codec.codec import LayerCodec
from spectralquant.errors import BackendError

RANK_TOLERANCE = 2.0**-18
"""Singular values of the offsets' curves below this share of the largest are left out: finer than what two float16 numbers hold of the largest."""
SPLIT_ABOVE = 0.25
"""Where mean scores are beyond this size, in logits, their first 16 components are computed in twice the precision of float16: keys of some models have
biases of hundreds of logits. Of what is left, a few logits at most, float16 loses less than a thousandth."""
_HALF_MAX = 2.0**14


@dataclass(frozen=True, slots=True)
class KernelConstants:
    """Constants of one layer on the device of its codec.

    Attributes:
        transform: [H, (CK + CB + split) D / 16, 32, 8] float16, B fragments; last, when split, the low halves of the first chunk of the mean.
        table: [H, tiles (CB + split), 32, 8] float16, A fragments, tiles of 16 offsets in a run, low halves last. Plain frame: the mean, [H, D] float32.
        scales: [H, 2] float32: of the scores, and of the mean relative to them.
        value_rows: [H, P_V, D] float32.
        value_mean: [H, D] float32.
        missing_mass: [H, G] float32, of the codec in units of log 2, or None.
        rates: [D / 2] float64 on the CPU, radians per token of every pair (0: does not turn).
        turns: [run or 1, D / 2, 2] float32, see `turn_table`, at the offsets of a run.
        definitions: Compile-time definitions of the kernel that follow from the codec.
        rotary_pairs, interleaved: See `Rotary`.
    """

    transform: Tensor
    table: Tensor
    scales: Tensor
    value_rows: Tensor
    value_mean: Tensor
    missing_mass: Tensor | None
    rates: Tensor
    turns: Tensor
    definitions: dict[str, int]
    rotary_pairs: int
    interleaved: bool


def build_constants(codec: LayerCodec) -> KernelConstants:
    """Constants of `codec`.

    Raises:
        BackendError: Its levels are no sums of planes ("lloyd-max").
    """
    if not codec.has_planes:
        raise BackendError("quantizer='lloyd-max' has levels that no kernel reads; use 'joint' or 'uniform', or backend='reference'")
    frame, dim = codec.frame, codec.head_dim
    run = frame.run if frame is not None else 0
    rates = torch.zeros(dim // 2, dtype=torch.float64)
    if frame is not None:
        rates[: len(frame.rotary.inv_freq)] = frame.rotary.inv_freq.cpu()
    pairs = len(frame.rotary.inv_freq) if frame is not None else 0
    interleaved = frame is not None and frame.rotary.interleaved
    order = _pair_order(dim, pairs, interleaved)
    planes = codec.key.decode_matrix.cpu().double().mT[:, order]  # [H, D, P]
    plane_scale, mean_scale = _power_of_two(planes.norm(dim=1)), torch.ones(len(planes), dtype=torch.float64)
    split, rank, columns, table = 0, 0, [], codec.key.mean.float().contiguous()
    if run:
        left, right, size = _mean_factors(codec, rates, run)
        split, rank, mean_scale = int(size > SPLIT_ABOVE), left.shape[-1] // 16, _power_of_two(left.norm(dim=1))
        plane_scale = torch.maximum(plane_scale, mean_scale / _HALF_MAX)
        columns = _with_low_halves(left[:, order] / mean_scale[:, None, None], split)
        table = _a_fragments(torch.cat(_with_low_halves(right, split), -1))
    device = codec.key.mean.device
    definitions = {"D": dim, "CK": planes.shape[-1] // 16, "CV": codec.layout.value_planes // 16, "CB": rank, "RUN": run, "SPLIT_BIAS": split}
    return KernelConstants(
        _b_fragments(torch.cat([planes / plane_scale[:, None, None], *columns], -1)).to(device),
        table.to(device),
        torch.stack([plane_scale, mean_scale / plane_scale], -1).float().contiguous().to(device),
        codec.value.decode_matrix.float().contiguous(),
        codec.value.mean.float().contiguous(),
        None if codec.missing_mass is None else (codec.missing_mass / math.log(2)).float().contiguous(),
        rates,
        turn_table(rates, torch.arange(run or 1), device),
        definitions,
        pairs,
        interleaved,
    )


def turn_table(rates: Tensor, positions: Tensor, device: torch.device) -> Tensor:
    """[n, D / 2, 2] float32: cos and sin of every pair at positions [n]."""
    angles = positions.double()[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()], -1).float().contiguous().to(device)


def _pair_order(dim: int, pairs: int, interleaved: bool) -> Tensor:
    """[D] int64: the coordinate of each row of the transform."""
    lower, upper = (torch.arange(pairs) * 2, torch.arange(pairs) * 2 + 1) if interleaved else (torch.arange(pairs), torch.arange(pairs) + pairs)
    rest = torch.arange(2 * pairs, dim)
    lower, upper = torch.cat([lower, rest[0::2]]), torch.cat([upper, rest[1::2]])
    return torch.stack([lower.view(-1, 8), upper.view(-1, 8)], 1).flatten()


@lru_cache(maxsize=64)
def offset_basis(rates: tuple[float, ...], run: int) -> Tensor:
    """[R, run] float64, orthonormal rows: what cos and sin of all pairs, and a constant, can be over the offsets of a run. One basis for all heads and
    layers that turn alike."""
    angles = torch.tensor(rates, dtype=torch.float64)[:, None] * torch.arange(run)
    curves = torch.cat([angles.cos(), angles.sin(), torch.ones(1, run, dtype=torch.float64)])
    _, s, v = torch.linalg.svd(curves, full_matrices=False)
    return v[s > RANK_TOLERANCE * s[0]]


def _mean_factors(codec: LayerCodec, rates: Tensor, run: int) -> tuple[Tensor, Tensor, float]:
    """A [H, D, R] and B^T [H, run, R] of the mean over a run, R a multiple of 16, columns in order of their part in the scores, and the size of the mean
    of the head where it is largest, in logits."""
    basis = offset_basis(tuple(rates.tolist()), run)
    mean = codec.key_mean(torch.arange(run, device=codec.key.mean.device)).cpu().double().expand(-1, run, -1).mT  # [H, D, run]
    left = mean @ basis.mT
    metric = codec.key.encode_matrix.cpu().double() * codec.key.scale.cpu().double()[:, None]
    in_logits = metric.mT @ left
    turn = torch.linalg.eigh(in_logits.mT @ in_logits).eigenvectors.flip(-1)
    size = (codec.key.mean.cpu().double()[:, None] @ metric).norm(dim=-1).max()
    missing = -len(basis) % 16
    pad = torch.nn.functional.pad
    return pad(left @ turn, (0, missing)), pad(basis.mT @ turn, (0, missing)), float(size)


def _power_of_two(norms: Tensor) -> Tensor:
    """[H]: the least power of two above all norms [H, n] of a head."""
    return 2.0 ** norms.amax(-1).clamp_min(1e-30).log2().ceil()


def _with_low_halves(x: Tensor, split: int) -> list[Tensor]:
    """x [..., R] and, when split, what float16 leaves of its first 16 columns."""
    first = x[..., :16]
    return [x, first - first.half().double()] if split else [x]


def _b_fragments(matrix: Tensor) -> Tensor:
    """[H, D, N] -> [H, N / 16 * D / 16, 32, 8] float16; a lane's eight numbers are k 2c, 2c + 1, 2c + 8, 2c + 9 of columns r and r + 8."""
    heads, rows, columns = matrix.shape
    tiles = matrix.view(heads, rows // 16, 2, 4, 2, columns // 16, 2, 8)  # H, k chunk, b, c, half, chunk, tile, r
    return tiles.permute(0, 5, 1, 7, 3, 6, 2, 4).reshape(heads, -1, 32, 8).half().contiguous()


def _a_fragments(matrix: Tensor) -> Tensor:
    """[H, n, R] -> [H, n / 16 * R / 16, 32, 8] float16; a lane's numbers are rows r, r + 8 of k 2c, 2c + 1, then of 2c + 8, 2c + 9."""
    heads, rows, columns = matrix.shape
    tiles = matrix.reshape(heads, rows // 16, 2, 8, columns // 16, 2, 4, 2)  # H, tile, a0, r, chunk, a1, c, half
    return tiles.permute(0, 1, 4, 3, 6, 5, 2, 7).reshape(heads, -1, 32, 8).half().contiguous()
