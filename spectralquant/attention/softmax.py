"""Softmax carried across tiles (Milakov and Gimelshein 2018, arXiv:1805.02867)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class RunningSoftmax:
    """Maximum, mass and weighted sum of what was taken in so far, float32; the sum has W columns, of any space.

    Attributes:
        peak, mass: [B, H, N].
        total: [B, H, N, W]. Who takes in a tile adds its weighted values: `state.total += state.add(scores) @ values`.
    """

    peak: Tensor
    mass: Tensor
    total: Tensor

    @classmethod
    def empty(cls, shape: torch.Size, columns: int, device: torch.device) -> "RunningSoftmax":
        """Nothing taken in by queries of `shape` [B, H, N]."""
        zero = torch.zeros(shape, device=device)
        return cls(zero - torch.inf, zero, torch.zeros((*shape, columns), device=device))

    def add(self, scores: Tensor, overwrite: bool = False) -> Tensor:
        """Take in scores [B, H, N, T]; rescale what is held; return exp(scores - peak), in the memory of `scores` if it may be overwritten."""
        peak = torch.maximum(self.peak, scores.amax(-1))
        finite = peak.clamp_min(torch.finfo(peak.dtype).min)  # a row that is masked throughout stays at zero mass
        shrink = (self.peak - finite).exp_()
        weights = torch.sub(scores, finite[..., None], out=scores if overwrite else None).exp_()
        self.peak, self.mass = peak, self.mass * shrink + weights.sum(-1)
        self.total *= shrink[..., None]
        return weights

    def result(self) -> Tensor:
        """[B, H, N, W]; a row that saw nothing is zero."""
        return self.total / self.mass.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
