"""What calibration needs: how much text, of which kinds, and whether its menu chooses well, told by the KL on text it never saw.

    python benchmarks/calibration.py [--model M] --text prose=FILE --text code=stdlib:tarfile,inspect --study tokens --study kinds --out FILE
    python benchmarks/calibration.py --out FILE --plot FOLDER        (pictures of what is there; nothing is measured)

Studies (--study, may be repeated). Every line of a study is one calibration at preset "high", scored on every --text:
  tokens  how much text is enough: about 2k, 4k, 8k, 16k, 32k (or each --size) and all tokens of the bundled corpus. Every text gives its share,
          and the windows on which the menu is measured stay the same, so only the statistics shrink
  kinds   whether a mixture is needed: prose, code, maths (with worked science), other languages, or all texts, at equal token counts
  shift   what another domain costs: prose, code, or both, at equal counts, which are above those of kinds; with a --text of each
  seeds   how much is luck: random halves of the corpus's texts, five or --halves of them; mean and standard deviation of their KL
  menu    whether the choice is good: one calibration as users get it, then every candidate of its menu, beside the score the menu gave it

A window is --context tokens, stored in the packed cache, and --scored tokens that follow, fed in pieces of 16 so that they read codes. KL is
KL(uncompressed || compressed) in nats per token, with its standard error over windows; the windows are the same for all lines. FILE is written
after every line and gone on with when it is there; a calibration that fails leaves a line with the error's text.
"""

import argparse
import json
import platform
import random
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from calibration_report import draw, scored_lines, summarise
from torch import Tensor
from tqdm.auto import tqdm

from spectralquant import SpectralQuantEngine
from spectralquant.cache.hf import coded_layer_indices
from spectralquant.calibration.fit import fit_profile
from spectralquant.calibration.hf import ModelStatistics, collect
from spectralquant.cli.models import load_model
from spectralquant.codec.quantizer import scalar_of
from spectralquant.config import require_int
from spectralquant.corpus import SAMPLE_TOKENS, Samples, leading_tokens, make_samples, token_budget
from spectralquant.errors import CalibrationError, ConfigError
from spectralquant.evaluation.metrics import standard_error, token_divergence
from spectralquant.evaluation.plan import DEFAULT_TEXTS
from spectralquant.evaluation.tasks.base import continue_with, hand_over, read_context
from spectralquant.evaluation.texts import begin_with, read_text, spread_windows, tokenise
from spectralquant.files import write_json
from spectralquant.profile import Choices, Profile
from spectralquant.selection import choose, prepare, with_measured

PRESET, CHUNK = "high", 16
SIZES, EVERYTHING = (2000, 4000, 8000, 16_000, 32_000), 10**9
KINDS = {
    "prose": "fiction news encyclopedia essay dialogue interview email review legal paper question medical forum speech",
    "code": "python javascript typescript c cpp rust go java sql shell html diff",
    "maths": "word algebra proofs statistics physics chemistry",
    "languages": "german french spanish italian portuguese russian chinese japanese korean arabic hindi dutch",
}
"""Kind -> first words of its files' names, such as 17_python_parser.txt. Tables, configuration and chat markup belong to none of them."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A scored window: uncompressed keys and values of its context, scored ids [1, S], uncompressed log-probabilities [S, V]. On the CPU."""

    context: list[tuple[Tensor, Tensor]]
    ids: Tensor
    want: Tensor


