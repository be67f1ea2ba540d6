"""One process for a long time: 200,000 decoded tokens, and what grows meanwhile.

    python benchmarks/soak.py --out FILE [--model tiny|MODEL] [--batch N] [--tokens N] [--prefixes N] [--plot SVG]
    python benchmarks/soak.py --out FILE --plot SVG        (the picture of a FILE that is there; nothing is measured)

A round is everything that a process with a model does: generations with caches of their own, a cache that several calls of `generate` continue with ever longer
texts, a prefix with follow-ups, copies and crops, and calls that fail in the middle. After each of these: resident memory, memory of the GPU, live tensors,
open files, threads. --prefixes N does as many prompts through a `PrefixStore` that has room for a tenth of them. Reported is by how much each grows per 1,000
tokens (or prefixes) over the last three quarters: least squares with one line for each of the five, all of one slope, and its standard error.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from calibration import command_line
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from spectralquant import PrefixStore, SpectralQuantEngine, get_default_calibration_texts
from spectralquant.cli.models import load_model
from spectralquant.files import write_json

PROMPT, NEW, TURNS, FOLLOW_UPS = 200, 64, 4, 2
SAMPLED_PREFIXES = 20
"""Prompts between two samples."""
UNITS = {"rss_bytes": "MB of memory", "cuda_bytes": "MB on the GPU", "tensors": "live tensors", "files": "open files", "threads": "threads"}


class MeantToFailError(Exception):
    pass


class Failing(LogitsProcessor):
    """Fails at the n-th token."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if self.left <= 0:
            raise MeantToFailError
        return scores


