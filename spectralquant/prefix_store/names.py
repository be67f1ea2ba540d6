"""What entries of the store are called: digests of what they hold, so an entry never changes and is found without an index.

A text is cut into blocks of 128 tokens. The name of a block is a digest over the name of the block before it and its own tokens, that of the first one over the
name of its root: the model, the calibration and the settings that codes depend on. So a block's name stands for everything up to its end, texts that begin
alike have the same first names, and the longest stored beginning of a text is found by looking for one name after another.
"""

import hashlib
import json
import re
from dataclasses import asdict

from torch import Tensor

from spectralquant.cache.file import SETTINGS, Identity
from spectralquant.codec.layout import UNIT
from spectralquant.config import CacheConfig

LENGTH = 40
"""Hexadecimal digits of a name, 160 bits of SHA-256."""
NAME = re.compile(f"[0-9a-f]{{{LENGTH}}}")
_FORMAT = 1


def root_name(identity: Identity, config: CacheConfig) -> str:
    """The name of what all entries of one model, calibration and setting have in common."""
    held = {"format": _FORMAT, **asdict(identity), **{name: getattr(config, name) for name in SETTINGS}}
    return _digest(json.dumps(held, sort_keys=True).encode())


def block_names(root: str, ids: Tensor) -> list[str]:
    """Names of the whole blocks of ids [T] int64, on the CPU."""
    names, before = list[str](), root
    for block in ids[: len(ids) // UNIT * UNIT].split(UNIT):
        before = next_name(before, block)
        names.append(before)
    return names


def next_name(before: str, ids: Tensor) -> str:
    """The name of the tokens ids [n] int64 that come after what is called `before`."""
    return _digest(before.encode() + ids.numpy().astype("<i8").tobytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:LENGTH]