@dataclass(frozen=True, slots=True)
class Bench:
    """The model, what is scored (text name -> windows), the options, and the lines there are."""

    model: Any
    tokenizer: Any
    references: dict[str, list[Reference]]
    args: argparse.Namespace
    lines: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What is scored, what it was fitted from, and the columns of its line."""

    profile: Profile
    statistics: ModelStatistics
    columns: dict[str, Any]


Job = tuple[dict[str, Any], Callable[[], Calibrated]]  # settings of a line, and what makes its calibration


def calibrate(bench: Bench, draw_samples: Callable[[], Samples]) -> Calibrated:
    """What `engine.calibrate` does, on samples of one's own."""
    engine, began = SpectralQuantEngine(compression=PRESET), time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        samples = draw_samples()
        with tqdm(total=samples.tokens, unit="tok", desc="calibrating", leave=False) as bar:
            statistics = collect(bench.model, samples.statistics, coded_layer_indices(bench.model), bar.update)
            with engine.applied_to(bench.model):
                profile = choose(bench.model, statistics, samples.held_out, engine.preset, engine.cache_config, engine.quantizer, bar.set_postfix_str)
    columns = {"tokens": statistics.tokens, "seconds": round(time.perf_counter() - began, 2), "choices": changes(profile.choices)}
    told = [str(w.message) for w in caught if "calibration text" in str(w.message)]
    return Calibrated(profile, statistics, {**columns, "certificate_kl": profile.certificate["kl"], **({"warnings": told} if told else {})})


def changes(choices: Choices) -> dict[str, Any]:
    """What differs from the recipe that the menu starts with."""
    return {k: v for k, v in asdict(choices).items() if v != getattr(Choices(), k)}


@torch.no_grad()
def read_references(model: Any, tokenizer: Any, texts: dict[str, str], args: argparse.Namespace) -> dict[str, list[Reference]]:
    """Text -> windows; the log-probabilities are the model's over the whole window at once, without a cache."""
    found: dict[str, list[Reference]] = {name: [] for name in texts}
    lead = leading_tokens(tokenizer)
    for name, text in texts.items():
        windows = spread_windows(tokenise(tokenizer, text), args.context + args.scored, args.windows, 0, name)
        for window in tqdm([begin_with(lead, w) for w in windows], desc=f"reference of {name}"):
            ids = window.to(model.device)
            context = [(k.cpu(), v.cpu()) for k, v in read_context(model, ids[:, : args.context])]
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=args.scored).logits[0, -args.scored :]
            found[name].append(Reference(context, window[:, args.context :], logits.float().log_softmax(-1).cpu()))
    return found


def score(bench: Bench, profile: Profile) -> dict[str, dict[str, Any]]:
    """`score_engine` of the default engine with this calibration."""
    engine = SpectralQuantEngine(compression=PRESET)
    with TemporaryDirectory() as folder:
        engine.load_calibration(profile.save(Path(folder) / "calibration"))
    return score_engine(bench, engine)


def score_engine(bench: Bench, engine: SpectralQuantEngine) -> dict[str, dict[str, Any]]:
    """Text -> mean KL with its standard error, and (mean sqrt KL)^2, which is what the menu goes by."""
    device, found = bench.model.device, {}
    with engine.applied_to(bench.model):
        for name, references in bench.references.items():
            kl = []
            for reference in tqdm(references, desc=f"scoring {name}", leave=False):
                cache = hand_over([(k.to(device), v.to(device)) for k, v in reference.context], engine.cache(bench.model))
                ids = reference.ids.to(device)
                got = continue_with(bench.model, cache, ids, CHUNK).log_softmax(-1)
                kl.append(token_divergence(reference.want.to(device), got, ids[0, 1:])["kl"].double().cpu())
            windows = [float(k.mean()) for k in kl]
            root = float(torch.cat(kl).clamp_min(0).sqrt().mean())
            found[name] = {"kl": mean(windows), "kl_se": standard_error(windows), "score": root**2, "kl_per_window": windows}
    return found


def corpus() -> dict[str, list[str]]:
    """Kind -> bundled texts, and "all"."""
    paths = sorted((files("spectralquant") / "data" / "corpus").iterdir(), key=lambda p: p.name)
    texts = [(re.split(r"[_.]", p.name)[1], p.read_text(encoding="utf-8")) for p in paths if p.name.endswith(".txt")]
    kinds = {kind: [text for word, text in texts if word in words.split()] for kind, words in KINDS.items()}
    return {**kinds, "all": [text for _, text in texts]}


