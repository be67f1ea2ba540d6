"""Packed records to planes and gains by the CUDA kernels of kernels/dense.cu, for code that reads dense keys and values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectralquant.codec.layout import UNIT, RecordLayout
from spectralquant.kernels.compiler import load

_THREADS = 256
_LANE_CODES = 64
"""Codes that one thread of `decode_planes` unpacks."""


@dataclass(frozen=True, slots=True)
class UnpackLaunch:
    """Launches of both kernels, ready to go.

    Attributes:
        definitions: Compile-time definitions.
        records: [B, H, U, record_bytes] uint8, units of a contiguous store.
        planes: [B, H, U * 128, P] uint8, written by `decode_planes`.
        gains: [B, H, U * 128] float32, written by `decode_gains`.
    """

    definitions: dict[str, int]
    records: Tensor
    planes: Tensor
    gains: Tensor

    def parts(self) -> list[tuple[str, Tensor, int, tuple[int, ...]]]:
        """(kernel, output, threads, arguments after the two addresses) of each launch."""
        batch, heads, units, _ = self.records.shape
        sizes = (batch * heads, units, self.records.stride(1))
        return [("decode_planes", self.planes, self.planes.numel() // _LANE_CODES, sizes), ("decode_gains", self.gains, self.gains.numel(), sizes)]

    def run(self) -> None:
        for name, out, threads, sizes in self.parts():
            kernel = load("dense.cu", self.definitions, name, self.records.device)
            kernel(-(-threads // _THREADS), _THREADS, 0, (self.records.data_ptr(), out.data_ptr(), *sizes))


def plan_unpack(layout: RecordLayout, records: Tensor, which: str) -> UnpackLaunch:
    """Everything of the unpacking of one side ("key" or "value") but the launches, on any device."""
    batch, heads, units, _ = records.shape
    planes = layout.key_planes if which == "key" else layout.value_planes
    definitions = {"KEY_PLANES": layout.key_planes, "VALUE_PLANES": layout.value_planes, "IS_KEY": int(which == "key")}
    return UnpackLaunch(
        definitions,
        records,
        torch.empty((batch, heads, units * UNIT, planes), dtype=torch.uint8, device=records.device),
        torch.empty((batch, heads, units * UNIT), dtype=torch.float32, device=records.device),
    )
