"""Mutated files for every reader: each is either read as it was, refused with a SpectralQuantError, or, where the mutation left a valid file, read and used.

    python benchmarks/fuzz.py --runs 100000 --out result.json [--reader NAME ...] [--jobs 2]
    python benchmarks/fuzz.py --reader NAME --first 4711 --runs 1 --keep FOLDER   # one file again, and what it looks like

A file is decided by its reader and its number. Readers run in processes of their own, whose address space is bounded by what they have at the start and
`MEMORY`: who asks for more fails. A run that takes more than `SECONDS` is a hang: an alarm ends it, or, where the interpreter doesn't get to see the alarm,
the parent ends the process. What is no SpectralQuantError, a process that dies, and content that changed under a checksum are failures as well; all
are listed with their numbers, and the exit status is 1. `fuzz_readers.py` says how a reader is added.
"""

import argparse
import json
import multiprocessing
import os
import platform
import queue
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

from calibration import command_line

SECONDS, PATIENCE = 20, 60
"""Of one file; and until the parent ends a process that doesn't answer its alarm."""
MEMORY = 1 << 30
"""Bytes of address space beyond those of the process before it reads anything: a thread's arena alone is 64 MB."""
STEP, NOT_YET = 500, -1
"""Files between two reports of a process; the number of the file before the first."""
MOST_FAILURES = 20
"""Kept of a reader; all are counted."""


class Hang(BaseException):
    """Raised by the alarm: no `except Exception` takes it for an error of a file."""


def mutated(reader: Any, number: int, original: bytes) -> tuple[bytes, bool]:
    """File `number`, and whether the mutation was a blind one."""
    from fuzz_mutations import BLIND

    random = Random(f"{reader.name}/{number}")
    blind = random.random() < 0.4
    data = random.choice(BLIND if blind else reader.aware)(random, original)
    return data, blind


def tried(reader: Any, path: Path, original: bytes, want: Any, data: bytes, blind: bool) -> str:
    """What became of one file: "same", "refused NAME" or "other". Raises what is a failure."""
    from spectralquant.errors import SpectralQuantError

    path.unlink()  # it may be mapped still
    path.write_bytes(data)
    try:
        got = reader.read(path)
        same = reader.same(want, got)
        if reader.sealed and blind and not same:
            raise AssertionError("its content changed, and it was read")
        if not same or data == original:
            reader.use(got)
    except SpectralQuantError as error:
        _require_memory(error)
        str(error).encode()
        return f"refused {type(error).__name__}"
    return "same" if same else "other"