def draw_exactly(tokenizer: Any, texts: list[str], count: int) -> Samples:
    """Samples of `count` tokens, which the texts must have; `make_samples` alone stays a little below its limit."""
    samples, limit = make_samples(tokenizer, texts, max_tokens=count), count
    while samples.tokens < count:
        limit += max(count - samples.tokens, len(texts))
        samples = make_samples(tokenizer, texts, max_tokens=limit)
    starts = range(0, count, SAMPLE_TOKENS)
    return Samples([s[:, : count - start] for start, s in zip(starts, samples.statistics, strict=False)], samples.held_out)


def study_tokens(bench: Bench) -> list[Job]:
    limits = {**{size: size for size in sorted(bench.args.size or SIZES)}, "all": EVERYTHING}
    return [({"max_tokens": k}, partial(calibrate, bench, partial(make_samples, bench.tokenizer, None, max_tokens=n))) for k, n in limits.items()]


def at_equal_counts(bench: Bench, groups: dict[str, list[str]]) -> list[Job]:
    """One job per group of texts; all use as many tokens as the smallest group has besides its held-out windows."""
    count = min(make_samples(bench.tokenizer, texts, max_tokens=EVERYTHING).tokens for texts in groups.values())
    draws = {k: partial(draw_exactly, bench.tokenizer, texts, count) for k, texts in groups.items()}
    return [({"kind": k, "max_tokens": count}, partial(calibrate, bench, samples)) for k, samples in draws.items()]


def study_shift(bench: Bench) -> list[Job]:
    prose, code = (corpus()[kind] for kind in ("prose", "code"))
    return at_equal_counts(bench, {"prose": prose, "code": code, "both": prose + code})


