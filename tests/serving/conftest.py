"""vLLM in an environment of its own (tests/serving/install.sh); elsewhere these tests are skipped."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spectralquant.cli.models import load_model
from spectralquant.corpus import get_default_calibration_texts
from spectralquant.engine import SpectralQuantEngine

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as safetensors in bfloat16, its calibration beside it."""
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    model, tokenizer, _ = load_model(None, "bfloat16")
    model.hf_quantizer, model.config.quantization_config = None, None  # it came as GGUF, and is none any more
    del model.config.quantization_config
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    engine = SpectralQuantEngine()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine.calibrate(loaded, tokenizer, get_default_calibration_texts(16), progress=False)
    engine.save_pretrained(folder / "spectralquant")
    return folder
