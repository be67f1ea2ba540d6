"""Blocks that leave the window by CUDA graphs, against the same blocks packed one by one: bit for bit, given the same keys and values."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from faults import FailingOperations
from graph_doubles import DoubledGraph, Tape, use_doubles
from tiny_models import TinyTokenizer, tiny_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from spectralquant.cache.exact import entries_used
from spectralquant.cache.hf import SpectralCache
from spectralquant.codec.layout import UNIT
from spectralquant.config import CacheConfig
from spectralquant.corpus import get_default_calibration_texts
from spectralquant.decode_graph import AHEAD, LEAD, DecodeGraph, graphed_steps
from spectralquant.engine import SpectralQuantEngine

VOCABULARY = 997


class TableModel:
    """Keys and values of a token come from a table: they don't depend on how attention rounds. Some tokens are secondary sinks.

    Args:
        engine, model: Calibrated; the cache is this model's.
        sinks: Share of the tokens.
    """

    def __init__(self, engine: SpectralQuantEngine, model: PreTrainedModel, sinks: float = 0.02) -> None:
        self.config, self.device, self.codecs = model.config, model.device, engine.profile_codec(model)
        heads, dim = self.codecs[0].key.encode_matrix.shape[:2]
        make = torch.Generator().manual_seed(3)
        self.tables = torch.randn(2, len(self.codecs), VOCABULARY, heads, dim, generator=make)
        self.tables[1][:, torch.rand(VOCABULARY, generator=make) < sinks] *= 1e-3
        self.tables = self.tables.to(self.device, model.dtype)

    def cache(self, config: CacheConfig, padding: tuple[int, ...] = (0,)) -> SpectralCache:
        cache = SpectralCache(self.config, self.codecs, config)
        cache.set_padding(torch.arange(max(padding) + 1)[None] >= torch.tensor(padding)[:, None])
        return cache

    def forward(self, input_ids: Tensor, position_ids: Tensor, past_key_values: SpectralCache, **inputs: Any) -> CausalLMOutputWithPast:
        for layer, keys, values in zip(past_key_values.coded_layers, *self.tables, strict=True):
            layer.update(keys[input_ids].transpose(1, 2), values[input_ids].transpose(1, 2))
        return CausalLMOutputWithPast(logits=position_ids[..., None].float())

    def feed(self, cache: SpectralCache, ids: Tensor, one_by_one: bool = True) -> None:
        for part in ids.split(1, 1) if one_by_one else [ids]:
            position = cache.get_seq_length() + torch.arange(part.shape[1], device=self.device).expand(len(ids), -1)
            mask = torch.arange(int(position[0, -1]) + 1, device=self.device) >= cache.coded_layers[0].padding.to(self.device)[:, None]
            out = self.forward(input_ids=part, position_ids=position, attention_mask=mask, past_key_values=cache)
            assert torch.equal(out.logits[..., 0], position.float())


class TapedGraph(DoubledGraph):
    """Steps are tapes too: nothing in the table model's step depends on the host."""

    step_double = Tape


@pytest.fixture
def table(engine: SpectralQuantEngine, llama: PreTrainedModel) -> TableModel:
    return TableModel(engine, llama)


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[DoubledGraph]:
    return use_doubles(monkeypatch, TapedGraph)


def random_ids(length: int, batch: int = 1, device: Any = "cpu") -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), device=device)


@contextmanager
def graphed(model: TableModel, cache: SpectralCache) -> Iterator[DecodeGraph]:
    with graphed_steps(model, cache) as graph:
        assert graph is not None
        yield graph


