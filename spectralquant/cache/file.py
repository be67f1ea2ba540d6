"""A compressed cache as one file: what `SpectralCache.save` writes and `SpectralCache.load` reads. docs/format.md has every field."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralquant.cache.state import CacheState
from spectralquant.config import CacheConfig, require_int
from spectralquant.errors import CacheFileError, ConfigError
from spectralquant.tensor_file import FileKind, Header
from spectralquant.untrusted import members, parse_json, shown

CACHE_FILE = FileKind("spectralquant-cache", 1, "cache file", "save the cache again, or compute it from the text", CacheFileError)
TOKEN_IDS = "token_ids"


def dtype_name(dtype: torch.dtype) -> str:
    """As files have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


DTYPES = {dtype_name(t): t for t in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
SETTINGS = ("sinks", "window", "max_exact_share")
"""Fields of `CacheConfig` that the content of a cache depends on."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What codes can only be read with.

    Attributes:
        weights: Fingerprint of the model.
        dtype: Of the model.
        calibration: See `codec.identity`.
    """

    weights: str
    dtype: str
    calibration: str

    def require(self, path: Path, header: Header) -> None:
        """Raise CacheFileError unless the file was made with this model, as it is, and this codec."""
        require_model(path, header, self.weights, self.dtype)
        if header.get("calibration") != self.calibration:
            raise CacheFileError(
                f"{path} was made with another calibration, preset or quantizer ({shown(header.get('calibration'))}, here {self.calibration}); "
                "use the engine settings and the calibration file that it was made with"
            )


def require_model(path: Path, header: Header, weights: str, dtype: str) -> None:
    """Raise CacheFileError unless the file was made with the model of fingerprint `weights` in `dtype`."""
    if header.get("weights") != weights:
        raise CacheFileError(f"{path} was made with another model (weights {shown(header.get('weights'))}, here {weights}); load that model")
    if header.get("model_dtype") != dtype:
        raise CacheFileError(f"{path} was made with the model in {shown(header.get('model_dtype'))}, here it is in {dtype}; load the model as it was")


def write_cache(path: Path, state: CacheState, token_ids: Tensor | None, config: CacheConfig, identity: Identity) -> None:
    """Write `state` to one file, as `FileKind.write` does.

    Args:
        path: The file.
        state: Of the cache.
        token_ids: [1, T] int64, what it holds, or None.
        config, identity: The cache's.
    """
    tensors = state.tensors() if token_ids is None else {**state.tensors(), TOKEN_IDS: token_ids}
    CACHE_FILE.write(path, tensors, described(state, config, identity))


def read_cache(path: Path, config: CacheConfig, identity: Identity) -> tuple[CacheState, Tensor | None, CacheConfig]:
    """The state, the token ids [1, T] or None, and `config` with the settings that the file was made with.

    Raises:
        CacheFileError: The file is missing, damaged, of another version, or made with another model or codec.
    """
    tensors, header = CACHE_FILE.read(path)
    identity.require(path, header)
    ids = tensors.pop(TOKEN_IDS, None)
    try:
        state = CacheState.of_tensors(tensors, read_flags(header), read_dtype(header))
        if not state.segments:
            raise CacheFileError("it holds no layer")
        if ids is not None and (ids.dtype != torch.int64 or tuple(ids.shape) != (1, state.length) or state.batch != 1):
            raise CacheFileError(f"{TOKEN_IDS} are {ids.dtype} {tuple(ids.shape)}, expected torch.int64 (1, {state.length}) of one sequence")
        return state, ids, read_config(header, config)
    except (CacheFileError, ConfigError) as error:
        raise CacheFileError(f"{path} can't be used: {error}") from error


def described(state: CacheState, config: CacheConfig, identity: Identity) -> Header:
    """Metadata that go with the tensors of `state`."""
    return {
        "weights": identity.weights,
        "model_dtype": identity.dtype,
        "calibration": identity.calibration,
        "settings": json.dumps({name: getattr(config, name) for name in SETTINGS}),
        "dtype": dtype_name(state.dtype),
        "flags": json.dumps(state.flags),
    }


def read_dtype(header: Header) -> torch.dtype:
    """The model's dtype."""
    if header.get("dtype") not in DTYPES:
        raise CacheFileError(f"dtype is {shown(header.get('dtype'))}, expected one of {', '.join(DTYPES)}")
    return DTYPES[header["dtype"]]


def read_config(header: Header, config: CacheConfig) -> CacheConfig:
    """`config` with the settings in the metadata."""
    settings = _parsed(header, "settings")
    if settings.keys() != set(SETTINGS) or not isinstance(settings["max_exact_share"], (int, float)):
        raise CacheFileError(f"settings are {shown(sorted(settings))}, expected numbers for {', '.join(SETTINGS)}")
    return replace(config, **settings)


def read_flags(header: Header) -> dict[int, dict[str, int | None]]:
    """Layer index -> name -> number."""
    flags: dict[int, dict[str, int | None]] = {}
    for layer, held in _parsed(header, "flags").items():
        index = require_int("layer", int(layer) if layer.isdecimal() and len(layer) <= 6 else layer, 0)
        if not isinstance(held, dict) or not all(v is None or (isinstance(v, int) and abs(v) < 2**31) for v in held.values()):
            raise CacheFileError(f"flags of layer {layer} are no numbers")
        flags[index] = held
    return flags


def _parsed(header: Header, name: str) -> dict[str, Any]:
    """A JSON object in the metadata."""
    try:
        found = parse_json(header.get(name, ""), name)
    except ValueError as error:
        raise CacheFileError(f"{name} in its header is no JSON: {error}") from error
    try:
        return members(found, f"{name} in its header")
    except ValueError as error:
        raise CacheFileError(str(error)) from error
