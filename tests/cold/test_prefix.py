"""A prefix as an archive: what comes back answers as the packed prefix does, and what doesn't fit is refused. Families: tests/test_families.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_files import Change, require_damage_found, rewrite
from near_lossless import relative, tokens
from safetensors import safe_open
from tiny_models import TinyTokenizer, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from spectralquant import SpectralCache, SpectralQuantEngine, get_default_calibration_texts
from spectralquant.archive.predictor import ArchiveModel, load_archive
from spectralquant.cache.state import capture_cache
from spectralquant.cold import file
from spectralquant.compat import cache_argument
from spectralquant.errors import CacheFileError, ConfigError

LENGTH, FINEST = 700, -64


def fitted(engine: SpectralQuantEngine, model: PreTrainedModel) -> ArchiveModel:
    return engine.fit_archive(model, TinyTokenizer(), get_default_calibration_texts(12), progress=False)


@pytest.fixture(scope="module")
def archive(llama: PreTrainedModel, llama_calibration: Path) -> ArchiveModel:
    made = SpectralQuantEngine()
    made.load_calibration(llama_calibration)
    return fitted(made, llama)


@pytest.fixture(scope="module")
def gemma2() -> tuple[PreTrainedModel, SpectralQuantEngine, ArchiveModel]:
    """Every other layer has a window of 64 tokens."""
    model, engine = tiny_model("gemma2"), SpectralQuantEngine(calibration_cache=False)
    engine.calibrate(model, TinyTokenizer(), get_default_calibration_texts(12), progress=False)
    return model, engine, fitted(engine, model)


@torch.no_grad()
def following(model: PreTrainedModel, cache: Any) -> Tensor:
    """Logits of 200 more tokens in pieces, which pack another block, on a copy."""
    torch.manual_seed(5)
    cache = cache.copy() if isinstance(cache, SpectralCache) else cache
    return torch.cat([model(piece, use_cache=True, **cache_argument(model, cache)).logits for piece in tokens(200).split([1, 1, 130, 68], 1)], 1)


def archived(engine: SpectralQuantEngine, model: PreTrainedModel, archive: ArchiveModel, path: Path, length: int = LENGTH, rate: int = -4) -> Path:
    torch.manual_seed(0)
    return engine.archive_prefix(model, TinyTokenizer(), tokens(length), path, archive, rate)["path"]


def require_near(model: PreTrainedModel, engine: SpectralQuantEngine, archive: ArchiveModel, path: Path) -> None:
    """The finest rate rounds to 1/256 of the usual step, so codes are those of the packed cache but where a choice was close. At the default rate the
    archive's noise, a hundredth of the power or two, comes to that of the preset, several hundredths: their squares add."""
    torch.manual_seed(0)
    ids = tokens(LENGTH)
    packed = following(model, engine.compress_prefill(model, TinyTokenizer(), ids)["cache"])
    with engine.applied_to(model):
        exact = following(model, engine.collect_kv(model, TinyTokenizer(), ids))
    loaded = {rate: following(model, engine.load_archived(archived(engine, model, archive, path, rate=rate), model, archive)) for rate in (FINEST, -4, 16)}
    assert relative(loaded[FINEST], packed) < 0.03
    assert relative(loaded[-4], exact) < 1.25 * relative(packed, exact)
    assert relative(loaded[FINEST], packed) < relative(loaded[-4], packed) < relative(loaded[16], packed)


def test_logits_of_a_model_all_of_whose_layers_are_coded(engine: SpectralQuantEngine, llama: PreTrainedModel, archive: ArchiveModel, tmp_path: Path) -> None:
    require_near(llama, engine, archive, tmp_path / "a")


def test_logits_of_a_model_with_sliding_layers(gemma2: tuple[PreTrainedModel, SpectralQuantEngine, ArchiveModel], tmp_path: Path) -> None:
    model, engine, archive = gemma2
    require_near(model, engine, archive, tmp_path / "a")
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        assert {"0.keys", "0.values", "2.keys", "2.values"} < set(opened.keys()), "windows are there as they are"


@pytest.mark.parametrize("length", [1, 5, 128, 300])
def test_short_prefixes(engine: SpectralQuantEngine, llama: PreTrainedModel, archive: ArchiveModel, tmp_path: Path, length: int) -> None:
    """What is near the end is in the window: it comes back to a few of its 16 bits' last places."""
    loaded = engine.load_archived(archived(engine, llama, archive, tmp_path / "a", length, FINEST), llama, archive)
    torch.manual_seed(0)
    packed = engine.compress_prefill(llama, TinyTokenizer(), tokens(length))["cache"]
    assert loaded.get_seq_length() == length
    for got, want in zip(capture_cache(loaded).segments.values(), capture_cache(packed).segments.values(), strict=True):
        assert relative(got.recent_keys, want.recent_keys) < 3e-3 and relative(got.recent_values, want.recent_values) < 3e-3
    assert following(llama, loaded).isfinite().all()


