"""Files of tensors that were damaged, or written anew by who knows the format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectralquant.errors import CacheFileError
from spectralquant.tensor_file import checksum

Header = dict[str, str]
Change = Callable[[dict[str, Tensor], Header], Any]


def rewrite(path: Path, change: Change) -> None:
    """Change a file as one would who knows the format: with a checksum that is right."""
    with safe_open(path, "pt") as file:
        tensors, header = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, header)
    header["checksum"] = checksum(tensors, header)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, header)


def require_damage_found(path: Path, load: Callable[[], Any]) -> None:
    """A flipped bit or an end that is missing is an error, at some two hundred places; the file is whole again afterwards."""
    whole = path.read_bytes()
    for at in range(8, len(whole), len(whole) // 200):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(CacheFileError):
            load()
        path.write_bytes(whole[:at])
        with pytest.raises(CacheFileError):
            load()
    path.write_bytes(whole)
