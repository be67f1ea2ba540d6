"""PrefixStore: compressed beginnings of texts in a folder, for any process that runs the same model with the same calibration.

There is no index and no lock that a reader waits for. Files are written aside and renamed, and never changed, so a reader sees a whole entry or none; what a
process that was killed has left is no entry, and `prune` removes it. The time of a file says when it was used last. It is set such that a block is never older
than those behind it: what is evicted first, least recently used, is always the end of a text.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from spectralquant.byte_counts import parse_bytes
from spectralquant.cache.hf import SpectralCache
from spectralquant.cache.state import CacheState, capture_cache, restore_cache
from spectralquant.codec.layout import UNIT
from spectralquant.codec.packed import plain_arithmetic
from spectralquant.errors import CacheFileError, ConfigError
from spectralquant.prefix_store.entries import BLOCK, Block, Tail, archive_block, joined
from spectralquant.prefix_store.folder import Entry, Problem, block_path, entries, files, find_tail, kind_of, require_own_name, root_of, tail_path
from spectralquant.prefix_store.names import block_names
from spectralquant.prefix_store.shape import StoredShape

T = TypeVar("T", Block, Tail)
_log = logging.getLogger("spectralquant")

LOCK = "evicting.lock"
STALE_SECONDS = 600.0
"""Files that were begun so long ago are nobody's any more."""


@dataclass(frozen=True, slots=True)
class Hit:
    """What a store had of a text.

    Attributes:
        tokens: Of the text, from its beginning; 0 for nothing.
        exact: The cache is as it was when it had read these tokens, to the bit. Else those tokens are all packed, as they would be by now.
        made_in: Seconds that it took to compute it.
        load_seconds: Seconds that it took to find and load it.
    """

    tokens: int = 0
    exact: bool = False
    made_in: float = 0.0
    load_seconds: float = 0.0


@dataclass(slots=True)
class Usage:
    """What one process did with a store.

    Attributes:
        hits, misses: Texts of which something was there, and others.
        hit_tokens: Tokens that were not computed.
        saved_seconds: What they took when they were computed, less what loading them took.
        written_bytes: Of new entries.
        evicted: Entries that had to go.
    """

    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    saved_seconds: float = 0.0
    written_bytes: int = 0
    evicted: int = 0


@dataclass(frozen=True, slots=True)
class _Found:
    """Files of blocks in order, and of the tail behind them."""

    blocks: list[Path]
    tail: Path | None


