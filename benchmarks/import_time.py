"""How long imports take, each in fresh processes, beside `import torch`; and which packages the time of the longest goes to.

    python benchmarks/import_time.py [--python ENVIRONMENT/bin/python] [--repeats 15] --out FILE

An interpreter that imports nothing is timed as well and taken off all others. Every round goes through all commands, so that a slow moment of the machine
hits them alike; a first round, which fills the disk cache, is not counted. "seconds" are those of a clock on the wall, "cpu_seconds" those that the process
ran: they say more where others share the machine. Transformers imports what it finds, so the figures are those of an environment: the committed ones are of
one that holds the wheel, a CPU build of torch and what the two bring.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from calibration import command_line

from spectralquant.evaluation.runner import write_json

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import spectralquant": ["-c", "import spectralquant"],
    "spectralquant --help": ["-m", "spectralquant", "--help"],
    "import torch and a model class of transformers": ["-c", "import torch; from transformers import LlamaForCausalLM"],
    "from spectralquant import SpectralQuant": ["-c", "from spectralquant import SpectralQuant"],
    "the same and a model class of transformers": ["-c", "from spectralquant import SpectralQuant; from transformers import LlamaForCausalLM"],
}
VERSIONS = "import json, platform; from importlib.metadata import version as v; print(json.dumps({'python': platform.python_version(), %s}))"
PACKAGES = ("torch", "transformers", "typer")


def fresh(python: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """A process that sees nothing of this one's: neither PYTHONPATH nor the working directory. Imports of installed packages are compiled already."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run([python, *arguments], cwd=folder, env=environment, check=True, capture_output=True, text=True)


def timed(python: str, arguments: list[str]) -> tuple[float, float]:
    """(seconds on the wall, seconds of processor time)"""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    fresh(python, arguments)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def by_package(python: str, arguments: list[str], most: int = 8) -> dict[str, float]:
    """Milliseconds of modules' own code by top-level package, as `-X importtime` counts them (with its overhead)."""
    spent: Counter[str] = Counter()
    for line in fresh(python, ["-X", "importtime", *arguments]).stderr.splitlines():
        own, _, name = line.removeprefix("import time:").split("|")
        if own.strip().isdigit():
            spent[name.strip().split(".")[0]] += int(own)
    return {name: round(microseconds / 1e3, 1) for name, microseconds in spent.most_common(most)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the interpreter of an environment that spectralquant is installed in (default: this one)")
    parser.add_argument("--repeats", type=int, default=15, help="processes per command (default 15)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    python = str(Path(args.python).absolute())
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("nothing", *COMMANDS)}
    for i in range(args.repeats + 1):
        for name in times:
            took = timed(python, COMMANDS.get(name, ["-c", ""]))
            if i:
                times[name].append(took)
    middle = {name: [median(column) for column in zip(*pairs, strict=True)] for name, pairs in times.items()}
    net = {name: [a - b for a, b in zip(pair, middle["nothing"], strict=True)] for name, pair in middle.items()}
    rows: list[dict[str, Any]] = []
    for name in COMMANDS:
        (wall, cpu), (torch_wall, torch_cpu) = net[name], net["import torch"]
        rows.append({"command": name, "seconds": wall, "cpu_seconds": cpu, "of_torch": wall / torch_wall, "cpu_of_torch": cpu / torch_cpu})
        print(json.dumps(rows[-1]))
    document = {
        "command": command_line("import_time", sys.argv[1:]),
        "cpus": os.cpu_count(),
        "versions": json.loads(fresh(python, ["-c", VERSIONS % ", ".join(f"{name!r}: v({name!r})" for name in PACKAGES)]).stdout),
        "processes_per_command": args.repeats,
        "interpreter_seconds": middle["nothing"][0],
        "rows": rows,
        "own_milliseconds_by_package": {name: by_package(python, COMMANDS[name]) for name in COMMANDS},
    }
    write_json(args.out, document)


if __name__ == "__main__":
    main()
