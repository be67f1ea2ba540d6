"""Keys and values to packed codes by the CUDA kernels whiten.cu, encode_scalar.cu and encode_joint.cu: the codes of `SideCodec.encode` and `pack_planes`, up to
rounding.

Per side one launch turns, centres and whitens into float32, which is written once and read once, and one does all the rest: gains, cells, the search among
codebook vectors, and the order of bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralquant.codec.codec import LayerCodec, SideCodec
from spectralquant.codec.joint import JointPlanes
from spectralquant.codec.layout import UNIT
from spectralquant.codec.quantizer import UniformPlanes
from spectralquant.kernels.launch import Launch

THREADS = 256
"""Of a block of whiten.cu and encode_scalar.cu."""
MOST_SIDE = 4
"""Blocks of coordinates that encode_joint.cu searches at the same time, at most."""
_SHARED_LIMIT = 99 * 1024
"""Dynamic shared memory of a block on the GPUs that have least."""
_GAINS = {"ls": 0, "unbiased": 1, "search": 2}
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True, slots=True)
class Whitening:
    """Whitened coordinates.

    Attributes:
        launch: What writes the others.
        u: [B, H, T, D] float32 of unit variance, or [B, H, T / 128, D, 128] by coordinate.
        sizes: [B, H, T] float32, |x|^2 of the vectors as they came; None for keys.
    """

    launch: Launch
    u: Tensor
    sizes: Tensor | None


@dataclass(frozen=True, slots=True)
class Encoding:
    """Codes in the store.

    Attributes:
        launch: What writes them and the others.
        gains: [B, H, T] uint8.
        error: [B, H, T] float32, |z - z^|^2, or None where the kernel gives none.
    """

    launch: Launch
    gains: Tensor
    error: Tensor | None


def can_encode(codec: LayerCodec) -> bool:
    """Whether the kernels know both sides' quantizers and gains, and K's tells its error."""
    value = codec.value.quantizer
    joint = isinstance(value, JointPlanes) and codec.value.gain != "search" and value.codebook.shape[2] > 1
    known = codec.key.gain in _GAINS and codec.value.gain in _GAINS
    return known and isinstance(codec.key.quantizer, UniformPlanes) and (isinstance(value, UniformPlanes) or joint)


class FusedEncoder:
    """The kernels on one CUDA device, with the tables of the codecs it has met."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tables: dict[int, tuple[LayerCodec, Tensor | None]] = {}  # the codec too: its id stays its own

    def encode(self, codec: LayerCodec, keys: Tensor, values: Tensor, before: Tensor, start: Tensor, records: Tensor) -> tuple[Encoding, Encoding, Tensor]:
        """Write the codes of whole units into a store; arguments as for `units.encode_units`, of a codec that `can_encode`.

        Returns:
            Of keys and of values, and |v|^2 [B, H, T].

        Raises:
            BackendError: The kernels can't be built.
        """
        return self._encode(
            codec, records, lambda is_key, by_coordinate: plan_whitening(codec, keys if is_key else values, before, start, is_key, by_coordinate)
        )

    def encode_tokens(self, codec: LayerCodec, keys: Tensor, values: Tensor, positions: Tensor, records: Tensor) -> tuple[Encoding, Encoding, Tensor]:
        """`encode` of tokens [N, H, D] at positions [N] of any sequences, one after another in records [1, H, units, record_bytes]. What is beyond N tokens
        has no meaning."""
        return self._encode(codec, records, lambda is_key, by_coordinate: plan_tokens(codec, keys if is_key else values, positions, is_key, by_coordinate))

    def run(self, launch: Launch) -> None:
        """Launch on torch's current stream."""
        launch.run(self.device)

    def _encode(self, codec: LayerCodec, records: Tensor, whitened: Callable[[bool, bool], Whitening]) -> tuple[Encoding, Encoding, Tensor]:
        """`whitened`: plans a side, K or not, by coordinate or not."""
        if id(codec) not in self._tables:
            quantizer = codec.value.quantizer
            self._tables[id(codec)] = (codec, joint_tables(quantizer) if isinstance(quantizer, JointPlanes) else None)
        tables = self._tables[id(codec)][1]
        key_codes, _, value_codes, _ = codec.layout.split(records)
        white = whitened(True, False)
        self.run(white.launch)
        key = plan_scalar(codec.key, white.u, key_codes, True)
        self.run(key.launch)
        white = whitened(False, tables is not None)
        self.run(white.launch)
        value = plan_scalar(codec.value, white.u, value_codes, False) if tables is None else plan_joint(codec.value, tables, white.u, value_codes)
        self.run(value.launch)
        assert white.sizes is not None
        return key, value, white.sizes


