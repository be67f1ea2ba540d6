"""Integers that the device computes and the host reads later, without a wait in between."""

import torch
from torch import Tensor


class Readback:
    """One transfer to the host at a time.

    Attributes:
        values: [n] int64, on any device; may be written again once it was read.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._on_gpu = values.is_cuda
        self._copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True) if self._on_gpu else values
        self._arrived = torch.cuda.Event() if self._on_gpu else None

    def send(self) -> None:
        """Have `values` copied once everything launched so far has run."""
        if self._arrived is not None:
            self._copy.copy_(self.values, non_blocking=True)
            self._arrived.record(torch.cuda.current_stream(self.values.device))

    def read(self) -> list[int]:
        """What was sent last; waits for it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()