@dataclass
class Soak:
    """A model, and what is done with it again and again. All methods return decoded tokens."""

    model: Any
    tokenizer: Any
    engine: SpectralQuantEngine
    batch: int

    def ids(self, rows: int, count: int) -> Tensor:
        return torch.randint(3, self.model.config.get_text_config().vocab_size - 1, (rows, count), device=self.model.device)

    def generate(self, ids: Tensor, cache: Any, new: int = NEW, **options: Any) -> Tensor:
        defaults = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        return self.model.generate(ids, past_key_values=cache, max_new_tokens=new, **{**defaults, **options})

    def fresh(self) -> int:
        made = self.engine.generate(self.model, self.tokenizer, self.ids(self.batch, PROMPT), NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        return made["stats"]["new_tokens"]

    def growing(self) -> int:
        cache, text, made = self.engine.cache(self.model), self.ids(self.batch, PROMPT), 0
        for _ in range(TURNS):
            text = torch.cat([self.generate(text, cache), self.ids(self.batch, 40)], 1)
            made += self.batch * NEW
        return made

    def prefixes(self) -> int:
        held, rows = self.engine.compress_prefill(self.model, self.tokenizer, self.ids(1, 4 * PROMPT)[0])["cache"], max(self.batch // 2, 1)
        for _ in range(FOLLOW_UPS):
            self.generate(self.ids(rows, 20), held)
        return FOLLOW_UPS * rows * NEW

    def copies(self) -> int:
        cache, text = self.engine.cache(self.model), self.ids(self.batch, 3 * PROMPT)
        text = self.generate(text, cache)
        other = cache.copy()
        other.crop(-200)
        other.reorder_cache(torch.arange(self.batch - 1, -1, -1, device=self.model.device))
        self.generate(text.flip(0)[:, : other.get_seq_length() + 1], other)
        return 2 * self.batch * NEW

    def failing(self) -> int:
        cache, text = self.engine.cache(self.model), self.ids(self.batch, PROMPT)
        for n in (1, NEW // 2):
            try:
                self.generate(text, cache, logits_processor=LogitsProcessorList([Failing(n)]))
            except MeantToFailError:
                continue
            raise SystemExit("a call that should fail did not")
        self.generate(text, cache)
        return self.batch * (NEW + NEW // 2)

    @property
    def kinds(self) -> tuple[Callable[[], int], ...]:
        return self.fresh, self.growing, self.prefixes, self.copies, self.failing


def sample(kind: str, done: int, began: float) -> dict[str, Any]:
    """What this process holds now. glibc gives back what is free first: how much of that it keeps is chance, a fifth of the memory of a small model."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "kind": kind,
        "done": done,
        "seconds": round(time.perf_counter() - began, 2),
        "rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "cuda_bytes": torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
        "tensors": sum(issubclass(type(x), Tensor) for x in gc.get_objects()),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "python_threads": threading.active_count(),
    }


def decode(soak: Soak, tokens: int) -> Iterator[dict[str, Any]]:
    """Rounds until `tokens` are decoded."""
    began, done = time.perf_counter(), 0
    while done < tokens:
        for kind in soak.kinds:
            done += kind()
            yield sample(kind.__name__, done, began)
        print(f"{done:,} of {tokens:,} tokens", flush=True)


def store_prefixes(soak: Soak, count: int, folder: Path, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Different prompts through a store that has room for a tenth of them; the last of every twenty is asked twice, and has to be found."""
    began, options = time.perf_counter(), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    soak.engine.generate(soak.model, soak.tokenizer, soak.ids(1, 3 * PROMPT), 2, store=PrefixStore(folder / "one", 10**12), **options)
    store = PrefixStore(folder / "all", count // 10 * bytes_below(folder / "one"))
    facts |= {"prefixes": count, "max_bytes": store.max_bytes, "largest_bytes": 0}
    for number in range(1, count + 1):
        prompt = soak.ids(1, 3 * PROMPT)
        soak.engine.generate(soak.model, soak.tokenizer, prompt, 2, store=store, **options)
        if number % SAMPLED_PREFIXES == 0:
            again = soak.engine.generate(soak.model, soak.tokenizer, prompt, 2, store=store, **options)["stats"]["store"]
            if again["hit_tokens"] < 3 * PROMPT - 1:
                raise SystemExit(f"a prefix that was stored last is not found: {again}")
            facts["largest_bytes"] = max(facts["largest_bytes"], bytes_below(folder / "all"))
            yield sample("store", number, began)
            print(f"{number:,} of {count:,} prefixes", flush=True)
    facts |= {"hits": store.usage.hits, "misses": store.usage.misses, "evicted": store.usage.evicted, "written_bytes": store.usage.written_bytes}


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def slopes(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Growth per 1,000 of what was done, over the last three quarters. The standard error takes samples as independent."""
    late = samples[len(samples) // 4 :]
    of_kind = [[i for i, s in enumerate(late) if s["kind"] == kind] for kind in sorted({s["kind"] for s in late})]
    freedom = len(late) - len(of_kind) - 1
    if freedom < 1:
        return {}

    def column(name: str) -> tuple[Tensor, Tensor]:
        """Values, and what they are above the mean of their kind."""
        values = torch.tensor([s[name] for s in late], dtype=torch.float64)
        above = values.clone()
        for rows in of_kind:
            above[rows] -= values[rows].mean()
        return values, above

    x, out = column("done")[1] / 1000, dict[str, Any](samples=len(late))
    for name in UNITS:
        y, above = column(name)
        slope = (x * above).sum() / x.square().sum()
        error = ((above - slope * x).square().sum() / freedom / x.square().sum()).sqrt()
        out[name] = {"per_1000": float(slope), "standard_error": float(error), "first": float(y[0]), "last": float(y[-1]), "most": float(y.max())}
    return out


def draw(document: dict[str, Any], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5, "svg.fonttype": "none", "svg.hashsalt": "docs"}
    parts = [(document[part]["samples"], what) for part, what in (("decoding", "decoded tokens"), ("store", "prefixes")) if part in document]
    names = [name for name in UNITS if any(s[name] for samples, _ in parts for s in samples)]
    with rc_context(style):
        figure = Figure((9, 1.5 * len(names) + 0.6), layout="constrained")
        grid = figure.subplots(len(names), len(parts), squeeze=False, sharex="col")
        for axes, name in zip(grid, names, strict=True):
            scale = 1e-6 if name.endswith("bytes") else 1.0
            for axis, (samples, what) in zip(axes, parts, strict=True):
                axis.plot([s["done"] for s in samples], [scale * s[name] for s in samples], color="#3366aa", lw=1.2)
                axis.set_ylim(0, 1.25 * scale * max(s[name] for s in samples))
                if axis is axes[0]:
                    axis.set_ylabel(UNITS[name])
                if name == names[-1]:
                    axis.set_xlabel(what)
        figure.suptitle(f"One process, {document['model']} on {document['machine']}", fontsize=10.5)
        figure.savefig(path, **({"metadata": {"Date": None}} if path.suffix == ".svg" else {}))


def load(name: str, calibration: Path | None, batch: int) -> Soak:
    if name == "tiny":
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from tiny_models import TinyTokenizer, tiny_model

        model, tokenizer = tiny_model().to("cuda" if torch.cuda.is_available() else "cpu"), TinyTokenizer()
    else:
        model, tokenizer, _ = load_model(None if name == "smollm2" else name)
    engine = SpectralQuantEngine()
    if calibration is not None:
        engine.load_calibration(calibration)
    else:
        engine.calibrate(model, tokenizer, get_default_calibration_texts(12), progress=False)
    engine.apply_to(model)
    return Soak(model, tokenizer, engine, batch)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help='"tiny", "smollm2", or a folder or file as `spectralquant` takes them')
    parser.add_argument("--calibration", type=Path, help="of this model; left out, some of the bundled texts are measured")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--prefixes", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON")
    parser.add_argument("--plot", type=Path, metavar="SVG")
    args = parser.parse_args(argv)
    if args.model is not None:
        soak = load(args.model, args.calibration, args.batch)
        document: dict[str, Any] = {
            "command": command_line("soak", argv),
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers")}},
            "model": args.model,
            "batch": args.batch,
        }
        if args.tokens:
            samples = list(decode(soak, args.tokens))
            document["decoding"] = {"slopes": slopes(samples), "samples": samples}
            write_json(args.out, document)
        if args.prefixes:
            with tempfile.TemporaryDirectory() as folder:
                facts: dict[str, Any] = {}
                samples = list(store_prefixes(soak, args.prefixes, Path(folder), facts))
            document["store"] = {**facts, "slopes": slopes(samples), "samples": samples}
        write_json(args.out, document)
    document = json.loads(args.out.read_text(encoding="utf-8"))
    for part in ("decoding", "store"):
        for name, line in document.get(part, {}).get("slopes", {}).items():
            print(part, name, line, flush=True)
    if args.plot is not None:
        draw(document, args.plot)


if __name__ == "__main__":
    main()
