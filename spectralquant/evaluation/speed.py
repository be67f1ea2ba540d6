"""Speed and memory of whole caches in use: prompts, decoding and bytes, for presets and the uncompressed cache in one run.

Everything goes through `model.generate`, transformers' own loop included, as a user would call it. All caches read the same prompt, one after another in
every round, so that a machine that slows down slows them all. A prompt counts until the logits of its first new token are there, packing included. Behind it
the first `WARM_UP` tokens are not counted: on a GPU decode steps are captured as graphs then.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache

from spectralquant import prompts
from spectralquant.cache.hf import SpectralCache, layer_tensors, model_device, storage_bytes
from spectralquant.compat import cache_argument
from spectralquant.config import require_int
from spectralquant.corpus import leading_tokens
from spectralquant.engine import SpectralQuantEngine
from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods.ours import CALIBRATION
from spectralquant.evaluation.plan import DEFAULT_TEXTS
from spectralquant.evaluation.run_files import BENCH
from spectralquant.evaluation.runner import machine
from spectralquant.evaluation.texts import begin_with, read_text, tokenise
from spectralquant.files import write_json
from spectralquant.presets import PRESETS, resolve_preset
from spectralquant.profile import Profile

UNCOMPRESSED = "fp16"
"""The cache of transformers, by the name that `evaluation.methods` has for it."""
WARM_UP = {"cuda": 32}
"""Tokens that are not counted, by the kind of device; elsewhere `_WARM_UP`."""
_WARM_UP = 2
_FIRST_CALL = 300
"""Tokens of the prompt that is read once before anything is measured: long enough that a block is packed."""


@dataclass(frozen=True, slots=True)
class SpeedPlan:
    """What is measured.

    Attributes:
        model: Name of the model, for the record.
        presets: Beside the uncompressed cache.
        contexts: Tokens of the prompts.
        new_tokens: Tokens decoded and counted behind each prompt. A block of 128 leaves the window every 128 tokens: so many count one packing each.
        repeats: Rounds; figures are medians, with the least and the largest.
        text: Of the prompts, again and again where it is too short; see `texts.read_text`.
    """

    model: str
    presets: tuple[str, ...] = tuple(PRESETS)
    contexts: tuple[int, ...] = (512, 2048, 4096)
    new_tokens: int = 128
    repeats: int = 3
    text: str = DEFAULT_TEXTS["prose"]

    def __post_init__(self) -> None:
        if not self.contexts:
            raise ConfigError("contexts is empty: name at least one length of a prompt, in tokens")
        for context in self.contexts:
            require_int("contexts", context, 1)
        for name in ("new_tokens", "repeats"):
            require_int(name, getattr(self, name), 1)
        for preset in self.presets:
            resolve_preset(preset)


def bench(
    plan: SpeedPlan, model: PreTrainedModel, tokenizer: Any, profile: Profile, folder: Path | None = None, command: str = "", progress: bool = True
) -> dict[str, Any]:
    """Measure what `plan` says; one row per context and cache.

    Args:
        model, tokenizer: A causal language model and its tokenizer.
        profile: The model's calibration.
        folder: Where bench.json goes, written after every context, and the calibration where there is none yet; None writes nothing.
        command: The command line that repeats the run, for the record.
        progress: Show a progress bar.

    Returns:
        {plan, command, device, threads, dtype, python, versions, warm_up, rows}. A row has `cache` ("fp16" or a preset), `context`, `tokens` (held at the end),
        `new_tokens`, `repeats`; `prompt_s` and `tokens_per_s`, each with `_low` and `_high`; `cache_bytes` as allocated, `fp16_bytes` of a 16-bit cache of the
        same tokens, `codec_bytes` of the constants that all caches of the model share; `peak_bytes` beside the weights, and what the model held before,
        None where torch does not count memory; `decode_mode`, how steps ran. Where the device's memory runs out it has `out_of_memory` in their place.

    Raises:
        ConfigError: A context is longer than the model reads.
    """
    device = model_device(model)
    warm_up = WARM_UP.get(device.type, _WARM_UP)
    _require_positions(plan, model, warm_up)
    engines = {name: SpectralQuantEngine.of(profile, compression=name) for name in plan.presets}
    ids = _prompt(plan, tokenizer).to(device)
    if folder is not None and not (folder / CALIBRATION).exists():
        profile.save(folder / CALIBRATION)
    rows: list[dict[str, Any]] = []
    document = {"plan": asdict(plan), "command": command, **machine(model), "warm_up": warm_up, "rows": rows}
    caches = (UNCOMPRESSED, *plan.presets)
    with tqdm(total=(1 + len(plan.contexts) * plan.repeats) * len(caches), unit="run", disable=not progress) as bar:

        def run(name: str, context: int, new_tokens: int) -> dict[str, Any]:
            bar.set_postfix_str(f"{name}, {context:,} tokens")
            row = _run(model, tokenizer, engines.get(name), ids[:, :context], warm_up, new_tokens)
            bar.update()
            return row

        for name in caches:  # what is made once, kernels and codebooks, is made here
            run(name, min(_FIRST_CALL, max(plan.contexts)), 1)
        for context in plan.contexts:
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in caches}
            for _ in range(plan.repeats):
                for name in caches:
                    runs[name].append(run(name, context, plan.new_tokens))
            rows += [{"cache": name, "context": context, **_summary(found)} for name, found in runs.items()]
            if folder is not None:
                write_json(folder / BENCH, document)
    return document


def _require_positions(plan: SpeedPlan, model: PreTrainedModel, warm_up: int) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(plan.contexts) + warm_up + plan.new_tokens + 1
    if limit and longest > limit:
        raise ConfigError(f"contexts={max(plan.contexts)} with {plan.new_tokens} new tokens is {longest} tokens, the model reads {limit}; choose a shorter one")


def _prompt(plan: SpeedPlan, tokenizer: Any) -> Tensor:
    """[1, longest context]."""
    text, longest = tokenise(tokenizer, read_text(plan.text)), max(plan.contexts)
    return begin_with(leading_tokens(tokenizer), text.repeat(1, -(-longest // text.shape[1]))[:, :longest])


# One generation -------------------------------------------------------------------------------------------------------


class Ticks(LogitsProcessor):
    """Notes when the logits of chosen tokens of one `generate` are there; changes nothing.

    Args:
        device: Waited for at those tokens, and at no others.
        at: Numbers of the tokens, 0 for the first.

    Attributes:
        times: Seconds on the clock of `time.perf_counter`, one for each of `at`.
    """

    def __init__(self, device: torch.device, at: Sequence[int]) -> None:
        self._device, self._at, self._seen = device, frozenset(at), 0
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._seen in self._at:
            wait_for(self._device)
            self.times.append(time.perf_counter())
        self._seen += 1
        return scores


def wait_for(device: torch.device) -> None:
    """Until all work launched on it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _run(model: PreTrainedModel, tokenizer: Any, engine: SpectralQuantEngine | None, ids: Tensor, warm_up: int, new_tokens: int) -> dict[str, Any]:
    """Figures of one generation behind the prompt ids [1, T]; without an engine uncompressed."""
    gc.collect()
    try:
        if engine is None:
            return _generate(model, tokenizer, lambda: DynamicCache(config=model.config.get_text_config(decoder=True)), ids, warm_up, new_tokens)
        with engine.applied_to(model):
            return _generate(model, tokenizer, lambda: engine.cache(model), ids, warm_up, new_tokens)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}


