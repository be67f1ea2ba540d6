"""llama.cpp's cache types: blocks of 32 values along the head dimension that share one float16 scale.

q8_0 scales by the largest magnitude. q4_0 maps the value of largest magnitude, with its sign, to -8, so that one end of the 16 levels is
always used. Codes come from the unrounded scale, values from the stored one, as in ggml.

Since 2026 llama.cpp turns the vectors of quantized caches by Hadamard matrices first (ggml-org/llama.cpp#21038), which spreads outlier channels over
many: keys by the largest matrix that fits the head, values by matrices of 64. `q4_0-hadamard` does that; `q8_0` and `q4_0` are
the formats alone, as before, or as with LLAMA_ATTN_ROT_DISABLE=1.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from spectralquant.cache.hf import kv_size
from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods.base import Method, Subject
from spectralquant.evaluation.methods.simulated import Rounding, Rule, simulated

BLOCK = 32
VALUE_TURN = 64
"""Size of the matrices that turn values; llama.cpp turns no head that is not a multiple of it."""


def round_q8_0(x: Tensor) -> Tensor:
    """[..., D], D a multiple of 32. Ties go to even, as in ggml's vector code (its scalar code rounds them away from zero)."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return _decode((blocks * _inverse(scale)).round(), scale, x)


def round_q4_0(x: Tensor) -> Tensor:
    """[..., D], D a multiple of 32. Of two values of the same magnitude the first one decides the sign."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    codes = (blocks * _inverse(scale) + 8.5).trunc().clamp_max(15)  # never negative: the quotient ends at -8
    return _decode(codes - 8, scale, x)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _decode(codes: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    return (codes * scale.half().float()).flatten(-2).to(like.dtype)


def round_keys_turned(x: Tensor) -> Tensor:
    """[..., D]: q4_0 of the vectors turned by the largest Hadamard matrix whose size divides D."""
    return _round_turned(x, x.shape[-1] & -x.shape[-1])


def round_values_turned(x: Tensor) -> Tensor:
    """[..., D]: q4_0 of the vectors turned in pieces of 64."""
    return _round_turned(x, min(x.shape[-1], VALUE_TURN))


def _round_turned(x: Tensor, size: int) -> Tensor:
    matrix = hadamard(size, x.device)
    turned = (x.float().unflatten(-1, (-1, size)) @ matrix).flatten(-2)
    return (round_q4_0(turned).unflatten(-1, (-1, size)) @ matrix).flatten(-2).to(x.dtype)


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """[size, size] float32 for a power of two, Sylvester's construction, orthonormal: symmetric, and so its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / size**0.5).to(device)


def _cache_type(name: str, label: str, family: str, rule: Rule, bits: int, fits: Callable[[int], bool], expected: str) -> Method:
    def rules(subject: Subject) -> Callable[[int], Rule]:
        _, dim = kv_size(subject.model.config, 0)
        if not fits(dim):
            raise ConfigError(f"method {name!r}: the model's heads have size {dim}, expected {expected}; leave the method out")
        return lambda layer: rule

    return simulated(name, label, family, rules, lambda dim: bits + 16 / BLOCK)


def _plain(bits: int, rounding: Rounding) -> Method:
    return _cache_type(
        f"q{bits}_0", f"llama.cpp q{bits}_0", "llama.cpp", Rule(rounding, rounding), bits, lambda dim: dim % BLOCK == 0, f"a multiple of {BLOCK}"
    )


METHODS = (
    _plain(8, round_q8_0),
    _plain(4, round_q4_0),
    _cache_type(
        "q4_0-hadamard",
        "llama.cpp q4_0, Hadamard",
        "llama.cpp, Hadamard",
        Rule(round_keys_turned, round_values_turned),
        4,
        lambda dim: dim % VALUE_TURN == 0 or dim == BLOCK,  # a head of one block is turned as a whole
        f"a multiple of {VALUE_TURN}, or {BLOCK}",
    ),
)