def assert_same(one: SpectralCache, other: SpectralCache) -> None:
    for a, b in zip(one.coded_layers, other.coded_layers, strict=True):
        a, b = a.segment, b.segment
        assert (a.packed, a.recent, a.length) == (b.packed, b.recent, b.length)
        assert torch.equal(a.lengths, b.lengths) and a.lengths.tolist() == [[a.packed // UNIT, a.recent]] * len(a.start)
        units = [s._view(s.recent_keys, s.recent_values, s.lengths).units(0, s.packed // UNIT) for s in (a, b)]
        assert torch.equal(*units)
        used = (a.exact_slots >= 0).sum(-1)
        assert torch.equal(entries_used(a.lengths[0, 0], a.start, a.secondary, a.config.sinks), used) and torch.equal(a.secondary, b.secondary)
        for row, count in enumerate(used.tolist()):
            assert (a.exact_slots[row, count:] == -1).all() and (b.exact_slots[row, count:] == -1).all()
            for name in ("exact_slots", "exact_keys", "exact_values"):
                x, y = (getattr(s, name)[row] for s in (a, b))
                rows = slice(0, count)
                assert torch.equal(x[rows] if x.dim() == 1 else x[:, rows], y[rows] if y.dim() == 1 else y[:, rows]), name
        for name in ("recent_keys", "recent_values"):
            assert torch.equal(getattr(a, name)[:, :, : a.recent], getattr(b, name)[:, :, : b.recent])


@pytest.mark.parametrize("window", [128, 300, 40, 1])
@pytest.mark.parametrize("padding", [(0,), (0, 3, 140, 310)], ids=str)
def test_blocks_packed_by_graphs_are_the_blocks(table: TableModel, taped: list[DoubledGraph], poison: None, window: int, padding: tuple[int, ...]) -> None:
    """Records, exact tokens and their order, window: from a prompt of 320 tokens on, over nine blocks, with starts of sequences in several of them."""
    ids, config = random_ids(1500, len(padding)), CacheConfig(window=window)
    plain, cache = table.cache(config, padding), table.cache(config, padding)
    table.feed(plain, ids[:, :320], one_by_one=False)
    table.feed(plain, ids[:, 320:])
    with graphed(table, cache) as graph:
        table.feed(cache, ids[:, :320], one_by_one=False)
        table.feed(cache, ids[:, 320:])
    assert_same(plain, cache)
    assert cache.coded_layers[0].segment.secondary.max() > 4
    assert graph.replays["store"] >= 6 and graph.replays["encode"] >= 5 and graph.replays["step"] > 1150
    assert graph.captures["step"] <= 4 and sum(graph.captures.values()) <= 12


def test_without_exact_tokens(table: TableModel, taped: list[DoubledGraph]) -> None:
    """The exact store has no room at all, and the launches leave it alone."""
    ids, config = random_ids(900), CacheConfig(sinks=0, max_exact_share=0.0)
    plain, cache = table.cache(config), table.cache(config)
    table.feed(plain, ids)
    with graphed(table, cache) as graph:
        table.feed(cache, ids)
    assert_same(plain, cache)
    assert graph.replays["store"] >= 3 and cache.coded_layers[0].segment.exact_slots.shape == (1, 0)


def test_one_row_with_exact_tokens_beside_rows_without(table: TableModel, taped: list[DoubledGraph]) -> None:
    """Rows that bring none write back what is there, also where their part of the store is full."""
    sinks = (table.tables[1][0].square().mean((-2, -1)) < 1e-3).nonzero()[:, 0]
    others = (table.tables[1][0].square().mean((-2, -1)) >= 1e-3).nonzero()[:, 0]
    ids = others[torch.randint(0, len(others), (3, 1200))]
    ids[0, 700::40], ids[1, 200:300:20] = sinks[0], sinks[1]
    config = CacheConfig(window=128)
    plain, cache = table.cache(config, (0, 0, 0)), table.cache(config, (0, 0, 0))
    table.feed(plain, ids)
    with graphed(table, cache):
        table.feed(cache, ids)
    assert_same(plain, cache)


@pytest.mark.parametrize("cut", [1, 30, 129, 200])
def test_crop_forgets_an_encoded_block(table: TableModel, taped: list[DoubledGraph], cut: int) -> None:
    ids, other = random_ids(256 - LEAD + 4 + 384), random_ids(400)
    plain, cache = table.cache(CacheConfig()), table.cache(CacheConfig())
    with graphed(table, cache):
        table.feed(cache, ids)
        assert cache.coded_layers[0].segment.encoded
        table.feed(plain, ids)
        for each in (plain, cache):
            each.crop(-cut)
        assert not cache.coded_layers[0].segment.encoded
        table.feed(plain, other)
        table.feed(cache, other)
    assert_same(plain, cache)


def test_rows_may_move_while_a_block_is_encoded(table: TableModel, taped: list[DoubledGraph]) -> None:
    """Its choice of exact tokens moves with them, and copies have it too."""
    ids, other, rows = random_ids(256 - LEAD + 4 + 384, 3), random_ids(300, 3), torch.tensor([2, 0, 0])
    plain, cache = table.cache(CacheConfig(), (0, 3, 300)), table.cache(CacheConfig(), (0, 3, 300))
    with graphed(table, cache):
        table.feed(plain, ids)
        table.feed(cache, ids)
        twin = cache.copy()
        for each in (plain, cache, twin):
            assert each.coded_layers[0].segment.encoded == (each is not plain)
            each.reorder_cache(rows)
        for each in (plain, cache, twin):
            table.feed(each, other)
    assert_same(plain, cache)
    assert_same(plain, twin)


def test_several_tokens_at_once_between_steps(table: TableModel, taped: list[DoubledGraph]) -> None:
    """As a chat's next message, or assisted decoding: they pack what is due themselves, and blocks encoded early are used or encoded again."""
    plain, cache = table.cache(CacheConfig()), table.cache(CacheConfig())
    with graphed(table, cache):
        for count, one_by_one in ((500, False), (9, True), (8, False), (300, True), (2, False), (700, False), (200, True)):
            ids = random_ids(count)
            table.feed(plain, ids, one_by_one)
            table.feed(cache, ids, one_by_one)
    assert_same(plain, cache)


def test_a_second_generation_on_the_same_cache(table: TableModel, taped: list[DoubledGraph]) -> None:
    """The first one ends between encoding and move: the second has no number for it and asks."""
    ids = random_ids(900)
    plain, cache = table.cache(CacheConfig()), table.cache(CacheConfig())
    table.feed(plain, ids)
    with graphed(table, cache):
        table.feed(cache, ids[:, : 256 - LEAD + 4 + 384])
    assert cache.coded_layers[0].segment.encoded
    with graphed(table, cache) as second:
        table.feed(cache, ids[:, 256 - LEAD + 4 + 384 :])
    assert_same(plain, cache)
    assert second.captures["store"] or second.captures["encode"]


# Memory --------------------------------------------------------------------------------------------------------------


def test_nothing_is_reserved_beyond_what_a_prompt_needs(table: TableModel) -> None:
    """After a prefill in one piece stores are as large as what they hold."""
    cache = table.cache(CacheConfig(), (0, 30))
    table.feed(cache, random_ids(1900, 2), one_by_one=False)
    for layer in cache.coded_layers:
        segment = layer.segment
        assert segment.records.shape[2] == segment.packed // UNIT
        assert segment.exact_slots.shape[1] == segment.exact_keys.shape[2] == (segment.exact_slots >= 0).sum(-1).max()


@pytest.mark.parametrize("sinks", [0.0, 0.01, 0.3])
def test_long_decoding_takes_no_more_memory_than_packing_with_known_counts(
    engine: SpectralQuantEngine, llama: PreTrainedModel, taped: list[DoubledGraph], sinks: float
) -> None:
    """Against updates that know how many tokens stay exact when they make room: equal but for the few steps that the store of codes grows earlier."""
    table = TableModel(engine, llama, sinks)
    ids = random_ids(2600)
    plain, cache = table.cache(CacheConfig()), table.cache(CacheConfig())
    table.feed(plain, ids[:, :600], one_by_one=False)
    for layer in plain.coded_layers:
        layer.segment.ahead = AHEAD
    with graphed(table, cache) as graph:
        table.feed(cache, ids[:, :600], one_by_one=False)
        for part in ids[:, 600:].split(200, 1):
            table.feed(plain, part)
            table.feed(cache, part)
            assert cache.nbytes <= 1.01 * plain.nbytes
    assert graph.replays["store"] > 10


@pytest.mark.parametrize("at", [325, 376, 384], ids=["step", "encode", "store"])
def test_steps_that_fail_count_nothing(table: TableModel, taped: list[DoubledGraph], at: int) -> None:
    """At any operation of a step, be it captured by then or not: the cache goes on from the tokens before. Where windows may have moved on in some layers
    it is empty."""
    ids = random_ids(400)
    plain = table.cache(CacheConfig())
    table.feed(plain, ids[:, :320], one_by_one=False)
    table.feed(plain, ids[:, 320:])
    emptied = failed = 0
    for n in (1, 7, 19, *range(40, 400, 45)):
        cache = table.cache(CacheConfig())
        with graphed(table, cache) as graph:
            table.feed(cache, ids[:, :320], one_by_one=False)
            table.feed(cache, ids[:, 320:at])
            try:
                with FailingOperations(n):
                    table.feed(cache, ids[:, at : at + 1])
            except torch.OutOfMemoryError:
                failed += 1
            if not cache.get_seq_length():
                emptied += 1
                continue
            cache.roll_back(at)
            table.feed(cache, ids[:, cache.get_seq_length() :])
        assert_same(plain, cache)
        assert graph.replays["step"]
    assert failed > 2 and (emptied > 0) == (at == 384)


# What is not captured ------------------------------------------------------------------------------------------------


class RefusedGraph(TapedGraph):
    """Refuses one kind."""

    refused = ""

    def repeat(self, kind: str, *args: Any) -> Any:
        self._refusing = kind == self.refused
        return super().repeat(kind, *args)

    def _capture(self, launch: Any, places: Any) -> Any:
        if self._refusing:
            self._double = lambda launch: (_ for _ in ()).throw(RuntimeError("operation not permitted when stream is capturing"))
        return super()._capture(launch, places)


@pytest.mark.parametrize("kind", ["step", "encode", "store"])
def test_a_capture_that_fails_leaves_steps_as_they_are(table: TableModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    monkeypatch.setattr(RefusedGraph, "refused", kind)
    use_doubles(monkeypatch, RefusedGraph)
    ids = random_ids(1300)
    plain, cache = table.cache(CacheConfig()), table.cache(CacheConfig())
    table.feed(plain, ids)
    with caplog.at_level(logging.INFO, "spectralquant"), graphed(table, cache) as graph:
        table.feed(cache, ids)
    assert_same(plain, cache)
    assert graph.captures[kind] == 0 and "not permitted" in caplog.text and len(caplog.records) == 1


def test_a_pad_token_in_a_prompt_is_reported(
    engine: SpectralQuantEngine, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers then makes a mask with a hole, which neither graphs nor the kernel know; steps are far slower, so the log says it."""
    made = use_doubles(monkeypatch)
    ids = torch.randint(3, 99, (1, 60))
    ids[0, 20] = 0
    cache = engine.cache(llama)
    with caplog.at_level(logging.INFO, "spectralquant"):
        llama.generate(ids, past_key_values=cache, max_new_tokens=8, min_new_tokens=8, pad_token_id=0)
    assert not made[0].replays and caplog.text.count("hides more than left padding") == 1


# With a GPU ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu() -> TableModel:
    model = tiny_model("llama", torch.bfloat16).cuda()
    engine = SpectralQuantEngine()
    engine.calibrate(model, TinyTokenizer(), get_default_calibration_texts(12), progress=False)
    return TableModel(engine, model)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [128, 300, 1])
@pytest.mark.parametrize("padding", [(0,), (0, 3, 140, 310)], ids=str)
def test_blocks_packed_by_graphs_are_the_blocks_on_the_device(on_gpu: TableModel, window: int, padding: tuple[int, ...]) -> None:
    ids, config = random_ids(1500, len(padding), "cuda"), CacheConfig(window=window)
    plain, cache = on_gpu.cache(config, padding), on_gpu.cache(config, padding)
    for each in (plain, cache):
        on_gpu.feed(each, ids[:, :320], one_by_one=False)
    on_gpu.feed(plain, ids[:, 320:])
    graph = DecodeGraph(on_gpu, on_gpu.forward, cache)  # pyright: ignore[reportArgumentType]
    for i in range(320, 1500):
        graph.step({"input_ids": ids[:, i : i + 1], "position_ids": torch.full((len(padding), 1), i, device="cuda"), "past_key_values": cache})
    assert_same(plain, cache)
    assert graph.replays["store"] >= 6 and graph.replays["encode"] >= 5 and graph.replays["step"] > 1150


@pytest.mark.gpu
def test_steps_neither_wait_nor_take_memory(on_gpu: TableModel) -> None:
    """Between two moves of the stores: no operation of PyTorch waits for the device, and none asks the driver for memory."""
    ids, cache = random_ids(2400, 2, "cuda"), on_gpu.cache(CacheConfig(), (0, 3))
    position = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    on_gpu.feed(cache, ids[:, :320], one_by_one=False)
    graph = DecodeGraph(on_gpu, on_gpu.forward, cache)  # pyright: ignore[reportArgumentType]
    calm = 0
    for i in range(320, 2400):
        before, allocated = state(graph, cache), torch.cuda.memory_stats()["segment.all.allocated"]
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            graph.step({"input_ids": ids[:, i : i + 1], "position_ids": position, "past_key_values": cache})
        torch.cuda.set_sync_debug_mode("default")
        if state(graph, cache) == before:
            assert not waits and torch.cuda.memory_stats()["segment.all.allocated"] == allocated, i
            calm += 1
    assert calm > 2000 and graph.replays["store"] > 8


def state(graph: DecodeGraph, cache: SpectralCache) -> tuple[Any, ...]:
    """Changes when something is captured, runs for the first time, or moves."""
    return dict(graph.captures), dict(graph._ran), [(t.data_ptr(), t.shape) for layer in cache.coded_layers for t in layer.segment.tensors()]


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_stream_as_it_was(on_gpu: TableModel) -> None:
    def forward(**inputs: Any) -> CausalLMOutputWithPast:
        if torch.cuda.is_current_stream_capturing():
            inputs["input_ids"].max().item()
        return on_gpu.forward(**inputs)

    ids, stream = random_ids(800, 1, "cuda"), torch.cuda.current_stream()
    plain, cache = on_gpu.cache(CacheConfig()), on_gpu.cache(CacheConfig())
    for each in (plain, cache):
        on_gpu.feed(each, ids[:, :320], one_by_one=False)
    on_gpu.feed(plain, ids[:, 320:])
    graph = DecodeGraph(on_gpu, forward, cache)  # pyright: ignore[reportArgumentType]
    for i in range(320, 800):
        inputs = {"input_ids": ids[:, i : i + 1], "position_ids": torch.full((1, 1), i, device="cuda"), "past_key_values": cache}
        graph.step(inputs) if graph.takes(inputs) else forward(**inputs)
    assert_same(plain, cache)
    assert torch.cuda.current_stream() == stream and not graph.captures["step"]
    assert torch.randn(3, device="cuda").isfinite().all()  # the generator of random numbers does not wait for the capture's end
