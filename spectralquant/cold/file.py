"""A prefix as an archive in one file, and back. What comes back is checked: a stranger may have written it. docs/archive.md has every field.

Keys and values are coded in parts of `PART` tokens, so neither coding nor decoding needs the uncompressed cache of a long text at once.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectralquant.cache.file import TOKEN_IDS, dtype_name, read_dtype, read_flags, require_model
from spectralquant.cache.state import CacheState, Flags, Tensors
from spectralquant.errors import CacheFileError, ConfigError
from spectralquant.tensor_file import FileKind
from spectralquant.untrusted import shown

ARCHIVE_FILE = FileKind("spectralquant-archive", 1, "archive of a prefix", "archive the prefix again", CacheFileError)
PART = 4096
"""Tokens of a payload, the last one's at most."""


@dataclass(frozen=True, slots=True)
class Made:
    """What an archive is made with and read with: the model's fingerprint and dtype, and the digest of the archive model."""

    weights: str
    dtype: str
    archive: str


@dataclass(frozen=True, slots=True)
class Archived:
    """One sequence.

    Attributes:
        token_ids: [1, T] int64.
        payloads: [N] uint8, from `archive.codec.encode_dense`, one for each of `parts`.
        others, flags: What layers keep beside coded keys and values, see `cache.state.capture_others`.
        dtype: Of the keys that the model made.
    """

    token_ids: Tensor
    payloads: list[Tensor]
    others: Tensors
    flags: Flags
    dtype: torch.dtype

    def write(self, path: Path, made: Made) -> None:
        """Write one file, as `FileKind.write` does."""
        held = CacheState({}, self.others).tensors()
        payloads = {f"payload.{k}": payload for k, payload in enumerate(self.payloads)}
        header = {"weights": made.weights, "model_dtype": made.dtype, "archive": made.archive, "flags": json.dumps(self.flags)}
        header["dtype"] = dtype_name(self.dtype)
        ARCHIVE_FILE.write(path, {TOKEN_IDS: self.token_ids, **payloads, **held}, header)

    @classmethod
    def read(cls, path: Path, made: Made) -> "Archived":
        """Read and check it; payloads and the tensors of other layers are checked where they are used.

        Raises:
            CacheFileError: It is missing, damaged, of another version, or made with another model or archive model.
        """
        tensors, header = ARCHIVE_FILE.read(path)
        require_model(path, header, made.weights, made.dtype)
        if header.get("archive") != made.archive:
            raise CacheFileError(
                f"{path} was made with another archive model ({shown(header.get('archive'))}, here {made.archive}); load the file and calibration of that one"
            )
        try:
            ids = _token_ids(tensors)
            payloads = [tensors.pop(f"payload.{k}", torch.empty(0)) for k in range(len(parts(ids.shape[1])))]
            wrong = [k for k, payload in enumerate(payloads) if payload.dtype != torch.uint8 or payload.dim() != 1]
            if wrong:
                raise CacheFileError(f"payload.{wrong[0]} is missing or no row of bytes, {ids.shape[1]} tokens have {len(payloads)}")
            state = CacheState.of_tensors(tensors, read_flags(header), read_dtype(header))
            if state.segments:
                raise CacheFileError(f"layer {min(state.segments)} is packed, expected none that is")
            return cls(ids, payloads, state.others, state.flags, state.dtype)
        except (CacheFileError, ConfigError) as error:
            raise CacheFileError(f"{path} can't be used: {error}") from error


def parts(length: int) -> list[range]:
    """The tokens of each payload of a prefix."""
    return [range(first, min(first + PART, length)) for first in range(0, length, PART)]


def _token_ids(tensors: dict[str, Tensor]) -> Tensor:
    ids = tensors.pop(TOKEN_IDS, torch.empty(0))
    if ids.dtype != torch.int64 or ids.dim() != 2 or len(ids) != 1 or not ids.numel():
        raise CacheFileError(f"{TOKEN_IDS} are {ids.dtype} {tuple(ids.shape)}, expected torch.int64 (1, T) with T of 1 or more")
    return ids