class PrefixStore:
    """Compressed prefixes in a folder. Any number of processes and threads may use one.

    Whoever can write to the folder decides what models that read it say, and whoever can read it can read the texts: keep it as private as they are.

    Args:
        directory: The folder; it is made if it is missing.
        max_bytes: Size that entries may have in all, "20GB" or a number of bytes. Those that were not used for the longest time go first.

    Attributes:
        usage: What this object did.

    Raises:
        ConfigError: The folder can't be made, or `max_bytes` is no size.
    """

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int | str = "10GB") -> None:
        self.directory: Path = Path(directory).expanduser().absolute()
        self.max_bytes: int = parse_bytes("max_bytes", max_bytes)
        self.usage: Usage = Usage()
        self._lock = threading.Lock()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"directory={str(directory)!r} can't be a store ({error.strerror}); expected a folder that can be written") from error

    # Reading --------------------------------------------------------------------------------------------------------

    def load(self, cache: SpectralCache, token_ids: Tensor) -> Hit:
        """Give an empty cache the longest stored beginning of a text: up to a tail, or as many blocks as would be packed once the text is read, so that the
        recent window is exact as ever.

        Args:
            cache: Empty, from `engine.cache(model)`.
            token_ids: [T] or [1, T] int64, the text.

        Returns:
            What was found; `tokens` is what the cache holds now. An entry that can't be used is removed, with a warning, and counts as missing.

        Raises:
            ConfigError: The cache is not empty, or no cache of an engine.
        """
        began = time.perf_counter()
        if cache.get_seq_length():
            raise ConfigError(f"the cache holds {cache.get_seq_length()} tokens; only an empty one can take a stored prefix")
        shape, ids = StoredShape.of(cache), _flat(token_ids)
        found = self._find(shape, ids)
        blocks = self._read_blocks(shape, ids, found)
        tail = self._read_tail(found, ids) if len(blocks) == len(found.blocks) else None
        whole = tail is not None and self._restore(cache, shape, blocks, tail, found.tail)
        taken = len(blocks) if whole else min(len(blocks), shape.packed_of(len(ids)))
        if not whole and taken:
            self._restore(cache, shape, blocks[:taken], None, found.blocks[0])
        held = cache.get_seq_length()
        if held:
            self._touch([*found.blocks[: len(blocks)], *([found.tail] if whole and found.tail else [])])
        made = sum(block.seconds for block in blocks[:taken]) + (tail.seconds if tail is not None and whole else 0.0)
        hit = Hit(held, whole, made if held else 0.0, time.perf_counter() - began)
        self._count(hit)
        return hit

    def _find(self, shape: StoredShape, ids: Tensor) -> _Found:
        """The files with the longest stored beginning of ids [T]."""
        root = self.directory / shape.root
        names = block_names(shape.root, ids)
        depth = next((i for i, name in enumerate(names) if not block_path(root, name).is_file()), len(names))
        packed = min(depth, shape.packed_of(len(ids)))
        for count in range(depth, max(packed - 2, 0), -1):  # a window holds less than two blocks
            tail = find_tail(root, names[count - 1], ids[UNIT * count :])
            if tail is not None:
                return _Found([block_path(root, name) for name in names[:count]], tail)
        return _Found([block_path(root, name) for name in names[:packed]], None)

    def _read_blocks(self, shape: StoredShape, ids: Tensor, found: _Found) -> list[Block]:
        blocks: list[Block] = []
        for i, path in enumerate(found.blocks):
            block = self._try_read(path, lambda path: Block.read(path, shape.layers), ids[UNIT * i : UNIT * (i + 1)])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _read_tail(self, found: _Found, ids: Tensor) -> Tail | None:
        if found.tail is None:
            return None
        length = int(found.tail.name.partition("-")[0])
        return self._try_read(found.tail, Tail.read, ids[UNIT * len(found.blocks) :][:length])

    def _try_read(self, path: Path, read: Callable[[Path], T], ids: Tensor) -> T | None:
        """The entry with these tokens [n], or None: it is gone meanwhile, or can't be used and is removed."""
        try:
            entry = read(path)
            if not torch.equal(entry.token_ids, ids):
                raise CacheFileError(f"{path} holds another text than its name says")
            return entry
        except CacheFileError as error:
            if path.is_symlink() or path.exists():
                self._drop(path, error)
            return None

    def _restore(self, cache: SpectralCache, shape: StoredShape, blocks: Sequence[Block], tail: Tail | None, path: Path | None) -> bool:
        """Whether the cache could take them; `path` goes if not."""
        try:
            with plain_arithmetic(torch.device("cpu")):
                state = joined(blocks, tail, shape.layers, shape.half, shape.dtype)
                restore_cache(cache, state, shape.config, cache.device_of)
            return True
        except CacheFileError as error:
            cache.reset()
            if path is not None:
                self._drop(path, error)
            return False

    def _drop(self, path: Path, error: Exception) -> None:
        _log.warning("an entry of the prefix store can't be used, it is removed: %s", error)
        with suppress(OSError):
            path.unlink()

    def _touch(self, paths: Sequence[Path]) -> None:
        """Note that entries were used, those in front last."""
        now = time.time_ns()
        for i, path in enumerate(paths):
            with suppress(OSError):  # it may be evicted meanwhile, or belong to another user
                os.utime(path, ns=(now - 1000 * i, now - 1000 * i))

    def _count(self, hit: Hit) -> None:
        with self._lock:
            self.usage.hits += hit.tokens > 0
            self.usage.misses += hit.tokens == 0
            self.usage.hit_tokens += hit.tokens
            self.usage.saved_seconds += max(hit.made_in - hit.load_seconds, 0.0) if hit.tokens else 0.0

    # Writing --------------------------------------------------------------------------------------------------------

    def save(self, cache: SpectralCache, token_ids: Tensor, seconds: float = 0.0, tail: Tail | None = None) -> int:
        """Store what a cache holds of a text, and evict what is too much.

        Args:
            cache: One that has read the text, without padding; of several sequences the first counts.
            token_ids: [T] or [1, T] int64, the text, or its beginning.
            seconds: What it took to compute a token; hits are told what they save by it.
            tail: From `snapshot`, where the window has moved on since; None takes the cache as it is, if it holds this text and no more.

        Returns:
            Bytes that were written: what is there already is not written again.

        Raises:
            ConfigError: The cache is no cache of an engine, is padded, or holds less than the text.
            OSError: The folder can't be written. Entries that were written before are whole.
        """
        shape, ids = StoredShape.of(cache), _flat(token_ids)
        with plain_arithmetic(torch.device("cpu")):
            state = capture_cache(cache)
        _require_held(state, ids)
        if tail is None and state.batch == 1 and state.length == len(ids):
            tail = Tail.of(state, ids, seconds)
        root, names = self.directory / shape.root, block_names(shape.root, ids)[: state.units]
        before = self.usage.written_bytes
        for unit, name in enumerate(names):
            path = block_path(root, name)
            if not path.is_file():
                block = Block.of(state, unit, ids[UNIT * unit : UNIT * (unit + 1)], shape.layers.layout, seconds * UNIT)
                self._write(path, partial(block.write, path, names[unit - 1] if unit else shape.root))
        paths = [block_path(root, name) for name in names]
        if tail is not None and 0 < tail.units <= len(names):
            path = tail_path(root, names[tail.units - 1], tail.token_ids)
            if not path.is_file():
                self._write(path, partial(tail.write, path, names[tail.units - 1]))
            paths.append(path)
        self._touch(paths)
        self._evict(self.max_bytes)
        return self.usage.written_bytes - before

    def _write(self, path: Path, write: Callable[[], None]) -> None:
        try:
            write()
        except FileNotFoundError:  # another process has just removed the empty folder
            write()
        with suppress(OSError), self._lock:
            self.usage.written_bytes += path.stat().st_size

    def _evict(self, max_bytes: int) -> int:
        """Remove the least recently used entries beyond `max_bytes`; returns how many. One process does, others go on."""
        there = self.entries()
        total = sum(entry.nbytes for entry in there)
        if total <= max_bytes:
            return 0
        count = 0
        with suppress(Timeout), FileLock(self.directory / LOCK, timeout=0):
            for entry in sorted(there, key=lambda entry: entry.used):
                if total <= max_bytes:
                    break
                total -= entry.nbytes
                count += self._remove(entry.path)
        with self._lock:
            self.usage.evicted += count
        return count

    def _remove(self, path: Path) -> bool:
        """Whether there was such a file. Folders that are empty then go as well."""
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        with suppress(OSError):  # not empty
            path.parent.rmdir()
        return True

    # Keeping --------------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All entries, in no order."""
        return list(entries(self.directory))

    def stats(self) -> dict[str, Any]:
        """{directory, max_bytes, bytes, blocks, tails, tokens} of the folder, `tokens` of all blocks, and {hits, misses, hit_tokens, saved_seconds,
        written_bytes, evicted} of this object."""
        there = self.entries()
        blocks = sum(entry.kind == BLOCK for entry in there)
        held = {"bytes": sum(entry.nbytes for entry in there), "blocks": blocks, "tails": len(there) - blocks, "tokens": UNIT * blocks}
        return {"directory": str(self.directory), "max_bytes": self.max_bytes, **held, **asdict(self.usage)}

    def verify(self, progress: Callable[[], object] = lambda: None) -> list[Problem]:
        """Read every entry and compare checksum and name.

        Args:
            progress: Called after every file.

        Returns:
            What is wrong: entries that can't be read, entries that no text can reach, and files that a process has begun and not finished.
        """
        problems: list[Problem] = []
        before: dict[Path, Path] = {}  # of every entry, the file in front of it: a block, or the root's folder
        for path, stat in files(self.directory):
            try:
                if kind_of(path):
                    root, name = root_of(path), require_own_name(path)
                    before[path] = root if name == root.name else block_path(root, name)
                elif time.time() - stat.st_mtime > STALE_SECONDS:
                    problems.append(Problem(path, "it was begun and not finished, or is no file of a store", False))
            except CacheFileError as error:
                if path.exists():  # it may be evicted meanwhile
                    problems.append(Problem(path, str(error), True))
            progress()
        reached = {root_of(path) for path in before}
        while more := [path for path, front in before.items() if front in reached and path not in reached]:
            reached.update(more)
        return problems + [Problem(path, "a block in front of it is gone, no text reaches it", False) for path in before if path not in reached]

    def archive(self, unused_for: float, progress: Callable[[], object] = lambda: None) -> int:
        """Code blocks that were not used for so many seconds in fewer bytes, without loss. They are found and loaded as before, somewhat more slowly.

        Args:
            unused_for: Seconds.
            progress: Called after every block.

        Returns:
            Bytes saved.

        Raises:
            DependencyError: The extra "archive" is not installed.
        """
        limit, saved = time.time() - unused_for, 0
        for entry in self.entries():
            if entry.kind == BLOCK and entry.used < limit:
                try:
                    saved += archive_block(entry.path)
                except CacheFileError as error:
                    if entry.path.exists():  # it may be evicted meanwhile
                        self._drop(entry.path, error)
                progress()
        return saved

    def prune(self, max_bytes: int | str | None = None, unused_for: float | None = None) -> int:
        """Remove what `verify` finds, what was not used for `unused_for` seconds, and the least recently used entries beyond `max_bytes` (None: this store's).

        Returns:
            Files removed.
        """
        removed = sum(self._remove(problem.path) for problem in self.verify())
        if unused_for is not None:
            limit = time.time() - unused_for
            removed += sum(self._remove(entry.path) for entry in self.entries() if entry.used < limit)
        return removed + self._evict(self.max_bytes if max_bytes is None else parse_bytes("max_bytes", max_bytes))


