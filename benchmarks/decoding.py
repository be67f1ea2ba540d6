"""What a user of a whole model sees: time to the first token, time per token, peak memory, largest batch and context, packed cache against transformers' own.

    python benchmarks/decoding.py --out FILE [--shape NAME] [--suite NAME] [--memory GB]

Models have random bfloat16 weights and the shapes of well-known ones: speed and memory do not depend on values. The codec is that of made-up spectra, with
records of the usual size. `--model` takes a real one instead, calibrates it and lets it read Python's own source. Everything goes through
`model.generate`, so the whole step counts, transformers' own loop included. Caches:

- `dynamic`: transformers' DynamicCache with `scaled_dot_product_attention`;
- `static, compiled`: transformers' StaticCache, for which `generate` compiles the model and captures CUDA graphs;
- `hqq, 4 bits`, `hqq, 2 bits`: transformers' QuantizedCache, where the package hqq is installed;
- `packed`: this package, steps as CUDA graphs where the device can;
- `packed, compiled`: the same with `CacheConfig(compile_steps=True)`;
- `packed, no graph`: the same without graphs.

Suites, all by default:

- `contexts`: one sequence, over contexts;
- `batches`: 32,768 tokens each, over batches;
- `prefix`: the same with packed caches whose sequences all go on from one prefix of 32,768 tokens, held once;
- `largest`: the largest batch of 32,768 tokens each and the longest context of one sequence that `--memory` holds, by trial;
- `prompt`: prompts of 2,048 and 32,768 tokens, read whole, and 32,768 in pieces of 4,096;
- `peak`: the most memory beside the weights for 32,768 tokens x 12, read in pieces, and what `engine.memory_plan` says of packed caches.

In all suites but the last two caches are filled with random keys and values (a real model's with its own), and `token_ms` is the mean of 160 tokens behind
32 that are not counted. Then captures and compilation are over; blocks that leave the window are counted.
"""

import argparse
import gc
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from attention import made_up_sides
from calibration import command_line
from shapes import SHAPES, THETA, random_model
from tqdm import tqdm
from transformers import DynamicCache, PretrainedConfig, QuantizedCache, StaticCache

from spectralquant import SpectralQuantEngine
from spectralquant.attention.hf import register
from spectralquant.cache.hf import SpectralCache
from spectralquant.cli.models import load_model
from spectralquant.codec.codec import LayerCodec, build_codec
from spectralquant.compat import cache_argument
from spectralquant.config import CacheConfig, Dials
from spectralquant.errors import ConfigError
from spectralquant.evaluation.speed import PeakMemory, Ticks, wait_for
from spectralquant.evaluation.texts import read_text, tokenise
from spectralquant.files import write_json
from spectralquant.follow_up import install_generate
from spectralquant.memory import MemoryPlan, Planner, measure_forward
from spectralquant.presets import PRESETS
from spectralquant.profile import Choices, LayerProfile, Profile
from spectralquant.rope import Rotary

PIECE, LONG, FILL = 4096, 32_768, 65_536
WARM, TOKENS = 32, 160
TEXT = "stdlib:argparse,typing,decimal,datetime"
REPEATS = 3
CONTEXTS, BATCHES = (512, 2048, 8192, 32_768, 131_072), (1, 8, 12)
PACKED = {"packed": {}, "packed, compiled": {"compile_steps": True}, "packed, no graph": {"cuda_graphs": False}}
HQQ = {"hqq, 4 bits": 4, "hqq, 2 bits": 2}
KINDS = ("dynamic", "static, compiled", *HQQ, *PACKED)
SUITES = ("contexts", "batches", "prefix", "largest", "prompt", "peak")


def made_up_profile(layers: int, heads: int, dim: int) -> Profile:
    """Spectra that fall by e^4, a rotation like Llama's, no exact tokens beyond the sinks."""
    key, value = made_up_sides(heads, dim)
    rotary = Rotary(THETA ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)))
    layer = LayerProfile(key, value, torch.full((heads,), float(dim)), 10.0, rotary)
    return Profile(dict.fromkeys(range(layers), layer), Choices(exact_below=0.0, exact_error=0.0), {}, {})


