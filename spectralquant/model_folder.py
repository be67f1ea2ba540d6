"""The calibration of a model that is a folder on disk, found and checked without loading its weights.

For servers, where the model that runs is of another class, with fused weights. Names and shapes of parameters come from a model on the device "meta", made
from the configuration; values from the safetensors files, which are mapped into memory: of a large tensor only the pages around the sample are read.

The folder may be a stranger's. Its weights are looked for in the folder alone (a link that lies in it may lead out, as those of the hub's cache do), no code
of it is run, and a configuration that asks for a million of modules is refused while the model is made.
"""

import logging
import os
import re
import shlex
import threading
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
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
from spectralquant.untrusted import MAX_DEPTH, member, members, one_line, parse_json, printable, read_bounded, shown

_log = logging.getLogger("spectralquant")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UNREADABLE = (OSError, ValueError, ImportError, KeyError, SafetensorError)
"""What transformers raises for a model that it can't load."""
MAX_CONFIG, MAX_INDEX = 16 << 20, 256 << 20
"""Bytes of a configuration, and of the list of a model's tensors."""
MAX_COUNT = 10_000
"""Of layers, blocks or experts in a configuration: transformers makes lists of so many before it makes modules."""
MAX_PARAMETERS = 500_000
"""Modules and parameters; the largest models of many experts have a third of that, and to make as many takes seconds."""
_COUNTS = re.compile("(?:num|n)_.*(?:layer|block|expert|stage|branch|label)|layers$|depths?$")


def without_weights(name: str | os.PathLike[str], **options: Any) -> Any:
    """The causal LM that transformers makes from a configuration, on the device "meta". Raises any of UNREADABLE; no code of the model's is run."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
        with torch.device("meta"), _few_parameters():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except UNREADABLE:
        raise
    except Exception as error:  # transformers computes with what a configuration says: anything may come of it
        raise ValueError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _few_parameters() -> Generator[None]:
    """Let making a model of more than MAX_PARAMETERS modules and parameters fail with ValueError, in this thread."""
    left, thread = MAX_PARAMETERS, threading.get_ident()

    def count(*_: Any) -> None:
        nonlocal left
        if threading.get_ident() == thread:
            left -= 1
            if left < 0:
                raise ValueError(f"its configuration makes a model of more than {MAX_PARAMETERS:,} modules and parameters")

    hooks = [
        torch.nn.modules.module.register_module_parameter_registration_hook(count),
        torch.nn.modules.module.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def fingerprint_of_folder(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `calibration.hf.fingerprint` gives for the model that `AutoModelForCausalLM` loads from `folder`.

    Its "weights" are None where the safetensors files don't hold the parameters by name and shape: quantized checkpoints, experts that transformers fuses,
    files of another kind. `Profile.require_model` then compares all but the weights.

    Raises:
        ConfigError: The folder holds no model that transformers knows, or one that can't be read.
    """
    folder = Path(folder)
    expected = "expected a model as save_pretrained writes it, config.json and safetensors files"
    try:
        if not (folder / "config.json").exists():
            raise ConfigError(f"{folder} holds no config.json; {expected}")
        _require_sensible(read_bounded(folder / "config.json", MAX_CONFIG))
        model = without_weights(folder)
        return {**architecture(model), "weights": _digest(model, folder)}
    except ConfigError:
        raise
    except (*UNREADABLE, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError) as error:
        raise ConfigError(f"the model in {folder} can't be read; {expected}: {one_line(error)}") from error


def _require_sensible(config: bytes) -> None:
    """Raise ValueError for a configuration that takes transformers for ever to read."""
    parts: list[Any] = [members(parse_json(config, "config.json"), "config.json")]
    for _ in range(MAX_DEPTH):
        for part in (part for part in parts if isinstance(part, dict)):
            for name, value in part.items():
                if isinstance(value, (int, float)) and value > MAX_COUNT and _COUNTS.search(name):
                    raise ValueError(f"config.json has {name} {shown(value)}, expected at most {MAX_COUNT:,}")
        parts = [inner for part in parts if isinstance(part, (dict, list)) for inner in (part.values() if isinstance(part, dict) else part)]


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
        file = _open(folder / WEIGHTS, opened)
        return dict.fromkeys(file.keys(), file)
    if not (folder / INDEX).is_file():
        return {}
    index = members(parse_json(read_bounded(folder / INDEX, MAX_INDEX), INDEX), INDEX)
    shards = {name: _shard(shard) for name, shard in members(member(index, "weight_map", INDEX), "weight_map").items()}
    files = {shard: _open(folder / shard, opened) for shard in set(shards.values())}
    return {name: files[shard] for name, shard in shards.items()}


def _shard(name: Any) -> str:
    """The name of a file that lies in the model's folder, and nowhere else."""
    if Path(printable(name, "a file in weight_map")).name != name or "\\" in name or ":" in name or not name.endswith(".safetensors"):
        raise ValueError(f"weight_map names the file {shown(name)}, expected a .safetensors file in the same folder")
    return name


def _open(path: Path, opened: ExitStack) -> Any:
    if not path.is_file():  # opening a pipe would wait for who writes to it
        raise ValueError(f"{path} is not there, or no file")
    return opened.enter_context(safe_open(path, framework="pt"))
