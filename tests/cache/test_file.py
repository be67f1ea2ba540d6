"""A cache as a file: what comes back is what went in, and what doesn't fit is refused. Families: tests/test_families.py."""

import json
from pathlib import Path

import pytest
import torch
from damaged_files import Change, require_damage_found, rewrite
from near_lossless import tokens
from tiny_models import TinyTokenizer, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from spectralquant import SpectralCache, SpectralQuant, SpectralQuantEngine
from spectralquant.compat import cache_argument
from spectralquant.config import CacheConfig
from spectralquant.errors import CacheFileError, ConfigError


@torch.no_grad()
def filled(engine: SpectralQuantEngine, model: PreTrainedModel, length: int = 700, batch: int = 1) -> SpectralCache:
    cache = engine.cache(model)
    model(tokens(length, batch), **cache_argument(model, cache))
    return cache


@torch.no_grad()
def following(model: PreTrainedModel, cache: SpectralCache, batch: int = 1) -> Tensor:
    """Logits of 300 more tokens in pieces, which pack more blocks, on a copy."""
    torch.manual_seed(5)
    cache, more = cache.copy(), tokens(300, batch)
    return torch.cat([model(piece, **cache_argument(model, cache)).logits for piece in more.split([1, 1, 130, 168], 1)], 1)


@pytest.mark.parametrize("length", [1, 5, 128, 255, 256, 384, 700])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cache_comes_back(engine: SpectralQuantEngine, llama: PreTrainedModel, tmp_path: Path, length: int, batch: int) -> None:
    cache = filled(engine, llama, length, batch)
    loaded = SpectralCache.load(cache.save(tmp_path / "cache"), llama, engine)
    assert loaded.get_seq_length() == length
    assert torch.equal(following(llama, loaded, batch), following(llama, cache, batch))
    assert loaded.nbytes <= cache.nbytes + 4 * batch * len(cache.coded_layers), "rows of the prefix, and no room in advance"


def test_padding_and_shared_beginnings_come_back(engine: SpectralQuantEngine, llama: PreTrainedModel, tmp_path: Path) -> None:
    mask = torch.ones(3, 600, dtype=torch.long)
    mask[0, :130], mask[2, :7] = 0, 0
    padded = engine.cache(llama)
    llama.generate(tokens(600, 3), attention_mask=mask, **cache_argument(llama, padded), max_new_tokens=5, eos_token_id=199)
    shared = filled(engine, llama, 600)
    shared.batch_repeat_interleave(3)
    with torch.no_grad():
        llama(tokens(400, 3), **cache_argument(llama, shared))
    shared.reorder_cache(torch.tensor([2, 2, 0]))
    for cache in (padded, shared):
        loaded = SpectralCache.load(cache.save(tmp_path / "cache"), llama, engine)
        assert torch.equal(following(llama, loaded, 3), following(llama, cache, 3))
    assert (tmp_path / "cache.safetensors").stat().st_size < shared.nbytes, "600 tokens are there once, not three times"


def test_a_prefix_comes_back_as_a_prefix(engine: SpectralQuantEngine, llama: PreTrainedModel, tokenizer: TinyTokenizer, tmp_path: Path) -> None:
    prefix = engine.compress_prefill(llama, tokenizer, tokens(500))
    loaded = SpectralCache.load(prefix["cache"].save(tmp_path / "prefix"), llama, engine)
    assert torch.equal(loaded.prefix_ids, prefix["input_ids"])
    question = tokens(20)
    answers = [llama.generate(question, **cache_argument(llama, c), max_new_tokens=8, eos_token_id=199) for c in (prefix["cache"], loaded, loaded)]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[1], answers[2])
    with_ids = filled(engine, llama, 300)
    assert SpectralCache.load(with_ids.save(tmp_path / "c"), llama, engine).prefix_ids is None
    assert SpectralCache.load(with_ids.save(tmp_path / "c", torch.zeros(1, 300, dtype=torch.int64)), llama, engine).prefix_ids.shape == (1, 300)


def test_packed_units_stay_in_the_file(engine: SpectralQuantEngine, llama: PreTrainedModel, tmp_path: Path) -> None:
    """Nothing is copied: the memory is that of the mapped file, which other processes share."""
    path = filled(engine, llama, 2000).save(tmp_path / "cache")
    loaded = SpectralCache.load(path, llama, engine)
    mapped = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line] if Path("/proc").is_dir() else []
    ranges = [(int(low, 16), int(high, 16)) for low, high in mapped]
    for layer in loaded.coded_layers:
        at = layer.segment.prefix.records.data_ptr()
        assert not ranges or any(low <= at < high for low, high in ranges)
    following(llama, loaded)
    assert torch.equal(following(llama, loaded), following(llama, SpectralCache.load(path, llama, engine))), "and nobody wrote to it"


