"""KIVI (Liu et al. 2024, arXiv 2402.02750): keys in groups along the tokens, one scale and zero point per channel; values in groups along
the channels, per token; round to nearest; the newest 128 tokens exact, keys flushed 128 at a time. Scales and zero points in FP16."""

from torch import Tensor

from spectralquant.evaluation.methods.base import Method
from spectralquant.evaluation.methods.simulated import Rule, simulated

RESIDUAL = 128


def round_asymmetric(x: Tensor, bits: int) -> Tensor:
    """Groups are the last dimension: 2^bits levels from the least to the greatest value, scale and zero point kept in float16."""
    y = x.float()
    low = y.amin(-1, keepdim=True)
    scale = ((y.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float().clamp_min(1e-7)
    low = low.half().float()
    return (((y - low) / scale).round().clamp(0, 2**bits - 1) * scale + low).to(x.dtype)


def round_keys(x: Tensor, bits: int, group: int) -> Tensor:
    """[B, H, n, D], n a multiple of `group`."""
    return round_asymmetric(x.mT.unflatten(-1, (-1, group)), bits).flatten(-2).mT


def round_values(x: Tensor, bits: int, group: int) -> Tensor:
    """[B, H, n, D]; a group is not longer than D."""
    return round_asymmetric(x.unflatten(-1, (-1, min(group, x.shape[-1]))), bits).flatten(-2)


def _kivi(bits: int, group: int) -> Method:
    rule = Rule(
        lambda x: round_keys(x, bits, group),
        lambda x: round_values(x, bits, group),
        key_block=RESIDUAL,
        value_window=RESIDUAL,
    )
    return simulated(
        f"kivi{bits}-g{group}",
        f"KIVI {bits}-bit, groups of {group}",
        f"KIVI, groups of {group}",
        lambda subject: lambda layer: rule,
        lambda dim: bits + 16 / group + 16 / min(group, dim),
    )


METHODS = tuple(_kivi(bits, group) for bits in (2, 4) for group in (32, 128))
