"""The readers of `fuzz.py` with mutations led by coverage: inputs that reach new branches of the package are mutated further (atheris, on libFuzzer).

    pip install atheris==3.0.0    # for CPython 3.11 to 3.13 on Linux; in no extra of the package
    python benchmarks/fuzz_coverage.py --runs 100000 --out result.json [--reader NAME ...]

Only modules of this package are instrumented. Mutations are libFuzzer's own and, half of the time, those of `fuzz_mutations`, which keep a format readable
and its checksum right. What counts as a failure is what counts in `fuzz.py`, and memory and time are bounded by libFuzzer: the first failure ends a reader, and
its input is kept beside the result.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

RESIDENT = 3072
"""Megabytes that a process may hold, libraries and libFuzzer's corpus included."""
LARGEST = 1 << 17
"""Bytes of an input; the valid files have 0.4 to 35 KB."""


def child(name: str, runs: int, folder: Path) -> None:
    """One reader, in a process that libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["spectralquant"]):  # so nothing above this file may import any of it
        from fuzz import SECONDS, tried
        from fuzz_mutations import BLIND
        from fuzz_readers import READERS
    reader, place = READERS[name], Path(tempfile.mkdtemp())
    path = reader.make(place)
    original = path.read_bytes()
    want = reader.read(path)
    reader.use(want)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(64):
        (corpus / str(number)).write_bytes(original if not number else Random(number).choice(reader.aware)(Random(number), original))

    def one(data: bytes) -> None:
        tried(reader, path, original, want, data, blind=False)

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.5:
            try:
                return random.choice((*reader.aware, *reader.aware, *BLIND))(random, data)[:largest]
            except Exception:  # it is damaged too much already for a mutation that knows the format
                return random.choice(BLIND)(random, data)[:largest]
        return atheris.Mutate(data, largest)

    options = [f"-runs={runs}", f"-max_len={LARGEST}", f"-timeout={SECONDS}", f"-rss_limit_mb={RESIDENT}", f"-artifact_prefix={folder}/", "-seed=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


def campaign(name: str, runs: int, keep: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        command = [sys.executable, __file__, "--child", made, "--reader", name, "--runs", str(runs)]
        ended = subprocess.run(command, capture_output=True, text=True)
        last = re.findall(r"#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)", ended.stderr)
        seconds = re.search(r"Done \d+ runs in (\d+) second", ended.stderr)
        found = [file for file in Path(made).iterdir() if file.is_file()]
        for file in found:
            (keep / f"{name.replace(' ', '-')}-{file.name}").write_bytes(file.read_bytes())
    first, final = (dict(zip(("inputs", "branches", "features", "corpus"), map(int, row), strict=True)) for row in (last[0], last[-1]))
    row = {"reader": name, **final, "branches_of_the_corpus": first["branches"], "seconds": seconds and int(seconds[1]), "failed": int(ended.returncode != 0)}
    return row if not ended.returncode else {**row, "error": ended.stderr[-3000:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", action="append", metavar="NAME", help="may be repeated; default: all but slow ones")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs per reader (default 100,000)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="rows of other readers that are there stay")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.reader[0], args.runs, args.child)
    from calibration import command_line
    from fuzz import machine
    from fuzz_readers import READERS

    there = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out is not None and args.out.exists() else []
    rows: dict[str, dict[str, Any]] = {row["reader"]: row for row in there}
    versions = {"python": platform.python_version(), **{package: version(package) for package in ("atheris", "torch", "safetensors", "transformers")}}
    said = {"command": command_line("fuzz_coverage", sys.argv[1:]), "versions": versions}
    names = args.reader or [name for name, reader in READERS.items() if not reader.slow]
    keep = Path() if args.out is None else args.out.parent
    for name in names:
        rows[name] = {**campaign(name, args.runs, keep), **said}
        print(json.dumps(rows[name]), flush=True)
        if args.out is not None:
            document = {"machine": machine(), "rows": [rows[name] for name in READERS if name in rows]}
            args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(any(rows[name]["failed"] for name in names))


if __name__ == "__main__":
    sys.exit(main())
