"""Decode steps by a CUDA graph: the parts everywhere, the whole with a GPU."""

import logging
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_doubles import DoubledGraph, use_doubles
from tiny_models import TinyTokenizer, tiny_model
from transformers import GenerationConfig, PreTrainedModel

from spectralquant import decode_graph, follow_up
from spectralquant.cache.segment import Segment
from spectralquant.config import CacheConfig
from spectralquant.corpus import get_default_calibration_texts
from spectralquant.decode_graph import DecodeGraph, _only_padding, graphed_steps
from spectralquant.engine import SpectralQuantEngine


def segment_of(engine: SpectralQuantEngine, length: int, start: tuple[int, ...] = (0, 3)) -> tuple[Segment, torch.Tensor, torch.Tensor]:
    codec = next(iter(engine.profile_codec().values()))
    heads, dim = codec.key.encode_matrix.shape[:2]
    keys, values = torch.randn(2, len(start), heads, length + 400, dim)
    segment = Segment(codec, CacheConfig(), keys, torch.tensor(start))
    segment.update(keys[:, :, :length], values[:, :, :length])
    return segment, keys[:, :, length:], values[:, :, length:]


@pytest.mark.parametrize("length", [20, 300, 511])
def test_append_is_update_token_by_token(engine: SpectralQuantEngine, length: int) -> None:
    """Across several blocks that leave the window; what attention reads is the same."""
    torch.manual_seed(1)
    one, keys, values = segment_of(engine, length)
    torch.manual_seed(1)
    other, _, _ = segment_of(engine, length)
    for i in range(300):
        token = (keys[:, :, i : i + 1], values[:, :, i : i + 1])
        want = one.update(*token)
        other.pack_ready()
        got = other.append(*token)
        other.count_step()
        assert want is not None and got.length == want.length and torch.equal(got.lengths, want.lengths)
        assert got.causal and not want.causal
        assert torch.equal(got.raw_keys, want.raw_keys) and torch.equal(got.raw_values, want.raw_values)
    assert torch.equal(one.records[:, :, : one.packed // 128], other.records[:, :, : other.packed // 128])
    assert torch.equal(one.exact_slots[one.exact_slots >= 0], other.exact_slots[other.exact_slots >= 0])


def test_stores_that_grow_ahead_move_seldom(engine: SpectralQuantEngine) -> None:
    segment, keys, values = segment_of(engine, 300)
    segment.ahead, places = 8, set()
    for i in range(0, 400, 4):
        segment.update(keys[:, :, i : i + 4], values[:, :, i : i + 4])
        places.add((segment.records.data_ptr(), segment.exact_keys.data_ptr()))
    assert len(places) <= 2 and segment.packed >= 512


def test_moves_are_told_apart(engine: SpectralQuantEngine) -> None:
    """Growth, copies, other rows and new segments; not what is written in place. Packing that touches no exact token does not wait for the exact store."""
    segment, keys, values = segment_of(engine, 300)
    seen = [(segment.move, segment.exact_move)]

    def moved() -> tuple[bool, bool]:
        seen.append((segment.move, segment.exact_move))
        return seen[-1][0] != seen[-2][0], seen[-1][1] != seen[-2][1]

    segment.append(keys[:, :, :1], values[:, :, :1])
    segment.count_step()
    assert moved() == (False, False)
    segment.reserve_unit()
    assert moved() == (True, False)
    segment.reserve_exact(10_000)
    assert moved() == (False, True)
    segment.map_rows(torch.Tensor.clone)
    assert moved() == (True, True)
    numbers = [n for pair in seen for n in pair] + [n for s in (segment.copy(), segment_of(engine, 20)[0]) for n in (s.move, s.exact_move)]
    assert len(set(numbers)) == len({*seen[0], seen[2][0], seen[3][1], *seen[4]}) + 4


def test_only_padding(engine: SpectralQuantEngine) -> None:
    segments = [segment_of(engine, 20)[0]]
    mask = torch.ones(2, 21, dtype=torch.int64)
    assert not _only_padding(None, segments) and not _only_padding(mask, segments)
    mask[1, :3] = 0
    assert _only_padding(mask, segments)
    mask[0, 7] = 0
    assert not _only_padding(mask, segments)
    assert not _only_padding(mask[None, None], segments)
    assert _only_padding(None, [segment_of(engine, 20, (0, 0))[0]])


def test_no_graph_without_a_gpu(engine: SpectralQuantEngine, llama: PreTrainedModel) -> None:
    with graphed_steps(llama, engine.cache(llama)) as graph:
        assert graph is None and "forward" not in llama.__dict__


@pytest.mark.parametrize(
    ("inputs", "taken"),
    [({}, True), ({"input_ids": torch.ones(1, 2, dtype=torch.int64)}, False), ({"output_attentions": True}, False), ({"inputs_embeds": torch.ones(1)}, False)],
    ids=["a token", "two tokens", "attentions", "embeddings"],
)
def test_takes_plain_steps_alone(engine: SpectralQuantEngine, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, inputs: Any, taken: bool) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    cache = engine.cache(llama)
    one = {"input_ids": torch.ones(1, 1, dtype=torch.int64), "past_key_values": cache, "use_cache": True, "attention_mask": torch.ones(1, 41)}
    graph = DecodeGraph(llama, llama.forward, cache)
    assert not graph.takes(one)  # nothing is stored yet
    with torch.no_grad():
        llama(torch.randint(3, 99, (1, 40)), past_key_values=cache)
    assert graph.takes({**one, **inputs}) == taken


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> list[DoubledGraph]:
    """The graphs that were made; steps are taken as if there were a GPU."""
    return use_doubles(monkeypatch)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_repeated_steps_are_the_steps(
    engine: SpectralQuantEngine, llama: PreTrainedModel, llama_calibration: Path, doubles: list[DoubledGraph], options: dict[str, Any], padded: bool
) -> None:
    plain = SpectralQuantEngine(cache_config=CacheConfig(cuda_graphs=False))
    plain.load_calibration(llama_calibration)
    ids = torch.randint(3, 99, (2, 300))
    mask = torch.ones_like(ids)
    mask[1, : 37 if padded else 0] = 0
    out = []
    for one in (plain, engine):
        torch.manual_seed(5)
        cache = one.cache(llama)
        out.append(llama.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=150, min_new_tokens=150, pad_token_id=0, **options))
    assert torch.equal(out[0], out[1])
    (graph,) = doubles
    if "num_beams" in options:
        assert graph.replays["step"] < 5  # buffers move at every step
    else:
        assert graph.captures["step"] <= 2 and graph.replays["step"] >= 145


def test_a_step_is_captured_once_in_a_thousand_tokens(engine: SpectralQuantEngine, llama: PreTrainedModel, doubles: list[DoubledGraph]) -> None:
    cache, ids = engine.cache(llama), torch.randint(3, 99, (1, 300))
    with torch.no_grad(), graphed_steps(llama, cache) as graph:
        assert graph is not None
        llama(ids, past_key_values=cache)
        for i in range(600):
            llama(input_ids=ids[:, i % 300 : i % 300 + 1], past_key_values=cache)
    assert cache.get_seq_length() == 900 and graph.captures["step"] <= 3 and graph.replays["step"] >= 590


def test_generations_that_overlap_leave_the_model_as_it_was(engine: SpectralQuantEngine, llama: PreTrainedModel, doubles: list[DoubledGraph]) -> None:
    """As two threads may have them: the first ends inside the second. Steps of a cache that is done go to the model."""
    one, other = engine.cache(llama), engine.cache(llama)
    ids = torch.randint(3, 99, (1, 40))
    first, second = graphed_steps(llama, one), graphed_steps(llama, other)
    first.__enter__(), second.__enter__()
    with torch.no_grad():
        for cache in (one, other):
            llama(ids, past_key_values=cache)
        first.__exit__(None, None, None)
        for _ in range(3):
            for cache in (one, other):
                llama(input_ids=ids[:, :1], past_key_values=cache)
    second.__exit__(None, None, None)
    assert not doubles[0].captures and doubles[1].captures["step"] == 1 and one.get_seq_length() == other.get_seq_length() == 43
    with torch.no_grad():
        llama(input_ids=ids[:, :1], past_key_values=other)
    assert doubles[1].replays["step"] == 2
    llama.__dict__.pop("forward", None)  # what is left passes everything on


def test_a_prefix_serves_follow_ups_by_graphs(
    engine: SpectralQuantEngine, llama: PreTrainedModel, tokenizer: TinyTokenizer, doubles: list[DoubledGraph]
) -> None:
    prefix = engine.compress_prefill(llama, tokenizer, torch.randint(3, 99, (400,)).tolist())
    question = torch.randint(3, 99, (1, 9))
    first, second = (llama.generate(question, past_key_values=prefix["cache"], max_new_tokens=20, pad_token_id=0) for _ in range(2))
    assert torch.equal(first, second) and len(doubles) == 2 and all(graph.replays["step"] >= 15 for graph in doubles)


# With a GPU ----------------------------------------------------------------------------------------------------------


def engine_on_gpu(dtype: torch.dtype, **config: Any) -> tuple[SpectralQuantEngine, PreTrainedModel]:
    model = tiny_model("llama", dtype).cuda()
    engine = SpectralQuantEngine(cache_config=CacheConfig(**config))
    engine.calibrate(model, TinyTokenizer(), get_default_calibration_texts(12), progress=False)
    return engine, model


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("padding", [0, 37])
def test_logits_are_the_same_with_and_without_graphs(dtype: torch.dtype, error: float, padding: int) -> None:
    """Given tokens, over several blocks that leave the window. Stores of other sizes split the kernel's work elsewhere, so roundings differ."""
    engine, model = engine_on_gpu(dtype)
    ids = torch.randint(3, 99, (2, 700), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    plain, cache = engine.cache(model), engine.cache(model)
    with torch.no_grad(), graphed_steps(model, cache) as graph:
        assert graph is not None
        for each in (plain, cache):
            each.set_padding(mask)
            model(ids[:, :300], attention_mask=mask[:, :300], position_ids=position[:, :300], past_key_values=each)
        for i in range(300, 700):
            step = {"input_ids": ids[:, i : i + 1], "attention_mask": mask[:, : i + 1], "position_ids": position[:, i : i + 1]}
            want, got = (model(**step, past_key_values=each).logits.float() for each in (plain, cache))
            assert (got - want).norm() < error * want.norm(), i
    assert graph.replays["step"] > 385


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True}], ids=str)
def test_generate_on_the_device(options: dict[str, Any]) -> None:
    engine, model = engine_on_gpu(torch.bfloat16)
    ids = torch.randint(3, 99, (2, 300), device="cuda")
    cache = engine.cache(model)  # before `generate` is looked up: the model gets ours here
    out = model.generate(ids, past_key_values=cache, max_new_tokens=150, min_new_tokens=150, pad_token_id=0, **options)
    assert out.shape == (2, 450) and torch.equal(out[:, :300], ids)