def _require_memory(error: BaseException | None) -> None:
    """Memory that ran out is no reason to refuse a file: it asked for too much."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise AssertionError("it asked for too much memory") from error
        error = error.__cause__


def work(name: str, first: int, last: int, at: Any, results: Any, keep: str | None) -> None:
    """In a process of its own: try the files `first` to `last` (exclusive). `at` is the number of the one that is tried."""
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    from fuzz_readers import READERS

    torch.set_num_threads(1)
    reader = READERS[name]
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        path = reader.make(folder)
        original = path.read_bytes()
        want = reader.read(path)
        reader.use(want)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def ring(*_: Any) -> None:
            raise Hang

        signal.signal(signal.SIGALRM, ring)
        outcomes: Counter[str] = Counter()
        slowest, failures = 0.0, []
        for number in range(first, last):
            at.value = number
            began = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                data, blind = mutated(reader, number, original)
                if keep:
                    shutil.copytree(folder, keep, dirs_exist_ok=True)
                    (Path(keep) / path.name).write_bytes(data)
                outcomes[tried(reader, path, original, want, data, blind)] += 1
            except BaseException as error:
                outcomes["failed"] += 1
                failures.append({"number": number, "error": f"{type(error).__name__}: {str(error)[:300]}", "at": traceback.format_exc()[-1500:]})
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.perf_counter() - began)
            if (number - first + 1) % STEP == 0 or number + 1 == last:
                grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
                results.put({"done": number + 1, "outcomes": dict(outcomes), "slowest": slowest, "grown": grown, "failures": failures})
                outcomes, slowest, failures = Counter(), 0.0, []
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def campaign(name: str, first: int, runs: int, keep: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """All files of one reader, in one process after another where one dies."""
    context = multiprocessing.get_context("spawn")
    at, results = context.Value("q", NOT_YET), context.Queue()
    total: dict[str, Any] = {"reader": name, "files": runs, "outcomes": Counter(), "slowest_seconds": 0.0, "grown_bytes": 0, "failures": []}
    began, done = time.perf_counter(), first
    while done < first + runs:
        process = context.Process(target=work, args=(name, done, first + runs, at, results, keep))
        process.start()
        seen, since = at.value, time.perf_counter()
        while process.is_alive() or not results.empty():
            try:
                part = results.get(timeout=1)
            except queue.Empty:
                if at.value != seen:
                    seen, since = at.value, time.perf_counter()
                if time.perf_counter() - since > PATIENCE + SECONDS:
                    process.kill()
                continue
            done = part["done"]
            total["outcomes"].update(part["outcomes"])
            total["slowest_seconds"] = max(total["slowest_seconds"], part["slowest"])
            total["grown_bytes"] = max(total["grown_bytes"], part["grown"])
            total["failures"] += part["failures"]
            say(f"{name}: {done - first:,} of {runs:,}, {dict(total['outcomes'])}")
        process.join()
        if at.value == NOT_YET:
            raise SystemExit(f"{name}: the valid file can't be made or read; its process says why above")
        if done < first + runs:
            lost = at.value
            total["failures"].append({"number": lost, "error": f"the process ended with status {process.exitcode}, or did not answer", "at": ""})
            total["outcomes"].update({"failed": 1, "not counted": lost - done})
            done = lost + 1
    total["seconds"] = round(time.perf_counter() - began, 1)
    total["slowest_seconds"] = round(total["slowest_seconds"], 3)
    total["failed"] = total["outcomes"].pop("failed", 0)
    total["failures"] = total["failures"][:MOST_FAILURES]
    return {**total, "outcomes": dict(total["outcomes"].most_common())}


def machine() -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "cpus": os.cpu_count(), "system": platform.platform()}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", action="append", metavar="NAME", help="may be repeated; default: all")
    parser.add_argument("--runs", type=int, default=100_000, help="files per reader, a hundredth for slow ones (default 100,000)")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="number of the first file (default 0)")
    parser.add_argument("--jobs", type=int, default=1, help="readers at a time (default 1)")
    parser.add_argument("--keep", metavar="FOLDER", help="copy every mutated file there, with what is beside it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="rows of other readers that are there stay")
    args = parser.parse_args(argv)
    from fuzz_readers import READERS

    if unknown := set(args.reader or ()) - set(READERS):
        parser.error(f"no reader called {', '.join(sorted(unknown))}; there are {', '.join(READERS)}")
    names = args.reader or list(READERS)
    versions = {"python": platform.python_version(), **{package: version(package) for package in ("torch", "safetensors", "transformers")}}
    document = {"machine": machine(), "seconds_allowed": SECONDS, "memory_allowed": MEMORY}
    said = {"command": command_line("fuzz", argv), "versions": versions, "first": args.first}
    there = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out is not None and args.out.exists() else []
    rows: dict[str, dict[str, Any]] = {row["reader"]: row for row in there}

    def run(name: str) -> None:
        runs = max(args.runs // 100, 1) if READERS[name].slow else args.runs
        rows[name] = {**campaign(name, args.first, runs, args.keep, lambda line: print(line, file=sys.stderr, flush=True)), **said}
        print(json.dumps(rows[name]), flush=True)
        if args.out is not None:
            done = [rows[name] for name in READERS if name in rows]
            args.out.write_text(json.dumps({**document, "rows": done}, indent=1) + "\n", encoding="utf-8")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, names))
    return int(any(rows[name]["failed"] for name in names))


if __name__ == "__main__":
    sys.exit(main())