def test_what_is_reported(engine: SpectralQuantEngine, llama: PreTrainedModel, archive: ArchiveModel, tmp_path: Path) -> None:
    sizes = {}
    for rate in (-4, 8):
        told = engine.archive_prefix(llama, TinyTokenizer(), "word " * 500, tmp_path / "a", archive, rate)
        assert told.keys() == {"path", "tokens", "bytes", "ratio", "seconds"} and told["tokens"] == 501 and told["seconds"] > 0
        assert told["path"] == tmp_path / "a.safetensors" and told["bytes"] == told["path"].stat().st_size
        assert told["ratio"] == pytest.approx(3 * 2 * 2 * 2 * 32 * 501 / told["bytes"]), "layers, sides, heads, bytes, head size, tokens"
        sizes[rate] = told["bytes"]
    assert sizes[8] < sizes[-4]


def test_follow_ups_take_new_tokens_or_the_whole_text(engine: SpectralQuantEngine, llama: PreTrainedModel, archive: ArchiveModel, tmp_path: Path) -> None:
    loaded = engine.load_archived(archived(engine, llama, archive, tmp_path / "a"), llama, archive)
    torch.manual_seed(0)
    assert loaded.prefix_ids is not None and torch.equal(loaded.prefix_ids, tokens(LENGTH))
    more, options = tokens(7), {"max_new_tokens": 9, "do_sample": False, "eos_token_id": 199, "pad_token_id": 0}
    short = llama.generate(more, **cache_argument(llama, loaded), **options)
    whole = llama.generate(torch.cat([loaded.prefix_ids, more], 1), **cache_argument(llama, loaded), **options)
    assert torch.equal(short[:, 7:], whole[:, LENGTH + 7 :]) and short.shape[1] == 16


def test_a_loaded_prefix_is_a_cache_file_too(engine: SpectralQuantEngine, llama: PreTrainedModel, archive: ArchiveModel, tmp_path: Path) -> None:
    loaded = engine.load_archived(archived(engine, llama, archive, tmp_path / "a"), llama, archive)
    again = SpectralCache.load(loaded.save(tmp_path / "cache"), llama, engine)
    assert torch.equal(following(llama, again), following(llama, loaded))


