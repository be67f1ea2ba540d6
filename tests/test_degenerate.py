"""Degenerate input: heads that say nothing, dead dimensions, too little text, one token at a time, sinks in mid-text, one token over and over, and
scales far apart. Nothing of it may give NaN, and attention on the codes is compared with float64 attention on what was coded."""

import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import synthetic
import torch
from tiny_models import COMMON, TinyTokenizer, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from spectralquant import SpectralQuantEngine, get_default_calibration_texts
from spectralquant.attention import hf
from spectralquant.attention.reference import attend
from spectralquant.cache.exact import EARLY
from spectralquant.cache.segment import Segment
from spectralquant.calibration import fit
from spectralquant.calibration.hf import SKIP, TOKENS_PER_DIMENSION, ModelStatistics, collect
from spectralquant.calibration.statistics import LayerStatistics
from spectralquant.codec.codec import LayerCodec, build_codec
from spectralquant.codec.packed import PackedKV
from spectralquant.compat import cache_argument
from spectralquant.config import CacheConfig, Dials
from spectralquant.corpus import leading_tokens
from spectralquant.evaluation.texts import begin_with
from spectralquant.presets import PRESETS
from spectralquant.profile import Choices, LayerProfile, Profile, SideProfile

HEAD = 32
HIGH, NO_DIALS = PRESETS["high"], Dials()
STORED = 2e-3
"""Relative RMS of what needs no bits: two roundings to float16 (2^-11 each), or one to bfloat16 that dense attention sees too."""
CODED = 0.4
"""Relative RMS of attention on codes in random tiny models: 2.44 bits on nearly flat spectra leave a tenth of the variance of K and V (0.3 in RMS), and
attention that picks single tokens averages little of it."""
ONE_SAMPLE = 0.8
"""The same with covariances from a single sample of a few hundred tokens: worse, which is what the warning says, but of use."""
LOGITS = 3e-3
"""KL of next tokens, nats: a tenth of what it is without any attention at all (0.027), a few times that of ordinary text."""


# Models and their attention ------------------------------------------------------------------------------------------


def calibrated(
    edit: Callable[[PreTrainedModel], Any], dtype: torch.dtype = torch.float32, compression: str = "high", quantizer: str = "uniform"
) -> tuple[PreTrainedModel, SpectralQuantEngine]:
    """The tiny llama after `edit`, and an engine calibrated for it."""
    model = tiny_model("llama", dtype)
    with torch.no_grad():
        edit(model)
    engine = SpectralQuantEngine(compression=compression, quantizer=quantizer)
    engine.calibrate(model, TinyTokenizer(), get_default_calibration_texts(4), progress=False)
    return model, engine


def silence(model: PreTrainedModel, layer: int, which: str, head: int, size: float) -> None:
    """KV head `head` gives the same key or value (`which`: "k_proj" or "v_proj") for every token: a vector of about `size`, or zeros."""
    projection = getattr(model.model.layers[layer].self_attn, which)
    rows = slice(head * HEAD, (head + 1) * HEAD)
    projection.weight[rows] = 0
    if projection.bias is None:
        projection.bias = torch.nn.Parameter(torch.zeros(len(projection.weight), dtype=projection.weight.dtype))
    projection.bias[rows] = size * torch.randn(HEAD).to(projection.bias)


def attention_inputs(model: PreTrainedModel, engine: SpectralQuantEngine, ids: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor, float]]:
    """Layer -> queries, keys, values and scale that the uncompressed model has on `ids`."""
    seen: dict[int, tuple[Tensor, Tensor, Tensor, float]] = {}

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float, scaling: float, *rest: Any) -> Tensor:
        seen[module.layer_idx] = (query, key, value, scaling)
        return dense(module, query, key, value, mask, dropout, scaling, *rest)

    dense, patch = hf.dense_attention, pytest.MonkeyPatch()
    with patch.context() as patched, engine.applied_to(model), torch.no_grad():
        patched.setattr(hf, "dense_attention", record)
        model(ids, use_cache=False)
    return seen


