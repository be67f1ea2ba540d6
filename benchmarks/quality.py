"""Quality of each preset against the uncompressed model, on text that nothing was tuned on.

    python benchmarks/quality.py --text wikitext=FILE --text code=stdlib:tarfile,inspect [--model M] [--prefix 512 --prefix 2048] [--windows 8] --out FILE

A window is `prefix` tokens of context and 256 scored tokens, fed in chunks of 16 so that they read codes; the context is stored in the packed
cache with everything a user's cache has (sinks, window, secondary sinks). Windows are spread evenly over the text; `stdlib:` joins the source
of modules of the running Python. KL is KL(uncompressed || compressed) in nats per token.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from spectralquant import SpectralQuantEngine
from spectralquant.cache.hf import cache_argument
from spectralquant.cli.models import load_model
from spectralquant.presets import PRESETS
from spectralquant.profile import with_suffix

SCORED, CHUNK = 256, 16


def read_text(source: str) -> str:
    """A file, or `stdlib:` and module names."""
    if not source.startswith("stdlib:"):
        return detokenise(Path(source).read_text(encoding="utf-8"))
    specs = [importlib.util.find_spec(name) for name in source.removeprefix("stdlib:").split(",")]
    return "\n\n".join(Path(spec.origin).read_text(encoding="utf-8") for spec in specs)


def detokenise(text: str) -> str:
    """Undo the word-level tokenisation of WikiText."""
    text = text.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".").replace("<unk>", "unknown")
    text = re.sub(r" ([.,;:!?%\)\]])", r"\1", text)
    return re.sub(r"([\(\[]) ", r"\1", text).replace(" 's", "'s").replace(" n't", "n't")


@torch.no_grad()
def score(model, engine, ids, prefix):
    """Per-token KL, agreement and negative log-likelihoods of one window, and the all-in bits of its packed store."""
    want = model(ids).logits[0, prefix:].float().log_softmax(-1)
    with engine.applied_to(model):
        cache = engine.cache(model)
        model.base_model(input_ids=ids[:, :prefix], use_cache=True, **cache_argument(model, cache))
        got = [model(input_ids=c, use_cache=True, **cache_argument(model, cache)).logits[0] for c in ids[:, prefix:].split(CHUNK, 1)]
    got = torch.cat(got).float().log_softmax(-1)
    target = ids[0, prefix + 1 :, None]
    segments = [layer.segment for layer in cache.coded_layers]
    secondary = sum(float(s.secondary.sum()) for s in segments) / sum(s.packed for s in segments)
    return {
        "kl": (want.exp() * (want - got)).sum(-1),
        "agree": (want.argmax(-1) == got.argmax(-1)).float(),
        "nll": -got[:-1].gather(1, target)[:, 0],
        "nll_plain": -want[:-1].gather(1, target)[:, 0],
        "secondary": secondary,
        "whole_ratio": cache.dense_bytes / cache.nbytes,
    }


def summarise(rows, layout, head_dim):
    """One line of the result: means over all windows, standard errors over windows."""
    kl = torch.cat([r["kl"] for r in rows])
    per_window = torch.tensor([float(r["kl"].mean()) for r in rows])
    share = sum(r["secondary"] for r in rows) / len(rows)
    bits = layout.bytes_per_token * 8 / (2 * head_dim) + share * 16
    log_ratio = torch.cat([r["nll"] for r in rows]).mean() - torch.cat([r["nll_plain"] for r in rows]).mean()
    return {
        "windows": len(rows),
        "scored_tokens": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_standard_error": float(per_window.std() / len(rows) ** 0.5),
        "kl_median": float(kl.median()),
        "kl_99": float(kl.quantile(0.99)),
        "agreement": float(torch.cat([r["agree"] for r in rows]).mean()),
        "perplexity_ratio": math.exp(float(log_ratio)),
        "secondary_exact_share": share,
        "bits_all_in": bits,
        "packed_ratio_all_in": 16 / bits,
        "whole_cache_ratio": sum(r["whole_ratio"] for r in rows) / len(rows),
        "kl_per_window": per_window.tolist(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--prefix", action="append", type=int)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--preset", action="append", choices=list(PRESETS))
    parser.add_argument("--calibration", default=None)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    model, tokenizer, label = load_model(args.model)
    path = Path(args.calibration or "calibration.safetensors")
    if not with_suffix(path).exists():
        SpectralQuantEngine(compression="high").calibrate_to(path, model, tokenizer)
    engines = {name: SpectralQuantEngine(compression=name) for name in args.preset or PRESETS}
    for engine in engines.values():
        engine.load_calibration(path)
    result = {
        "model": label,
        "command": " ".join(["python benchmarks/quality.py", *(re.sub("(^|=)/.*/", r"\1", a) for a in sys.argv[1:])]),
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {n: version(n) for n in ("torch", "transformers")},
        "certificate": {k: v for k, v in engine.profile_of(model).certificate.items() if k != "menu"},
        "rows": [],
    }
    for name, file in (t.split("=", 1) for t in args.text):
        ids = tokenizer(read_text(file), return_tensors="pt")["input_ids"]
        for prefix in args.prefix or [512, 2048]:
            size = prefix + SCORED
            gap = (ids.shape[1] - size) // max(args.windows - 1, 1)
            if gap < size:
                parser.error(f"text {name!r} has {ids.shape[1]} tokens, too few for {args.windows} windows of {size}")
            windows = [ids[:, i * gap : i * gap + size] for i in range(args.windows)]
            for preset, engine in engines.items():
                layout = next(iter(engine.profile_codec(model).values())).layout
                rows = [score(model, engine, w, prefix) for w in tqdm(windows, desc=f"{name} {prefix} {preset}")]
                line = {"text": name, "prefix": prefix, "preset": preset, **summarise(rows, layout, next(iter(engine.profile_codec(model).values())).head_dim)}
                result["rows"].append(line)
                write(Path(args.out), result)
                print(json.dumps({k: v for k, v in line.items() if k != "kl_per_window"}), flush=True)


def write(path, document):
    """Write aside, then rename."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


if __name__ == "__main__":
    main()
