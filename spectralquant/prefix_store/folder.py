"""The folder of a store: where entries lie, and which files are entries.

    FOLDER/<root>/<block>.safetensors            names are digests, see `names`
    FOLDER/<root>/<block>.tails/<tail>.safetensors

Files that others put there are passed over, and no link is followed.
"""

import os
import re
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectralquant.errors import CacheFileError
from spectralquant.prefix_store.entries import BLOCK, TAIL, read_entry
from spectralquant.prefix_store.names import NAME, next_name
from spectralquant.tensor_file import SUFFIX

TAILS = ".tails"
_BLOCK_FILE = re.compile(rf"{NAME.pattern}\{SUFFIX}")
_TAIL_FILE = re.compile(rf"[0-9]{{1,4}}-{NAME.pattern}\{SUFFIX}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a store.

    Attributes:
        path: The file.
        kind: "block" or "tail".
        nbytes: Its size.
        used: When it was used last, seconds since 1970.
    """

    path: Path
    kind: str
    nbytes: int
    used: float


@dataclass(frozen=True, slots=True)
class Problem:
    """What `PrefixStore.verify` found: a file, and what is wrong with it. `broken`: it is an entry that can't be read."""

    path: Path
    text: str
    broken: bool


def block_path(root: Path, name: str) -> Path:
    """The file of a block."""
    return root / (name + SUFFIX)


def tail_path(root: Path, before: str, ids: Tensor) -> Path:
    """The file of the tail with tokens ids [n] behind the block called `before`."""
    return root / (before + TAILS) / (tail_stem(before, ids) + SUFFIX)


def root_of(path: Path) -> Path:
    """The root's folder of an entry."""
    return path.parents[1] if path.parent.name.endswith(TAILS) else path.parent


def entries(directory: Path) -> Generator[Entry]:
    """All entries, in no order. Files that are none, links among them, are passed over."""
    for path, stat in files(directory):
        kind = kind_of(path)
        if kind is not None:
            yield Entry(path, kind, stat.st_size, stat.st_mtime)


def files(directory: Path) -> Generator[tuple[Path, os.stat_result]]:
    """Files of roots and their folders of tails."""
    for root in _folders(directory):
        for folder in (root, *(f for f in _folders(root) if f.name.endswith(TAILS))):
            with suppress(FileNotFoundError), os.scandir(folder) as listed:
                for item in listed:
                    with suppress(FileNotFoundError):  # evicted meanwhile
                        if item.is_file(follow_symlinks=False):
                            yield Path(item.path), item.stat(follow_symlinks=False)


def tail_stem(before: str, ids: Tensor) -> str:
    """The name of a tail, without suffix: tokens ids [n] behind the block called `before`."""
    return f"{len(ids)}-{next_name(before, ids)}"


def find_tail(root: Path, before: str, ids: Tensor) -> Path | None:
    """The longest tail behind the block called `before` that ids [n] begin with."""
    folder = root / (before + TAILS)
    try:
        stems = [file.stem for file in folder.iterdir() if _TAIL_FILE.fullmatch(file.name)]
    except OSError:  # nearly always: there is none
        return None
    lengths = sorted({int(stem.partition("-")[0]) for stem in stems}, reverse=True)
    wanted = (tail_stem(before, ids[:length]) for length in lengths if length <= len(ids))
    return next((folder / (stem + SUFFIX) for stem in wanted if stem in stems), None)


def kind_of(path: Path) -> str | None:
    """What a file is by its name, None for no entry."""
    if path.parent.name.endswith(TAILS):
        return TAIL if _TAIL_FILE.fullmatch(path.name) else None
    return BLOCK if _BLOCK_FILE.fullmatch(path.name) else None


def require_own_name(path: Path) -> str:
    """The name of the block before an entry, which is read whole.

    Raises:
        CacheFileError: It can't be read, or has the name of another entry.
    """
    kind = kind_of(path)
    assert kind is not None
    tensors, header = read_entry(path, kind)
    before, ids = header.get("before", ""), tensors.get("token_ids")
    if ids is None or ids.dtype != torch.int64 or ids.dim() != 1:
        raise CacheFileError(f"{path} has no token ids")
    stem = tail_stem(before, ids) if kind == TAIL else next_name(before, ids)
    if stem + SUFFIX != path.name or (kind == TAIL and path.parent.name != before + TAILS):
        raise CacheFileError(f"{path} holds another text than its name says")
    return before


def _folders(parent: Path) -> list[Path]:
    """Folders in `parent` that have the name of a root or of tails; no links."""
    try:
        with os.scandir(parent) as listed:
            return [Path(item.path) for item in listed if NAME.fullmatch(item.name.removesuffix(TAILS)) and item.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
