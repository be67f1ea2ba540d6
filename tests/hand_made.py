"""Run folders written by hand, for tests of reports and plots: figures that can be added up in the head."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

METHODS = ("fp16", "kivi2-g32", "high")
BITS = {"fp16": 16.0, "kivi2-g32": 3.0, "high": 2.5, "standard": 2.7}
SCALE = {"fp16": 1e-6, "kivi2-g32": 0.1, "high": 0.01, "standard": 0.008}
"""KL of the first token of the first window."""


def write_run(folder: Path, rows: Iterable[dict[str, Any]], methods: tuple[str, ...] = METHODS) -> Path:
    """A folder as `runner.run` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"model": "tiny", "methods": list(methods), "windows": 2, "scored": 4, "chunk": 16, "seed": 0}
    config = {"plan": plan, "command": "spectralquant evaluate --out run", "device": "cpu", "threads": 2, "dtype": "float32", "python": "3.11.7"}
    (folder / "config.json").write_text(json.dumps({**config, "versions": {"torch": "2.13.0", "hqq": None}}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def language_row(method: str, text: str = "prose", context: int = 512, window: int = 0) -> dict[str, Any]:
    """KL 1, 2, 3, 4 times the method's scale in window 0, twice that in window 1, and so on; three of four tokens agree."""
    kl = [SCALE[method] * (window + 1) * i for i in (1, 2, 3, 4)]
    where = {"task": "language", "unit": f"{text}/{context}/{window}", "text": text, "context": context, "window": window}
    likely = {"agree": [1, 1, 1, 0], "nll": [1.5, 2.5, 3.5], "nll_plain": [1.0, 2.0, 3.0 + window]}
    return {**where, "method": method, "kl": kl, **likely, "bits": BITS[method], "whole_bits": (BITS[method] + 16) / 2}


def language_rows(texts: Iterable[str] = ("prose",), contexts: Iterable[int] = (512,), methods: Iterable[str] = METHODS) -> list[dict[str, Any]]:
    """Two windows of each."""
    return [language_row(m, t, c, w) for t in texts for c in contexts for w in (0, 1) for m in methods]


def needle_row(method: str, correct: int, length: int = 1024, depth: float = 0.5, sample: int = 0, kind: str = "sentence") -> dict[str, Any]:
    where = {"task": "needles", "unit": f"{kind}/{length}/{depth}/{sample}", "kind": kind, "length": length, "depth": depth, "sample": sample}
    return {**where, "method": method, "answer": "7", "output": "7", "correct": correct, "answer_nll": 1.0 - correct / 2, "bits": BITS[method]}


def needle_rows(right: dict[str, Iterable[tuple[int, float]]]) -> list[dict[str, Any]]:
    """Lengths 1024 and 4096, depths 0 and 0.5, two samples; right at the (length, depth) in `right`."""
    places = [(length, depth) for length in (1024, 4096) for depth in (0.0, 0.5)]
    return [needle_row(m, int((n, d) in set(hits)), n, d, s) for n, d in places for s in (0, 1) for m, hits in right.items()]


def problem_row(method: str, correct: list[int], strict: list[int], batch: int = 0) -> dict[str, Any]:
    count = len(correct)
    lists = {"problem": [16 * batch + i for i in range(count)], "output": ["#### 1"] * count, "expected": ["1"] * count}
    return {"task": "problems", "unit": f"batch/{batch}", "method": method, **lists, "correct": correct, "correct_strict": strict, "bits": BITS[method]}


def bench_row(cache: str, context: int, seconds: float = 0.5) -> dict[str, Any]:
    """Twice the memory and half the speed at twice the context; "high" takes a quarter of the 16 bits."""
    share = 1.0 if cache == "fp16" else 0.25
    figures = {"prompt_s": seconds, "prompt_s_low": 0.9 * seconds, "prompt_s_high": 1.2 * seconds}
    speed = 51200 / context * (1.0 if cache == "fp16" else 1.1)
    figures |= {"tokens_per_s": speed, "tokens_per_s_low": 0.9 * speed, "tokens_per_s_high": 1.1 * speed}
    sizes = {"cache_bytes": int(1000 * context * share), "fp16_bytes": 1000 * context, "codec_bytes": 0 if cache == "fp16" else 5_000_000}
    held = {"tokens": context + 10, "new_tokens": 8, "repeats": 3, "peak_bytes": None, "decode_mode": None if cache == "fp16" else "as it is"}
    return {"cache": cache, "context": context, **figures, **sizes, **held}


def write_bench(folder: Path, rows: Iterable[dict[str, Any]] | None = None) -> Path:
    """A folder as `speed.bench` leaves it, without a calibration."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [bench_row(cache, context) for context in (512, 1024) for cache in ("fp16", "high")] if rows is None else list(rows)
    plan = {"model": "tiny", "presets": ["high"], "contexts": [512, 1024], "new_tokens": 8, "repeats": 3, "text": "stdlib:pydoc_data.topics"}
    machine = {"device": "cpu", "threads": 2, "dtype": "float32", "python": "3.11.7", "versions": {"torch": "2.13.0"}}
    (folder / "bench.json").write_text(json.dumps({"plan": plan, "command": "spectralquant bench --out run", **machine, "warm_up": 2, "rows": rows}))
    return folder
