"""The adapter for lm-evaluation-harness, through the harness' own request objects."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spectralquant.cache.hf import SpectralCache
from spectralquant.engine import SpectralQuantEngine
from spectralquant.errors import ConfigError, ProfileError

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from spectralquant.evaluation import lm_eval as adapter_module
from spectralquant.evaluation.lm_eval import HFLM, SpectralLM

HALF = 1e-3
"""Relative to the largest logit: exact tokens of a float32 model are kept in float16, three layers of this model pass the rounding on."""
CODED = 0.3
"""Relative error of the logits that codes of 2.4 bits may cause in a random model with sharp attention; unrelated logits are off by 1.4."""


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over w3 .. w198 with the special tokens of the tiny models."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 199)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def adapter(llama: PreTrainedModel, llama_calibration: Path, words: PreTrainedTokenizerFast) -> Any:
    made = SpectralLM(llama, calibration=str(llama_calibration), tokenizer=words, batch_size=2)
    yield made
    made.engine.remove_from(llama)


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[SpectralCache]:
    """Every cache that an engine makes."""
    made: list[SpectralCache] = []
    original = SpectralQuantEngine.cache

    def cache(self: SpectralQuantEngine, model: PreTrainedModel) -> SpectralCache:
        made.append(original(self, model))
        return made[-1]

    monkeypatch.setattr(SpectralQuantEngine, "cache", cache)
    return made


def packed(cache: SpectralCache) -> list[int]:
    return [layer.segment.packed for layer in cache.coded_layers if layer.segment is not None]


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 199, (batch, length), generator=torch.Generator().manual_seed(seed))


def dense_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def text_of(ids: torch.Tensor) -> str:
    return " ".join(f"w{int(i)}" for i in ids)


def request(kind: Any, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_is_registered() -> None:
    assert get_model("spectralquant") is SpectralLM


def test_short_text_scores_as_the_dense_model(adapter: SpectralLM, llama: PreTrainedModel, caches: list[SpectralCache]) -> None:
    ids = random_ids(2, 150)
    got, want = adapter._model_call(ids), dense_logits(llama, ids)
    assert got.shape == want.shape
    assert (got - want).abs().max() < HALF * want.abs().max()
    assert packed(caches[0]) == [0, 0, 0]


def test_long_text_is_read_from_codes(adapter: SpectralLM, llama: PreTrainedModel, caches: list[SpectralCache]) -> None:
    ids = random_ids(2, 600)
    got, want = adapter._model_call(ids), dense_logits(llama, ids)
    assert packed(caches[0]) == [384, 384, 384]  # 592 tokens before the last piece, 128 or more of them exact, in blocks of 128
    error = ((got - want).norm(dim=-1) / want.norm(dim=-1)).mean(0)
    assert error[:190].max() < HALF  # nothing was packed yet
    assert 10 * HALF < error[300:].mean() < CODED


def test_chunk_does_not_change_what_is_coded(llama: PreTrainedModel, llama_calibration: Path, words: Any, adapter: SpectralLM) -> None:
    """Pieces end at other places; the codes, and what is exact when, are the same."""
    one = SpectralLM(llama, calibration=str(llama_calibration), tokenizer=words, chunk=8)
    ids = random_ids(1, 400)
    first, second = one._model_call(ids), adapter._model_call(ids)
    apart = (first - second).norm(dim=-1) / second.norm(dim=-1)
    assert apart.mean() < HALF


def test_right_padding_changes_no_real_token(adapter: SpectralLM) -> None:
    ids = random_ids(2, 500)
    padded = ids.clone()
    padded[1, 330:] = 0
    alone = adapter._model_call(ids[1:, :330])
    together = adapter._model_call(padded)[1:, :330]
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_loglikelihood_is_the_sum_over_the_continuation(adapter: SpectralLM, caches: list[SpectralCache]) -> None:
    ids = random_ids(1, 420)
    context, continuation = ids[0, :400], ids[0, 400:]
    short = random_ids(1, 30, seed=1)
    pairs = [(context, continuation), (short[0, :20], short[0, 20:])]
    got = adapter.loglikelihood([request("loglikelihood", text_of(before), " " + text_of(after)) for before, after in pairs], disable_tqdm=True)
    assert max(packed(cache)[0] for cache in caches) >= 128
    logits = adapter._model_call(ids[:, :-1])[0].log_softmax(-1)
    want = logits[399:].gather(1, continuation[:, None]).sum()
    assert got[0][0] == pytest.approx(float(want), rel=1e-3)
    assert got[0][1] is False and got[1][0] < 0


def test_generate_until_reads_codes_of_a_padded_batch(adapter: SpectralLM, llama: PreTrainedModel, caches: list[SpectralCache]) -> None:
    long, short = random_ids(1, 400)[0], random_ids(1, 330, seed=1)[0]
    options = {"until": ["w0"], "max_gen_toks": 12, "do_sample": False}
    requests = [request("generate_until", text_of(long), dict(options)), request("generate_until", text_of(short), dict(options))]
    texts = adapter.generate_until(requests, disable_tqdm=True)
    assert packed(caches[0]) == [256, 256, 256]
    segment = caches[0].coded_layers[0].segment
    assert segment is not None and segment.start.tolist() == [0, 70]
    # The prompt is read uncoded, so the first token is the dense model's, padding or not.
    first = [int(dense_logits(llama, ids[None])[0, -1].argmax()) for ids in (long, short)]
    assert [text.split()[0] for text in texts] == [f"w{i}" for i in first]
    assert all(len(text.split()) <= 12 for text in texts)


def test_stop_sequences_end_the_text(adapter: SpectralLM) -> None:
    ids = random_ids(1, 300)[0]
    free = adapter.generate_until([request("generate_until", text_of(ids), {"until": ["w0"], "max_gen_toks": 8, "do_sample": False})], disable_tqdm=True)[0]
    word = free.split()[3]
    cut = adapter.generate_until([request("generate_until", text_of(ids), {"until": [word], "max_gen_toks": 8, "do_sample": False})], disable_tqdm=True)[0]
    assert cut == free[: free.index(word)]


def test_results_say_how_much_was_coded(adapter: SpectralLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HFLM, "get_model_info", lambda self: {"model_num_parameters": 1})  # the harness asks the hub for a revision
    ids = random_ids(3, 400)
    ids[1, 350:] = 0
    ids[2, 150:] = 0
    adapter._model_call(ids)
    assert (adapter.sequences, adapter.coded_sequences) == (3, 2)
    options = {"until": ["w0"], "max_gen_toks": 4, "do_sample": False}
    adapter.generate_until([request("generate_until", text_of(random_ids(1, n)[0]), dict(options)) for n in (300, 20)], disable_tqdm=True)
    info = adapter.get_model_info()
    assert info["model_num_parameters"] == 1
    assert info["spectralquant"] == {"compression": "high", "chunk": 16, "sequences": 5, "coded_sequences": 3}


def test_autocast_is_the_harness_own(llama: PreTrainedModel, llama_calibration: Path, words: Any) -> None:
    made = SpectralLM(llama, calibration=str(llama_calibration), tokenizer=words, mixed_precision_dtype="bfloat16")
    seen: list[bool] = []
    hook = llama.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    made._model_call(random_ids(1, 40))
    hook.remove()
    made.engine.remove_from(llama)
    assert seen == [True, True, True] and not torch.is_autocast_enabled("cpu")


def test_calibrates_without_a_file(llama: PreTrainedModel, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def calibrate(self: SpectralQuantEngine, model: Any, tokenizer: Any) -> None:
        calls.append((model, tokenizer))

    monkeypatch.setattr(SpectralQuantEngine, "calibrate", calibrate)
    monkeypatch.setattr(SpectralQuantEngine, "profile_of", lambda self, model: None)
    SpectralLM(llama, tokenizer=words)
    assert len(calls) == 1 and calls[0][0] is llama


@pytest.mark.parametrize("chunk", [0, 17, 2.5], ids=str)
def test_chunk_is_checked(llama: PreTrainedModel, words: Any, chunk: Any) -> None:
    with pytest.raises(ConfigError, match="chunk"):
        SpectralLM(llama, tokenizer=words, chunk=chunk)


def test_refuses_what_it_cannot_do(llama: PreTrainedModel, llama_calibration: Path, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProfileError):
        SpectralLM(llama, calibration=str(tmp_path / "nowhere"), tokenizer=words)
    with pytest.raises(ConfigError, match="causal"):
        SpectralLM(llama, calibration=str(llama_calibration), tokenizer=words, backend="seq2seq")
    monkeypatch.setattr(llama, "hf_device_map", {"a": 0, "b": 1}, raising=False)
    with pytest.raises(ConfigError, match="one device"):
        SpectralLM(llama, calibration=str(llama_calibration), tokenizer=words)


def test_the_command_is_the_harness_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Down to the arguments; an error of this package is one line."""
    arguments = ["lm_eval", "--model", "spectralquant", "--model_args", "pretrained=nowhere,chunk=17", "--tasks", "arc_easy"]
    seen: list[Any] = []

    def execute(parser: Any, args: Any) -> None:
        seen.append(args)
        get_model(args.model).create_from_arg_obj(args.model_args)

    monkeypatch.setattr("lm_eval._cli.HarnessCLI.execute", execute)
    monkeypatch.setattr("sys.argv", arguments)
    assert adapter_module.main() == 2
    assert seen[0].model_args == {"pretrained": "nowhere", "chunk": 17}
    error = capsys.readouterr().err
    assert "spectralquant: chunk=17" in error and "Traceback" not in error
