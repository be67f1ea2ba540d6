"""A prompt put away as an archive, and a cache for follow-ups made from one."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from spectralquant.archive.codec import decode_dense, encode_dense
from spectralquant.archive.predictor import ArchiveModel
from spectralquant.cache.file import dtype_name
from spectralquant.cache.hf import SpectralCache, layer_tensors, model_device, read_dense
from spectralquant.cache.state import capture_others, require_savable, restore_others
from spectralquant.calibration.hf import known_fingerprint
from spectralquant.codec.packed import plain_arithmetic
from spectralquant.cold.file import Archived, Made, parts
from spectralquant.cold.fit import one_sequence
from spectralquant.errors import CacheFileError, ConfigError
from spectralquant.profile import differences
from spectralquant.tensor_file import with_suffix


def archive_prefix(model: PreTrainedModel, ids: Tensor, path: Path, archive: ArchiveModel, rate: int) -> dict[str, Any]:
    """Read ids [1, T] once and write an archive of what the model keeps of them; see `SpectralQuantEngine.archive_prefix`."""
    began, made, archive = time.perf_counter(), made_with(model, archive), archive.to(model_device(model))
    require_savable(DynamicCache(config=model.config.get_text_config(decoder=True)), archive.layers)
    dense = read_dense(model, ids)
    with plain_arithmetic(ids.device):
        others, flags = capture_others(dense, archive.layers)
        held, payloads = one_sequence(dense, archive.layers, ids.device), list[Tensor]()
        for part in parts(ids.shape[1]):
            layers = {i: (keys[:, part.start : part.stop], values[:, part.start : part.stop]) for i, (keys, values) in held.items()}
            payloads.append(encode_dense(archive, layers, rate, part.start))
    target, dtype = with_suffix(path), next(iter(held.values()))[0].dtype
    Archived(ids, payloads, others, flags, dtype).write(target, made)
    whole, size = sum(2 * t.numel() for layer in dense.layers for t in layer_tensors(layer)), target.stat().st_size
    seconds = time.perf_counter() - began
    return {"path": target, "tokens": ids.shape[1], "bytes": size, "ratio": whole / size, "seconds": seconds}


def load_archived(path: Path, model: PreTrainedModel, archive: ArchiveModel, empty: Callable[[], SpectralCache]) -> SpectralCache:
    """A cache like `empty`'s with the prefix in an archive, packed; see `SpectralQuantEngine.load_archived`."""
    target, device = with_suffix(path), model_device(model)
    found = Archived.read(target, made_with(model, archive))
    cache, archive, length = empty(), archive.to(device), found.token_ids.shape[1]
    with plain_arithmetic(device):
        try:
            restore_others(cache, found.others, found.flags, (1, length), found.dtype, cache.device_of)
            for part, payload in zip(parts(length), found.payloads, strict=True):
                _append(cache, found.dtype, decode_dense(archive, payload, len(part), part.start))
        except CacheFileError as error:
            raise CacheFileError(f"{target} can't be used: {error}") from error
    cache.prefix_ids = found.token_ids.to(device)
    return cache


def _append(cache: SpectralCache, dtype: torch.dtype, layers: Iterator[tuple[int, Tensor, Tensor]]) -> None:
    """Let the cache take keys and values [H, T, D], layer by layer as they are decoded, as it takes those of a model."""
    taker: Any = cache
    for i, *pair in layers:
        keys, values = (x[None].to(cache.device_of(i), dtype) for x in pair)
        narrow = taker.layers[i].codec.exact_dtype_for(dtype)
        if not (keys.to(narrow).isfinite().all() and values.to(narrow).isfinite().all()):
            raise CacheFileError(f"layer {i} decodes to numbers beyond {narrow}")
        taker.update(keys, values, i)


def made_with(model: PreTrainedModel, archive: ArchiveModel) -> Made:
    """What an archive of this model is known by.

    Raises:
        ConfigError: `archive` is none, or was fitted for another model.
    """
    if not isinstance(archive, ArchiveModel):
        raise ConfigError(f"archive is a {type(archive).__name__}, expected an archive model: make it with fit_archive, or read it with load_archive")
    known = known_fingerprint(model)
    wrong = differences(archive.model, known)
    if wrong:
        raise ConfigError(f"archive was fitted for another model than this {type(model).__name__} ({', '.join(wrong)} differ); call fit_archive for this one")
    return Made(known["weights"], dtype_name(model.dtype), archive.digest)
