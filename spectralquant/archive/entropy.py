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
from numpy.typing import NDArray

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


def pack_symbols(symbols: NDArray[np.int16]) -> bytes:
    """A block with integers of -32767 .. 32767, in the reach that makes the first `_TRIED` of them smallest."""
    reach = min(REACHES, key=lambda r: len(_pack(symbols[:_TRIED], r, compress)))
    return _pack(symbols, reach, lambda data: _compressor(thorough=True).compress(data))


def unpack_symbols(block: bytes, count: int) -> tuple[NDArray[np.int16], int]:
    """The `count` symbols of the block at the start of `block`, and the block's length in bytes.

    Raises:
        CacheFileError: It is no block of `count` symbols.
    """
    if len(block) < _BLOCK.size:
        raise CacheFileError("the archive ends within a block; it is truncated: store the prefix again")
    reach, *sizes = _BLOCK.unpack(block[: _BLOCK.size])
    if reach not in REACHES or _BLOCK.size + sum(sizes) > len(block):
        raise CacheFileError(f"the archive has a block of reach {reach} and {sum(sizes)} bytes, {len(block)} are left; it is damaged: store the prefix again")
    middle, end = _BLOCK.size + sizes[0], _BLOCK.size + sum(sizes)
    per, base = REACHES[reach], 2 * reach + 1
    merged = np.frombuffer(expand(block[_BLOCK.size : middle], -(-count // per)), np.uint8)
    if len(merged) and merged.max() >= base**per:
        raise CacheFileError("the archive has a byte that stands for no symbols; it is damaged: store the prefix again")
    symbols = _digits(reach)[merged].reshape(-1)[:count].astype(np.int16)
    far = np.flatnonzero(np.abs(symbols) == reach)
    low, high = np.frombuffer(expand(block[middle:end], 2 * len(far)), np.uint8).reshape(2, -1).astype(np.int32)
    above = low + 256 * high
    if len(above) and above.max() > MAX_SYMBOL - reach:
        raise CacheFileError("the archive has a symbol beyond all; it is damaged: store the prefix again")
    symbols[far] += (np.sign(symbols[far]) * above).astype(np.int16)
    return symbols, end


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
def _digits(reach: int) -> NDArray[np.int8]:
    """[base^per, per]: the symbols that a byte stands for."""
    per, base = REACHES[reach], 2 * reach + 1
    return (np.arange(base**per)[:, None] // base ** np.arange(per) % base - reach).astype(np.int8)


@cache
def _compressor(thorough: bool) -> Any:
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
