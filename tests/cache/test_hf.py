"""The cache inside real transformers code paths."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, TinyTokenizer, tiny_model
from transformers import DynamicCache, PreTrainedModel

from spectralquant.cache.hf import SpectralCache
from spectralquant.corpus import get_default_calibration_texts
from spectralquant.engine import SpectralQuantEngine
from spectralquant.errors import ConfigError, UnsupportedModelError


def ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 199, (batch, length))


@torch.no_grad()
def test_nbytes_is_every_byte_held(engine: SpectralQuantEngine, llama: PreTrainedModel) -> None:
    """Found by walking the object graph, not by asking the cache what it thinks it holds."""
    cache = engine.cache(llama)
    llama(ids(700), past_key_values=cache)
    held: dict[int, int] = {}
    for layer in cache.layers:
        chosen = layer.segment.chosen
        for value in (*vars(layer.segment).values(), chosen.tokens, chosen.secondary):
            if isinstance(value, torch.Tensor):
                held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    assert cache.nbytes == sum(held.values())
    assert all(layer.keys is None and layer.values is None for layer in cache.layers)


@torch.no_grad()
def test_memory_per_token_stays_flat_while_decoding(engine: SpectralQuantEngine, llama: PreTrainedModel) -> None:
    """Decoded tokens are compressed too: 1,000 more tokens cost packed bytes, not dense ones."""
    cache = engine.cache(llama)
    llama(ids(500), past_key_values=cache)
    before = cache.nbytes
    for _ in range(1000):
        llama(ids(1), past_key_values=cache)
    layer = cache.coded_layers[0]
    heads, per_token = layer.segment.records.shape[1], layer.codec.layout.bytes_per_token
    assert (cache.nbytes - before) / 1000 < 1.35 * heads * per_token * len(cache.layers)


@torch.no_grad()
def test_exact_tokens_are_stored_a_layer_later_on_a_gpu(engine: SpectralQuantEngine, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer's by whatever comes next; what comes out is the same."""
    text, more = ids(500), ids(300)
    want, cache = engine.cache(llama), engine.cache(llama)
    llama(text, past_key_values=want)
    logits = llama(more, past_key_values=want).logits
    monkeypatch.setattr("spectralquant.cache.segment.waits_later", lambda device: True)
    llama(text, past_key_values=cache)
    *before, last = [layer.segment for layer in cache.coded_layers]
    assert all(segment._unfinished is None for segment in before) and last._unfinished is not None
    assert torch.equal(llama(more, past_key_values=cache).logits, logits)
    assert cache.nbytes == want.nbytes and last._unfinished is None
    cache.roll_back(200)
    want.roll_back(200)
    assert torch.equal(llama(more, past_key_values=cache).logits, llama(more, past_key_values=want).logits)


@pytest.mark.parametrize("foreign", ["sdpa", "eager"])
@torch.no_grad()
def test_foreign_attention_gives_the_same(engine: SpectralQuantEngine, llama: PreTrainedModel, foreign: str) -> None:
    """But for the mass of coded tokens, which only our attention adds."""
    engine.apply_to(llama)
    codec = {i: replace(c, missing_mass=None) for i, c in engine.profile_codec(llama).items()}
    cache, more = SpectralCache(llama.config, codec, engine.cache_config), ids(7)
    llama(ids(600), past_key_values=cache)
    ours = llama(more, past_key_values=cache.copy()).logits
    before = llama.config._attn_implementation
    llama.set_attn_implementation(foreign)
    theirs = llama(more, past_key_values=cache.copy()).logits
    llama.set_attn_implementation(before)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_generate_before_anything_is_coded_equals_dense(engine: SpectralQuantEngine, llama: PreTrainedModel) -> None:
    prompt = ids(60)
    dense = llama.generate(prompt, max_new_tokens=40, do_sample=False)
    coded = llama.generate(prompt, max_new_tokens=40, do_sample=False, past_key_values=engine.cache(llama))
    assert torch.equal(dense, coded)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_generate_options(engine: SpectralQuantEngine, llama: PreTrainedModel, options: dict[str, object]) -> None:
    prompt = ids(400)
    out = llama.generate(prompt, max_new_tokens=12, past_key_values=engine.cache(llama), **options)
    assert out.shape[1] > 400 and torch.equal(out[0, :400], prompt[0])


