"""Time to the first token and time per token of whole models, packed cache against transformers' own.

    python benchmarks/decoding.py --out FILE [--shape NAME] [--context N] [--batch N] [--tokens N]

Models have random bfloat16 weights and the shapes of well-known ones: speed and memory do not depend on values. The codec is that of made-up spectra, with
records of the usual size. Everything goes through `model.generate`, the whole step counts. One line is a context, a batch and a cache:

- `dynamic`: transformers' DynamicCache with `scaled_dot_product_attention`;
- `packed`: this package, steps as CUDA graphs where the device can;
- `packed, no graph`: the same without;
- `packed, prompt in pieces`: the prompt comes 4,096 tokens at a time, so that later pieces attend to codes.

`prefill_s` is the time of a generation of one token, `token_ms` that of every further one, `peak_bytes` the most memory that torch had in use beside the model.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from attention import made_up_sides
from calibration import command_line
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PretrainedConfig, Qwen2Config

from spectralquant.attention.hf import register
from spectralquant.cache.hf import SpectralCache
from spectralquant.codec.codec import LayerCodec, build_codec
from spectralquant.compat import cache_argument
from spectralquant.config import CacheConfig, Dials
from spectralquant.errors import ConfigError
from spectralquant.evaluation.runner import write_json
from spectralquant.follow_up import install_generate
from spectralquant.presets import PRESETS
from spectralquant.profile import Choices, LayerProfile, Profile
from spectralquant.rope import Rotary

PIECE = 4096
REPEATS = 3
THETA = 500_000.0
SHAPES: dict[str, PretrainedConfig] = {
    "qwen2.5-1.5b": Qwen2Config(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        max_position_embeddings=131_072, tie_word_embeddings=True,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=131_072,
    ),
    "tiny": LlamaConfig(
        vocab_size=199, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=131_072,
    ),
}  # fmt: skip


def made_up_profile(layers: int, heads: int, dim: int) -> Profile:
    """Spectra that fall by e^4, a rotation like Llama's, no exact tokens beyond the sinks."""
    key, value = made_up_sides(heads, dim)
    rotary = Rotary(THETA ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)))
    layer = LayerProfile(key, value, torch.full((heads,), float(dim)), 10.0, rotary)
    return Profile(dict.fromkeys(range(layers), layer), Choices(exact_below=0.0, exact_error=0.0), {}, {})


class Bench:
    """One model, and its caches under test."""

    def __init__(self, config: PretrainedConfig, preset: str, device: torch.device) -> None:
        self.config, self.device = config, device
        config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
        with torch.device(device):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        install_generate(self.model)
        dim = config.hidden_size // config.num_attention_heads
        profile = made_up_profile(config.num_hidden_layers, config.num_key_value_heads, dim)
        self.codec: dict[int, LayerCodec] = build_codec(profile, PRESETS[preset], Dials(), device, "joint")

    def cache(self, kind: str) -> Any:
        self.model.set_attn_implementation("sdpa" if kind == "dynamic" else register())
        if kind == "dynamic":
            return DynamicCache(config=self.config)
        return SpectralCache(self.config, self.codec, CacheConfig(cuda_graphs=kind != "packed, no graph"))

    def generate(self, kind: str, ids: torch.Tensor, tokens: int) -> None:
        cache = self.cache(kind)
        if kind == "packed, prompt in pieces":
            for first in range(0, ids.shape[1] - 1, PIECE):
                piece = ids[:, first : min(first + PIECE, ids.shape[1] - 1)]
                self.model.base_model(input_ids=piece, use_cache=True, **cache_argument(self.model, cache))
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        self.model.generate(ids, attention_mask=torch.ones_like(ids), **cache_argument(self.model, cache), **options)

    def seconds(self, call: Callable[[], None]) -> float:
        self._wait()
        began = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, kind: str, context: int, batch: int, tokens: int) -> dict[str, float]:
        """One line's figures; the first generation of a kind, which loads kernels, is not counted."""
        make = torch.Generator().manual_seed(1)
        ids = torch.randint(3, self.config.vocab_size - 1, (batch, context), generator=make).to(self.device)
        held = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        self.generate(kind, ids, 4)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        first = median(self.seconds(lambda: self.generate(kind, ids, 1)) for _ in range(REPEATS))
        whole = median(self.seconds(lambda: self.generate(kind, ids, 1 + tokens)) for _ in range(REPEATS))
        peak = torch.cuda.max_memory_allocated(self.device) - held if self.device.type == "cuda" else 0
        return {"prefill_s": first, "token_ms": (whole - first) / tokens * 1e3, "peak_bytes": peak}


KINDS = ("dynamic", "packed", "packed, no graph", "packed, prompt in pieces")


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    bench = Bench(SHAPES[args.shape], args.preset, device)
    document: dict[str, Any] = {
        "command": command_line("decoding", argv),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers")}},
        "shape": args.shape, "preset": args.preset, "new_tokens": args.tokens, "rows": [],
    }  # fmt: skip
    lines = [(context, batch, kind) for context in args.context for batch in args.batch for kind in args.kind or KINDS]
    for context, batch, kind in tqdm(lines, desc="decoding", unit="line"):
        try:
            row = {"context": context, "batch": batch, "cache": kind, **bench.measure(kind, context, batch, args.tokens)}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            row = {"context": context, "batch": batch, "cache": kind, "out_of_memory": True}
        document["rows"].append(row)
        tqdm.write(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
        write_json(args.out, document)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-1.5b", help="whose shape the model has (default qwen2.5-1.5b)")
    parser.add_argument("--preset", choices=list(PRESETS), default="high")
    parser.add_argument("--context", type=int, action="append", help="tokens of the prompt (may be repeated; default 2048 and 32768)")
    parser.add_argument("--batch", type=int, action="append", help="sequences (may be repeated; default 1)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens generated after the first (default 128)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="measure these caches alone (may be repeated)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSON, written after every line")
    args = parser.parse_args(argv)
    args.context, args.batch = args.context or [2048, 32_768], args.batch or [1]
    if min(*args.context, *args.batch, args.tokens) < 1:
        raise ConfigError(f"--context {args.context}, --batch {args.batch}, --tokens {args.tokens}: expected positive numbers")
    return args


if __name__ == "__main__":
    main()
