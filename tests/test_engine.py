"""The engine and the API on a tiny model: what they return, what they leave alone, what they refuse."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyTokenizer, tiny_model
from transformers import AttentionInterface, MambaConfig, MambaForCausalLM, PreTrainedModel, TextStreamer

from spectralquant import EigenspectralCalibrator, SpectralQuant, SpectralQuantEngine, get_default_calibration_texts
from spectralquant.calibration.hf import fingerprint
from spectralquant.errors import CalibrationError, ConfigError, ProfileError, ShapeError, UnsupportedModelError

PROMPT = " ".join(f"word{i} and some more text" for i in range(90))


@pytest.fixture
def sq(llama: PreTrainedModel, llama_calibration: Path) -> Any:
    made = SpectralQuant(compression="high")
    made.load_calibration(llama_calibration)
    yield made
    made.engine.remove_from(llama)


def test_calibrate_returns_the_documented_keys_and_leaves_the_model(tokenizer: TinyTokenizer) -> None:
    model = tiny_model("llama", seed=5).train()
    before = (model.config._attn_implementation, model.training, fingerprint(model), model.config.use_cache)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    result = SpectralQuant().engine.calibrate(model, tokenizer, get_default_calibration_texts(12), progress=False)
    assert {"calibrated", "n_heads", "d_eff_mean", "d_eff_min", "d_eff_max", "gap_mean", "gap_median", "calibration_time_s"} <= result.keys()
    assert result["n_heads"] == 6 and result["certificate"]["menu"]
    assert (model.config._attn_implementation, model.training, fingerprint(model), model.config.use_cache) == before
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    assert "generate" not in vars(model)


@pytest.mark.parametrize("calibrator", [SpectralQuantEngine, EigenspectralCalibrator])
def test_a_soft_capped_model_may_be_the_first_of_a_process(calibrator: Any, tokenizer: TinyTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our attention was not yet known to transformers then, and its sdpa refused the soft-cap, or dropped it in older releases."""
    model, texts, seen = tiny_model("gemma2"), get_default_calibration_texts(12), []
    monkeypatch.setattr(AttentionInterface, "_global_mapping", {k: v for k, v in AttentionInterface._global_mapping.items() if k != "spectralquant"})
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", lambda *args, **kwargs: seen.append(kwargs))
    calibrator().calibrate(model, tokenizer, texts)
    assert not seen and "spectralquant" in AttentionInterface()


def test_calibrate_is_deterministic(tokenizer: TinyTokenizer, tmp_path: Path) -> None:
    model, files = tiny_model("llama"), []
    for name in "ab":
        engine = SpectralQuantEngine()
        engine.calibrate(model, tokenizer, get_default_calibration_texts(10), progress=False)
        files.append({i: (layer.key.basis, layer.value.basis) for i, layer in engine.profile_of(model).layers.items()})
        engine.save_calibration(tmp_path / name)
    assert all(torch.equal(a, b) for i in files[0] for a, b in zip(files[0][i], files[1][i], strict=True))


@torch.no_grad()
def test_calibrate_restores_the_model_after_an_exception(tokenizer: TinyTokenizer) -> None:
    model = tiny_model("llama", seed=6)
    broken = model.model.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken layer")))
    with pytest.raises(RuntimeError, match="broken layer"):
        SpectralQuantEngine().calibrate(model, tokenizer, get_default_calibration_texts(4), progress=False)
    broken.remove()
    assert model.config._attn_implementation != "spectralquant-recorder"
    assert model(torch.tensor([[5, 6]])).logits.isfinite().all()


def test_calibrate_rejects_too_little_text(llama: PreTrainedModel, tokenizer: TinyTokenizer) -> None:
    with pytest.raises(CalibrationError, match="100 tokens, which is too short"):
        SpectralQuantEngine().calibrate(llama, tokenizer, ["far too short a text " * 20], progress=False)


def test_generate_returns_text_tokens_and_stats(sq: SpectralQuant, llama: PreTrainedModel, tokenizer: TinyTokenizer) -> None:
    out = sq.generate(llama, tokenizer, PROMPT, max_new_tokens=9)
    stats = out["stats"]
    assert {
        "seq_len",
        "n_layers",
        "n_kv_heads",
        "fp16_bytes",
        "compressed_bytes",
        "ratio",
        "new_tokens",
        "seconds",
        "tokens_per_second",
        "preset",
    } <= stats.keys()
    assert len(out["tokens"]) == stats["new_tokens"] and stats["preset"] == "high"
    assert stats["ratio"] == stats["fp16_bytes"] / stats["compressed_bytes"]


