"""A launch as a value: made anywhere, run on a device, or by tests on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectralquant.kernels.compiler import load


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch of a kernel, ready to go.

    Attributes:
        source: The kernel's source file.
        kernel: Its name.
        definitions: Compile-time definitions.
        arguments: In the kernel's order: tensors (their address is passed), None for an array that it neither reads nor writes, and numbers as
            `compiler.Kernel` takes them.
        blocks, threads, shared_bytes: Of the launch.
    """

    source: str
    kernel: str
    definitions: dict[str, int]
    arguments: Sequence[Any]
    blocks: int
    threads: int
    shared_bytes: int

    def run(self, device: torch.device) -> None:
        """Launch on the current stream of a CUDA device.

        Raises:
            BackendError: The kernel can't be built.
        """
        arguments = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in self.arguments]
        load(self.source, self.definitions, self.kernel, device)(self.blocks, self.threads, self.shared_bytes, arguments)
