"""What vLLM does with pages: shares them, takes them away, moves them, spreads their heads over processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyTokenizer, save_tiny_model
from transformers import AutoModelForCausalLM
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm_server import SETTINGS

from spectralquant.config import CacheConfig
from spectralquant.corpus import get_default_calibration_texts
from spectralquant.engine import SpectralQuantEngine
from spectralquant.errors import DependencyError
from spectralquant.integrations.vllm import plugin

ENGINE = {"dtype": "float32", "max_model_len": 2048, "max_num_seqs": 16, "skip_tokenizer_init": True, "additional_config": {"spectralquant": {}}}


def run(tmp_path: Path, model: Path, rounds: list[list[list[int]]], max_tokens: int = 8, **engine: Any) -> dict[str, Any]:
    """What offline.py says."""
    job, answers = tmp_path / "job.json", tmp_path / "answers.json"
    job.write_text(json.dumps({"engine": {**ENGINE, "model": str(model), **engine}, "rounds": rounds, "max_tokens": max_tokens}))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline.py")), str(job), str(answers)], env={**os.environ, **SETTINGS}, capture_output=True, text=True
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-12_000:])
    return json.loads(answers.read_text())


def prompts_of(lengths: list[int], vocabulary: int = 90, seed: int = 0) -> list[list[int]]:
    make = torch.Generator().manual_seed(seed)
    return [torch.randint(5, vocabulary, (n,), generator=make).tolist() for n in lengths]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two KV heads, its calibration beside it."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    save_tiny_model(folder)
    engine = SpectralQuantEngine()
    engine.calibrate(AutoModelForCausalLM.from_pretrained(folder), TinyTokenizer(), get_default_calibration_texts(12), progress=False)
    engine.save_pretrained(folder / "spectralquant")
    return folder


def test_a_hit_is_a_miss_that_was_read_in_parts(tiny_folder: Path, tmp_path: Path) -> None:
    """Prompts are taken in page by page; asked for again, their full pages are there already, and nothing changes: not a bit."""
    prompts = [[prompt] for prompt in prompts_of([300, 130, 700, 513])]  # one by one: parts begin where pages do
    said = run(tmp_path, tiny_folder, prompts * 2, max_num_batched_tokens=128, enable_prefix_caching=True)
    assert said["hits"] == sum((len(p) - 1) // 128 * 128 for [p] in prompts)
    assert said["rounds"][:4] == said["rounds"][4:]


def test_two_ranks_say_what_one_says(tiny_folder: Path, tmp_path: Path) -> None:
    rounds = [prompts_of([20, 300, 700, 1000])]
    one = run(tmp_path, tiny_folder, rounds, max_tokens=40)
    two = run(tmp_path, tiny_folder, rounds, max_tokens=40, tensor_parallel_size=2, distributed_executor_backend="mp")
    for a, b in zip(one["rounds"][0], two["rounds"][0], strict=True):
        assert a["tokens"] == b["tokens"]
        assert all(abs(x[t] - y[t]) < 1e-3 for x, y in zip(a["likely"], b["likely"], strict=True) for t in x.keys() & y.keys())
    assert two["capacity"] > 1.9 * one["capacity"]


def test_requests_that_lose_their_pages_begin_anew(tiny_folder: Path, tmp_path: Path) -> None:
    """More requests than pages: some are preempted, lose all they have and are taken in again."""
    rounds = [prompts_of([250, 260, 380, 120, 500, 300])]
    few = run(tmp_path, tiny_folder, rounds, max_tokens=200, num_gpu_blocks_override=12, max_model_len=1024)
    many = run(tmp_path, tiny_folder, rounds, max_tokens=200, max_model_len=1024)
    assert few["preemptions"] > 0 and many["preemptions"] == 0
    assert all(len(a["tokens"]) == 200 for a in few["rounds"][0])
    same = [a["tokens"][:20] == b["tokens"][:20] for a, b in zip(few["rounds"][0], many["rounds"][0], strict=True)]
    assert sum(same) >= len(same) - 1


def test_a_connector_moves_packed_pages(tiny_folder: Path, tmp_path: Path) -> None:
    """One process writes pages to files, the next one reads them in the place of a prompt. It says nearly the same: what was exact is read by its codes."""
    folder = tmp_path / "pages"
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"shared_storage_path": str(folder)}}
    rounds = [prompts_of([513, 300])]
    first = run(tmp_path, tiny_folder, rounds, kv_transfer_config=connector, enable_prefix_caching=False)
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    per_layer = sum(f.stat().st_size for f in files) / 3
    dense = (512 + 256) * 2 * 2 * 32 * 2
    assert per_layer < dense / 3  # heads of size 32 have few planes to choose from: the ratio of such a page is small
    second = run(tmp_path, tiny_folder, rounds, kv_transfer_config=connector, enable_prefix_caching=False)
    for a, b in zip(first["rounds"][0], second["rounds"][0], strict=True):
        assert all(abs(x[t] - y[t]) < 0.5 for x, y in zip(a["likely"][:1], b["likely"][:1], strict=True) for t in x.keys() & y.keys())


def test_a_wrong_calibration_is_refused_at_start(tiny_folder: Path, smollm2_folder: Path, tmp_path: Path) -> None:
    wrong = {"spectralquant": {"calibration": str(smollm2_folder / "spectralquant")}}
    with pytest.raises(RuntimeError, match=r"calibration .* is refused: .*made for another model|ProfileError"):
        run(tmp_path, tiny_folder, [prompts_of([20])], additional_config=wrong)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [({"kv_cache_dtype": "fp8"}, 'kv_cache_dtype="fp8": expected "auto"'), ({"block_size": 64}, "block_size=64: expected a multiple of 128")],
)
def test_settings_that_pages_cannot_have_are_refused_at_start(setting: dict[str, Any], complaint: str, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        run(tmp_path, tiny_folder, [prompts_of([20])], **setting)


def test_without_a_calibration_it_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRALQUANT_HOME", str(tmp_path / "home"))
    save_tiny_model(tmp_path / "model")
    with pytest.raises(RuntimeError, match=r"spectralquant calibrate .*model --out .*spectralquant"):
        run(tmp_path, tmp_path / "model", [prompts_of([20])])


def test_vllm_is_itself_where_nobody_asks(tiny_folder: Path, tmp_path: Path) -> None:
    """The plugin stands in for the CPU backend in every process; without options it is that backend."""
    plain = run(tmp_path, tiny_folder, [prompts_of([300])], additional_config={})
    packed = run(tmp_path, tiny_folder, [prompts_of([300])])
    assert packed["capacity"] > 3 * plain["capacity"] and len(plain["rounds"][0][0]["tokens"]) == 8


def test_drafts_change_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    """Drafts are written to pages, and mostly rejected."""
    rounds = [[p * 3 for p in prompts_of([60, 150, 250])]]  # there is something to find in what was said
    plain = run(tmp_path, tiny_folder, rounds, max_tokens=40)
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    drafted = run(tmp_path, tiny_folder, rounds, max_tokens=40, speculative_config=drafts)
    for a, b in zip(plain["rounds"][0], drafted["rounds"][0], strict=True):
        assert a["tokens"] == b["tokens"]


def test_sliding_layers_stay_as_they_are(tmp_path: Path) -> None:
    """Gemma 2: every other layer has a window, logits are capped."""
    folder = tmp_path / "gemma2"
    save_tiny_model(folder, "gemma2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    engine = SpectralQuantEngine(cache_config=CacheConfig(sinks=1, max_exact_share=0.25))
    engine.calibrate(model, TinyTokenizer(), get_default_calibration_texts(12), progress=False)
    engine.save_pretrained(folder / "spectralquant")
    rounds = [prompts_of([20, 300, 700])]
    said = run(tmp_path, folder, rounds, enable_prefix_caching=False)
    with engine.applied_to(model), torch.no_grad():
        for prompt, answer in zip(rounds[0], said["rounds"][0], strict=True):
            cache, ids = engine.cache(model), torch.tensor([prompt])
            for token, likely in zip(answer["tokens"], answer["likely"], strict=True):
                log_probability = model(ids, past_key_values=cache).logits[0, -1].log_softmax(-1)
                assert all(abs(float(log_probability[int(t)]) - p) < 0.05 for t, p in likely.items())
                ids = torch.tensor([[token]])


def test_a_release_outside_the_window_is_refused_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "version", lambda name: "0.99.0")
    plugin.register()
    with pytest.raises(DependencyError, match=r"vLLM 0\.99\.0 is installed"):
        AttentionBackendEnum.CUSTOM.get_class()