def test_generate_zero_tokens_returns_nothing_new(sq: SpectralQuant, llama: PreTrainedModel, tokenizer: TinyTokenizer) -> None:
    out = sq.generate(llama, tokenizer, PROMPT, max_new_tokens=0)
    assert out["text"] == "" and out["tokens"] == [] and out["stats"]["new_tokens"] == 0


@pytest.mark.parametrize(
    "prompt",
    [["one two three", PROMPT], [{"role": "user", "content": "hello there"}], [5, 6, 7], torch.tensor([[5, 6, 7]])],
    ids=["batch", "chat", "ids", "tensor"],
)
def test_generate_takes_every_form_of_prompt(sq: SpectralQuant, llama: PreTrainedModel, tokenizer: TinyTokenizer, prompt: Any) -> None:
    out = sq.generate(llama, tokenizer, prompt, max_new_tokens=3)
    batched = isinstance(prompt, list) and isinstance(prompt[0], str)
    assert len(out["text"]) == 2 if batched else isinstance(out["text"], str)


def test_generate_batch_equals_single_runs(sq: SpectralQuant, llama: PreTrainedModel, tokenizer: TinyTokenizer) -> None:
    prompts = ["one two three four", "seven eight"]
    together = sq.generate(llama, tokenizer, prompts, max_new_tokens=6)["tokens"]
    assert together == [sq.generate(llama, tokenizer, p, max_new_tokens=6)["tokens"] for p in prompts]


