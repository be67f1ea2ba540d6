"""Bits per spectral coordinate: reverse water-filling on the measured distortion of the quantizer really used.

Coordinate i of variance `v_i` coded with b bits costs `v_i D(b)`. Because D is convex over the widths, raising one
coordinate by one width step at a time, always the one with the largest drop per bit, is optimal for the budget; all
drops can therefore be ranked at once and the best taken (Shannon 1959; Cover & Thomas, section 10.3.3).
"""

import torch
from torch import Tensor

from spectralquant.codebook import distortion_table
from spectralquant.errors import ConfigError
from spectralquant.presets import BIT_WIDTHS


def water_fill(variance: Tensor, budget: int, widths: tuple[int, ...] = BIT_WIDTHS, quantizer: str = "uniform") -> Tensor:
    """Allocate `budget` bits to each row's coordinates.

    Args:
        variance: [..., D], non-negative.
        budget: Bits per row; a multiple of the width step.
        widths: Allowed widths, equally spaced from 0.
        quantizer: "uniform" or "lloyd-max": whose distortion counts.

    Returns:
        [..., D] int64 widths; each row sums to `budget`. Equal variances are served in order of their index.

    Raises:
        ConfigError: `budget` is negative, not a multiple of the step, or more than every coordinate can take.
    """
    step, dim = widths[1] - widths[0], variance.shape[-1]
    if budget < 0 or budget % step or budget > dim * widths[-1]:
        raise ConfigError(f"budget={budget}: expected a multiple of {step} from 0 to {dim * widths[-1]} bits for {dim} coordinates")
    table = torch.tensor(distortion_table(widths, quantizer), dtype=torch.float64, device=variance.device)
    drops = (variance.double().clamp_min(1e-30)[..., None] * (table[:-1] - table[1:])).flatten(-2)
    order = drops.argsort(dim=-1, descending=True, stable=True)[..., : budget // step]
    taken = torch.zeros_like(drops, dtype=torch.int64).scatter_(-1, order, 1)
    return taken.unflatten(-1, (dim, len(widths) - 1)).sum(-1) * step