def float64_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of the last queries, by the definition."""
    groups, new, total = query.shape[1] // keys.shape[1], query.shape[2], keys.shape[2]
    keys, values = (x.double().repeat_interleave(groups, 1) for x in (keys, values))
    seen = torch.ones(new, total, dtype=torch.bool).tril(total - new)
    return (query.double() @ keys.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ values


def coded(codec: LayerCodec, keys: Tensor, values: Tensor, new: int, config: CacheConfig | None = None) -> tuple[Segment, PackedKV]:
    """A cache of all tokens, the last `new` of which come in a call of their own, and what attention then reads."""
    segment = Segment(codec, config or CacheConfig(), keys, torch.zeros(len(keys), dtype=torch.int64))
    old = keys.shape[2] - new
    assert segment.update(keys[:, :, :old], values[:, :, :old]) is None
    view = segment.update(keys[:, :, old:], values[:, :, old:])
    assert view is not None and view.packed >= 256
    return segment, view


def by_head(x: Tensor, heads: int) -> Tensor:
    """RMS [H] of x [B, H * G, n, D] over everything else."""
    return x.double().unflatten(1, (heads, -1)).square().mean((0, 2, 3, 4)).sqrt()


def attention_errors(codec: LayerCodec, query: Tensor, keys: Tensor, values: Tensor, scale: float, new: int = 40) -> tuple[Tensor, Tensor]:
    """RMS [H] of the error of attention on codes, over the last `new` queries, and RMS [H] of the float64 output."""
    _, view = coded(codec, keys, values, new)
    query = query[:, :, -new:]
    got, want = attend(query.float(), view, scale=scale), float64_attention(query, keys, values, scale)
    assert got.isfinite().all()
    return by_head(got.double() - want, keys.shape[1]), by_head(want, keys.shape[1])


def relative_errors(model: PreTrainedModel, engine: SpectralQuantEngine, ids: Tensor) -> dict[int, Tensor]:
    """Layer -> relative RMS error [H] of attention on codes."""
    inputs = attention_inputs(model, engine, ids)
    out = {}
    for i, codec in engine.profile_codec(model).items():
        error, size = attention_errors(codec, *inputs[i])
        out[i] = error / size.clamp_min(1e-30)
    return out


@torch.no_grad()
def kl_with_cache(model: PreTrainedModel, engine: SpectralQuantEngine, ids: Tensor, pieces: list[int]) -> float:
    """Mean KL of the last piece's next tokens, uncompressed model against one whose cache was filled in `pieces`."""
    logits = []
    for cache in (DynamicCache(config=model.config), engine.cache(model)):
        for part in ids.split(pieces, 1):
            out = model(part, use_cache=True, **cache_argument(model, cache)).logits
        logits.append(out.double().log_softmax(-1))
    engine.remove_from(model)
    want, got = logits
    assert got.isfinite().all()
    return float((want.exp() * (want - got)).sum(-1).mean())


def random_ids(length: int) -> Tensor:
    return torch.randint(3, 199, (1, length))


# Constant heads ------------------------------------------------------------------------------------------------------


def some_silent(model: PreTrainedModel) -> None:
    """Constant and zero keys and values in some heads, no values at all in the last layer."""
    silence(model, 0, "k_proj", 0, 3.0)
    silence(model, 0, "v_proj", 1, 3.0)
    silence(model, 1, "k_proj", 0, 0.0)
    silence(model, 1, "v_proj", 1, 0.0)
    silence(model, 2, "v_proj", 0, 0.0)
    silence(model, 2, "v_proj", 1, 0.0)


@pytest.fixture(scope="module", params=[(torch.float32, "joint"), (torch.bfloat16, "uniform")], ids=["float32-joint", "bfloat16-uniform"])
def silent(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, SpectralQuantEngine]:
    """A model with silent heads beside ordinary ones, and its engine."""
    torch.manual_seed(0)
    dtype, quantizer = request.param
    return calibrated(some_silent, dtype, quantizer=quantizer)


def test_constant_heads_beside_ordinary_ones(silent: tuple[PreTrainedModel, SpectralQuantEngine]) -> None:
    model, engine = silent
    assert engine.profile_of(model).layers[2].exact_share < 0.1  # zeros are no attention sinks where all values are zero
    inputs = attention_inputs(model, engine, random_ids(600))
    errors, sizes = {}, {}
    for i, codec in engine.profile_codec(model).items():
        errors[i], sizes[i] = attention_errors(codec, *inputs[i])
        for side in (codec.key, codec.value):
            assert all(t.isfinite().all() for t in (side.encode_matrix, side.decode_matrix, side.mean, side.scale))
    assert errors[0][1] < STORED * sizes[0][1]
    assert max(errors[1][1], *errors[2]) < 1e-9
    for layer, head in ((0, 0), (1, 0)):
        assert errors[layer][head] < CODED * sizes[layer][head]
    assert kl_with_cache(model, engine, random_ids(600), [560, 40]) < LOGITS