def test_generate_uses_the_cache_it_is_given(engine: SpectralQuantEngine, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the configuration is against caches (MPT): without, every step would put the whole text in."""
    monkeypatch.setattr(llama.generation_config, "use_cache", False)
    cache = engine.cache(llama)
    llama.generate(ids(300), max_new_tokens=5, do_sample=False, eos_token_id=None, past_key_values=cache)
    assert cache.get_seq_length() == 304
    with pytest.raises(ConfigError, match="leave use_cache out"):
        llama.generate(ids(300), max_new_tokens=5, past_key_values=engine.cache(llama), use_cache=False)


@torch.no_grad()
def test_left_padding_changes_nothing(engine: SpectralQuantEngine, llama: PreTrainedModel) -> None:
    """Each row of a padded batch equals its own single run, packed blocks included."""
    short, long = ids(430), ids(600)
    batch = torch.cat([torch.cat([torch.zeros(1, 170, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :170] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    together = llama.generate(batch, attention_mask=mask, past_key_values=engine.cache(llama), **options)
    for row, prompt in enumerate((short, long)):
        alone = llama.generate(prompt, past_key_values=engine.cache(llama), **options)
        # Blocks start at other tokens in the padded row, so codes differ a little; the long row has equal blocks.
        error = (together.logits[0][row] - alone.logits[0][0]).norm() / alone.logits[0][0].norm()
        assert error < (1e-4 if row else 0.2)


@torch.no_grad()
def test_reorder_select_and_repeat(engine: SpectralQuantEngine, llama: PreTrainedModel) -> None:
    cache, step = engine.cache(llama), ids(1)
    rows = ids(500, batch=3)
    llama(rows, past_key_values=cache)
    want = llama(step.expand(3, -1), past_key_values=cache.copy()).logits
    moved = cache.copy()
    moved.reorder_cache(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(llama(step.expand(3, -1), past_key_values=moved).logits, want[[2, 0, 0]])
    picked = cache.copy()
    picked.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(llama(step, past_key_values=picked).logits, want[[1]], rtol=1e-4, atol=1e-4)
    picked.reset()
    assert picked.get_seq_length() == 0


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"prefill_chunk_size": 70, "do_sample": False}], ids=str)
@torch.no_grad()
def test_continuations_share_a_prefix(engine: SpectralQuantEngine, llama: PreTrainedModel, options: dict[str, object]) -> None:
    """Many continuations of one packed text hold its codes once, and give what a text of its own gives each."""
    text, questions = ids(1500), ids(190, batch=3)
    options = {**options, "max_new_tokens": 100, "eos_token_id": None}
    cache = engine.cache(llama)
    llama(text, past_key_values=cache)
    one, beams = cache.nbytes, options.get("num_beams", 1)
    rows = cache.copy()
    rows.batch_repeat_interleave(3 * beams)
    records = [layer.segment.prefix.records for layer in cache.coded_layers]
    own = sum(r.nbytes for r in records)
    assert all(layer.segment.prefix.records is r for layer, r in zip(rows.coded_layers, records, strict=True))
    assert rows.nbytes < own + 3 * beams * (one - own) + 1000
    got = llama.generate(torch.cat([text.expand(3, -1), questions], 1), past_key_values=rows, **options)
    apart = []
    for question in questions:
        alone = engine.cache(llama)
        llama(text, past_key_values=alone)
        alone.batch_repeat_interleave(beams)
        apart.append(llama.generate(torch.cat([text, question[None]], 1), past_key_values=alone, **options)[0])
    assert torch.equal(got, torch.stack(apart))
    assert all(layer.segment.prefix.records is r for layer, r in zip(rows.coded_layers, records, strict=True))


@torch.no_grad()
def test_chunked_prefill_sees_new_tokens_exactly(engine: SpectralQuantEngine, llama: PreTrainedModel) -> None:
    prompt = ids(900)
    cache = engine.cache(llama)
    for chunk in prompt.split(300, 1):
        logits = llama(chunk, past_key_values=cache).logits[:, -1]
    dense = llama(prompt).logits[:, -1]
    assert cache.get_seq_length() == 900
    assert (logits - dense).norm() / dense.norm() < 0.3


@pytest.mark.parametrize("family", sorted(CONFIGS))
@torch.no_grad()
def test_families(family: str, tokenizer: TinyTokenizer) -> None:
    """Sliding layers stay transformers' own; full layers are coded; the model is as it was afterwards."""
    model, engine = tiny_model(family), SpectralQuantEngine()
    before = model.config._attn_implementation
    if family == "mistral-sliding":
        with pytest.raises(UnsupportedModelError, match="no attention layer that grows"):
            engine.calibrate(model, tokenizer, get_default_calibration_texts(12), progress=False)
        return
    engine.calibrate(model, tokenizer, get_default_calibration_texts(12), progress=False)
    assert model.config._attn_implementation == before
    cache, prompt = engine.cache(model), ids(400)
    model(prompt, past_key_values=cache)
    got = model(prompt[:, :1], past_key_values=cache).logits
    dense = DynamicCache(config=model.config)
    model(prompt, past_key_values=dense)
    want = model(prompt[:, :1], past_key_values=dense).logits
    # A random model is far more sensitive than a trained one; a wrong frame or mask gives errors above 1.
    assert cache.coded_layers and (got - want).norm() / want.norm() < 0.6
    engine.remove_from(model)
    assert model.config._attn_implementation == before and "generate" not in vars(model)


def test_cache_rejects_calibration_of_more_layers(engine: SpectralQuantEngine, llama: PreTrainedModel) -> None:
    codec = next(iter(engine.profile_codec().values()))
    with pytest.raises(UnsupportedModelError, match="layer 9"):
        SpectralCache(llama.config, {9: codec})


@torch.no_grad()
def test_cropped_to_nothing_takes_another_batch(engine: SpectralQuantEngine, llama: PreTrainedModel) -> None:
    """Rows and left padding of before are forgotten: tokens in the slots of old padding would be lost."""
    cache, fresh = engine.cache(llama), engine.cache(llama)
    mask = torch.arange(400)[None] >= torch.tensor([0, 200, 7])[:, None]
    llama.generate(ids(400, 3), attention_mask=mask.long(), max_new_tokens=3, past_key_values=cache)
    cache.crop(-cache.get_seq_length())
    prompt, step = ids(500, 2), ids(1, 2)
    for each in (cache, fresh):
        llama(prompt, past_key_values=each)
    assert torch.equal(llama(step, past_key_values=cache).logits, llama(step, past_key_values=fresh).logits)


@torch.no_grad()
def test_file_of_rows_that_have_not_begun(engine: SpectralQuantEngine, llama: PreTrainedModel, tmp_path: Path) -> None:
    """After a crop some rows may hold padding alone."""
    cache = engine.cache(llama)
    cache.set_padding(torch.arange(300)[None] >= torch.tensor([0, 200])[:, None])
    llama(ids(300, 2), past_key_values=cache)
    cache.crop(-250)
    loaded, more = SpectralCache.load(cache.save(tmp_path / "cache"), llama, engine), ids(200, 2)
    assert torch.equal(llama(more, past_key_values=loaded).logits, llama(more, past_key_values=cache).logits)
