"""Weights in other forms: adapters, quantized, from GGUF files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from near_lossless import NEAR, Pair, packed_tokens, relative, tokens
from tiny_models import TinyTokenizer, tiny_model

from spectralquant import SpectralQuantEngine
from spectralquant.corpus import get_default_calibration_texts


def test_adapters() -> None:
    """LoRA by peft: the model inside is calibrated and applied to, the wrapper generates."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    wrapped = peft.get_peft_model(tiny_model("llama"), config).eval()
    prompt, pair = tokens(500), Pair.of(wrapped.get_base_model())
    pair.require_greedy(Pair(wrapped, pair.engine).generate(prompt, cache := pair.cache()), 500)
    assert packed_tokens(cache) == 256
    out = pair.engine.generate(wrapped, TinyTokenizer(), prompt, 12, do_sample=False)
    assert len(out["tokens"]) > 0


def test_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = tiny_model("llama", torch.bfloat16)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    require_generation(model)


def test_bitsandbytes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    transformers = pytest.importorskip("transformers")
    config = tiny_model("llama").config
    config.intermediate_size = 128  # blocks of 64
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    require_generation(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config))


def test_hqq() -> None:
    core = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = core.HQQLinear(layer.mlp.up_proj, core.BaseQuantizeConfig(nbits=8, group_size=32), compute_dtype=torch.float32, device="cpu")
    require_generation(model)


def require_generation(model: Any) -> None:
    """Far into the coded part, as without a compressed cache."""
    pair, prompt = Pair.of(model), tokens(500)
    cache = pair.cache()
    out = pair.generate(prompt, cache, output_logits=True, return_dict_in_generate=True)
    assert packed_tokens(cache) == 256
    assert relative(torch.stack(out.logits, 1), pair.logits(out.sequences, 500)) < NEAR


@pytest.mark.real
def test_gguf(smollm2: tuple[Any, Any], smollm2_calibration: Path) -> None:
    """SmolLM2 from its GGUF file, 8 bits: the uncompressed model's tokens for two blocks behind the first coded one."""
    model, tokenizer = smollm2
    engine = SpectralQuantEngine(None, 8, noise_bits=8, value_noise_bits=8, d_eff_variance=1.0, quantizer="uniform")
    engine.load_calibration(smollm2_calibration)
    pair, text = Pair(model, engine), get_default_calibration_texts()[20]
    prompt = tokenizer(text, return_tensors="pt")["input_ids"][:, :400]
    try:
        cache = pair.cache()
        out = pair.generate(prompt, cache, max_new_tokens=24)
        want = pair.generate(prompt, None, max_new_tokens=24)
    finally:
        engine.remove_from(model)
    assert packed_tokens(cache) == 256 and torch.equal(out, want)
