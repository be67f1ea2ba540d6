"""FP8 e4m3 (Micikevicius et al. 2022, arXiv 2209.05433): with a float16 scale per token and head, and as vLLM serves it by default, with
scale 1. Both saturate: the format ends at 448, and keys of models with a large key bias do not."""

import torch
from torch import Tensor

from spectralquant.evaluation.methods.simulated import Rule, simulated

E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-24
"""Least positive float16: a token of zeros must not divide by zero."""


def round_unscaled(x: Tensor) -> Tensor:
    """Any shape: nearest e4m3 value, ties to even; beyond +-448 the end of the range (the bare conversion gives NaN in older torch)."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def round_scaled(x: Tensor) -> Tensor:
    """[..., D]: the largest value of each vector is mapped to the end of the range."""
    y = x.float()
    scale = (y.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(SMALLEST_SCALE).half().float()
    return (round_unscaled(y / scale) * scale).to(x.dtype)


METHODS = (
    simulated("fp8", "FP8 e4m3, scale per token and head", "FP8", lambda subject: lambda layer: Rule(round_scaled, round_scaled), lambda dim: 8 + 16 / dim),
    simulated("fp8-unscaled", "FP8 e4m3, scale 1", "FP8, scale 1", lambda subject: lambda layer: Rule(round_unscaled, round_unscaled), lambda dim: 8.0),
)