def plan_whitening(codec: LayerCodec, x: Tensor, before: Tensor, start: Tensor, is_key: bool, by_coordinate: bool) -> Whitening:
    """Everything of a whitening but the launch, on any device.

    Args:
        codec: The layer's codec.
        x: [B, H, T, D], T a multiple of 128; floating point, any strides.
        before: [] int32, units in front of these.
        start: [B] int64, slots of left padding.
        is_key: Whether x are keys, else values.
        by_coordinate: Order of `Whitening.u`.
    """
    batch, heads, count, dim = x.shape
    if x.dtype not in _DTYPES:
        x = x.float()
    if x.stride(-1) != 1:
        x = x.contiguous()
    side = codec.key if is_key else codec.value
    units = count // UNIT
    u = x.new_empty((batch, heads, units, dim, UNIT) if by_coordinate else (batch, heads, count, dim), dtype=torch.float32)
    sizes = None if is_key else x.new_empty((batch, heads, count), dtype=torch.float32)
    definitions, turning = _whitening(codec, x, is_key, by_coordinate)
    arguments = (
        x, side.encode_matrix, side.mean, *turning, start, before, u, sizes, x.stride(0), x.stride(1), x.stride(2), heads, units,
    )  # fmt: skip
    tiles, columns = _column_tiles(dim)
    shared = 4 * 2 * 16 * (UNIT + 4 + 16 * columns) + 4 * dim
    return Whitening(Launch("whiten.cu", "whiten", definitions, arguments, batch * heads * units * tiles, THREADS, shared), u, sizes)


