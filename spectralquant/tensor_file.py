"""Files of named tensors, written whole or not at all, and read as if a stranger had made them.

A file is safetensors: a JSON header and raw bytes, no code. Its metadata say what kind of file it is, in which version, and carry a checksum over metadata and
tensors. Sizes are checked before anything is allocated: the header's against a limit, those of tensors, by safetensors, against the file. On a CPU what is
read lies in the file (mapped privately into memory), so nothing is copied that is not written to. Files are replaced by renaming and never written to in place,
so who has one mapped keeps what was read.
"""

import hashlib
import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectralquant.errors import SpectralQuantError
from spectralquant.untrusted import one_line

MAX_HEADER = 16 << 20
"""Bytes of names, shapes and metadata that a file may have; those of a model with a thousand layers are 2 MB."""
SUFFIX = ".safetensors"

Header = dict[str, str]


@dataclass(frozen=True, slots=True)
class FileKind:
    """One kind of file.

    Attributes:
        format: What the metadata call it.
        version: Of the format; only this one is read.
        noun: What messages call it.
        remedy: What a user does about a file that can't be used.
        error: What is raised then.
    """

    format: str
    version: int
    noun: str
    remedy: str
    error: type[SpectralQuantError]

    def write(self, path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], *, durable: bool = True) -> None:
        """Write aside, then rename: a reader sees the old file or the new one.

        Args:
            path: The file. Its folder is made if it is missing.
            tensors: On any device.
            header: Metadata besides "format", "version" and "checksum".
            durable: Wait until the disk has it, so that a power failure leaves the old file or the new one too.

        Raises:
            OSError: It can't be written; the old file is as it was.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        held = {name: _own(t) for name, t in tensors.items()}
        header = {"format": self.format, "version": str(self.version), **header}
        header["checksum"] = checksum(held, header)
        aside = path.with_name(f".{path.name}.{uuid4().hex}")
        try:
            aside.touch()
            mode = aside.stat().st_mode  # what the umask gives: safetensors makes files that nobody else may read, and these are shared
            try:
                save_file(held, aside, metadata=header)
            except SafetensorError as error:  # how safetensors tells of a full disk
                raise OSError(None, f"can't be written ({error}); free some space, or write elsewhere", str(path)) from error
            aside.chmod(mode)
            if durable:
                _flush(aside)
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    @contextmanager
    def opened(self, path: Path) -> Generator[tuple[Any, Header]]:
        """The open file and its metadata. What can't be read inside of the block is this kind's error; no checksum is compared."""
        self.require_file(path)
        try:
            self._require_bounded(path)
            opened: Any = safe_open(path, framework="pt")
            with opened as file:
                header: Header = file.metadata() or {}
                self._require_kind(path, header)
                yield file, header
        except SpectralQuantError:
            raise
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError) as error:
            raise self.error(f"{path} is not a readable {self.noun} ({one_line(error)}), it is truncated or damaged: {self.remedy}") from error

    def read(self, path: Path) -> tuple[dict[str, Tensor], Header]:
        """All tensors, on the CPU, and the metadata.

        Raises:
            SpectralQuantError: Of this kind: the file is missing, no such file, truncated, of another version, or damaged; the text says which.
        """
        with self.opened(path) as (file, header):
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        if header.get("checksum") != checksum(tensors, header):
            raise self.error(f"{path} is damaged: its checksum does not match its content; {self.remedy}")
        return tensors, header

    def require_file(self, path: Path) -> None:
        """Raise unless there is a file, and no folder, pipe or device."""
        try:
            if path.is_file():
                return
            wrong = "is no file" if path.exists() else "does not exist"
        except OSError as error:  # a folder above it may not be entered
            raise self.error(f"{self.noun} {path} can't be reached ({error.strerror}); let this user read it") from error
        raise self.error(f"{self.noun} {path} {wrong}: {self.remedy}")

    @staticmethod
    def _require_bounded(path: Path) -> None:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER:
            raise ValueError(f"a header of {size:,} bytes, at most {MAX_HEADER:,} are read")

    def _require_kind(self, path: Path, header: Header) -> None:
        if header.get("format") != self.format:
            raise self.error(f"{path} is a safetensors file but no {self.noun} of this package")
        if header.get("version") != str(self.version):
            raise self.error(f"{path} has format version {one_line(str(header.get('version')))}, this release reads {self.version}; {self.remedy}")


def with_suffix(path: str | os.PathLike[str]) -> Path:
    """`path` with `.safetensors` appended unless it is there."""
    target = Path(path)
    return target if target.suffix == SUFFIX else target.with_name(target.name + SUFFIX)


def checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of metadata (all but the checksum) and of name, dtype, shape and bytes of every tensor, in order of names."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "checksum"}, sort_keys=True).encode())
    for name in sorted(tensors):
        update_digest(digest, name, tensors[name])
    return digest.hexdigest()


def update_digest(digest: Any, name: str, tensor: Tensor) -> None:
    """Let a hash take a tensor on the CPU: name, dtype, shape, bytes."""
    digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _own(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU, alone in its storage: safetensors writes no views."""
    held = tensor.detach().cpu().contiguous()
    return held if held.untyped_storage().nbytes() == held.nbytes else held.clone()


def _flush(path: Path) -> None:
    """Wait for the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
