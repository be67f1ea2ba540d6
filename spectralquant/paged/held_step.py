"""A step whose tensors stay where they are, so that a CUDA graph which read one step reads the next."""

from dataclasses import fields, replace

import torch
from torch import Tensor

from spectralquant.paged.recent import Step


class HeldStep:
    """Memory for steps of one size or smaller; it is taken when the first one comes.

    Args:
        sequences, tokens: Most of a step.
    """

    def __init__(self, sequences: int, tokens: int) -> None:
        self.sequences, self.tokens = sequences, tokens
        self._held: dict[str, Tensor] = {}

    def hold(self, step: Step) -> Step:
        """`step`, copied to where the one before was."""
        moved = {f.name: self._copy(f.name, getattr(step, f.name)) for f in fields(step) if f.name not in ("copy_serials", "longest")}
        return replace(step, **moved)

    def _copy(self, name: str, value: Tensor) -> Tensor:
        if name not in self._held:
            room = {"starts": self.sequences + 1}.get(name, self.tokens if name in ("slots", "positions", "serials", "rows") else self.sequences)
            self._held[name] = torch.zeros((room, *value.shape[1:]), dtype=value.dtype, device=value.device)
        return self._held[name][: len(value)].copy_(value)