@pytest.mark.gpu
def test_a_graph_is_captured_seldom() -> None:
    engine, model = engine_on_gpu(torch.bfloat16)
    cache, ids = engine.cache(model), torch.randint(3, 99, (1, 300), device="cuda")
    with torch.no_grad(), graphed_steps(model, cache) as graph:
        assert graph is not None
        model(ids, past_key_values=cache)
        for i in range(600):
            model(input_ids=ids[:, i % 300 : i % 300 + 1], past_key_values=cache)
    assert cache.get_seq_length() == 900 and graph.captures["step"] <= 3 and graph.replays["step"] >= 590 and "forward" not in model.__dict__


def test_no_graph_where_positions_do_not_follow_from_the_length(engine: SpectralQuantEngine, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """M-RoPE: behind an image, a step without `position_ids` takes them from the model's `rope_deltas`."""
    use_doubles(monkeypatch)
    cache, ids = engine.cache(llama), torch.tensor([[5]])
    llama(torch.randint(3, 199, (1, 20)), past_key_values=cache)
    graph = DoubledGraph(llama, llama.forward, cache)
    assert graph.takes({"input_ids": ids, "past_key_values": cache})
    monkeypatch.setattr(llama.model, "rope_deltas", None, raising=False)
    assert not graph.takes({"input_ids": ids, "past_key_values": cache})
    assert graph.takes({"input_ids": ids, "past_key_values": cache, "position_ids": ids[None].expand(3, -1, -1)})


# What is not read, compiled steps, reports ----------------------------------------------------------------------------


def test_finished_rows_are_not_read(engine: SpectralQuantEngine, llama: PreTrainedModel, doubles: list[DoubledGraph]) -> None:
    """A row whose input token was an end has lengths of zero from then on; the others what the cache has. Ends don't outlast the generation."""
    cache, ids = engine.cache(llama), torch.randint(3, 99, (3, 300))
    with torch.no_grad(), graphed_steps(llama, cache, (100, 101)) as graph:
        assert graph is not None
        llama(ids, past_key_values=cache)
        for tokens, running in [([5, 6, 7], [1, 1, 1]), ([100, 6, 7], [0, 1, 1]), ([2, 6, 101], [0, 1, 0]), ([2, 6, 2], [0, 1, 0])]:
            llama(input_ids=torch.tensor(tokens)[:, None], past_key_values=cache)
            segment = cache.coded_layers[0].segment
            assert segment is not None and graph._seen is not None
            assert torch.equal(graph._seen.lengths, segment.lengths * torch.tensor(running)[:, None])
    assert all(layer.seen is None for layer in cache.coded_layers) and segment.lengths[:, 1].unique().numel() == 1


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({}, (7,)),
        ({"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": None}, ()),
        ({"num_beams": 2}, ()),
        ({"prompt_lookup_num_tokens": 3}, ()),
        ({"generation_config": GenerationConfig(eos_token_id=9)}, (9,)),
        ({"generation_config": GenerationConfig(num_beams=2)}, ()),
    ],
    ids=str,
)
def test_which_tokens_finish_a_row(
    engine: SpectralQuantEngine, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], ends: tuple[int, ...]
) -> None:
    seen: list[tuple[int, ...]] = []

    @contextmanager
    def look(model: Any, cache: Any, ends: tuple[int, ...]) -> Any:
        seen.append(ends)
        yield None

    monkeypatch.setattr(follow_up, "graphed_steps", look)
    monkeypatch.setattr(llama.generation_config, "eos_token_id", 7)
    monkeypatch.setattr(llama.generation_config, "pad_token_id", 0)
    with engine.applied_to(llama):
        llama.generate(torch.randint(8, 99, (1, 20)), past_key_values=engine.cache(llama), max_new_tokens=2, **options)
    assert seen == [ends]