def test_constant_keys_come_back(silent: tuple[PreTrainedModel, SpectralQuantEngine]) -> None:
    """Before rotation they are one vector: its mean, turned to every position, is all there is to store."""
    model, engine = silent
    inputs = attention_inputs(model, engine, random_ids(600))
    for layer in (0, 1):
        _, keys, values, _ = inputs[layer]
        _, view = coded(engine.profile_codec(model)[layer], keys, values, 1)
        error = (view.dense("key")[:, 0].double() - keys[:, 0].double()).norm()
        assert error <= (STORED + torch.finfo(model.dtype).eps) * keys[:, 0].double().norm() + 1e-9


@pytest.mark.parametrize(
    ("dtype", "compression", "quantizer"),
    [
        (torch.float32, "high", "joint"),
        (torch.float16, "high", "uniform"),
        (torch.float16, "ultra", "uniform"),
        (torch.bfloat16, "max", "uniform"),
    ],
)
def test_constant_heads_throughout(dtype: torch.dtype, compression: str, quantizer: str) -> None:
    """Variance is nothing but rounding, of which tokens may have any multiple of the median: no reason to find no codec within the budget."""

    def edit(model: PreTrainedModel) -> None:
        for layer in range(3):
            for head in range(2):
                silence(model, layer, "k_proj", head, 3.0)
                silence(model, layer, "v_proj", head, 3.0)

    model, engine = calibrated(edit, dtype, compression, quantizer)
    for errors in relative_errors(model, engine, random_ids(600)).values():
        assert (errors < STORED).all()


@pytest.mark.parametrize("zeros", [1, 4, 6])
def test_exact_need_ignores_heads_without_values(zeros: int) -> None:
    """Ordinary tokens are not taken for sinks because most heads are pruned, and sinks of the live heads are still found."""
    values = torch.randn(1, 6, 400, HEAD)
    values[:, :zeros] = 0
    values[:, :, 100] *= 1e-3
    statistics = hand_made(torch.randn(6, 400, HEAD), torch.randn(6, 400, HEAD), values[0])
    codec = build_codec(fit.fit_profile(statistics, Choices()), HIGH, NO_DIALS)[0]
    need = codec.exact_need(codec.value_size(values), torch.zeros(1, 400))[0]
    others = torch.cat([need[:100], need[101:]])
    assert (others < 1).all()
    assert (need[100] > 3 * others.max()) == (zeros < 4)


# Dead dimensions -----------------------------------------------------------------------------------------------------


def test_dead_dimensions_stay_dead() -> None:
    """Dimensions that are always zero take no bits and come back as zeros, under both metrics; the others are coded as ever."""
    dead = [0, 3, 9, 16, 19, 25]  # pairs of the rotation: 0 and 16, 3 and 19, 9 and 25

    def edit(model: PreTrainedModel) -> None:
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight.view(2, HEAD, -1)[:, dead] = 0

    model, engine = calibrated(edit)
    ids = random_ids(600)
    inputs = attention_inputs(model, engine, ids)
    for i, codec in engine.profile_codec(model).items():
        _, keys, values, _ = inputs[i]
        _, view = coded(codec, keys, values, 1)
        for which, x in (("key", keys), ("value", values)):
            got = view.dense(which)
            assert (x[..., dead] == 0).all()
            assert got[..., dead].square().mean().sqrt() < 2e-3 * x.square().mean().sqrt()
    for errors in relative_errors(model, engine, ids).values():
        assert (errors < CODED).all()
    assert kl_with_cache(model, engine, ids, [560, 40]) < LOGITS


# Little calibration text ---------------------------------------------------------------------------------------------


def hand_made(keys: Tensor, queries: Tensor, values: Tensor) -> ModelStatistics:
    """Statistics of one layer without rotation, from vectors [H, n, D]."""
    made = ModelStatistics({"weights": "abc"}, tokens=keys.shape[1])
    made.layers[0] = LayerStatistics()
    made.layers[0].add(keys, queries, values)
    return made


