"""PrefixStore against a list of texts, and against whatever can happen to a folder."""

import multiprocessing
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from near_lossless import tokens
from stored_texts import logits, read, work_with_evictions
from tiny_models import TinyTokenizer, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from spectralquant import PrefixStore, SpectralCache, SpectralQuantEngine
from spectralquant.codec.layout import UNIT
from spectralquant.compat import cache_argument
from spectralquant.config import CacheConfig
from spectralquant.errors import ConfigError
from spectralquant.prefix_store.entries import ENTRY_FILE
from spectralquant.prefix_store.folder import Entry

WINDOW = CacheConfig().window


@pytest.fixture
def store(tmp_path: Path) -> PrefixStore:
    return PrefixStore(tmp_path / "store")


def whole(ids: Tensor) -> int:
    """Blocks that are packed once a text is read: none of a text that the window's buffer has room for."""
    return (ids.shape[1] - WINDOW) // UNIT if ids.shape[1] > WINDOW + UNIT else 0


def test_a_whole_text_comes_back_to_the_bit(engine: SpectralQuantEngine, llama: PreTrainedModel, store: PrefixStore) -> None:
    for length in (257, 300, 511, 700):
        ids, more = tokens(length), tokens(3)
        cache = read(engine, llama, ids)
        assert store.save(cache, ids) > 0 and store.save(cache, ids) == 0
        other = engine.cache(llama)
        hit = store.load(other, ids)
        assert (hit.tokens, hit.exact) == (length, True)
        assert torch.equal(logits(llama, other, more), logits(llama, cache, more))
    assert not store.verify()


def test_short_texts_are_not_stored(engine: SpectralQuantEngine, llama: PreTrainedModel, store: PrefixStore) -> None:
    """Below a block and a window nothing is packed, and computing is as fast as loading."""
    ids = tokens(256)
    assert store.save(read(engine, llama, ids), ids) == 0
    assert store.load(engine.cache(llama), ids).tokens == 0