def compiling(calibration: Path) -> SpectralQuantEngine:
    engine = SpectralQuantEngine(cache_config=CacheConfig(compile_steps=True))
    engine.load_calibration(calibration)
    return engine


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_steps_are_the_steps(
    engine: SpectralQuantEngine, llama: PreTrainedModel, llama_calibration: Path, doubles: list[DoubledGraph], tokenizer: TinyTokenizer
) -> None:
    """Layers and lengths share what is compiled: a step after a block has left compiles nothing."""
    prompt = torch.randint(3, 99, (300,)).tolist()
    torch._dynamo.reset()
    want = engine.generate(llama, tokenizer, prompt, 150, min_new_tokens=150)
    got = compiling(llama_calibration).generate(llama, tokenizer, prompt, 20, min_new_tokens=20)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    got = compiling(llama_calibration).generate(llama, tokenizer, prompt, 150, min_new_tokens=150)
    assert got["tokens"] == want["tokens"] and compiled > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert got["stats"]["decode_mode"] == "compiled CUDA graph" and got["stats"]["decode_reason"] is None and got["stats"]["decode_replays"] > 140


def test_what_cannot_be_compiled_runs_as_a_graph(
    engine: SpectralQuantEngine,
    llama: PreTrainedModel,
    llama_calibration: Path,
    doubles: list[DoubledGraph],
    tokenizer: TinyTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It may fail behind the first layer, whose token is counted by then."""

    def broken(forward: Any) -> Any:
        def run(**inputs: Any) -> Any:
            forward(**inputs)
            raise RuntimeError("no compiler\nmore")

        return run

    prompt = torch.randint(3, 99, (300,)).tolist()
    want = engine.generate(llama, tokenizer, prompt, 40, min_new_tokens=40)
    monkeypatch.setattr(decode_graph, "compile_forward", broken)
    with caplog.at_level(logging.WARNING, "spectralquant"):
        got = compiling(llama_calibration).generate(llama, tokenizer, prompt, 40, min_new_tokens=40)
    assert got["tokens"] == want["tokens"] and got["stats"]["decode_mode"] == "CUDA graph"
    assert got["stats"]["decode_reason"] == "torch.compile raised RuntimeError: no compiler" and caplog.text.count("no compiler") == 1


def test_reports_say_why_steps_run_as_they_are(engine: SpectralQuantEngine, llama: PreTrainedModel, tokenizer: TinyTokenizer) -> None:
    stats = engine.generate(llama, tokenizer, [5, 6, 7], 3)["stats"]
    assert stats["decode_mode"] == "as it is" and "not on an NVIDIA GPU" in stats["decode_reason"]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_beside_finished_ones_are_what_they_were(compiled: bool) -> None:
    """Row 1 ends after a few steps, and what it holds is not read; the other rows' logits don't change, and none is NaN."""
    engine, model = engine_on_gpu(torch.float32, compile_steps=compiled)
    ids = torch.randint(3, 99, (3, 500), device="cuda")
    out = []
    for ends in ((), (150,)):
        cache = engine.cache(model)
        with torch.no_grad(), graphed_steps(model, cache, ends) as graph:
            assert graph is not None
            model(ids[:, :300], past_key_values=cache)
            rows = []
            for i in range(300, 480):
                step = ids[:, i : i + 1].clone()
                step[1] = 150 if i == 310 else step[1]
                rows.append(model(input_ids=step, past_key_values=cache).logits.float())
        assert graph.report().mode == ("compiled CUDA graph" if compiled else "CUDA graph") and graph.report().reason is None
        out.append(torch.cat(rows, 1))
    assert out[1].isfinite().all() and not torch.allclose(out[0][1, 30:], out[1][1, 30:], rtol=1e-3)
    assert (out[0][[0, 2]] - out[1][[0, 2]]).norm() < 2e-3 * out[0][[0, 2]].norm()