@pytest.fixture(scope="module")
def wide() -> PreTrainedModel:
    """Heads of 256, so that little text is little indeed."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**COMMON, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}, head_dim=256)
    return AutoModelForCausalLM.from_config(deepcopy(config)).eval()


@pytest.mark.parametrize("words", [290, 700])
def test_calibrate_on_fewer_tokens_than_dimensions(wide: PreTrainedModel, words: int) -> None:
    """Works and says how much text is missing: fewer usable tokens than dimensions, and fewer than four to a dimension."""
    engine = SpectralQuantEngine(quantizer="uniform")
    with pytest.warns(UserWarning, match="add at least") as caught:
        result = engine.calibrate(wide, TinyTokenizer(), [" ".join(f"word{i * i}" for i in range(words))], progress=False)
    assert (result["tokens"] < 256) == (words == 290)
    told = re.search(r"has (\d+) usable tokens.*head size 256.*add at least (\d+) tokens", str(caught[0].message))
    assert len(caught) == 1 and told is not None
    assert int(told[1]) == result["tokens"] and int(told[2]) == TOKENS_PER_DIMENSION * 256 - result["tokens"]
    for errors in relative_errors(wide, engine, random_ids(600)).values():
        assert (errors < ONE_SAMPLE).all()
    assert kl_with_cache(wide, engine, random_ids(600), [560, 40]) < LOGITS


@pytest.mark.parametrize("samples", [1, 3])
def test_collect_warns_of_just_the_missing_tokens(samples: int, llama: PreTrainedModel) -> None:
    """That many more tokens in a sample, and there is no warning; one less, and one is missing."""
    need = TOKENS_PER_DIMENSION * HEAD
    ids = [random_ids(SKIP + 20) for _ in range(samples)]
    with pytest.warns(UserWarning, match=f"add at least {need - 20 * samples} tokens"):
        collect(llama, ids, [0])
    longer = [*ids[1:], random_ids(SKIP + 20 + need - 20 * samples)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert collect(llama, longer, [0]).tokens == need
    with pytest.warns(UserWarning, match="add at least 1 tokens"):
        collect(llama, [*longer[:-1], longer[-1][:, 1:]], [0])


@pytest.mark.parametrize("query_metric", [False, True])
@pytest.mark.parametrize("tokens", [20, 56, 120])
def test_shrinkage_makes_up_for_few_tokens(tokens: int, query_metric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Error on fresh keys of the same distribution, of the keys or of the logits: with the raw covariance directions without variance get no bits."""
    dim = 64
    part = synthetic.side(2, dim, decay=0.03)
    seen, fresh = synthetic.samples(part, tokens)[0], synthetic.samples(part, 2000)
    queries, later = torch.randn(2, tokens, dim), torch.randn(2, 500, dim)
    choices = Choices(query_metric=query_metric, output_metric=False)

    def error() -> float:
        codec = build_codec(fit.fit_profile(hand_made(seen, queries, seen), choices), HIGH, NO_DIALS)[0]
        centred = fresh - codec.key.mean[:, None]
        off = codec.key.decode(*codec.key.encode(centred)) - centred
        return float((off @ later.mT if query_metric else off).square().mean())

    shrunken = error()
    monkeypatch.setattr(fit, "shrink", lambda covariance, samples: covariance)
    assert shrunken < 0.75 * error()


def test_calibrate_on_one_word(llama: PreTrainedModel) -> None:
    """Covariances of rank 0 serve the text they come from; on any other they are of no use, but all stays finite."""
    engine = SpectralQuantEngine(quantizer="uniform")
    engine.calibrate(llama, TinyTokenizer(), ["word " * 1500], progress=False)
    word = TinyTokenizer()("word", add_special_tokens=False)["input_ids"][0]
    text = begin_with(leading_tokens(TinyTokenizer()), torch.full((1, 600), word))
    for errors in relative_errors(llama, engine, text).values():
        assert (errors < STORED).all()
    relative_errors(llama, engine, random_ids(600))  # finite
    kl_with_cache(llama, engine, random_ids(600), [560, 40])