def test_long_prefixes_are_coded_in_parts(
    engine: SpectralQuantEngine, llama: PreTrainedModel, archive: ArchiveModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions and sinks go on from part to part. In pieces other tokens may stay exact, as of a prompt in pieces: the bound has room for some."""
    whole = following(llama, engine.load_archived(archived(engine, llama, archive, tmp_path / "a", rate=FINEST), llama, archive))
    monkeypatch.setattr(file, "PART", 300)
    path = archived(engine, llama, archive, tmp_path / "b", rate=FINEST)
    with safe_open(path, "pt") as opened:
        assert sorted(opened.keys()) == ["payload.0", "payload.1", "payload.2", "token_ids"]
    loaded = engine.load_archived(path, llama, archive)
    assert loaded.get_seq_length() == LENGTH
    assert relative(following(llama, loaded), whole) < 0.06


def test_one_archive_serves_every_preset_and_the_file_of_its_model(
    engine: SpectralQuantEngine, llama: PreTrainedModel, llama_calibration: Path, archive: ArchiveModel, tmp_path: Path
) -> None:
    path = archived(engine, llama, archive, tmp_path / "a")
    again = load_archive(archive.save(tmp_path / "model"), engine.profile_of(llama))
    assert torch.equal(following(llama, engine.load_archived(path, llama, again)), following(llama, engine.load_archived(path, llama, archive)))
    ultra = SpectralQuantEngine(compression="ultra")
    ultra.load_calibration(llama_calibration)
    assert ultra.load_archived(path, llama, archive).nbytes < engine.load_archived(path, llama, archive).nbytes


def test_a_model_in_sixteen_bits(llama_calibration: Path, tmp_path: Path) -> None:
    model, engine = tiny_model("llama", torch.bfloat16), SpectralQuantEngine()
    engine.load_calibration(llama_calibration)
    archive = fitted(engine, model)
    loaded = engine.load_archived(archived(engine, model, archive, tmp_path / "a"), model, archive)
    assert loaded.coded_layers[0].segment.recent_keys.dtype == torch.bfloat16
    assert following(model, loaded).isfinite().all()
    with pytest.raises(CacheFileError, match="in 'bfloat16', here it is in float32"):
        engine.load_archived(tmp_path / "a", tiny_model("llama"), archive)


def test_another_model_or_archive_model_is_refused(
    engine: SpectralQuantEngine,
    llama: PreTrainedModel,
    archive: ArchiveModel,
    gemma2: tuple[PreTrainedModel, SpectralQuantEngine, ArchiveModel],
    tmp_path: Path,
) -> None:
    path = archived(engine, llama, archive, tmp_path / "a")
    with pytest.raises(CacheFileError, match="made with another archive model"):
        engine.load_archived(path, llama, engine.fit_archive(llama, TinyTokenizer(), ["a text of words " * 2000], progress=False))
    other, second, of_other = gemma2
    with pytest.raises(CacheFileError, match="made with another model"):
        second.load_archived(path, other, of_other)
    with pytest.raises(ConfigError, match="archive was fitted for another model than this LlamaForCausalLM"):
        engine.load_archived(path, llama, of_other)
    with pytest.raises(ConfigError, match="archive was fitted for another model"):
        engine.archive_prefix(llama, TinyTokenizer(), "a word", tmp_path / "b", of_other)
    with pytest.raises(ConfigError, match="archive is a str, expected an archive model"):
        engine.load_archived(path, llama, "my-archive")  # pyright: ignore[reportArgumentType]


def test_what_can_not_be_archived_is_refused(engine: SpectralQuantEngine, llama: PreTrainedModel, archive: ArchiveModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompt holds 2 sequences; archive_prefix takes one"):
        engine.archive_prefix(llama, TinyTokenizer(), ["a", "b"], tmp_path / "a", archive)
    with pytest.raises(ConfigError, match="rate=65"):
        engine.archive_prefix(llama, TinyTokenizer(), "a word", tmp_path / "a", archive, 65)
    with pytest.raises(CacheFileError, match=r"a\.safetensors does not exist"):
        engine.load_archived(tmp_path / "a", llama, archive)
    assert not list(tmp_path.iterdir())


def test_damage_is_found(engine: SpectralQuantEngine, llama: PreTrainedModel, archive: ArchiveModel, tmp_path: Path) -> None:
    path = archived(engine, llama, archive, tmp_path / "a", 300)
    require_damage_found(path, lambda: engine.load_archived(path, llama, archive))
    assert engine.load_archived(path, llama, archive).get_seq_length() == 300


def test_damage_under_a_right_checksum_is_an_error_or_other_numbers(gemma2: tuple[PreTrainedModel, SpectralQuantEngine, ArchiveModel], tmp_path: Path) -> None:
    """A payload whose bytes a stranger chose: whatever they are, there is a cache of the right length, or CacheFileError."""
    model, engine, archive = gemma2
    path = archived(engine, model, archive, tmp_path / "a", 200)
    whole, size, outcomes = path.read_bytes(), 0, set[str]()
    with safe_open(path, "pt") as opened:
        size = len(opened.get_tensor("payload.0"))
    for at in [*range(40), *range(40, size, size // 160)]:
        path.write_bytes(whole)
        rewrite(path, lambda t, h, at=at: t["payload.0"][at].bitwise_xor_(0x41))
        try:
            loaded = engine.load_archived(path, model, archive)
        except CacheFileError:
            outcomes.add("refused")
            continue
        outcomes.add("loaded")
        assert loaded.get_seq_length() == 200 and all(t.isfinite().all() for t in capture_cache(loaded).tensors().values())
    assert outcomes == {"refused", "loaded"}


BAD: dict[str, tuple[Change, str]] = {
    "no payload": (lambda t, h: t.pop("payload.0"), "payload.0 is missing"),
    "a payload of numbers": (lambda t, h: t.update({"payload.0": t["payload.0"].float()}), "payload.0 is missing or no row of bytes"),
    "a payload of two dimensions": (lambda t, h: t.update({"payload.0": t["payload.0"][None]}), "no row of bytes"),
    "an empty payload": (lambda t, h: t.update({"payload.0": t["payload.0"][:0]}), "has no head"),
    "a payload too many": (lambda t, h: t.update({"payload.1": t["payload.0"].clone()}), "names no layer"),
    "another number of tokens": (lambda t, h: t.update({"token_ids": t["token_ids"][:, :-1]}), "299|keys is"),
    "no tokens": (lambda t, h: t.update({"token_ids": t["token_ids"][:, :0]}), "token_ids are"),
    "no token ids": (lambda t, h: t.pop("token_ids"), "token_ids are"),
    "two sequences": (lambda t, h: t.update({"token_ids": t["token_ids"].expand(2, -1)}), r"token_ids are torch.int64 \(2, 300\)"),
    "token ids that are floats": (lambda t, h: t.update({"token_ids": t["token_ids"].float()}), "token_ids are"),
    "more tokens than a part": (lambda t, h: t.update({"token_ids": torch.zeros(1, 5000, dtype=torch.int64)}), "payload.1 is missing"),
    "a packed layer": (lambda t, h: t.update({"1.records": torch.zeros(1, dtype=torch.uint8)}), "incomplete"),
    "a window in a coded layer": (lambda t, h: t.update({"1.keys": torch.zeros(1, 2, 63, 32)}), "layer 1 has keys, of which this model's keeps nothing"),
    "no window": (lambda t, h: [t.pop(f"0.{side}") for side in ("keys", "values")], "layer 0 has nothing, expected keys and values"),
    "half of a window": (lambda t, h: t.pop("2.values"), "layer 2 has keys, expected keys and values"),
    "a window of another length": (lambda t, h: t.update({"0.keys": t["0.keys"][:, :, 1:]}), r"0.keys is torch.float32 \(1, 2, 62, 32\)"),
    "windows of bytes": (lambda t, h: t.update({f"0.{side}": t[f"0.{side}"].byte() for side in ("keys", "values")}), "0.keys is torch.uint8"),
    "a window of fewer heads": (lambda t, h: t.update({"0.keys": t["0.keys"][:, 1:]}), r"expected torch.float32 \(1, 2, 63, 32\)"),
    "a window of wider heads": (lambda t, h: t.update({"0.values": torch.cat([t["0.values"]] * 2, -1)}), r"0.values is torch.float32 \(1, 2, 63, 64\)"),
    "a scalar": (lambda t, h: t.update({"0.keys": torch.tensor(1.0)}), r"0.keys is torch.float32 \(\)"),
    "a layer too many": (lambda t, h: t.update({"7.keys": torch.zeros(1, 2, 3, 32)}), r"layers \[7\] are there"),
    "a name is no layer's": (lambda t, h: t.update({"x.keys": torch.zeros(1)}), "names no layer"),
    "an unknown dtype": (lambda t, h: h.update(dtype="int8"), "dtype is 'int8'"),
    "no flags": (lambda t, h: h.pop("flags"), "no JSON"),
    "nested JSON": (lambda t, h: h.update(flags="[" * 100_000), "no JSON"),
    "flags that are text": (lambda t, h: h.update(flags=json.dumps({"0": {"cumulative_length": "x"}})), "no numbers"),
    "flags of a layer without": (lambda t, h: h.update(flags=json.dumps({"1": {"conv_kernel_size": 3}})), "keeps nothing"),
    "another version": (lambda t, h: h.update(version="2"), "format version 2"),
    "a cache file": (lambda t, h: h.update(format="spectralquant-cache"), "no archive of a prefix"),
    "of no archive model": (lambda t, h: h.pop("archive"), "made with another archive model"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_file_with_a_right_checksum_is_checked_all_the_same(
    gemma2: tuple[PreTrainedModel, SpectralQuantEngine, ArchiveModel], tmp_path: Path, bad: str
) -> None:
    model, engine, archive = gemma2
    change, text = BAD[bad]
    path = archived(engine, model, archive, tmp_path / "a", 300)
    rewrite(path, change)
    with pytest.raises(CacheFileError, match=text) as caught:
        engine.load_archived(path, model, archive)
    assert str(path) in str(caught.value)


def test_numbers_that_the_model_can_not_hold_are_refused(llama_calibration: Path, tmp_path: Path) -> None:
    """A payload may stand for more than 65,504, where 16 bits end: in windows and among exact tokens, also of a model in 32."""
    model, engine = tiny_model("llama", torch.float16), SpectralQuantEngine()
    engine.load_calibration(llama_calibration)
    archive = fitted(engine, model)
    path = archived(engine, model, archive, tmp_path / "a", 300)
    rewrite(path, lambda t, h: t["payload.0"][:2].copy_(torch.tensor([64, 0], dtype=torch.uint8)))  # the rate
    with pytest.raises(CacheFileError):
        engine.load_archived(path, model, archive)


@pytest.mark.gpu
def test_an_archive_moves_between_devices(llama_calibration: Path, tmp_path: Path) -> None:
    """As near as devices are, where decoding and packing round."""
    models = {name: tiny_model("llama").to(name) for name in ("cpu", "cuda")}
    engine = SpectralQuantEngine()
    engine.load_calibration(llama_calibration)
    archive = fitted(engine, models["cpu"])
    for here in models:
        path = archived(engine, models[here], archive, tmp_path / here, rate=FINEST)
        loaded = {name: engine.load_archived(path, model, archive) for name, model in models.items()}
        torch.manual_seed(1)
        ids = tokens(20)
        with torch.no_grad():
            got = {name: models[name](ids.to(name), **cache_argument(models[name], cache)).logits.cpu() for name, cache in loaded.items()}
        assert relative(got["cuda"], got["cpu"]) < 0.03
