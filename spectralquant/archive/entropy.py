"""Bytes and small integers through zstandard, which codes entropy with Huffman tables of its own, and back from what a stranger may have written.

A Huffman code spends a whole bit at least, and most symbols here are worth less. So several share a byte: `per` symbols of -reach .. reach are the digits of
a number in base 2 reach + 1. A symbol whose size is the reach or above is followed up, in order, by how far it is above, as two bytes in a frame of its own.

Matches between distant bytes are chance in such data, and a coder that finds them loses by them: its tables are kept small, so that only runs are found.
"""

import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectralquant.errors import CacheFileError, DependencyError

REACHES = {1: 5, 2: 3, 3: 2, 7: 2, 127: 1}
"""Reach -> symbols to a byte."""
MAX_SYMBOL = 32_767
_BLOCK = struct.Struct("<BII")  # reach, bytes of the two frames
_TRIED = 1 << 17
_WINDOW = 17  # log2 of the bytes that a frame may refer back to: what reading one takes


def compress(data: bytes) -> bytes:
    """One frame, which says how long `data` is; the same bytes for the same release of zstandard."""
    return _compressor(thorough=False).compress(data)


def expand(frame: bytes, size: int) -> bytes:
    """What `compress` was given, `size` bytes.

    Raises:
        CacheFileError: It is no frame of exactly `size` bytes; nothing larger is allocated.
    """
    zstd = _zstd()
    try:
        declared = zstd.get_frame_parameters(frame)
        if declared.content_size != size or declared.window_size > max(1 << _WINDOW, size):
            raise CacheFileError(
                f"a part of the archive says that it holds {declared.content_size} bytes, expected {size}; it is damaged: store the prefix again"
            )
        found = zstd.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except (zstd.ZstdError, ValueError, MemoryError) as error:
        raise CacheFileError(f"a part of the archive can't be read ({error}); it is damaged: store the prefix again") from error
    if len(found) != size:
        raise CacheFileError(f"a part of the archive holds {len(found)} bytes, expected {size}; it is damaged: store the prefix again")
    return found


def pack_symbols(symbols: Tensor) -> bytes:
    """A block with integers of -32767 .. 32767, int16 on the CPU, in the reach that makes the first `_TRIED` of them smallest."""
    values = symbols.numpy()
    reach = min(REACHES, key=lambda r: len(_pack(values[:_TRIED], r, compress)))
    return _pack(values, reach, lambda data: _compressor(thorough=True).compress(data))


def split_blocks(data: bytes, count: int) -> list[bytes]:
    """The `count` blocks that `data` is made of.

    Raises:
        CacheFileError: It is made of something else.
    """
    blocks, at = list[bytes](), 0
    for _ in range(count):
        head = data[at : at + _BLOCK.size]
        end = at + _BLOCK.size + sum(_BLOCK.unpack(head)[1:]) if len(head) == _BLOCK.size else len(data) + 1
        if end > len(data):
            raise CacheFileError("the archive ends within a block; it is truncated or damaged: store the prefix again")
        blocks.append(data[at:end])
        at = end
    if at < len(data):
        raise CacheFileError(f"{len(data) - at} bytes are left after the archive's last block; it is damaged: store the prefix again")
    return blocks


def unpack_symbols(block: bytes, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The `count` symbols of a block, int16 on `device`, where all but decompression is done.

    Raises:
        CacheFileError: It is no block of `count` symbols.
    """
    reach, *sizes = _BLOCK.unpack(block[: _BLOCK.size])
    if reach not in REACHES:
        raise CacheFileError(f"the archive has a block of reach {reach}, expected one of {', '.join(map(str, REACHES))}; it is damaged: store the prefix again")
    middle = _BLOCK.size + sizes[0]
    merged = bytes_tensor(expand(block[_BLOCK.size : middle], -(-count // REACHES[reach]))).to(device).int()
    digits = _digits(reach).to(device)
    if merged.numel() and int(merged.max()) >= len(digits):
        raise CacheFileError("the archive has a byte that stands for no symbols; it is damaged: store the prefix again")
    symbols = digits.index_select(0, merged).flatten()[:count].short()
    far = (symbols.abs() == reach).nonzero()[:, 0]
    low, high = bytes_tensor(expand(block[middle:], 2 * len(far))).to(device).int().view(2, -1)
    above = low + 256 * high
    if above.numel() and int(above.max()) > MAX_SYMBOL - reach:
        raise CacheFileError("the archive has a symbol beyond all; it is damaged: store the prefix again")
    symbols[far] += symbols[far].sign() * above.short()
    return symbols


def bytes_tensor(data: bytes) -> Tensor:
    """[N] uint8 on the CPU."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _pack(symbols: NDArray[np.int16], reach: int, into_frame: Callable[[bytes], bytes]) -> bytes:
    per, base = REACHES[reach], 2 * reach + 1
    size = np.abs(symbols)
    near = np.clip(symbols, -reach, reach).astype(np.int32) + reach
    digits = np.pad(near, (0, -len(near) % per), constant_values=reach).reshape(-1, per)
    merged = (digits * base ** np.arange(per)).sum(1).astype(np.uint8)
    above = (size[size >= reach] - reach).astype(np.uint16)
    frames = into_frame(merged.tobytes()), into_frame((above & 255).astype(np.uint8).tobytes() + (above >> 8).astype(np.uint8).tobytes())
    return _BLOCK.pack(reach, *map(len, frames)) + b"".join(frames)


@cache
def _digits(reach: int) -> Tensor:
    """[base^per, per] int8: the symbols that a byte stands for."""
    per, base = REACHES[reach], 2 * reach + 1
    return (torch.arange(base**per)[:, None] // base ** torch.arange(per) % base - reach).to(torch.int8)


def _compressor(thorough: bool) -> Any:
    """One of the caller's own: threads can't share them."""
    zstd = _zstd()
    chosen = {"strategy": zstd.STRATEGY_DFAST, "hash_log": 6, "chain_log": 6}
    if thorough:  # where runs of equal bytes are worth a search, 3 % smaller
        chosen = {"strategy": zstd.STRATEGY_BTULTRA2, "hash_log": 8, "chain_log": 8, "search_log": 1}
    level = 19 if thorough else 3
    return zstd.ZstdCompressor(compression_params=zstd.ZstdCompressionParameters.from_level(level, min_match=7, window_log=_WINDOW, **chosen))


@cache
def _zstd() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise DependencyError('archives of cold prefixes need zstandard; run: pip install "spectralquant[archive]"') from error
    return zstandard