def test_saving_again_leaves_the_old_file_to_those_who_read_it(engine: SpectralQuantEngine, llama: PreTrainedModel, tmp_path: Path) -> None:
    cache = filled(engine, llama, 700)
    loaded = SpectralCache.load(cache.save(tmp_path / "cache"), llama, engine)
    want = following(llama, loaded)
    filled(engine, llama, 300).save(tmp_path / "cache")
    assert torch.equal(following(llama, loaded), want)


def test_the_settings_of_the_file_count(engine: SpectralQuantEngine, llama: PreTrainedModel, llama_calibration: Path, tmp_path: Path) -> None:
    other = SpectralQuantEngine(cache_config=CacheConfig(sinks=2, window=256, max_exact_share=0.01))
    other.load_calibration(llama_calibration)
    cache = filled(other, llama, 900)
    loaded = SpectralCache.load(cache.save(tmp_path / "cache"), llama, engine)
    config = loaded.coded_layers[0].config
    assert (config.sinks, config.window, config.max_exact_share) == (2, 256, 0.01)
    assert torch.equal(following(llama, loaded), following(llama, cache))


def test_the_one_object_interface_loads(llama: PreTrainedModel, llama_calibration: Path, tmp_path: Path) -> None:
    sq = SpectralQuant()
    sq.load_calibration(llama_calibration)
    cache = filled(sq.engine, llama, 300)
    assert SpectralCache.load(cache.save(tmp_path / "cache"), llama, sq).get_seq_length() == 300
    sq.engine.remove_from(llama)


def test_another_model_dtype_or_preset_is_refused(engine: SpectralQuantEngine, llama: PreTrainedModel, llama_calibration: Path, tmp_path: Path) -> None:
    path = filled(engine, llama, 300).save(tmp_path / "cache")
    ultra = SpectralQuantEngine(compression="ultra")
    ultra.load_calibration(llama_calibration)
    with pytest.raises(CacheFileError, match="another calibration, preset or quantizer"):
        SpectralCache.load(path, llama, ultra)
    half = tiny_model("llama").to(torch.bfloat16)
    with pytest.raises(CacheFileError, match="in 'float32', here it is in bfloat16"):
        SpectralCache.load(path, half, engine)
    other = tiny_model("llama", seed=1)
    second = SpectralQuantEngine()
    second.calibrate(other, TinyTokenizer(), ["a text " * 2000], progress=False)
    with pytest.raises(CacheFileError, match="made with another model"):
        SpectralCache.load(path, other, second)


