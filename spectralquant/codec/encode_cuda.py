"""Whitened vectors to packed codes by the CUDA kernels encode_scalar.cu and encode_joint.cu: the codes of `SideCodec.encode` and `pack_planes`, up to rounding.

K and V are turned and whitened by PyTorch, in products that its libraries do best; what the kernels take over is everything after: gains, cells,
the search among codebook vectors, and the order of bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectralquant.codec.codec import LayerCodec, SideCodec
from spectralquant.codec.joint import JointPlanes
from spectralquant.codec.layout import UNIT
from spectralquant.codec.quantizer import UniformPlanes
from spectralquant.codec.search import SearchTables
from spectralquant.kernels.compiler import load

THREADS = 256
"""Of a block; kernels/encode.cuh has the same."""
_GAINS = {"ls": 0, "unbiased": 1, "search": 2}


@dataclass(frozen=True, slots=True)
class EncodeLaunch:
    """A launch of one of the kernels, ready to go.

    Attributes:
        name: Of the kernel and of its source file.
        definitions: Compile-time definitions.
        arguments: In the kernel's order: tensors (their address is passed) and integers.
        blocks, shared_bytes: Of the launch.
        gains: [B, H, T] uint8, written by it.
        error: [B, H, T] float32, written by it, or None where the kernel gives none.
    """

    name: str
    definitions: dict[str, int]
    arguments: Sequence[Any]
    blocks: int
    shared_bytes: int
    gains: Tensor
    error: Tensor | None

    def run(self, device: torch.device) -> None:
        kernel = load(f"{self.name}.cu", self.definitions, self.name, device)
        kernel(self.blocks, THREADS, self.shared_bytes, [a.data_ptr() if isinstance(a, Tensor) else a for a in self.arguments])


def can_encode(codec: LayerCodec) -> bool:
    """Whether the kernels know both sides' quantizers, and K's tells its error."""
    scalar = isinstance(codec.key.quantizer, UniformPlanes)
    return scalar and (isinstance(codec.value.quantizer, UniformPlanes) or (isinstance(codec.value.quantizer, JointPlanes) and codec.value.gain != "search"))


@dataclass(frozen=True, slots=True)
class JointConstants:
    """What the kernel reads of a joint quantizer's codebooks: the tables of the search, and [H B, P / B, d] vectors with their standard deviations."""

    tables: SearchTables
    rows: Tensor


class FusedEncoder:
    """The kernels on one CUDA device, with the constants of the codecs it has met."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._constants: dict[int, tuple[LayerCodec, JointConstants | None]] = {}  # the codec too: its id stays its own

    def encode(self, codec: LayerCodec, keys: Tensor, values: Tensor, records: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write the codes of keys and values [B, H, T, D] float32, centred, for codecs that `can_encode`; result as of `units.encode_units`.

        Raises:
            BackendError: The kernels can't be built.
        """
        if id(codec) not in self._constants:
            self._constants[id(codec)] = (codec, joint_constants(codec.value))
        key_codes, _, value_codes, _ = codec.layout.split(records)
        key = plan_side(codec.key, keys @ codec.key.encode_matrix, key_codes, True, None)
        key.run(self.device)
        value = plan_side(codec.value, values @ codec.value.encode_matrix, value_codes, False, self._constants[id(codec)][1])
        value.run(self.device)
        assert key.error is not None
        return key.gains, value.gains, codec.relative_error(key.error)


def joint_constants(side: SideCodec) -> JointConstants | None:
    """Of a side's quantizer, or None for a scalar one."""
    quantizer = side.quantizer
    return JointConstants(quantizer.tables(), quantizer.scaled_rows().contiguous()) if isinstance(quantizer, JointPlanes) else None


def plan_side(side: SideCodec, u: Tensor, records: Tensor, is_key: bool, joint: JointConstants | None) -> EncodeLaunch:
    """Everything of the encoding of one side but the launch, on any device.

    Args:
        side: The codec.
        u: [B, H, T, D] float32, contiguous: centred vectors times `side.encode_matrix`; T a multiple of 128.
        records: [B, H, T / 128, bytes], the side's codes in the store: a view whose units are contiguous records of all B H rows.
        is_key: Which side.
        joint: Of a joint quantizer.
    """
    batch, heads, count, dim = u.shape
    planes = side.decode_matrix.shape[1]
    units = count // UNIT
    gains = torch.empty((batch, heads, count), dtype=torch.uint8, device=u.device)
    sizes = (units, records.stride(1), records.stride(2), heads)
    quantizer = side.quantizer
    definitions = {"D": dim, "PLANES": planes, "IS_KEY": int(is_key), "GAIN": _GAINS[side.gain]}
    if isinstance(quantizer, UniformPlanes):
        error = torch.empty((batch, heads, count), dtype=torch.float32, device=u.device)
        arguments = (u, quantizer.step, quantizer.top, side.scale, quantizer.coordinate, quantizer.shift, records, gains, error, *sizes)
        return EncodeLaunch("encode_scalar", definitions, arguments, batch * heads * units, UNIT * dim, gains, error)
    assert isinstance(quantizer, JointPlanes) and joint is not None
    blocks, tables = len(quantizer.index), joint.tables
    shared = _joint_shared_bytes(dim // blocks, planes // blocks, planes)
    arguments = (
        u, quantizer.index, quantizer.kept, side.scale, tables.filters, tables.reach, tables.weight, tables.ridge, joint.rows, records, gains, *sizes,
    )  # fmt: skip
    return EncodeLaunch("encode_joint", {**definitions, "BLOCKS": blocks}, arguments, batch * heads * units, shared, gains, None)


def _joint_shared_bytes(dim: int, planes: int, all_planes: int) -> int:
    """`Shared` of kernels/encode_joint.cu, for blocks of `dim` coordinates and `planes` planes."""
    tables = planes * (-(-planes // 4) * 4) + planes + 2 * dim * planes
    return -(-4 * tables // 16) * 16 + UNIT * all_planes
