"""The calibration of a model that is a folder on disk, found and checked without loading its weights.

For servers, where the model that runs is of another class, with fused weights. Names and shapes of parameters come from a model on the device "meta", made
from the configuration; values from the safetensors files, which are mapped into memory: of a large tensor only the pages around the sample are read.
"""

import json
import logging
import os
import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from spectralquant import calibration_cache
from spectralquant.calibration.hf import architecture, sampled, values_digest
from spectralquant.errors import CalibrationError, ConfigError
from spectralquant.pretrained import BESIDE, find_in
from spectralquant.profile import Profile

_log = logging.getLogger("spectralquant")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UNREADABLE = (OSError, ValueError, ImportError, KeyError, SafetensorError)
"""What transformers raises for a model that it can't load."""


def without_weights(name: str | os.PathLike[str], **options: Any) -> Any:
    """The causal LM that transformers makes from a configuration, on the device "meta". Raises any of UNREADABLE."""
    config = AutoConfig.from_pretrained(name, **options)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def fingerprint_of_folder(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `calibration.hf.fingerprint` gives for the model that `AutoModelForCausalLM` loads from `folder`.

    Its "weights" are None where the safetensors files don't hold the parameters by name and shape: quantized checkpoints, experts that transformers fuses,
    files of another kind. `Profile.require_model` then compares all but the weights.

    Raises:
        ConfigError: The folder holds no model that transformers knows, or one that can't be read.
    """
    folder = Path(folder)
    expected = "expected a model as save_pretrained writes it, config.json and safetensors files"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no config.json; {expected}")
    try:
        model = without_weights(folder)
        return {**architecture(model), "weights": _digest(model, folder)}
    except UNREADABLE as error:
        raise ConfigError(f"the model in {folder} can't be read; {expected}: {' '.join(str(error).split())[:300]}") from error


def find_calibration(folder: str | os.PathLike[str], fingerprint: dict[str, Any]) -> tuple[Path, Profile] | None:
    """A calibration of the model in `folder`: the one beside it (see `pretrained`), else the newest that is kept on this machine (see `calibration_cache`).

    Args:
        folder: The model's.
        fingerprint: See `fingerprint_of_folder`.

    Returns:
        The file and what it holds, or None; `missing_calibration` is the error to raise then. What is damaged or another model's is passed over, with a warning
        where it lies beside the model or can't be read.
    """
    found = find_in(Path(folder), fingerprint) or calibration_cache.find_kept(fingerprint)
    if found is not None and fingerprint["weights"] is None:
        _log.warning("%s fits the model in %s by architecture and sizes; whether it was made from these weights can't be known", found[0], folder)
    return found


def missing_calibration(folder: str | os.PathLike[str], fingerprint: dict[str, Any]) -> CalibrationError:
    """The error for a model that `find_calibration` finds nothing for. It says how to make a calibration, and where to put it."""
    kept, beside = calibration_cache.calibrations_folder(), Path(folder) / BESIDE
    model = f"{fingerprint['architecture']}, {fingerprint['layers']} layers, weights {fingerprint['weights'] or 'not known'}"
    places = f"in {beside}" if kept is None else f"in {beside} or {kept}"
    elsewhere = "" if kept is None else f"; where that folder can't be written, leave --out away and it is kept in {kept}"
    command = f"spectralquant calibrate {shlex.quote(str(folder))} --out {shlex.quote(str(beside))}"
    return CalibrationError(f"there is no calibration of the model in {folder} ({model}) {places}; make it once: {command}{elsewhere}")


def _digest(model: PreTrainedModel, folder: Path) -> str | None:
    """`weights_digest` of the model with the weights in `folder`, or None, see `fingerprint_of_folder`."""
    if getattr(model.config, "quantization_config", None) is not None:
        return None
    names: dict[torch.Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # one that is tied has several names, and the file may have any of them
        names.setdefault(parameter, []).append(name)
    with ExitStack() as opened:
        files = _files(folder, opened)
        entries = {known[0]: _entry(files, known, parameter.shape, f"{model.base_model_prefix}.") for parameter, known in names.items()}
        found = {name: entry for name, entry in entries.items() if entry is not None}
        if len(found) < len(entries):
            return None
        values = ((name, files[entry].get_tensor(entry)) for name, entry in sorted(found.items()))
        return values_digest((name, tensor.shape, tensor) for name, tensor in values)


def _entry(files: Mapping[str, Any], names: list[str], shape: torch.Size, prefix: str) -> str | None:
    """What the parameter with these names is called in the files, or None: it isn't there, has another shape, or its names have unequal values.

    A checkpoint of the base model, such as GPT-2's, lacks the prefix.
    """
    there = [e for e in dict.fromkeys([*names, *(name.removeprefix(prefix) for name in names)]) if e in files]
    if not there or any(files[e].get_slice(e).get_shape() != list(shape) for e in there):
        return None
    if len(there) > 1:
        first, *others = (sampled(files[e].get_tensor(e)).float() for e in there)
        if any(not torch.equal(first, other) for other in others):
            return None
    return there[0]


def _files(folder: Path, opened: ExitStack) -> dict[str, Any]:
    """Name of a tensor -> the open file that holds it."""
    if (folder / WEIGHTS).is_file():
        file = opened.enter_context(safe_open(folder / WEIGHTS, framework="pt"))
        return dict.fromkeys(file.keys(), file)
    if not (folder / INDEX).is_file():
        return {}
    shards: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    files = {name: opened.enter_context(safe_open(folder / name, framework="pt")) for name in set(shards.values())}
    return {name: files[shard] for name, shard in shards.items()}
