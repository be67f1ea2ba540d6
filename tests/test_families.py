"""Every family of models that `model_families` lists, on one tiny random model each: a family is coded and right, or refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import FAMILIES, WINDOW, Family, Prepared, prepare
from models_table import DOCUMENT, render
from packaging.version import Version
from releases import skip_before
from tiny_models import TinyTokenizer
from transformers import DynamicCache, __version__

from spectralquant import PrefixStore, get_default_calibration_texts
from spectralquant.cache.hf import SpectralCache
from spectralquant.cache.layers import SpectralLayer
from spectralquant.codec.layout import UNIT
from spectralquant.compat import KEEPS_RECURRENT_STATES, cache_argument
from spectralquant.errors import SpectralQuantError

REFUSED = {
    "Mistral 0.1": "layers 0-1 keep a sliding window of 64 tokens",
    "Mamba": "no attention heads",
    "RecurrentGemma": "layer 0 keeps recurrent states, layer 1 keeps a sliding window of 64 tokens",
    "DeepSeek-V2": "layer 0 of DeepseekV2ForCausalLM is multi-head latent attention",
    "DeepSeek-V3": "layer 0 of DeepseekV3ForCausalLM is multi-head latent attention",
    "JetMoe": "layer 0 of JetMoeForCausalLM caches 2 heads",
    "Gemma 4 (as released)": "layer 1 of Gemma4ForCausalLM: head_dim=512",
    "T5": "all decoder layers",
    "Whisper": "all decoder layers",
}
CODED = [f for f in FAMILIES if f.name not in REFUSED]
PROMPT = 400
PER_TOKEN = {"input_ids", "mm_token_type_ids"}


def ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 199, (batch, length))


@pytest.fixture(params=CODED, ids=lambda f: f.name)
def family(request: pytest.FixtureRequest) -> Any:
    """The family, calibrated; its model is as it was afterwards. Hybrids are refused before transformers 5.4."""
    prepared = prepare(request.param)
    if not KEEPS_RECURRENT_STATES and any(reason in str(prepared) for reason in ("in a cache of its own kind", "Lfm2ForCausalLM attend neither")):
        pytest.skip(str(prepared))
    assert isinstance(prepared, Prepared), prepared
    yield prepared
    prepared.engine.remove_from(prepared.model)


def coded_cache(family: Prepared, **changes: Any) -> SpectralCache:
    """Without the mass of coded tokens, which only our attention adds."""
    engine, model = family.engine, family.model
    engine.apply_to(model)
    codecs = {i: replace(c, missing_mass=None) for i, c in engine.profile_codec(model).items()}
    return SpectralCache(model.config, codecs, replace(engine.cache_config, **changes))


@torch.no_grad()
def logits(family: Prepared, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    inputs = {"input_ids": tokens} if cache.get_seq_length() else family.family.inputs(tokens)
    return family.model(**inputs, use_cache=True, **cache_argument(family.model, cache)).logits


def skip_where_it_cannot_go_on(family: Prepared) -> None:
    """With the model's own attention and cache, which the test compares to."""
    if family.family.name == "StableLM":
        skip_before("5.2", "makes StableLM's mask one too long for several tokens behind others", since="5.0")


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def decoded_twin(packed: SpectralCache, dense: DynamicCache) -> DynamicCache:
    """`dense` with what the codes of `packed` decode to in the place of its keys and values."""
    for mine, theirs in zip(packed.copy().layers, dense.layers, strict=True):
        if isinstance(mine, SpectralLayer):
            assert mine.segment.packed >= UNIT
            view = mine.segment.update(theirs.keys[:, :, :1], theirs.values[:, :, :1])
            theirs.keys, theirs.values = (view.dense(which)[:, :, :-1] for which in ("key", "value"))
    return dense


def test_logits_are_those_of_the_models_own_attention_over_decoded_keys(family: Prepared) -> None:
    skip_where_it_cannot_go_on(family)
    prompt, more = ids(PROMPT), ids(5)
    packed, dense = coded_cache(family), DynamicCache(config=family.model.config)
    logits(family, prompt, packed)
    got = torch.cat([logits(family, token, packed) for token in more.split(2, 1)], 1)
    family.engine.remove_from(family.model)
    logits(family, prompt, dense)
    again = coded_cache(family)
    logits(family, prompt, again)
    family.engine.remove_from(family.model)
    twin = decoded_twin(again, dense)
    want = torch.cat([logits(family, token, twin) for token in more.split(2, 1)], 1)
    assert error(got, want) < 2e-3


def test_nothing_changes_before_anything_is_coded(family: Prepared) -> None:
    skip_where_it_cannot_go_on(family)
    prompt, more = ids(60), ids(20)
    packed, dense = coded_cache(family), DynamicCache(config=family.model.config)
    got = [logits(family, tokens, packed) for tokens in (prompt, more)]
    family.engine.remove_from(family.model)
    want = [logits(family, tokens, dense) for tokens in (prompt, more)]
    assert error(got[0], want[0]) < 1e-5 and error(got[1], want[1]) < 2e-3  # the window is of 16 bits


