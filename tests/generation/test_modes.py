"""Modes of PyTorch and transformers around a compressed cache: gradients, precision, attention implementations, compilation, threads, devices."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from near_lossless import NEAR, Pair, packed_tokens, relative, tokens
from tiny_models import TinyTokenizer, tiny_model
from torch import Tensor
from transformers import AttentionInterface

from spectralquant import SpectralQuantEngine
from spectralquant.codec.codec import place_codecs, tensors_of
from spectralquant.codec.packed import LazyKV
from spectralquant.errors import ConfigError, GradientError


def scored(pair: Pair, ids: Tensor, cache: Any, piece: int = 100) -> Tensor:
    """Logits of `ids` read in pieces: all but the first read what was stored."""
    return torch.cat([pair.forward(part, cache) for part in ids.split(piece, 1)], 1)


def test_without_no_grad(pair: Pair) -> None:
    ids = tokens(700)
    got = scored(pair, ids, pair.cache())
    assert relative(got, pair.model(ids).logits) < NEAR
    assert pair.generate(ids, pair.cache()).shape == (1, 712)


@pytest.mark.parametrize("attention", ["spectralquant", "sdpa", "eager"])
def test_gradients_through_codes_are_an_error(llama_pair: Pair, attention: str) -> None:
    """A gradient that leaves out the past would be wrong, without a word."""
    cache, model = llama_pair.cache(), llama_pair.model
    if attention != "spectralquant":
        model.set_attn_implementation(attention)
    llama_pair.forward(tokens(400), cache)
    loss = llama_pair.forward(tokens(3), cache).logsumexp(-1).sum()
    with pytest.raises(GradientError, match="no_grad"):
        loss.backward()
    model.zero_grad()


def test_gradients_on_an_empty_cache_are_right(llama_pair: Pair) -> None:
    """The first pass attends to the tokens themselves."""
    ids, grads = tokens(300), []
    for cache in (llama_pair.cache(), llama_pair.dense()):
        llama_pair.model.zero_grad()
        llama_pair.forward(ids, cache).square().mean().backward()
        grads.append(llama_pair.model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    llama_pair.model.zero_grad()
    torch.testing.assert_close(*grads)


def test_training_mode(llama_pair: Pair) -> None:
    """Works as long as there is no dropout to apply."""
    model, ids = llama_pair.model, tokens(500)
    model.train()
    try:
        with torch.no_grad():
            assert relative(scored(llama_pair, ids, llama_pair.cache()), model(ids).logits) < NEAR
            for layer in model.model.layers:
                layer.self_attn.attention_dropout = 0.1
            with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
                scored(llama_pair, ids, llama_pair.cache())
    finally:
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        model.eval()


def test_inference_mode_and_back(pair: Pair) -> None:
    """A cache that inference mode filled goes on outside of it, and the other way round."""
    text, cache = tokens(500), pair.cache()
    for turn in range(4):
        with torch.inference_mode(turn % 2 == 0):
            width = text.shape[1] + 140
            text = pair.generate(torch.cat([text, tokens(140)], 1), cache).clone()
            kept = cache.copy()
            kept.reorder_cache(torch.tensor([0]))
            if not any(cache.is_sliding):
                cache.crop(-1)
        pair.require_greedy(text, width)
        cache = kept


@torch.no_grad()
def test_autocast(pair: Pair) -> None:
    """Codes are written and read in float32: autocast costs what it costs the uncompressed model, and no more."""
    ids = tokens(700)
    with torch.autocast("cpu", torch.bfloat16):
        cache, dense = pair.cache(), pair.dense()
        got, want = scored(pair, ids, cache), scored(pair, ids, dense)
    assert packed_tokens(cache) >= 384
    exact = pair.model(ids).logits
    assert relative(got, exact) < 1.5 * relative(want, exact) + NEAR


@torch.no_grad()
def test_codes_are_the_same_under_autocast(llama_pair: Pair) -> None:
    keys, values = torch.randn(2, 1, 2, 400, 32)
    records = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer = llama_pair.cache().coded_layers[0]
            layer.update(keys, values)
            records.append(layer.segment.records[:, :, :2])
    assert torch.equal(*records)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    pair, ids = Pair.of(tiny_model("llama", dtype)), tokens(700)
    cache = pair.cache()
    got, want = scored(pair, ids, cache), scored(pair, ids, pair.dense())
    assert got.dtype == dtype and cache.coded_layers[0].segment.recent_keys.dtype == dtype
    exact = tiny_model("llama")(ids).logits
    assert relative(got, exact) < 1.5 * relative(want, exact) + NEAR


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_attention_implementations_agree(pair: Pair, attention: str) -> None:
    if attention == "sdpa" and getattr(pair.model.config, "attn_logit_softcapping", None):
        pytest.skip("transformers' sdpa leaves the soft-cap out")
    ids, mask = tokens(600, batch=2), torch.ones(2, 640, dtype=torch.long)
    mask[0, :200] = 0
    position = (mask.cumsum(1) - 1).clamp_min(0)
    cache, more, found = pair.cache(), tokens(40, batch=2), []
    pair.forward(ids, cache, attention_mask=mask[:, :600], position_ids=position[:, :600])
    for name in ("spectralquant", attention):
        try:
            pair.model.set_attn_implementation(name)
        except (ValueError, ImportError) as error:
            pytest.skip(f"{type(pair.model).__name__} does not take {name} here: {str(error).splitlines()[0]}")
        try:
            with torch.compiler.set_stance("force_eager"):  # transformers compiles flex attention, which takes 20 seconds
                found.append(pair.forward(more, cache.copy(), attention_mask=mask, position_ids=position[:, 600:]))
        finally:
            pair.model.set_attn_implementation("spectralquant")
    assert relative(*found) < 1e-3


@torch.no_grad()
def test_other_models_are_not_touched(llama_pair: Pair) -> None:
    """Neither another instance nor a copy, and what was registered before is still there."""
    other, ids = tiny_model("llama"), tokens(200)
    before, name = dict(AttentionInterface()), other.config._attn_implementation
    want = other(ids).logits
    llama_pair.engine.apply_to(llama_pair.model)
    assert other.config._attn_implementation == name and "generate" not in vars(other)
    assert torch.equal(other(ids).logits, want)
    after = dict(AttentionInterface())
    assert all(after[k] is v for k, v in before.items())
    twin = copy.deepcopy(llama_pair.model)
    for parameter in twin.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    text = twin.generate(ids, max_new_tokens=5, do_sample=False)
    llama_pair.engine.remove_from(llama_pair.model)
    assert torch.equal(llama_pair.engine.remove_from(twin).generate(ids, max_new_tokens=5, do_sample=False), text), "a copy generates with its own weights"


@pytest.mark.parametrize("how", ["torch.compile(model)", "model.compile()", "forward"])
def test_compiled_models(how: str) -> None:
    """The layers are compiled, the cache and attention over it are not."""
    pair, prompt = Pair.of(tiny_model("llama")), tokens(500)
    want = pair.generate(prompt, pair.cache())
    cache, model = pair.cache(), pair.model
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        if how == "forward":
            model.forward = torch.compile(model.forward, backend="eager")
        elif how == "model.compile()":
            model.compile(backend="eager")
        else:
            model = torch.compile(model, backend="eager")
            with torch.no_grad():
                assert relative(Pair.forward(Pair(model, pair.engine), prompt, pair.cache()), pair.model(prompt).logits) < 1e-4
        got = Pair(model, pair.engine).generate(prompt, cache)
    assert packed_tokens(cache) == 256 and torch.equal(got, want)
    torch._dynamo.reset()


def test_threads_share_an_engine(tmp_path: Path) -> None:
    """Each gets what it gets alone, its own statistics, and the model is clean once the last one is done."""
    model, tokenizer, engine = tiny_model("llama"), TinyTokenizer(), SpectralQuantEngine(compression="high")
    prompts = [" ".join(f"word{i * k} and more" for i in range(100 + 20 * k)) for k in range(1, 7)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda p: engine.generate(model, tokenizer, p, 15, do_sample=False), prompts))
    assert not hasattr(model, "_spectralquant") and "generate" not in vars(model) and model.config._attn_implementation != "spectralquant"
    for prompt, got in zip(prompts, together, strict=True):
        alone = engine.generate(model, tokenizer, prompt, 15, do_sample=False)
        assert alone["tokens"] == got["tokens"] and got["stats"]["seq_len"] == alone["stats"]["seq_len"]


def test_with_blocks_of_threads(llama_pair: Pair) -> None:
    """The first to leave does not pull the model from under the other; what was asked for without an end stays."""
    engine, model = llama_pair.engine, llama_pair.model
    with ThreadPoolExecutor(1) as pool:
        outer, inner = engine.applied_to(model), engine.applied_to(model)
        pool.submit(outer.__enter__).result()
        inner.__enter__()
        pool.submit(outer.__exit__, None, None, None).result()
        assert model.config._attn_implementation == "spectralquant"
        inner.__exit__(None, None, None)
        assert model.config._attn_implementation != "spectralquant"
        outer = engine.applied_to(model)
        pool.submit(outer.__enter__).result()
        engine.apply_to(model)
        pool.submit(outer.__exit__, None, None, None).result()
    assert model.config._attn_implementation == "spectralquant"
    engine.remove_from(model)


@torch.no_grad()
def test_layers_of_the_cache_can_be_offloaded(pair: Pair) -> None:
    """As transformers does it, and a layer that nobody fetched comes back by itself."""
    cache, more = pair.cache(), tokens(5)
    pair.forward(tokens(500), cache)
    kept = cache.copy()
    for index in range(len(cache.layers)):
        cache.offload(index)
        cache.layers[index].prefetch()
        cache.offload(index)
    assert torch.equal(pair.forward(more, cache), pair.forward(more, kept))


@torch.no_grad()
def test_device_map(tmp_path: Path) -> None:
    """Weights of a layer on the disk: it runs on the CPU, so its cache is there, and so are its constants."""
    accelerate = pytest.importorskip("accelerate", reason="device_map needs accelerate")
    model, ids = tiny_model("llama"), tokens(400)
    pair = Pair.of(model)
    want = pair.generate(ids)
    places = {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert model.device.type == "meta"
    cache = pair.cache()
    assert {layer.codec.value_norm.device.type for layer in cache.coded_layers} == {"cpu"}
    assert torch.equal(pair.generate(ids, cache)[:, :401], want[:, :401])


def test_constants_follow_their_layers(llama_pair: Pair) -> None:
    """One layer on another device; what the others share stays shared."""
    codecs = llama_pair.engine.profile_codec(llama_pair.model)
    placed = place_codecs(codecs, {0: torch.device("cpu"), 1: torch.device("meta"), 2: torch.device("meta")})
    assert placed[0] is codecs[0]
    assert {t.device.type for t in (*tensors_of(placed[1].value), placed[2].value_norm)} == {"meta"}
    assert placed[1].frame is None or placed[1].frame is placed[2].frame


@torch.no_grad()
def test_keys_on_another_device(llama_pair: Pair) -> None:
    cache = llama_pair.cache()
    llama_pair.forward(tokens(300), cache)
    with pytest.raises(ConfigError, match="make a new cache after moving"):
        cache.layers[0].update(*torch.empty(2, 1, 2, 1, 32, device="meta"))


def test_pipeline(llama_pair: Pair) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<pad>": 0, **{f"w{i}": i for i in range(1, 199)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="w2")
    text = " ".join(f"w{3 + i * 7 % 190}" for i in range(400))
    run, options = transformers.pipeline("text-generation", llama_pair.model, tokenizer=tokenizer), {"max_new_tokens": 8, "do_sample": False}
    want = run(text, **options)
    cache = llama_pair.cache()
    got = run(text, past_key_values=cache, **options)
    assert packed_tokens(cache) == 256 and got[0]["generated_text"][: len(text)] == text
    assert run("w5 w6 w7", past_key_values=llama_pair.cache(), **options) == run("w5 w6 w7", **options)
    assert len(got) == len(want)


def test_lazy_tensors_stay_lazy(llama_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients on, and without, our attention decodes nothing."""
    cache = llama_pair.cache()
    monkeypatch.setattr(LazyKV, "__torch_dispatch__", classmethod(lambda *_, **__: pytest.fail("decoded")))
    with torch.no_grad():
        llama_pair.forward(tokens(400), cache)
        llama_pair.forward(tokens(2), cache)
