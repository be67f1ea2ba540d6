"""`spectralquant demo`: a real model, real bytes, FP16 beside every preset."""

import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from spectralquant.cache.hf import SpectralCache
from spectralquant.cli.certificate import describe_certificate
from spectralquant.cli.models import load_model
from spectralquant.compat import cache_argument
from spectralquant.config import require_int
from spectralquant.engine import SpectralQuantEngine
from spectralquant.presets import PRESETS
from spectralquant.profile import with_suffix

CHUNK = 16
"""Tokens fed at a time when a continuation is scored, so that they read coded keys."""


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt under one method. Bytes are of the cache at its end; KL (nats) and agreement are against the uncompressed model,
    over the tokens that the uncompressed model generated."""

    prompt: str
    method: str
    text: str
    context: int
    new_tokens: int
    cache_bytes: int
    fp16_bytes: int
    codec_bytes: int
    kl: float
    agreement: float
    prefill_seconds: float
    tokens_per_second: float

    @property
    def ratio(self) -> float:
        return self.fp16_bytes / self.cache_bytes

    @property
    def ratio_with_codec(self) -> float:
        return self.fp16_bytes / (self.cache_bytes + self.codec_bytes)


def run_demo(
    model_name: str | None, prompts: list[str] | None, presets: list[str] | None, max_new_tokens: int, calibration: str | None, json_file: str | None
) -> int:
    """Calibrate, compare, print; returns the exit status."""
    require_int("--max-new-tokens", max_new_tokens, 1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    began = time.perf_counter()
    model, tokenizer, label = load_model(model_name)
    print(f"model: {label}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {model.dtype}, {model.device}\n")
    names = presets or list(PRESETS)
    engines = {name: SpectralQuantEngine(compression=name) for name in names}
    _calibrate(engines, model, tokenizer, calibration)
    titled = [(f"prompt {i}", text) for i, text in enumerate(prompts, 1)] if prompts else _bundled_prompts()
    runs = [run for title, text in titled for run in _compare(title, text, engines, model, tokenizer, max_new_tokens)]
    seconds = time.perf_counter() - began
    print(_summary(runs, names, seconds))
    if json_file:
        _write_json(Path(json_file), label, model, runs, seconds)
    return 0


def _calibrate(engines: dict[str, SpectralQuantEngine], model: Any, tokenizer: Any, path: str | None) -> None:
    """One calibration for all presets, through a file: what is shown is what a saved calibration gives."""
    first = next(iter(engines.values()))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(path) if path else Path(folder) / "calibration"
        if not with_suffix(target).exists():
            SpectralQuantEngine(compression="high").calibrate_to(target, model, tokenizer)
        for engine in engines.values():
            engine.load_calibration(target)
    print(describe_certificate(first.profile_of(model)) + "\n")


def _bundled_prompts() -> list[tuple[str, str]]:
    folder = files("spectralquant") / "data" / "prompts"
    found = sorted((f for f in folder.iterdir() if f.name.endswith(".txt")), key=lambda f: f.name)
    return [(f.name.removesuffix(".txt").split("_", 1)[1], f.read_text(encoding="utf-8").strip()) for f in found]


def _compare(title: str, text: str, engines: dict[str, SpectralQuantEngine], model: Any, tokenizer: Any, count: int) -> list[Run]:
    messages = [{"role": "user", "content": text}]
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)["input_ids"].to(model.device)
    print(f"--- {title}: {ids.shape[1]} tokens of context")
    plain = DynamicCache(config=model.config.get_text_config(decoder=True))
    new, prefill, rate = _generate(model, ids, plain, count)
    reference = _continuation(model, ids, new, DynamicCache(config=model.config.get_text_config(decoder=True)))
    layers: list[Any] = list(plain.layers)
    held = sum(t.numel() * 2 for layer in layers for t in (layer.keys, layer.values))
    runs = [Run(title, "FP16", _text(tokenizer, new), ids.shape[1], new.shape[1], held, held, 0, 0.0, 1.0, prefill, rate)]
    print(_row(runs[0]))
    for name, engine in engines.items():
        with engine.applied_to(model):
            cache = engine.cache(model)
            own, prefill, rate = _generate(model, ids, cache, count)
            got = _continuation(model, ids, new, engine.cache(model))
        divergence = float((reference.exp() * (reference - got)).sum(-1).mean())
        agreement = float((reference.argmax(-1) == got.argmax(-1)).float().mean())
        runs.append(
            Run(
                title,
                name,
                _text(tokenizer, own),
                ids.shape[1],
                own.shape[1],
                cache.nbytes,
                cache.dense_bytes,
                cache.codec_bytes,
                divergence,
                agreement,
                prefill,
                rate,
            )
        )
        print(_row(runs[-1]))
    print()
    return runs


@torch.no_grad()
def _generate(model: Any, ids: Tensor, cache: DynamicCache | SpectralCache, count: int) -> tuple[Tensor, float, float]:
    """Greedy tokens [1, n], seconds of prefill (compression included), and decoded tokens per second."""
    began = time.perf_counter()
    model.base_model(input_ids=ids[:, :-1], use_cache=True, **cache_argument(model, cache))
    prefill = time.perf_counter() - began
    began = time.perf_counter()
    options = {"do_sample": False, "pad_token_id": model.generation_config.eos_token_id, **cache_argument(model, cache)}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)
    new = out[:, ids.shape[1] :]
    return new, prefill, new.shape[1] / (time.perf_counter() - began)


@torch.no_grad()
def _continuation(model: Any, ids: Tensor, new: Tensor, cache: DynamicCache | SpectralCache) -> Tensor:
    """Log-probabilities [n, V] of every token of `new` after `ids`, the scored tokens fed in chunks."""
    model.base_model(input_ids=ids[:, :-1], use_cache=True, **cache_argument(model, cache))
    feed = torch.cat([ids[:, -1:], new[:, :-1]], 1)
    logits = [model(input_ids=chunk, use_cache=True, **cache_argument(model, cache)).logits[0] for chunk in feed.split(CHUNK, 1)]
    return torch.cat(logits).float().log_softmax(-1)


def _text(tokenizer: Any, new: Tensor) -> str:
    return tokenizer.decode(new[0], skip_special_tokens=True).strip()


def _row(run: Run) -> str:
    figures = f"{run.cache_bytes / 1e6:6.2f} MB  {run.tokens_per_second:5.1f} tok/s"
    if run.method != "FP16":
        figures += f"  {run.ratio:4.2f}x (with codec {run.ratio_with_codec:4.2f}x)  KL {run.kl:.4f}  same token {run.agreement:.0%}"
    return f"{run.method:>9}  {figures}\n           {' '.join(run.text.split())[:300]}"


def _summary(runs: list[Run], presets: list[str], seconds: float) -> str:
    lines = [f"{'':>9}  {'promise':>8} {'bytes':>9} {'ratio':>6} {'w. codec':>8} {'KL':>8} {'same token':>10} {'tok/s':>6}"]
    for name in ["FP16", *presets]:
        mine = [r for r in runs if r.method == name]
        held, dense = sum(r.cache_bytes for r in mine), sum(r.fp16_bytes for r in mine)
        codec = sum(r.codec_bytes for r in mine)
        tokens = sum(r.new_tokens for r in mine)
        kl = sum(r.kl * r.new_tokens for r in mine) / tokens
        agreement = sum(r.agreement * r.new_tokens for r in mine) / tokens
        rate = tokens / sum(r.new_tokens / r.tokens_per_second for r in mine)
        promise = f"{PRESETS[name].ratio:.2f}x" if name in PRESETS else ""
        lines.append(
            f"{name:>9}  {promise:>8} {held / 1e6:6.2f} MB {dense / held:5.2f}x {dense / (held + codec):7.2f}x {kl:8.4f} {agreement:10.1%} {rate:6.1f}"
        )
    lines.append(
        "\npromise: the packed history alone. ratio: the whole cache as allocated, exact sinks and recent window (128 to 255 tokens,\n"
        f"16-bit) included: it grows towards the promise with the context. {seconds:.0f} s in all."
    )
    return "\n".join(lines)


def _write_json(path: Path, label: str, model: Any, runs: list[Run], seconds: float) -> None:
    rows = [{**asdict(r), "ratio": r.ratio, "ratio_with_codec": r.ratio_with_codec} for r in runs]
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "device": str(model.device)}
    versions = {name: version(name) for name in ("torch", "transformers", "spectralquant")}
    document = {"model": label, "dtype": str(model.dtype), "seconds": seconds, "machine": machine, "versions": versions, "runs": rows}
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)
    print(f"figures written to {path}")