def plan_tokens(codec: LayerCodec, x: Tensor, positions: Tensor, is_key: bool, by_coordinate: bool) -> Whitening:
    """`plan_whitening` of tokens x [N, H, D], the last dimension contiguous, at positions [N]: one sequence of whole units, zeros at its end."""
    (count, heads, dim), side = x.shape, codec.key if is_key else codec.value
    units = -(-count // UNIT)
    u = x.new_zeros((1, heads, units, dim, UNIT) if by_coordinate else (1, heads, units * UNIT, dim), dtype=torch.float32)
    sizes = None if is_key else x.new_empty((1, heads, units * UNIT), dtype=torch.float32)
    definitions, turning = _whitening(codec, x, is_key, by_coordinate)
    arguments = (x, side.encode_matrix, side.mean, *turning, positions, u, sizes, *x.stride()[:2], heads, units)
    return Whitening(Launch("whiten.cu", "whiten_token", definitions, arguments, count * heads, THREADS, 6 * dim), u, sizes)


def _whitening(codec: LayerCodec, x: Tensor, is_key: bool, by_coordinate: bool) -> tuple[dict[str, int], tuple[Tensor | None, Tensor | None]]:
    """Definitions of whiten.cu, and the tables of the frame."""
    frame = codec.frame if is_key else None
    definitions = {
        "D": x.shape[-1],
        "DTYPE": _DTYPES[x.dtype],
        "RUN": frame.run if frame is not None else 0,
        "PAIRS": len(frame.rotary.inv_freq) if frame is not None else 0,
        "INTERLEAVED": int(frame is not None and frame.rotary.interleaved),
        "TRAJECTORY": int(frame is not None and frame.trajectory),
        "BY_COORDINATE": int(by_coordinate),
        "SIZES": int(not is_key),
    }
    return definitions, (frame.rotary.inv_freq, frame.turns) if frame is not None else (None, None)


def _column_tiles(dim: int) -> tuple[int, int]:
    """Tiles of columns, and columns of a thread, of kernels/whiten.cu."""
    tiles = -(-dim // 128)
    return tiles, -(-dim // 16 // tiles)


def plan_scalar(side: SideCodec, u: Tensor, records: Tensor, is_key: bool) -> Encoding:
    """Everything of the encoding by scalar planes but the launch, on any device.

    Args:
        side: The codec.
        u: [B, H, T, D] from `plan_whitening`.
        records: [B, H, T / 128, bytes], the side's codes in the store: a view whose units are contiguous records of all B H rows.
        is_key: Which side.
    """
    quantizer, (batch, heads, count, dim) = side.quantizer, u.shape
    assert isinstance(quantizer, UniformPlanes)
    units = count // UNIT
    gains, error = u.new_empty((batch, heads, count), dtype=torch.uint8), u.new_empty((batch, heads, count))
    definitions = {"D": dim, "PLANES": side.decode_matrix.shape[1], "IS_KEY": int(is_key), "GAIN": _GAINS[side.gain]}
    arguments = (
        u, quantizer.step, quantizer.top, side.scale, quantizer.coordinate, quantizer.shift, records, gains, error,
        units, records.stride(1), records.stride(2), heads,
    )  # fmt: skip
    return Encoding(Launch("encode_scalar.cu", "encode_scalar", definitions, arguments, batch * heads * units, THREADS, UNIT * dim), gains, error)


def plan_joint(side: SideCodec, tables: Tensor, u: Tensor, records: Tensor) -> Encoding:
    """`plan_scalar` for values by joint planes: u [B, H, T / 128, D, 128], `tables` from `joint_tables`."""
    quantizer, (batch, heads, units, dim, _) = side.quantizer, u.shape
    assert isinstance(quantizer, JointPlanes)
    blocks, planes = len(quantizer.index), side.decode_matrix.shape[1]
    gains = u.new_empty((batch, heads, units * UNIT), dtype=torch.uint8)
    together = min(blocks, MOST_SIDE)
    while together > 1 and _joint_shared_bytes(tables, blocks, planes, together) > _SHARED_LIMIT:
        together //= 2
    definitions = {"D": dim, "PLANES": planes, "IS_KEY": 0, "GAIN": _GAINS[side.gain], "BLOCKS": blocks, "SIDE": together}
    arguments = (
        u, quantizer.index, quantizer.kept, tables, records, gains, units, records.stride(1), records.stride(2), heads,
    )  # fmt: skip
    shared = _joint_shared_bytes(tables, blocks, planes, together)
    return Encoding(Launch("encode_joint.cu", "encode_joint", definitions, arguments, batch * heads * units, UNIT * together, shared), gains, None)


def _joint_shared_bytes(tables: Tensor, blocks: int, planes: int, together: int) -> int:
    """`Shared` of kernels/encode_joint.cu."""
    words, paths, sums = -(-planes // blocks // 16), 8, 3
    size = together * 4 * tables.shape[1] + paths * UNIT * together * 4 * words + blocks * words * UNIT * 4 + sums * together * UNIT * 4
    return -(-size // 64) * 64


def joint_tables(quantizer: JointPlanes) -> Tensor:
    """[H B, n] float32, `Tables` of kernels/encode_joint.cu for the B blocks of every head."""
    search = quantizer.tables()
    reach, filters = search.reach.double().triu(1), search.filters.double()  # [G, P, P], [G, d, P]
    planes = reach.shape[1]
    scale = quantizer.scale[:, quantizer.index].flatten(0, 1)  # [G, d]
    kept = quantizer.kept[:, quantizer.index].flatten(0, 1)
    padding = -scale.shape[1] % 4
    codes = torch.arange(16, device=reach.device)
    codes = torch.stack([codes % 4, codes // 4]).double()
    moves = [-torch.nn.functional.pad(reach[:, p, p + 1 :], (0, (planes - 1 - p) % 2)).unflatten(1, (-1, 2)) @ codes for p in range(planes - 1)]
    to_b = scale[..., None] * (filters + filters @ reach.mT)  # [G, d, P]
    steps = torch.stack([1.5 * reach.sum(-1) + 1.0, search.weight.double()], -1)
    parts = [
        torch.cat(moves[::-1], 1),
        torch.nn.functional.pad(to_b.mT.flip(1), (0, padding)),
        torch.nn.functional.pad(quantizer.scaled_rows(), (0, padding)),
        steps.flip(1),
        torch.nn.functional.pad(torch.stack([scale, scale * kept], 1), (0, padding)),
        search.ridge[:, None].expand(-1, 4),
    ]
    flat = torch.cat([part.float().flatten(1) for part in parts], -1)
    return torch.nn.functional.pad(flat, (0, -flat.shape[1] % 16)).contiguous()
