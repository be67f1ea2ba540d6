"""Packed units to dense keys or values by the CUDA kernel kernels/dense.cu: `LayerCodec.decode_keys` and `decode_values`, straight into the model's dtype.

In PyTorch decoding is some thirty passes over memory: about 11 KB a token and head for K at D = 128 and 5 KB for V, where the record has 78 bytes and the
result 256 a side. The kernel reads the one and writes the other.
"""

import torch
from torch import Tensor

from spectralquant.codec.codec import LayerCodec
from spectralquant.codec.layout import UNIT
from spectralquant.kernels.launch import Launch

THREADS = 256
OUT_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""What the kernel can write."""
_WARP, _SLICE = 32, 16
"""Threads of a warp, and coordinates that it makes."""


def plan_decode(codec: LayerCodec, records: Tensor, which: str, first: int, start: Tensor, out: Tensor, rows: Tensor | None) -> Launch:
    """Everything of `units.decode_units` but the launch, on any device: arguments as there; levels are sums of planes and `out` has one of `OUT_DTYPES`."""
    batch, heads, units, _ = records.shape
    side, frame = (codec.key, codec.frame) if which == "key" else (codec.value, None)
    constants = side.decode_matrix.contiguous(), side.mean.contiguous()
    definitions = {
        "D": codec.head_dim,
        "KEY_PLANES": codec.layout.key_planes,
        "VALUE_PLANES": codec.layout.value_planes,
        "IS_KEY": int(which == "key"),
        "OUT": OUT_DTYPES[out.dtype],
        "PAIRS": 0 if frame is None else frame.rotary.dim // 2,
        "INTERLEAVED": int(frame is not None and frame.rotary.interleaved),
        "RUN": frame.run if frame is not None and frame.trajectory else 0,
    }
    turns, angles = constants[1], (constants[1], constants[1])  # not read
    if frame is not None:
        slots = first + UNIT * torch.arange(units, device=records.device)
        turns, angles = frame.turns, frame.rotary.cos_sin(frame.anchors(slots, start))
    arguments = (
        records, *constants, turns, *angles, None if rows is None else rows.contiguous(), out,
        batch, heads, units, first // UNIT, records.stride(1), *(out.stride(i) for i in range(3)),
    )  # fmt: skip
    threads = batch * heads * units * codec.head_dim // _SLICE * _WARP
    return Launch("dense.cu", "decode_units", definitions, arguments, -(-threads // THREADS), THREADS, 0)
