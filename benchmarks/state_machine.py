"""Random programs on a cache, checked after every step: the long form of tests/cache/test_machine.py and tests/generation/test_machine.py.

    python benchmarks/state_machine.py --out FILE [--of cache|generate] [--programs N] [--seed S] [--workers N]

A program on a cache is up to --steps operations that users, transformers and `generate` do to it: tokens that come one by one or many at a time, crops, rows
that move, copies, files, passes that run out of memory or are interrupted at some operation; what is held is compared with plain tensors. One of `generate`
is turns on one cache and its copies, and every answer has to be the uncompressed model's. FILE counts what was run, and holds the program that failed.
"""

import argparse
import itertools
import os
import platform
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from calibration import command_line
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from spectralquant.files import write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import cache_machine
import generate_machine
from near_lossless import Pair
from tiny_models import tiny_model

AT_A_TIME = 100


def machine_of(kind: str) -> tuple[type[RuleBasedStateMachine], Counter[str]]:
    """The programs, and where they count."""
    if kind == "cache":
        return cache_machine.CacheMachine, cache_machine.counts
    if not hasattr(generate_machine.GenerateMachine, "pair"):
        generate_machine.GenerateMachine.pair = Pair.of(tiny_model())
    return generate_machine.GenerateMachine, generate_machine.counts


def run_programs(kind: str, number: int, steps: int) -> tuple[Counter[str], str | None]:
    """Programs of one seed: what was done, and the text of the error with the program that raised it, or None."""
    torch.set_num_threads(1)
    machine, counts = machine_of(kind)
    before, failure = counts.copy(), None
    options = settings(
        max_examples=AT_A_TIME, stateful_step_count=steps, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    try:
        run_state_machine_as_test(seed(number)(machine), settings=options)
    except Exception as error:
        failure = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    return counts - before, failure


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", choices=("cache", "generate"), default="cache", help="what programs are made of (default: operations on a cache)")
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0, help="of the first hundred programs; the next ones have the next seeds")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON, written after every hundred programs")
    args = parser.parse_args(argv)
    document: dict[str, Any] = {
        "command": command_line("state_machine", argv),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers", "hypothesis")}},
        "steps": args.steps,
        "failure": None,
    }
    began, seeds, done = time.perf_counter(), itertools.count(args.seed), Counter[str]()
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        running = {pool.submit(run_programs, args.of, next(seeds), args.steps) for _ in range(args.workers)}
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for one in ended:
                more, failure = one.result()
                done += more
                document["failure"] = document["failure"] or failure
                if done["programs"] < args.programs and document["failure"] is None:
                    running.add(pool.submit(run_programs, args.of, next(seeds), args.steps))
            document |= {"seconds": round(time.perf_counter() - began, 1), "counts": dict(sorted(done.items()))}
            write_json(args.out, document)
            print(f"{done['programs']:,} programs, {done['checks']:,} checks, {document['seconds']:.0f} s", flush=True)
    if document["failure"] is not None:
        sys.exit(document["failure"])


if __name__ == "__main__":
    main()