def _generate(model: Any, tokenizer: Any, make_cache: Callable[[], Cache], ids: Tensor, warm_up: int, new_tokens: int) -> dict[str, Any]:
    count, ticks = warm_up + new_tokens + 1, Ticks(ids.device, (0, warm_up, warm_up + new_tokens))
    options = prompts.with_pad_token(model, tokenizer, {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False})
    cache, peak = make_cache(), PeakMemory(ids.device)
    wait_for(ids.device)
    began = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), **cache_argument(model, cache), logits_processor=LogitsProcessorList([ticks]), **options)
    first, start, end = ticks.times
    figures = {"prompt_s": first - began, "tokens_per_s": new_tokens / (end - start), "peak_bytes": peak.bytes(), "new_tokens": new_tokens}
    return {**figures, "tokens": cache.get_seq_length(), **_sizes(cache)}


def _sizes(cache: Cache) -> dict[str, Any]:
    if isinstance(cache, SpectralCache):
        mode = cache.decode_report.mode if cache.decode_report is not None else None
        return {"cache_bytes": cache.nbytes, "fp16_bytes": cache.dense_bytes, "codec_bytes": cache.codec_bytes, "decode_mode": mode}
    held = [tensor for layer in cache.layers for tensor in layer_tensors(layer)]
    return {"cache_bytes": storage_bytes(held), "fp16_bytes": sum(2 * t.numel() for t in held), "codec_bytes": 0, "decode_mode": None}


class PeakMemory:
    """Most memory that torch has held on a device since it was made, beyond what it held then."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0
        if device.type == "cuda":
            torch.cuda.empty_cache()
            self._before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) - self._before if self._device.type == "cuda" else None


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row from all rounds of a context and cache: sizes of the last round, which are those of all."""
    if any("out_of_memory" in run for run in runs):
        return {"out_of_memory": True}
    row = {**runs[-1], "repeats": len(runs)}
    for name in ("prompt_s", "tokens_per_s"):
        values = [run[name] for run in runs]
        row |= {name: median(values), f"{name}_low": min(values), f"{name}_high": max(values)}
    if row["peak_bytes"] is not None:
        row["peak_bytes"] = max(run["peak_bytes"] for run in runs)
    return row