def snapshot(cache: SpectralCache, token_ids: Tensor, seconds: float = 0.0) -> Tail:
    """A copy of what a cache holds behind its packed units, for `PrefixStore.save` later on.

    Args:
        cache: Holds token_ids and nothing else, without padding; of several sequences the first counts.
        token_ids: [T] or [1, T] int64.
        seconds: What it took to compute a token.
    """
    with plain_arithmetic(torch.device("cpu")):
        return Tail.of(capture_cache(cache), _flat(token_ids), seconds).copy()


def _require_held(state: CacheState, ids: Tensor) -> None:
    if int(next(iter(state.segments.values())).start[0]):
        raise ConfigError("the cache is padded on the left; a store takes texts that begin at the first slot")
    if len(ids) > state.length:
        raise ConfigError(f"token_ids has {len(ids)} tokens, the cache holds {state.length}; expected the text that it has read, or its beginning")


def _flat(token_ids: Tensor) -> Tensor:
    """[T] int64 on the CPU."""
    ids = torch.as_tensor(token_ids)
    if ids.dtype != torch.int64 or ids.dim() not in (1, 2) or (ids.dim() == 2 and len(ids) != 1):
        raise ConfigError(f"token_ids is {ids.dtype} {tuple(ids.shape)}, expected torch.int64 [T] or [1, T]: a store takes one text at a time")
    return ids.flatten().cpu()