def study_seeds(bench: Bench) -> list[Job]:
    texts = corpus()["all"]
    halves = [sorted(random.Random(seed).sample(range(len(texts)), len(texts) // 2)) for seed in range(bench.args.halves)]
    draws = [partial(make_samples, bench.tokenizer, [texts[i] for i in half]) for half in halves]
    return [({"seed": seed}, partial(calibrate, bench, samples)) for seed, samples in enumerate(draws)]


def study_menu(bench: Bench) -> list[Job]:
    """The menu's length is known after its calibration, which is left out when all lines are there."""
    there = scored_lines(bench.lines, "menu")
    if there and len(there) == there[0]["candidates"]:
        return []
    samples = make_samples(bench.tokenizer, None, max_tokens=token_budget(bench.model.device))
    base, engine = calibrate(bench, lambda: samples), SpectralQuantEngine(compression=PRESET)
    rows = base.profile.certificate["menu"]
    winner = max(i for i, row in enumerate(rows) if row["kept"])
    with engine.applied_to(bench.model):
        windows = prepare(bench.model, samples.held_out, base.statistics.layers)

    def candidate(index: int) -> Calibrated:
        row, choices = rows[index], Choices(**rows[index]["choices"])
        profile = with_measured(fit_profile(base.statistics, choices), windows, engine.preset, engine.cache_config, scalar_of(engine.quantizer))
        columns = {**base.columns, "candidates": len(rows), "choices": changes(choices), "changed": row["changed"], "kept": row["kept"]}
        return replace(base, profile=profile, columns={**columns, "chosen": index == winner, "menu_score": row["score"], "menu_kl": row["kl"]})

    return [({"candidate": i}, partial(candidate, i)) for i in range(len(rows))]


STUDIES: dict[str, Callable[[Bench], list[Job]]] = {
    "tokens": study_tokens, "kinds": lambda bench: at_equal_counts(bench, corpus()), "shift": study_shift, "seeds": study_seeds, "menu": study_menu,
}  # fmt: skip


def run(bench: Bench, document: dict[str, Any]) -> None:
    """Measure what is missing; the file is written after every line."""
    for name in dict.fromkeys(bench.args.study):
        done = [line["settings"] for line in bench.lines if line["study"] == name]
        for settings, make in tqdm([job for job in STUDIES[name](bench) if job[0] not in done], desc=name, unit="line"):
            try:
                made = make()
                columns = {**made.columns, "texts": score(bench, made.profile)}
            except CalibrationError as error:
                columns = {"error": str(error)}
            bench.lines.append({"study": name, "settings": settings, **columns})
            write_json(bench.args.out, {**document, "summary": summarise(bench.lines), "lines": bench.lines})
            told = "  ".join(f"{text} {x['kl']:.4f} +- {x['kl_se']:.4f}" for text, x in columns.get("texts", {}).items())
            tqdm.write(f"{name} {settings}: {told or columns['error']}")


def lines_so_far(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    there = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"settings": settings, "lines": []}
    differing = [f"{k}: {there['settings'].get(k)!r}" for k in settings if there["settings"].get(k) != settings[k]]
    if differing:
        raise ConfigError(f"--out {out}: it holds lines of other settings ({', '.join(differing)}); choose another file")
    return there["lines"]


def measure(args: argparse.Namespace, command: str) -> None:
    sources = dict(args.text or DEFAULT_TEXTS.items())
    texts = {name: read_text(source) for name, source in sources.items()}
    model, tokenizer, label = load_model(args.model, "float32")
    document = describe(args, label, sources, command)
    lines = lines_so_far(args.out, document["settings"])
    run(Bench(model, tokenizer, read_references(model, tokenizer, texts, args), args, lines), document)


def describe(args: argparse.Namespace, label: str, sources: dict[str, str], command: str) -> dict[str, Any]:
    """The head of a result file: what was measured, and on what."""
    settings = {"model": without_folders(label), "dtype": "float32", "preset": PRESET, **{k: getattr(args, k) for k in ("context", "windows", "scored")}}
    settings["texts"] = {name: without_folders(source) for name, source in sources.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"settings": settings, "command": command, "device": device, "versions": {name: version(name) for name in ("torch", "transformers")}}


def without_folders(text: str) -> str:
    return re.sub("(^|=)/.*/", r"\1", text)


def command_line(script: str, argv: list[str]) -> str:
    """The command of a benchmark as a result file tells it."""
    return shlex.join(["python", f"benchmarks/{script}.py", *map(without_folders, argv)])


def named_text(text: str) -> tuple[str, str]:
    name, _, source = text.partition("=")
    if name and source:
        return name, source
    raise argparse.ArgumentTypeError(f"{text}: expected NAME=SOURCE, for example prose=book.txt")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, GGUF file or hub name; default: SmolLM2-135M-Instruct from the demo extra")
    parser.add_argument("--text", action="append", type=named_text, metavar="NAME=SOURCE", help="a file, a .jsonl file, or stdlib:module,module")
    parser.add_argument("--study", action="append", choices=list(STUDIES), help="see above (may be repeated)")
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache before the first scored one (default 1024)")
    parser.add_argument("--windows", type=int, default=6, help="windows per text, spread evenly over it (default 6)")
    parser.add_argument("--scored", type=int, default=256, help="scored tokens per window (default 256)")
    parser.add_argument("--size", type=int, action="append", help="calibration tokens of study tokens (may be repeated)")
    parser.add_argument("--halves", type=int, default=5, help="random halves of study seeds (default 5)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSON; gone on with when it is there")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw PNG pictures of FILE's lines there")
    args = parser.parse_args(argv)
    for name in ("context", "windows", "scored", "halves"):
        require_int(name, getattr(args, name), 2)
    if not args.study and not args.plot:
        parser.error("there is nothing to do: name a --study to measure, or a folder to --plot in")
    return args


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.study:
        measure(args, command_line("calibration", argv))
    if args.plot:
        draw(json.loads(args.out.read_text(encoding="utf-8")), args.plot)


if __name__ == "__main__":
    main()
