"""The package of the same name on PyPI, 0.3.1, on one GPU: what a prompt and further tokens take, and how many bytes its cache has.

    pip install --no-deps --target FOLDER spectralquant==0.3.1
    python benchmarks/original.py --package FOLDER --out FILE [--shape NAME] [--context N ...]

The model is that of decoding.py: a well-known shape, random bfloat16 weights. Prompts are random tokens; so are calibration texts, as long as its own are.
`token_ms` is by its own count, which leaves the prompt out; `prompt_s` has prompt and compression; `stats_ratio` is the ratio that it reports, and
`cache_bytes` what its cache holds. It needs scipy.
"""

import argparse
import gc
import json
import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, random_model
from transformers import BatchEncoding

CALIBRATION_TOKENS, TOKENS = 23, 64


class RandomTokens:
    """Stands for a tokenizer: a number, as text, becomes so many random tokens; any other text `CALIBRATION_TOKENS`."""

    eos_token_id = pad_token_id = None

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, text: str, **options: Any) -> BatchEncoding:
        ids = torch.randint(3, self.vocabulary, (1, int(text) if text.isdigit() else CALIBRATION_TOKENS))
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, *args: Any, **options: Any) -> str:
        return ""


def cache_bytes(cache: Any) -> int:
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


@torch.no_grad()
def measure(sq: Any, model: Any, tokenizer: RandomTokens, context: int) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    began = time.perf_counter()
    prefix = sq.compress_prefill(model, tokenizer, str(context))
    torch.cuda.synchronize()
    row: dict[str, Any] = {"context": context, "batch": 1, "prompt_s": time.perf_counter() - began, "cache_bytes": cache_bytes(prefix["cache"])}
    del prefix
    stats = sq.generate(model, tokenizer, str(context), max_new_tokens=TOKENS)["stats"]
    row |= {"token_ms": 1e3 * stats["seconds"] / stats["new_tokens"], "stats_ratio": stats["ratio"]}
    return {**row, "peak_bytes": torch.cuda.max_memory_allocated() - held}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", required=True, type=Path, metavar="FOLDER", help="where pip put the original")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--context", type=int, action="append", help="may be repeated; default 2048 and 32768")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(args.package))
    import spectralquant

    if Path(spectralquant.__file__).resolve().parent.parent != args.package.resolve():
        sys.exit(f"--package {args.package}: expected the original there; run pip install --no-deps --target {args.package} spectralquant==0.3.1")
    model, tokenizer = random_model(SHAPES[args.shape], torch.device("cuda", 0)), RandomTokens(SHAPES[args.shape].vocab_size)
    sq: Any = spectralquant.SpectralQuant(compression="high", device="cuda")
    began = time.perf_counter()
    sq.calibrate(model, tokenizer)
    document: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/original.py", *("FOLDER" if a == str(args.package) else Path(a).name for a in argv)]),
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "spectralquant": spectralquant.__version__, **{n: version(n) for n in ("torch", "transformers")}},
        "shape": args.shape, "preset": "high", "calibration_s": time.perf_counter() - began, "rows": [],
    }  # fmt: skip
    for context in args.context or (2048, 32_768):
        document["rows"].append(measure(sq, model, tokenizer, context))
        print(document["rows"][-1])
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