# One token at a time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_token_at_a_time_gives_the_codes_of_one_update(engine: SpectralQuantEngine, dtype: torch.dtype, poison: None) -> None:
    """Bit for bit: records, exact tokens and window."""
    codec = engine.profile_codec()[1]
    keys, values = (torch.randn(2, 2, 700, HEAD).to(dtype) for _ in range(2))
    values[:, :, 150:600:90] *= 1e-3  # secondary sinks
    whole, single = (Segment(codec, CacheConfig(), keys, torch.zeros(2, dtype=torch.int64)) for _ in range(2))
    whole.update(keys, values)
    assert single.update(keys[:, :, :1], values[:, :, :1]) is None
    for t in range(1, 700):
        view = single.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        assert view is not None and view.length == t + 1
    assert (single.packed, single.recent) == (whole.packed, whole.recent) == (512, 188)
    used = (whole.exact_slots >= 0).sum(-1).max()
    assert used > CacheConfig().sinks
    assert torch.equal(single.records[:, :, :4], whole.records[:, :, :4])
    for name in ("exact_slots", "exact_keys", "exact_values"):
        one, other = (getattr(s, name).narrow(1 if name == "exact_slots" else 2, 0, used) for s in (single, whole))
        assert torch.equal(one, other)
    assert (single.exact_slots[:, used:] == -1).all()
    for name in ("recent_keys", "recent_values"):
        assert torch.equal(getattr(single, name)[:, :, :188], getattr(whole, name)[:, :, :188])


def test_prompt_of_one_token(engine: SpectralQuantEngine, llama: PreTrainedModel) -> None:
    """Fed one by one through the model, as generation does after such a prompt, against the uncompressed model on the same tokens."""
    ids = random_ids(340)
    assert kl_with_cache(llama, engine, ids, [1] * 300 + [40]) < LOGITS
    assert engine.generate(llama, TinyTokenizer(), [5], max_new_tokens=3)["stats"]["seq_len"] >= 1


# Attention sinks in mid-text -----------------------------------------------------------------------------------------


class SinkText:
    """Keys, queries and values [1, 2, n, 64] in which most attention goes to `sinks`, tokens with hardly any value, and the codec of text without."""

    def __init__(self, sinks: list[int], length: int = 1100) -> None:
        dim = 64
        key, value = synthetic.side(2, dim, 0.06, 0), synthetic.side(2, dim, 0.03, 5)
        towards = torch.nn.functional.normalize(torch.randn(2, 1, dim), dim=-1)

        def make(count: int) -> tuple[Tensor, Tensor, Tensor]:
            queries = synthetic.samples(key, count) - key.mean[:, None] + 6 * towards
            return synthetic.samples(key, count), queries, synthetic.samples(value, count)

        self.statistics = hand_made(*(x[0] for x in make(4000)))
        self.keys, self.queries, self.values = make(length)
        self.keys[:, :, sinks] = key.mean[:, None] + 12 * towards + 0.3 * torch.randn(2, len(sinks), dim)
        self.values[:, :, sinks] *= 1e-2

    def codec(self, **choices: Any) -> LayerCodec:
        return build_codec(fit.fit_profile(self.statistics, Choices(**choices)), HIGH, NO_DIALS)[0]

    def error(self, codec: LayerCodec) -> float:
        """Relative RMS of attention on codes."""
        error, size = attention_errors(codec, self.queries, self.keys, self.values, 64**-0.5)
        return float((error / size).max())


def test_sinks_in_mid_text_stay_exact() -> None:
    sinks = [200, 433, 666, 850]
    text = SinkText(sinks)
    attention = (text.queries[:, :, -40:] @ text.keys.mT * 64**-0.5).softmax(-1)
    assert attention[..., sinks].sum(-1).mean() > 0.9
    segment, view = coded(text.codec(), text.keys, text.values, 40)
    assert segment.exact_slots[0].tolist() == [0, 1, 2, 3, *sinks]
    for which, x in (("key", text.keys), ("value", text.values)):
        torch.testing.assert_close(view.dense(which)[:, :, sinks], x[:, :, sinks], rtol=1e-3, atol=1e-5)
    assert text.error(text.codec()) < 0.02  # what is left of the attention reads codes
    assert text.error(text.codec(exact_below=0.0, exact_error=0.0)) > 1.0  # an error of the logits moves all of it


@pytest.mark.parametrize("rule", [{"exact_below": 0.0}, {"exact_error": 0.0}])
def test_sinks_in_mid_text_are_found_by_either_sign(rule: dict[str, float]) -> None:
    """By their keys, which the code serves badly, or by their values."""
    text = SinkText([200, 433, 666, 900])
    assert text.error(text.codec(**rule)) < 0.02