class Bench:
    """One model, and its caches under test.

    Args:
        model: A causal language model.
        codec: Its layers' codecs, of one preset.
        text: Token ids [1, T] that prompts are made of, again and again; None: random ones.
    """

    def __init__(self, model: Any, codec: dict[int, LayerCodec], text: torch.Tensor | None = None) -> None:
        self.model, self.codec, self.text = model, codec, text
        self.config, self.device = model.config, model.device
        self.heads, self.dim = self.config.num_key_value_heads, self.config.hidden_size // self.config.num_attention_heads
        install_generate(model)

    @classmethod
    def of_shape(cls, config: PretrainedConfig, preset: str, device: torch.device) -> "Bench":
        """Random weights and made-up spectra."""
        profile = made_up_profile(config.num_hidden_layers, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
        return cls(random_model(config, device), build_codec(profile, PRESETS[preset], Dials(), device, "joint"))

    @classmethod
    def of_model(cls, name: str, preset: str) -> "Bench":
        """A real model, calibrated here, with Python's own source as text."""
        model, tokenizer, _ = load_model(name)
        engine = SpectralQuantEngine(compression=preset)
        engine.calibrate(model, tokenizer)
        return cls(model, engine.profile_codec(model), tokenise(tokenizer, read_text(TEXT)).to(model.device))

    def cache(self, kind: str, room: int = 0) -> Any:
        """An empty one; a static one has `room` for so many tokens."""
        self.model.set_attn_implementation(register() if kind in PACKED else "sdpa")
        if kind in PACKED:
            return SpectralCache(self.config, self.codec, CacheConfig(**PACKED[kind]))
        if kind in HQQ:
            return QuantizedCache("hqq", self.config, nbits=HQQ[kind], axis_key=1, axis_value=1, q_group_size=64)
        return StaticCache(config=self.config, max_cache_len=room) if kind == "static, compiled" else DynamicCache(config=self.config)

    def filled(self, kind: str, context: int, batch: int, room: int, shared: bool = False) -> Any:
        """A cache of random keys and values, of the text's where there is one. A packed one holds the same sequence `batch` times, or once for all rows where
        `shared`: it packs one."""
        cache, rows, piece = self.cache(kind, room), 1 if kind in PACKED else batch, FILL if kind in PACKED else context
        for ids in self.ids(rows, context).split(PIECE, 1) if self.text is not None else ():
            self.model(ids, **cache_argument(self.model, cache), use_cache=True, logits_to_keep=1)
        for first in range(0, context, piece) if self.text is None else ():
            for layer in range(self.config.num_hidden_layers):
                shape = (2, rows, self.heads, min(piece, context - first), self.dim)
                cache.update(*torch.randn(shape, device=self.device, dtype=torch.bfloat16), layer)
        if rows < batch and shared:
            cache.batch_repeat_interleave(batch)
        elif rows < batch:
            for layer in cache.coded_layers:
                layer.segment.map_rows(lambda t: t.repeat_interleave(batch, 0))
        return cache

    def generate(self, cache: Any, ids: torch.Tensor, tokens: int, **options: Any) -> None:
        fixed = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        self.model.generate(ids, attention_mask=torch.ones_like(ids), **cache_argument(self.model, cache), **fixed, **options)

    def ids(self, batch: int, count: int) -> torch.Tensor:
        if self.text is not None:
            return self.text.repeat(1, -(-count // self.text.shape[1]))[:, :count].expand(batch, -1)
        make = torch.Generator().manual_seed(1)
        return torch.randint(3, self.config.vocab_size - 1, (1, count), generator=make).to(self.device).expand(batch, -1)

    def steps(self, kind: str, context: int, batch: int, shared: bool = False) -> dict[str, float]:
        """Milliseconds per token, and tokens per second of all sequences, behind `context` tokens in the cache."""
        torch._dynamo.reset()
        self.reset_peak()
        ticks = Ticks(self.device, (WARM, WARM + TOKENS))
        cache = self.filled(kind, context, batch, context + WARM + TOKENS + 2, shared)
        self.generate(cache, self.ids(batch, context + 1), WARM + TOKENS + 1, logits_processor=[ticks])
        seconds = (ticks.times[1] - ticks.times[0]) / TOKENS
        row: dict[str, Any] = {"token_ms": seconds * 1e3, "tokens_per_s": batch / seconds, "peak_bytes": self.peak()}
        return {**row, "cache_bytes": cache.nbytes, "mode": cache.decode_report.mode} if kind in PACKED else row

    def prompt(self, kind: str, context: int, piece: int | None) -> dict[str, float]:
        """Seconds of a generation of one token: the median of REPEATS behind one that is not counted."""
        ids, options = self.ids(1, context), {"prefill_chunk_size": piece} if piece else {}
        self.generate(self.cache(kind), ids, 1, **options)
        self.reset_peak()
        seconds = median(self.seconds(lambda: self.generate(self.cache(kind), ids, 1, **options)) for _ in range(REPEATS))
        return {"prompt_s": seconds, "peak_bytes": self.peak()}

    def peak_of(self, kind: str, context: int, batch: int, piece: int) -> dict[str, float]:
        """The most memory beside the weights while a batch is read in pieces and goes on for some tokens."""
        self.reset_peak()
        seconds = self.seconds(lambda: self.generate(self.cache(kind), self.ids(batch, context), 8, prefill_chunk_size=piece))
        row: dict[str, float] = {"seconds": seconds, "peak_bytes": self.peak()}
        if kind in PACKED:
            plan = self.plan(context, batch, 8, piece)
            row |= {"planned_bytes": plan.total - plan.weights - plan.codec}
        return row

    def plan(self, context: int, batch: int, tokens: int, piece: int | None) -> MemoryPlan:
        planner = Planner.of(self.model, self.codec, {}, CacheConfig())
        forward = measure_forward(self.model, lambda: self.cache("packed"))
        return planner.plan(batch, context, tokens, forward, piece)

    def seconds(self, call: Callable[[], None]) -> float:
        wait_for(self.device)
        began = time.perf_counter()
        call()
        wait_for(self.device)
        return time.perf_counter() - began

    def reset_peak(self) -> None:
        gc.collect()
        self.memory = PeakMemory(self.device)

    def peak(self) -> int:
        return self.memory.bytes() or 0

    def bytes_per_token(self, kind: str) -> float:
        """Of a cache, for the first guess at the largest one."""
        dense = 2 * 2 * self.heads * self.dim * self.config.num_hidden_layers
        layout = next(iter(self.codec.values())).layout
        return self.heads * self.config.num_hidden_layers * layout.record_bytes / 128 * 1.03 if kind in PACKED else dense


def lines_of(suite: str, bench: Bench, kinds: tuple[str, ...], args: argparse.Namespace) -> list[tuple[dict[str, Any], Callable[[], dict[str, float]]]]:
    """What a suite measures: a row's name, and what fills it."""
    if suite == "contexts":
        cases = [(kind, context, 1) for context in args.context for kind in kinds if context <= LONG or kind not in HQQ]
        return [({"cache": k, "context": c, "batch": b}, lambda k=k, c=c, b=b: bench.steps(k, c, b)) for k, c, b in cases]
    if suite == "batches":
        cases = [(kind, args.long, batch) for batch in args.batch if batch > 1 for kind in kinds if kind in ("dynamic", "static, compiled", *PACKED)]
        return [({"cache": k, "context": c, "batch": b}, lambda k=k, c=c, b=b: bench.steps(k, c, b)) for k, c, b in cases]
    if suite == "prefix":
        cases = [(kind, args.long, batch) for batch in args.batch if batch > 1 for kind in kinds if kind in PACKED]
        return [({"cache": k, "context": c, "batch": b, "shared": True}, lambda k=k, c=c, b=b: bench.steps(k, c, b, shared=True)) for k, c, b in cases]
    if suite == "largest":
        found = [kind for kind in kinds if kind not in HQQ]
        return [({"cache": k, "grows": g}, lambda k=k, g=g: largest(bench, k, g, args.long, args.memory)) for g in ("batch", "context") for k in found]
    found = [kind for kind in ("dynamic", "packed") if kind in kinds]
    if suite == "prompt":
        pieces = [(2048, None), (args.long, None), (args.long, PIECE)]
        return [({"cache": k, "context": c, "piece": p}, lambda k=k, c=c, p=p: bench.prompt(k, c, p)) for c, p in pieces for k in found]
    batch, piece = args.peak_batch, max(args.long // 64, 1)
    row = {"context": args.long, "batch": batch, "piece": piece}
    return [({"cache": k, **row}, lambda k=k: bench.peak_of(k, args.long, batch, piece)) for k in found]


def largest(bench: Bench, kind: str, grows: str, context: int, memory: float) -> dict[str, float]:
    """The largest batch or longest context that runs in `memory` bytes, from a guess that is sure to be too large downwards by 2 % or one sequence a try."""
    room = memory - (torch.cuda.memory_allocated(bench.device) if bench.device.type == "cuda" else 0)
    guess = int(room / bench.bytes_per_token(kind) / (context if grows == "batch" else 1))
    while guess > 0:
        batch, length = (guess, context) if grows == "batch" else (1, guess // 128 * 128)
        try:
            return {"batch": batch, "context": length, **bench.steps(kind, length, batch)}
        except torch.OutOfMemoryError:
            guess -= max(1, guess // 50)
    return {"out_of_memory": True}


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda" and args.memory < torch.cuda.mem_get_info(device)[1]:
        torch.cuda.set_per_process_memory_fraction(args.memory / torch.cuda.mem_get_info(device)[1], device)
    kinds = tuple(kind for kind in args.kind or KINDS if kind not in HQQ or find_spec("hqq"))
    bench = Bench.of_model(args.model, args.preset) if args.model else Bench.of_shape(SHAPES[args.shape], args.preset, device)
    document: dict[str, Any] = {
        "command": command_line("decoding", argv),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers")}},
        "shape": Path(args.model).stem if args.model else args.shape, "preset": args.preset, "tokens": TOKENS, "memory_bytes": args.memory, "rows": [],
    }  # fmt: skip
    lines = [(suite, *line) for suite in args.suite or SUITES for line in lines_of(suite, bench, kinds, args)]
    for suite, name, measure in tqdm(lines, desc="decoding", unit="line"):
        try:
            row = {"suite": suite, **name, **measure()}
        except torch.OutOfMemoryError:
            row = {"suite": suite, **name, "out_of_memory": True}
        document["rows"].append(row)
        tqdm.write(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
        write_json(args.out, document)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b", help="whose shape the model has (default llama-3.1-8b)")
    parser.add_argument("--model", metavar="NAME", help="a real model instead: a folder, a GGUF file or a hub name; it is calibrated first")
    parser.add_argument("--preset", choices=list(PRESETS), default="high")
    parser.add_argument("--suite", action="append", choices=SUITES, help="measure these alone (may be repeated)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="measure these caches alone (may be repeated)")
    parser.add_argument("--context", type=int, action="append", help=f"of the suite contexts (may be repeated; default {CONTEXTS})")
    parser.add_argument("--batch", type=int, action="append", help=f"of the suites batches and prefix (may be repeated; default {BATCHES})")
    parser.add_argument("--long", type=int, default=LONG, help=f"tokens of a long sequence (default {LONG})")
    parser.add_argument("--peak-batch", type=int, default=12, help="sequences of the suite peak (default 12)")
    parser.add_argument("--memory", type=float, default=80.0, metavar="GB", help="what the process may take of the device (default 80)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSON, written after every line")
    args = parser.parse_args(argv)
    args.context, args.batch, args.memory = args.context or list(CONTEXTS), args.batch or list(BATCHES), args.memory * 1e9
    if min(*args.context, *args.batch, args.long, args.peak_batch, args.memory) <= 0:
        raise ConfigError("--context, --batch, --long, --peak-batch and --memory: expected positive numbers")
    if not args.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {args.out}: there is no folder {args.out.parent}; make it first")
    return args


if __name__ == "__main__":
    main()