def test_what_cannot_be_saved_is_refused(engine: SpectralQuantEngine, llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the cache is empty"):
        engine.cache(llama).save(tmp_path / "cache")
    cache = filled(engine, llama, 300)
    for ids in (tokens(299), tokens(300).int(), tokens(300, 2)):
        with pytest.raises(ConfigError, match=r"token_ids is .* expected torch.int64 \(1, 300\)"):
            cache.save(tmp_path / "cache", ids)
    nameless = SpectralCache(llama.config, engine.profile_codec(llama))
    with torch.no_grad():
        llama(tokens(10), **cache_argument(llama, nameless))
    with pytest.raises(ConfigError, match="knows no model"):
        nameless.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_damage_is_found(engine: SpectralQuantEngine, llama: PreTrainedModel, tmp_path: Path) -> None:
    path = filled(engine, llama, 600).save(tmp_path / "cache")
    require_damage_found(path, lambda: SpectralCache.load(path, llama, engine))
    assert SpectralCache.load(path, llama, engine).get_seq_length() == 600
    with pytest.raises(CacheFileError, match=r"nothing\.safetensors does not exist"):
        SpectralCache.load(tmp_path / "nothing", llama, engine)


BAD: dict[str, tuple[Change, str]] = {
    "a layer is missing": (lambda t, h: [t.pop(name) for name in list(t) if name.startswith("1.")], r"layers \[0, 2\] are packed"),
    "a part is missing": (lambda t, h: t.pop("1.start"), "incomplete"),
    "a name is no layer's": (lambda t, h: t.update({"x.start": torch.zeros(1)}), "names no layer"),
    "a layer too many": (lambda t, h: t.update({"7.keys": torch.zeros(1, 2, 3, 32)}), r"layers \[7\] are there"),
    "a part too many": (lambda t, h: t.update({"1.update": torch.zeros(1)}), "keeps nothing"),
    "records of another dtype": (lambda t, h: t.update({"1.records": t["1.records"].float()}), "records is torch.float32"),
    "records of another size": (lambda t, h: t.update({"1.records": t["1.records"][..., 1:]}), "records has shape"),
    "fewer heads": (lambda t, h: t.update({"1.records": t["1.records"][:, :1]}), "records has shape"),
    "no sequences": (lambda t, h: t.update({n: x[:0] for n, x in t.items()}), "no sequence"),
    "a longer layer": (lambda t, h: t.update({"1.records": torch.cat([t["1.records"]] * 2, 2)}), "exact_slots|different numbers"),
    "exact tokens of 32 bits": (lambda t, h: t.update({"1.exact_keys": t["1.exact_keys"].float()}), "exact_keys is torch.float32"),
    "a slot that is not packed": (lambda t, h: t["1.exact_slots"].fill_(10_000), "exact_slots has values"),
    "a slot twice": (lambda t, h: t["1.exact_slots"].fill_(1), "in order"),
    "an unused entry in front": (lambda t, h: t["1.exact_slots"][:, :1].fill_(-1), "in order"),
    "a window too long": (lambda t, h: t.update({f"{i}.recent_{s}": torch.zeros(1, 2, 5000, 32).half() for i in range(3) for s in ("keys", "values")}), "room"),
    "a negative start": (lambda t, h: t["1.start"].fill_(-1), "start has values"),
    "a start beyond the end": (lambda t, h: t["1.start"].fill_(2**40), "start has values"),
    "rows without a prefix": (lambda t, h: t.update({"1.prefix_rows": torch.zeros(1, dtype=torch.int32)}), "come together"),
    "rows that are not there": (
        lambda t, h: [t.update({f"{i}.prefix_records": t[f"{i}.records"][:, :, :0], f"{i}.prefix_rows": torch.full((1,), 5).int()}) for i in range(3)],
        "prefix_rows has values",
    ),
    "an unknown dtype": (lambda t, h: h.update(dtype="int8"), "dtype is 'int8'"),
    "settings out of range": (lambda t, h: h.update(settings=json.dumps({"sinks": -1, "window": 128, "max_exact_share": 0.04})), "sinks=-1"),
    "settings that are a list": (lambda t, h: h.update(settings="[1]"), "expected an object"),
    "settings that are text": (lambda t, h: h.update(settings=json.dumps({"sinks": 4, "window": 128, "max_exact_share": "x"})), "expected numbers"),
    "nested JSON": (lambda t, h: h.update(flags="[" * 100_000), "no JSON"),
    "flags that are text": (lambda t, h: h.update(flags=json.dumps({"1": {"conv_kernel_size": "x"}})), "no numbers"),
    "flags of a layer without": (lambda t, h: h.update(flags=json.dumps({"1": {"conv_kernel_size": 3}})), "keeps nothing"),
    "token ids of another length": (lambda t, h: t.update({"token_ids": torch.zeros(1, 3, dtype=torch.int64)}), "token_ids are"),
    "another version": (lambda t, h: h.update(version="2"), "format version 2"),
    "a calibration's file": (lambda t, h: h.update(format="spectralquant"), "no cache file"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_file_with_a_right_checksum_is_checked_all_the_same(engine: SpectralQuantEngine, llama: PreTrainedModel, tmp_path: Path, bad: str) -> None:
    change, text = BAD[bad]
    path = filled(engine, llama, 600).save(tmp_path / "cache")
    rewrite(path, change)
    with pytest.raises(CacheFileError, match=text) as caught:
        SpectralCache.load(path, llama, engine)
    assert str(path) in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_moves_between_devices(llama_calibration: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """To the bit where it was saved, and as near as devices are elsewhere."""
    models = {name: tiny_model("llama").to(name, dtype) for name in ("cpu", "cuda")}
    ids, more = tokens(900, 2), tokens(3, 2)
    for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
        engine = SpectralQuantEngine()
        engine.load_calibration(llama_calibration)
        cache = engine.cache(models[here])
        with torch.no_grad():
            models[here](ids.to(here), **cache_argument(models[here], cache))
            path = cache.save(tmp_path / here)
            loaded = {name: SpectralCache.load(path, models[name], engine) for name in (here, there)}
            want = models[here](more.to(here), **cache_argument(models[here], cache)).logits.cpu()
            got = {name: models[name](more.to(name), **cache_argument(models[name], c)).logits.cpu() for name, c in loaded.items()}
        assert torch.equal(got[here], want)
        assert float((got[there] - want).norm() / want.norm()) < (1e-3 if dtype == torch.float32 else 3e-2)


@pytest.mark.gpu
def test_loaded_caches_decode_as_cuda_graphs(llama_calibration: Path, tmp_path: Path) -> None:
    model, engine = tiny_model("llama").to("cuda", torch.bfloat16), SpectralQuantEngine()
    engine.load_calibration(llama_calibration)
    cache, ids = engine.cache(model), tokens(700).cuda()
    text = model.generate(ids, **cache_argument(model, cache), max_new_tokens=20, eos_token_id=199)
    loaded = SpectralCache.load(cache.save(tmp_path / "cache"), model, engine)
    answers = [model.generate(text, **cache_argument(model, c), max_new_tokens=300, eos_token_id=199) for c in (cache, loaded)]
    assert torch.equal(*answers) and loaded.decode_report.replays > 250