def test_generate_passes_streamer(sq: SpectralQuant, llama: PreTrainedModel, tokenizer: TinyTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    sq.generate(llama, tokenizer, "one two", max_new_tokens=4, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.strip()


def test_compress_prefill_serves_any_number_of_follow_ups(sq: SpectralQuant, llama: PreTrainedModel, tokenizer: TinyTokenizer) -> None:
    """The original raised here, and a second follow-up saw the first."""
    result = sq.compress_prefill(llama, tokenizer, PROMPT)
    assert {"input_ids", "logits", "next_token", "cache", "stats", "prompt_length"} <= result.keys()
    cache, length = result["cache"], result["prompt_length"]
    question = torch.tensor([[7, 8, 9]])
    options = {"max_new_tokens": 5, "do_sample": False}
    first = llama.generate(question, past_key_values=cache, **options)
    other = llama.generate(torch.tensor([[50, 51]]), past_key_values=cache, **options)
    again = llama.generate(question, past_key_values=cache, **options)
    whole = llama.generate(torch.cat([result["input_ids"], question], 1), past_key_values=cache, **options)
    assert torch.equal(first, again) and torch.equal(whole[:, length:], first)
    assert torch.equal(first[:, :3], question) and torch.equal(other[:, :2], torch.tensor([[50, 51]]))
    assert cache.get_seq_length() == length
    same = llama.generate(result["input_ids"], past_key_values=cache, **options)
    assert int(same[0, length]) == result["next_token"]


def test_engine_keeps_calibrations_of_two_models_apart(engine: SpectralQuantEngine, llama: PreTrainedModel, tokenizer: TinyTokenizer) -> None:
    other = tiny_model("qwen3", seed=9)
    with pytest.raises(ProfileError, match="another model"):
        engine.cache(other)
    engine.calibrate(other, tokenizer, get_default_calibration_texts(12), progress=False)
    engine.cache(other), engine.cache(llama)
    assert engine.is_calibrated(other) and engine.is_calibrated(llama)
    assert engine.profile_of(llama).model != engine.profile_of(other).model
    engine.remove_from(other)


def test_applied_to_restores(engine: SpectralQuantEngine, llama: PreTrainedModel) -> None:
    before = llama.config._attn_implementation
    with engine.applied_to(llama):
        assert llama.config._attn_implementation == "spectralquant"
    assert llama.config._attn_implementation == before


def test_compression_stats_before_and_after(llama_calibration: Path) -> None:
    sq = SpectralQuant(compression="max")
    assert sq.compression_stats() == {"preset": "max", "expected_ratio": 6.68, "calibrated": False}
    sq.load_calibration(llama_calibration)
    stats = sq.compression_stats()
    assert stats["sq_ratio"] >= 6.68 * 0.995
    assert stats["sq_ratio"] == stats["fp16_bytes_per_token"] / (stats["sq_key_bytes"] + stats["sq_val_bytes"])


def test_compress_kv_cache_of_a_dense_cache(engine: SpectralQuantEngine, llama: PreTrainedModel, tokenizer: TinyTokenizer) -> None:
    dense = engine.collect_kv(llama, tokenizer, PROMPT)
    packed = engine.compress_kv_cache(dense, llama)
    assert packed.get_seq_length() == dense.get_seq_length() and packed.nbytes < packed.dense_bytes


def test_dials_replace_the_preset(llama_calibration: Path) -> None:
    ratios = {}
    for bits in (2, 4, 6):
        sq = SpectralQuant(avg_bits=bits, noise_bits=2, value_noise_bits=2, d_eff_variance=0.9)
        sq.load_calibration(llama_calibration)
        ratios[bits] = sq.compression_stats()["sq_ratio"]
    assert ratios[2] > ratios[4] > ratios[6]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"compression": "tiny"}, "'standard', 'high', 'max', 'ultra'"),
        ({"avg_bits": 2.5}, "never rounded"),
        ({"avg_bits": 9}, "from 1 to 8"),
        ({"noise_bits": 3}, "widths of"),
        ({"value_noise_bits": -2}, "from 0 to 8"),
        ({"d_eff_variance": -1}, r"in \(0, 1\]"),
        ({"d_eff_variance": 1.5}, r"in \(0, 1\]"),
        ({"use_qjl": True}, "use_qjl"),
    ],
    ids=str,
)
def test_constructor_rejects(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SpectralQuant(**options)


@pytest.mark.parametrize(
    ("corpus", "text"),
    [("a string", "one string"), ([], "is empty"), ([1, 2], r"calibration_texts\[0\]"), ([" "], "expected a string"), (7, "expected a list")],
    ids=str,
)
def test_calibrate_rejects_corpus(llama: PreTrainedModel, tokenizer: TinyTokenizer, corpus: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SpectralQuant().calibrate(llama, tokenizer, corpus)


@pytest.mark.parametrize("prompt", ["", [], ["one", ""], torch.tensor([])], ids=repr)
def test_generate_rejects_empty_prompt(sq: SpectralQuant, llama: PreTrainedModel, tokenizer: TinyTokenizer, prompt: Any) -> None:
    with pytest.raises(ConfigError, match="empty"):
        sq.generate(llama, tokenizer, prompt, max_new_tokens=2)


@pytest.mark.parametrize("count", [-1, 2.5, True, "3"], ids=repr)
def test_generate_rejects_max_new_tokens(sq: SpectralQuant, llama: PreTrainedModel, tokenizer: TinyTokenizer, count: Any) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens"):
        sq.generate(llama, tokenizer, "one", max_new_tokens=count)


def test_calibrate_rejects_head_sizes(tokenizer: TinyTokenizer) -> None:
    model = tiny_model("llama")
    model.config.head_dim = 24
    with pytest.raises(UnsupportedModelError, match=r"layer 0 of LlamaForCausalLM: .* multiples of 16 from 32 to 256"):
        SpectralQuant().calibrate(model, tokenizer)
    with pytest.raises(ShapeError, match="leave head_dim out"):
        SpectralQuant(head_dim=128).calibrate(tiny_model("llama"), tokenizer)


def test_calibrate_rejects_model_without_growing_attention(tokenizer: TinyTokenizer) -> None:
    with pytest.raises(UnsupportedModelError, match="nothing to compress"):
        SpectralQuant().calibrate(tiny_model("mistral-sliding"), tokenizer)


@torch.no_grad()
def test_bfloat16_keys_beyond_float16_range(tokenizer: TinyTokenizer) -> None:
    """bf16 never goes through fp16: keys of 1e5 would become inf (the original's fault 9)."""
    model = tiny_model("llama", torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.mul_(3e5)
        layer.self_attn.q_proj.weight.mul_(1e-6)
    engine = SpectralQuantEngine()
    engine.calibrate(model, tokenizer, get_default_calibration_texts(12), progress=False)
    cache, prompt = engine.cache(model), torch.randint(3, 199, (1, 500))
    model(prompt, past_key_values=cache)
    view = cache.copy().coded_layers[0].segment.update(*[torch.zeros(1, 2, 1, 32, dtype=torch.bfloat16)] * 2)
    assert view.dense("key").abs().max() > 65504
    assert model(prompt[:, :1], past_key_values=cache).logits.isfinite().all()


def test_models_without_attention_are_refused(tokenizer: TinyTokenizer) -> None:
    model = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64))
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM has no attention heads: there is nothing to compress"):
        SpectralQuant().calibrate(model, tokenizer)


def test_fingerprint_is_that_of_the_model_in_any_dtype() -> None:
    """Weights that are no 16-bit numbers, as those of dequantised GGUF files; a fine-tune by a few parts in a thousand is another model."""
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    own = fingerprint(model)["weights"]
    assert all(fingerprint(deepcopy(model).to(dtype))["weights"] == own for dtype in (torch.bfloat16, torch.float16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-4)
    assert fingerprint(model)["weights"] != own