def test_the_longest_beginning_is_found(engine: SpectralQuantEngine, llama: PreTrainedModel, store: PrefixStore) -> None:
    """Texts grow out of each other at random places; what is found is what a list of all stored texts says."""
    generator, stored = random.Random(0), [tokens(600)]
    store.save(read(engine, llama, stored[0]), stored[0])
    for _ in range(25):
        base = generator.choice(stored)
        cut = generator.choice([0, 1, UNIT, base.shape[1] // 2, base.shape[1] - 1, base.shape[1]])
        ids = torch.cat([base[:, :cut], tokens(generator.randrange(1, 400))], 1)
        tails = [s.shape[1] for s in stored if s.shape[1] <= ids.shape[1] and whole(s) and torch.equal(s, ids[:, : s.shape[1]])]
        blocks = [min(whole(s), max(ids.shape[1] - WINDOW, 0) // UNIT, same(s, ids) // UNIT) * UNIT for s in stored]
        cache = engine.cache(llama)
        hit = store.load(cache, ids)
        assert hit.tokens == max([*tails, *blocks, 0]) == cache.get_seq_length()
        assert hit.exact == (hit.tokens in tails)
        if generator.random() < 0.5:
            store.save(read(engine, llama, ids), ids)
            stored.append(ids)
    assert not store.verify()
    blocks = {tuple(s[0, : UNIT * (i + 1)].tolist()) for s in stored for i in range(whole(s))}
    assert store.stats()["blocks"] == len(blocks), "a shared beginning is there once"


def same(a: Tensor, b: Tensor) -> int:
    equal = [x == y for x, y in zip(a[0].tolist(), b[0].tolist(), strict=False)]
    return equal.index(False) if False in equal else len(equal)


def test_blocks_are_those_of_the_cache_that_stored_them(engine: SpectralQuantEngine, llama: PreTrainedModel, store: PrefixStore) -> None:
    ids = tokens(1500)
    cache = read(engine, llama, ids)
    store.save(cache, ids)
    other = engine.cache(llama)
    longer = torch.cat([ids[:, :1200], tokens(200)], 1)
    assert store.load(other, longer).tokens == 1152
    for mine, theirs in zip(other.coded_layers, cache.coded_layers, strict=True):
        assert torch.equal(mine.segment.prefix.records, theirs.segment.records[:, :, :9])
        slots = theirs.segment.exact_slots[0]
        want = sorted(slot for slot in slots.tolist() if 0 <= slot < 1152)
        assert sorted(mine.segment.exact_slots[0, mine.segment.exact_slots[0] >= 0].tolist()) == want


def test_generate_uses_and_fills_it(engine: SpectralQuantEngine, llama: PreTrainedModel, store: PrefixStore) -> None:
    def run(ids: Tensor, **options: Any) -> tuple[Any, dict[str, Any]]:
        out = engine.generate(llama, TinyTokenizer(), ids, 30, store=store, eos_token_id=199, **options)
        return out["tokens"], out["stats"]["store"]

    document = tokens(900)
    (first, miss), (second, hit) = run(document), run(document)
    assert first == second
    assert (miss["hit_tokens"], hit["hit_tokens"], hit["exact"]) == (0, 899, True)
    assert miss["saved_seconds"] == 0 and hit["saved_seconds"] > 0 and miss["written_bytes"] > 0 == hit["written_bytes"]
    turn = torch.cat([document, torch.tensor([first]), tokens(300)], 1)
    assert run(turn)[1]["hit_tokens"] == 899, "the answer was not packed yet"
    assert run(torch.cat([turn, tokens(200)], 1))[1]["hit_tokens"] == 1229
    assert run(torch.cat([document[:, :500], tokens(300)], 1))[1]["hit_tokens"] == 384
    beams = [run(document, num_beams=3), run(document, num_beams=3)]
    samples = run(document, num_return_sequences=2, do_sample=True)
    assert beams[0][0] == beams[1][0] and beams[1][1]["hit_tokens"] == samples[1]["hit_tokens"] == 899
    longer = torch.cat([tokens(500), document], 1)
    pieces, again = run(longer, prefill_chunk_size=256), run(longer)
    assert pieces[0] == again[0] and pieces[1]["hit_tokens"] == 0 and pieces[1]["written_bytes"] > 0
    assert store.usage.hits == 8 and not store.verify()


def test_compress_prefill_uses_and_fills_it(engine: SpectralQuantEngine, llama: PreTrainedModel, store: PrefixStore) -> None:
    ids = tokens(600)
    first, second = (engine.compress_prefill(llama, TinyTokenizer(), ids, store=store) for _ in range(2))
    assert torch.equal(first["logits"], second["logits"]) and second["stats"]["store"]["hit_tokens"] == 599
    question = tokens(9)
    answers = [llama.generate(question, **cache_argument(llama, p["cache"]), max_new_tokens=5, eos_token_id=199) for p in (first, second)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_prompts(engine: SpectralQuantEngine, llama: PreTrainedModel, store: PrefixStore, length: int) -> None:
    ids = tokens(length)
    with_store = engine.generate(llama, TinyTokenizer(), ids, 5, store=store, eos_token_id=199)
    assert len(with_store["tokens"]) == 5 and with_store["stats"]["store"]["hit_tokens"] == 0


def test_what_a_store_cannot_take(engine: SpectralQuantEngine, llama: PreTrainedModel, store: PrefixStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds 2 sequences, a store takes one at a time"):
        engine.generate(llama, TinyTokenizer(), ["a b", "c d"], 3, store=store)
    with pytest.raises(ConfigError, match="store is a str"):
        engine.generate(llama, TinyTokenizer(), "a b", 3, store="folder")
    ids = tokens(300)
    cache = read(engine, llama, ids)
    with pytest.raises(ConfigError, match="the cache holds 300 tokens"):
        store.load(cache, ids)
    with pytest.raises(ConfigError, match="token_ids has 301 tokens, the cache holds 300"):
        store.save(cache, torch.cat([ids, ids[:, :1]], 1))
    with pytest.raises(ConfigError, match=r"expected torch\.int64"):
        store.save(cache, ids.int())
    with pytest.raises(ConfigError, match="knows no model"):
        store.load(SpectralCache(llama.config, engine.profile_codec(llama)), ids)
    with pytest.raises(ConfigError, match="max_bytes='x'"):
        PrefixStore(tmp_path, "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be a store"):
        PrefixStore(tmp_path / "file")
    padded = engine.cache(llama)
    padded.set_padding(torch.tensor([[0, 1, 1]]))
    with torch.no_grad():
        llama(tokens(300), **cache_argument(llama, padded))
    with pytest.raises(ConfigError, match="padded on the left"):
        store.save(padded, tokens(300))


def test_the_least_recently_used_goes_first(engine: SpectralQuantEngine, llama: PreTrainedModel, store: PrefixStore) -> None:
    """And of a text its end: what is left can always be reached."""
    texts = [tokens(900) for _ in range(4)]
    for ids in texts:
        store.save(read(engine, llama, ids), ids)
        time.sleep(0.01)
    store.load(engine.cache(llama), texts[0])
    size = store.stats()["bytes"]
    for share in (0.8, 0.6, 0.4, 0.2, 0.05, 0.0):
        removed = store.prune(max(int(size * share), 1))
        assert removed and store.stats()["bytes"] <= max(size * share, 1) and not store.verify()
        found = [store.load(engine.cache(llama), ids).tokens for ids in (texts[1], texts[2], texts[3])]
        assert found == sorted(found), "the later one was used, the more of it is there"
        for ids in texts[1:]:  # loading counts as use: back to the order of before
            age(store, ids, engine, llama)
    assert store.stats()["blocks"] == 0


def age(store: PrefixStore, ids: Tensor, engine: SpectralQuantEngine, llama: PreTrainedModel) -> None:
    store.load(engine.cache(llama), ids)
    time.sleep(0.01)


def test_saving_keeps_the_size(engine: SpectralQuantEngine, llama: PreTrainedModel, tmp_path: Path) -> None:
    small = PrefixStore(tmp_path / "small", 150_000)
    for _ in range(6):
        ids = tokens(700)
        small.save(read(engine, llama, ids), ids)
        assert small.stats()["bytes"] <= 150_000 and not small.verify()
    assert small.usage.evicted and small.load(engine.cache(llama), ids).tokens, "the last one is there"
    assert small.load(engine.cache(llama), tokens(700)).tokens == 0


def largest(entries: list[Entry], kind: str) -> Path:
    return max((e for e in entries if e.kind == kind), key=lambda e: e.used).path


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "link", "folder", "other"])
@pytest.mark.parametrize("kind", ["block", "tail"])
def test_a_broken_entry_is_found_and_replaced(
    engine: SpectralQuantEngine, llama: PreTrainedModel, store: PrefixStore, caplog: pytest.LogCaptureFixture, damage: str, kind: str
) -> None:
    ids = tokens(700)
    cache = read(engine, llama, ids)
    store.save(cache, ids)
    entries = store.entries()
    path = largest(entries, kind)  # the first block, or the tail
    content = path.read_bytes()
    path.unlink()
    if damage == "link":
        elsewhere = path.with_name("elsewhere")
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)
    elif damage == "folder":
        path.mkdir()
    elif damage == "other":
        other = next(e.path for e in entries if e.path != path and e.kind == "block")
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes({"flip": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], "cut": content[: len(content) // 2], "empty": b""}[damage])
    if damage not in ("link", "folder"):
        assert [(p.path, p.broken) for p in store.verify() if p.broken] == [(path, True)]
    hit = store.load(engine.cache(llama), ids)
    assert hit.tokens == (0 if kind == "block" else whole(ids) * UNIT)
    assert damage == "folder" or "can't be used, it is removed" in caplog.text
    if damage == "folder":
        path.rmdir()
    store.save(cache, ids)
    assert store.load(engine.cache(llama), ids).exact and not [p for p in store.verify() if p.broken]


def test_what_is_left_over_is_told_and_removed(engine: SpectralQuantEngine, llama: PreTrainedModel, store: PrefixStore) -> None:
    ids = tokens(900)
    store.save(read(engine, llama, ids), ids)
    root = next(store.directory.iterdir())
    begun = root / f".{'a' * 40}.safetensors.0123"
    for file in (begun, store.directory / "README", root / "notes.txt"):
        file.write_text("x")
    assert not store.verify(), "somebody may be writing it"
    os.utime(begun, (0, 0))
    os.utime(root / "notes.txt", (0, 0))
    assert {p.path for p in store.verify()} == {begun, root / "notes.txt"}
    first = max((e for e in store.entries() if e.kind == "block"), key=lambda e: e.used).path
    first.unlink()
    assert [p.text for p in store.verify() if p.path.suffix == ".safetensors" and not p.broken] == ["a block in front of it is gone, no text reaches it"] * 6
    assert store.prune() == 8 and not store.entries(), "two files, five blocks behind the first, and their tail"
    assert (store.directory / "README").exists()


def test_a_store_that_cannot_be_written_is_a_warning(
    engine: SpectralQuantEngine, llama: PreTrainedModel, store: PrefixStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.directory.rmdir()
    store.directory.write_text("a file in the place of the folder")
    out = engine.generate(llama, TinyTokenizer(), tokens(400), 5, store=store, eos_token_id=199)
    assert len(out["tokens"]) == 5 and "can't be stored" in caplog.text
    assert out["stats"]["store"]["written_bytes"] == 0


def test_threads_share_one(engine: SpectralQuantEngine, llama: PreTrainedModel, store: PrefixStore) -> None:
    texts, errors = [tokens(400 + 130 * i) for i in range(3)], list[BaseException]()
    caches = [read(engine, llama, ids) for ids in texts]

    def work(seed: int) -> None:
        try:
            for i in random.Random(seed).choices(range(3), k=12):
                store.save(caches[i].copy(), texts[i])
                assert store.load(engine.cache(llama), texts[i]).exact
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not store.verify() and store.usage.hits == 48


def test_processes_share_one(llama_calibration: Path, store: PrefixStore) -> None:
    """Each saves, loads and evicts at once; nobody waits, nobody sees half an entry."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(3)
    processes = [context.Process(target=work_with_evictions, args=(store.directory, llama_calibration, seed, ready)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not [p for p in store.verify() if p.broken] and store.stats()["bytes"] <= 250_000


def test_cold_blocks_take_fewer_bytes_and_come_back_to_the_bit(engine: SpectralQuantEngine, llama: PreTrainedModel, store: PrefixStore) -> None:
    ids, more = tokens(1500), tokens(3)
    cache = read(engine, llama, ids)
    store.save(cache, ids)
    before, used = store.stats()["bytes"], {entry.path: entry.used for entry in store.entries()}
    assert store.archive(3600) == 0, "all was used a moment ago"
    time.sleep(0.01)
    seen: list[int] = []
    saved = store.archive(0.0, lambda: seen.append(1))
    assert saved > 0 and len(seen) == whole(ids) and abs(before - store.stats()["bytes"] - saved) < 20 * len(seen), "metadata are a few bytes longer"
    assert {entry.path: entry.used for entry in store.entries()} == used and not store.verify()
    assert store.archive(0.0) == 0, "once"
    other = engine.cache(llama)
    assert store.load(other, ids).exact and torch.equal(logits(llama, other, more), logits(llama, cache, more))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("planes", "16 -3", "expected two multiples of 16"),
        ("planes", "1600 16", "that its records have"),
        ("records", None, "archive"),
        ("level", "other", None),
    ],
)
def test_archived_blocks_are_not_believed(
    engine: SpectralQuantEngine, llama: PreTrainedModel, store: PrefixStore, caplog: pytest.LogCaptureFixture, name: str, value: str | None, text: str | None
) -> None:
    """With a right checksum."""
    ids = tokens(700)
    store.save(read(engine, llama, ids), ids)
    time.sleep(0.01)
    if name != "planes":
        store.archive(0.0)
    path = largest(store.entries(), "block")
    tensors, header = ENTRY_FILE.read(path)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    if value is None:
        tensors["records"] = tensors["records"][:-5]
    else:
        header[name] = value
    ENTRY_FILE.write(path, tensors, header)
    if name == "planes":
        time.sleep(0.01)
        store.archive(0.0)
    assert store.load(engine.cache(llama), ids).tokens == 0 and "can't be used, it is removed" in caplog.text
    assert text is None or text in caplog.text


def test_another_model_preset_or_setting_finds_nothing(
    engine: SpectralQuantEngine, llama: PreTrainedModel, llama_calibration: Path, store: PrefixStore
) -> None:
    ids = tokens(500)
    store.save(read(engine, llama, ids), ids)
    for settings in ({"compression": "ultra"}, {"cache_config": CacheConfig(sinks=5)}, {"quantizer": "uniform"}):
        other = SpectralQuantEngine(**settings)
        other.load_calibration(llama_calibration)
        assert store.load(other.cache(llama), ids).tokens == 0
    assert store.load(engine.cache(llama), ids).exact


@pytest.mark.gpu
def test_on_a_gpu(llama_calibration: Path, store: PrefixStore) -> None:
    """Hits give what misses gave, also by CUDA graphs, and a CPU's entries are taken as near as devices are."""
    model, engine = tiny_model("llama").to("cuda", torch.bfloat16), SpectralQuantEngine()
    engine.load_calibration(llama_calibration)
    ids = tokens(900).cuda()
    runs = [engine.generate(model, TinyTokenizer(), ids, 300, store=store, eos_token_id=199) for _ in range(2)]
    assert runs[0]["tokens"] == runs[1]["tokens"] and runs[1]["stats"]["decode_replays"] > 250
    assert [run["stats"]["store"]["hit_tokens"] for run in runs] == [0, 899]
    longer = torch.cat([ids, torch.tensor([runs[0]["tokens"]]).cuda()], 1)
    for rows in (1, 4):
        hit = engine.generate(model, TinyTokenizer(), longer, 3, store=store, num_return_sequences=rows, do_sample=rows > 1, eos_token_id=199)["stats"]["store"]
        assert hit["hit_tokens"] == (1024 if rows == 1 else 1199)
    other = engine.cache(tiny_model("llama").to(torch.bfloat16))
    assert store.load(other, ids[:, :-1]).exact, "on a CPU"
    assert not store.verify()
