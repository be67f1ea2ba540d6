"""What each part of the codec is worth: the recipe as shipped, and with one thing changed at a time.

    python benchmarks/ablations.py [--model M] --text prose=FILE --text code=FILE [--context 1024] [--windows 6] --out FILE

One collection of statistics; every line is fitted from it and scored like the studies of benchmarks/calibration.py. Texts must be development
text: what is chosen by these lines may not be reported on them. FILE is written after every line and gone on with when it is there.
"""

import argparse
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calibration import PRESET, Bench, command_line, describe, lines_so_far, named_text, read_references, score_engine
from tqdm.auto import tqdm

from spectralquant import SpectralQuantEngine
from spectralquant.cache.hf import coded_layer_indices
from spectralquant.calibration.fit import fit_profile
from spectralquant.calibration.hf import ModelStatistics, collect
from spectralquant.cli.models import load_model
from spectralquant.codec.quantizer import scalar_of
from spectralquant.corpus import DEFAULT_TOKENS, make_samples, token_budget
from spectralquant.evaluation.plan import DEFAULT_TEXTS
from spectralquant.evaluation.texts import read_text
from spectralquant.files import write_json
from spectralquant.profile import Choices
from spectralquant.selection import HeldOut, prepare, with_measured

STEPS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "nothing added for missing mass": {"add_mass": False},
    "calibrated on 44,000 tokens": {"tokens": DEFAULT_TOKENS},
    "V in scalar uniform planes": {"quantizer": "uniform"},
    "K and V with Lloyd-Max levels, widths 0 to 8": {"quantizer": "lloyd-max"},
    "statistics weigh all tokens alike": {"token_weights": False},
    "no query metric for K": {"query_metric": False},
    "no output metric for V": {"output_metric": False},
    "plain PCA: none of these three": {"token_weights": False, "query_metric": False, "output_metric": False},
    "K in the plain frame": {"run": 0},
    "K in runs of 128 tokens": {"run": 128},
    "K in runs of 512 tokens": {"run": 512},
    "constant mean of K instead of the trajectory": {"trajectory": False},
    "gain of K: least squares": {"key_gain": "ls"},
    "gain of K: unbiased": {"key_gain": "unbiased"},
    "gain of V: least squares": {"value_gain": "ls"},
    "gain of V: search": {"value_gain": "search"},
    "K gets as many bits as V": {"value_shift": 0.0},
    "K gets 0.25 bits more than V": {"value_shift": -0.25},
    "no exact tokens in mid-text": {"exact_below": 0.0, "exact_error": 0.0},
    "exact: small values only": {"exact_error": 0.0},
    "exact: badly coded keys only": {"exact_below": 0.0},
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    sources = dict(args.text or DEFAULT_TEXTS.items())
    model, tokenizer, label = load_model(args.model, "float32")
    document = describe(args, label, sources, command_line("ablations", argv))
    lines = lines_so_far(args.out, document["settings"])
    missing = [step for step in args.step or STEPS if step not in {line["step"] for line in lines}]
    if missing:
        texts = {name: read_text(source) for name, source in sources.items()}
        bench = Bench(model, tokenizer, read_references(model, tokenizer, texts, args), args, lines)
        run(bench, missing, document)


def run(bench: Bench, missing: list[str], document: dict[str, Any]) -> None:
    """Measure the steps `missing`; the file is written after every line."""
    engine, gathered = SpectralQuantEngine(compression=PRESET), cache(partial(gather, bench))
    for step in tqdm(missing, desc="ablations", unit="line"):
        change = dict(STEPS[step])
        quantizer = change.pop("quantizer", engine.quantizer)
        statistics, held_out = gathered(change.pop("tokens", token_budget(bench.model.device)))
        profile = fit_profile(statistics, replace(Choices(), **change))
        profile = with_measured(profile, held_out, engine.preset, engine.cache_config, scalar_of(quantizer))
        changed = SpectralQuantEngine(compression=PRESET, quantizer=quantizer)
        with TemporaryDirectory() as folder:
            changed.load_calibration(profile.save(Path(folder) / "calibration"))
        found = score_engine(bench, changed)
        bench.lines.append({"step": step, "changed": STEPS[step], "exact_share": profile.exact_share, "texts": found})
        write_json(bench.args.out, {**document, "lines": bench.lines})
        tqdm.write(f"{step}: " + "  ".join(f"{text} {x['kl']:.4f} +- {x['kl_se']:.4f}" for text, x in found.items()))


def gather(bench: Bench, tokens: int) -> tuple[ModelStatistics, HeldOut]:
    """Statistics of at most `tokens` of the bundled corpus, and the windows held out of it."""
    samples = make_samples(bench.tokenizer, None, max_tokens=tokens)
    with tqdm(total=samples.tokens, unit="tok", desc="statistics", leave=False) as bar:
        statistics = collect(bench.model, samples.statistics, coded_layer_indices(bench.model), bar.update)
    with SpectralQuantEngine(compression=PRESET).applied_to(bench.model):
        return statistics, prepare(bench.model, samples.held_out, statistics.layers)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, GGUF file or hub name; default: SmolLM2-135M-Instruct from the demo extra")
    parser.add_argument("--text", action="append", type=named_text, metavar="NAME=SOURCE", help="a file, a .jsonl file, or stdlib:module,module")
    parser.add_argument("--step", action="append", choices=list(STEPS), help="measure these alone (may be repeated)")
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache before the first scored one (default 1024)")
    parser.add_argument("--windows", type=int, default=6, help="windows per text, spread evenly over it (default 6)")
    parser.add_argument("--scored", type=int, default=256, help="scored tokens per window (default 256)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSON; gone on with when it is there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