def test_left_padded_rows_equal_single_ones(family: Prepared) -> None:
    """Padding of whole blocks, so that both are cut at the same tokens."""
    short, long, pad = ids(PROMPT), ids(PROMPT + 2 * UNIT), 2 * UNIT
    mask = torch.ones((2, long.shape[1]), dtype=torch.long)
    mask[0, :pad] = 0
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}

    def run(inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> Any:
        cache = coded_cache(family, max_exact_share=0.0)
        return family.model.generate(**inputs, attention_mask=mask, **cache_argument(family.model, cache), **options)

    images = [family.family.inputs(short), family.family.inputs(long)]
    given = {k: torch.cat([x[k] for x in images]) for k in images[0] if k not in PER_TOKEN}
    for name in PER_TOKEN & images[0].keys():
        given[name] = torch.cat([torch.nn.functional.pad(images[0][name], (pad, 0)), images[1][name]])
    together = run(given, mask)
    assert together.sequences.shape == (2, long.shape[1] + 3)
    for row, inputs in enumerate(images):
        prompt = inputs["input_ids"]
        alone = run(inputs, torch.ones_like(prompt))
        assert torch.equal(alone.sequences[0, : prompt.shape[1]], prompt[0])
        for step in (0, 1):
            assert error(together.logits[step][row], alone.logits[step][0]) < 2e-3


def test_what_is_bounded_stays_exact_and_bounded(family: Prepared) -> None:
    packed, dense, prompt, more = coded_cache(family), DynamicCache(config=family.model.config), ids(PROMPT), ids(1)
    for tokens in (prompt, more):
        logits(family, tokens, packed)
        logits(family, tokens, dense)
    for mine, theirs in zip(packed.layers, dense.layers, strict=True):
        if isinstance(mine, SpectralLayer):
            assert mine.get_seq_length() == PROMPT + 1 and mine.keys is None
        else:
            assert type(mine) is type(theirs)
            if getattr(mine, "is_sliding", False):
                assert mine.keys.shape[-2] <= WINDOW


def test_copies_own_what_they_hold(family: Prepared) -> None:
    """Recurrent states too, which steps overwrite in place. M-RoPE keeps an offset on the model: the same for both."""
    packed, prompt, more = coded_cache(family), ids(PROMPT), ids(4)
    logits(family, prompt, packed)
    runs = [torch.cat([logits(family, token, other) for token in more.split(1, 1)], 1) for other in (packed.copy(), packed.copy(), packed)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert packed.nbytes > 0 and packed.dense_bytes > 0


def test_beams_are_reordered(family: Prepared) -> None:
    packed, order = coded_cache(family), torch.tensor([2, 0, 0])
    if family.family.image is not None:
        pytest.skip("one image a row: generation reorders M-RoPE offsets elsewhere")
    logits(family, ids(PROMPT, batch=3), packed)
    step = ids(1).expand(3, -1)
    want = logits(family, step, packed.copy())[order]
    packed.reorder_cache(order)
    assert error(logits(family, step, packed), want) < 1e-4


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in REFUSED], ids=lambda f: f.name)
def test_refusals_name_layer_and_reason(family: Family) -> None:
    refusal = prepare(family)
    assert isinstance(refusal, SpectralQuantError)
    if Version(__version__) >= Version("5.24"):  # before, other layers of some models are in the way
        assert REFUSED[family.name] in str(refusal)


def test_document_is_what_was_run() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    if f"\n{__version__}: " not in text:
        pytest.skip("docs/models.md was written with another transformers")
    assert text == render()


def test_a_saved_cache_goes_on_with_the_same_logits(family: Prepared, tmp_path: Path) -> None:
    """Sliding windows and recurrent states are in the file too."""
    prompt, more, cache = ids(PROMPT, 2), ids(2, 2), family.engine.cache(family.model)
    logits(family, prompt, cache)
    loaded = SpectralCache.load(cache.save(tmp_path / "cache"), family.model, family.engine)
    for token in more.split(1, 1):
        assert torch.equal(logits(family, token, loaded), logits(family, token, cache))
    assert loaded.get_seq_length() == cache.get_seq_length() == PROMPT + 2


@torch.no_grad()
def test_an_archived_prompt_gives_logits_that_are_near(family: Prepared, tmp_path: Path) -> None:
    """At the finest rate, where what comes back differs in the last places; what layers keep that are not coded is in the file as it is."""
    engine, model, prompt, more = family.engine, family.model, family.family.inputs(ids(PROMPT)), ids(2)
    if prompt.keys() != {"input_ids"}:
        pytest.skip("images don't go through engine.archive_prefix")
    archive = engine.fit_archive(model, TinyTokenizer(), get_default_calibration_texts(2), progress=False)
    path = engine.archive_prefix(model, TinyTokenizer(), prompt["input_ids"], tmp_path / "a", archive, -64)["path"]
    caches = engine.load_archived(path, model, archive), engine.compress_prefill(model, TinyTokenizer(), prompt["input_ids"])["cache"]
    got, want = (logits(family, more, cache) for cache in caches)
    assert error(got, want) < 0.05


def test_a_stored_prompt_gives_the_same_tokens(family: Prepared, tmp_path: Path) -> None:
    engine, model, store = family.engine, family.model, PrefixStore(tmp_path / "store")
    prompt = family.family.inputs(ids(PROMPT))
    if prompt.keys() != {"input_ids"}:
        pytest.skip("images don't go through engine.generate")

    def run() -> tuple[Any, dict[str, Any]]:
        out = engine.generate(model, TinyTokenizer(), prompt["input_ids"], 4, store=store, eos_token_id=None)
        return out["tokens"], out["stats"]["store"]

    (first, miss), (second, hit) = run(), run()
    assert (miss["hit_tokens"], hit["hit_tokens"], hit["exact"]) == (0, PROMPT - 1, True)
    assert first == second and hit["written_bytes"] == 0 < miss["written_bytes"]
    assert not store.verify()
