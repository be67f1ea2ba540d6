"""The yardstick: keys and values in 16 bits (float16, or the model's own 16-bit dtype)."""

import torch
from torch import Tensor

from spectralquant.evaluation.methods.simulated import Rule, simulated


def round_16(x: Tensor) -> Tensor:
    """float32 through float16 where the range allows it; 16-bit tensors are stored as they are."""
    if x.dtype != torch.float32:
        return x
    fits = float(x.abs().max()) < torch.finfo(torch.float16).max
    return x.to(torch.float16 if fits else torch.bfloat16).to(x.dtype)


METHODS = (simulated("fp16", "FP16", "FP16", lambda subject: lambda layer: Rule(round_16, round_16), lambda dim: 16.0),)