def test_sinks_in_mid_text_beyond_the_bound_are_coded() -> None:
    """More than the promise leaves room for: the share is kept in every prefix, the room is used, and the first ones are served."""
    sinks = list(range(200, 1000, 12))
    text = SinkText(sinks)
    codec = text.codec()
    segment, _ = coded(codec, text.keys, text.values, 40)
    kept = [s for s in segment.exact_slots[0].tolist() if s >= CacheConfig().sinks]
    assert set(kept) < set(sinks) and segment.packed == 896
    for packed in range(128, 897, 128):
        assert sum(s < packed for s in kept) <= EARLY + codec.exact_bound * packed
    assert len(kept) == EARLY + int(codec.exact_bound * 896) and sum(s < 256 for s in kept) >= EARLY
    text.error(codec)  # finite


# One token over and over ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [5, 150])
def test_one_token_over_and_over(engine: SpectralQuantEngine, llama: PreTrainedModel, token: int) -> None:
    """2,000 times the same value: attention averages no error of its code, and adds none to it."""
    ids = torch.full((1, 2000), token)
    inputs = attention_inputs(llama, engine, ids)
    for i, codec in engine.profile_codec().items():
        _, keys, values, _ = inputs[i]
        _, view = coded(codec, keys, values, 40)
        error, size = attention_errors(codec, *inputs[i])
        worst = (view.dense("value") - values).double().square().mean(-1).amax((0, 2)).sqrt()
        assert (error <= worst * (1 + 1e-4)).all() and (error < 1.5 * CODED * size).all()
    assert kl_with_cache(llama, engine, ids, [1960, 40]) < LOGITS


# Scales far apart ----------------------------------------------------------------------------------------------------


def scaled(key_scale: float, value_scale: float) -> Callable[[PreTrainedModel], None]:
    """Keys and values of the first KV head times a power of two, its queries and output weights divided by it: the same function."""

    def edit(model: PreTrainedModel) -> None:
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.k_proj.weight[:HEAD] *= key_scale
            attention.q_proj.weight[: 2 * HEAD] /= key_scale
            attention.v_proj.weight[:HEAD] *= value_scale
            attention.o_proj.weight[:, : 2 * HEAD] /= value_scale

    return edit


def test_scales_of_heads_do_not_matter() -> None:
    """Heads a million times apart in variance have the errors they have at one scale."""
    ids = random_ids(600)
    plain, *others = (relative_errors(*calibrated(scaled(*scales)), ids) for scales in ((1.0, 1.0), (2.0**-12, 2.0**10), (2.0**10, 2.0**-12)))
    for layer, errors in plain.items():
        assert (errors < CODED).all()
        for other in others:
            torch.testing.assert_close(other[layer], errors, rtol=0.02, atol=0)


@pytest.mark.parametrize(("quantizer", "gain"), [("uniform", "ls"), ("uniform", "search"), ("uniform", "unbiased"), ("joint", "unbiased")])
@pytest.mark.parametrize("unit", [2.0**-24, 2.0**16])
def test_units_do_not_matter(unit: float, gain: str, quantizer: str) -> None:
    """Everything in another unit, 6e-8 or 65536 of the old one: the same codes, and vectors in the new unit, bit for bit."""

    def profile(scale: float) -> Profile:
        sides = [SideProfile(s.mean * scale, s.basis, s.variance * scale**2) for s in (synthetic.side(2, HEAD, 0.06), synthetic.side(2, HEAD, 0.03, 5))]
        return Profile({0: LayerProfile(*sides, torch.full((2,), scale**2), scale)}, Choices(key_gain=gain, value_gain=gain, run=0), {})

    x = synthetic.samples(profile(1.0).layers[0].value, 200)
    slots, start = torch.arange(200), torch.zeros(1, dtype=torch.int64)
    old, new = (build_codec(profile(scale), HIGH, NO_DIALS, quantizer=quantizer)[0] for scale in (1.0, unit))
    codes, same = (c.encode(x * scale, x * scale, slots, start) for c, scale in ((old, 1.0), (new, unit)))
    assert all(torch.equal(a, b) for a, b in zip(codes, same, strict=True))
    assert torch.equal(new.decode_keys(*same[:2], slots, start), unit * old.decode_keys(*codes[:2], slots, start))
    assert torch.equal(new.decode_values(*same[2:]), unit * old.decode_values(*codes[2:]))
