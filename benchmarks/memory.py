"""Bytes of the whole cache and speed of decoding, for each preset and context length, against the uncompressed model in the same run.

    python benchmarks/memory.py [--model M] [--context 512 --context 2048 --context 8192] --out FILE

Ratios divide the bytes of a 16-bit cache by `cache.nbytes`, which the script checks against the sum of `untyped_storage().nbytes()` over
every tensor found in the cache's layers. Decoding is one token at a time; the median of 24 steps after 4 warm-up steps.
"""

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from calibration import command_line
from transformers import DynamicCache

from spectralquant import SpectralQuantEngine
from spectralquant.cli.models import load_model
from spectralquant.compat import cache_argument
from spectralquant.presets import PRESETS
from spectralquant.profile import with_suffix

WARM_UP, STEPS = 4, 24


def storage_bytes(cache):
    """Every byte held, found by walking the layers' attributes."""
    held = {}
    for layer in cache.layers:
        for value in vars(layer.segment).values():
            if isinstance(value, torch.Tensor):
                held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(held.values())


@torch.no_grad()
def median_step(model, ids, cache):
    """Milliseconds of one decoding step after the context `ids`."""
    model.base_model(input_ids=ids, use_cache=True, **cache_argument(model, cache))
    times = []
    for _ in range(WARM_UP + STEPS):
        began = time.perf_counter()
        model(input_ids=ids[:, :1], use_cache=True, **cache_argument(model, cache))
        times.append(time.perf_counter() - began)
    return sorted(times[WARM_UP:])[STEPS // 2] * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--context", action="append", type=int)
    parser.add_argument("--calibration", default="calibration.safetensors")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    model, tokenizer, label = load_model(args.model)
    if not with_suffix(args.calibration).exists():
        SpectralQuantEngine(compression="high").calibrate_to(args.calibration, model, tokenizer)
    rows = []
    for length in args.context or [512, 2048, 8192]:
        ids = torch.randint(3, 1000, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
        plain = median_step(model, ids, DynamicCache(config=model.config.get_text_config(decoder=True)))
        for preset in PRESETS:
            engine = SpectralQuantEngine(compression=preset)
            engine.load_calibration(args.calibration)
            with engine.applied_to(model):
                cache = engine.cache(model)
                mine = median_step(model, ids, cache)
            held = storage_bytes(cache)
            if held != cache.nbytes:
                raise SystemExit(f"the cache claims {cache.nbytes} bytes and holds {held}")
            line = {
                "context": length,
                "tokens": cache.get_seq_length(),
                "preset": preset,
                "cache_bytes": held,
                "fp16_bytes": cache.dense_bytes,
                "ratio": cache.dense_bytes / held,
                "codec_bytes": cache.codec_bytes,
                "ratio_with_codec": cache.dense_bytes / (held + cache.codec_bytes),
                "step_ms": mine,
                "plain_step_ms": plain,
                "relative_speed": plain / mine,
            }
            rows.append(line)
            print(json.dumps(line), flush=True)
    document = {
        "model": label,
        "command": command_line("memory", sys.argv[1:]),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {n: version(n) for n in ("torch", "transformers")},
        "rows": rows,
    }
    target = Path(args.out)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    aside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    aside.replace(target)


if __name__ == "__main__":
    main()
