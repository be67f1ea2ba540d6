"""How long CUDA kernels keep a user waiting: compiled at the first use, read from the disk cache in every later process.

    python benchmarks/first_use.py --out FILE

A model's first `generate` with a prompt in pieces uses every kernel: encoding, attention of one and of few queries, decoding into tiles. Two processes run it,
the first with an empty disk cache. Counted is the time inside `kernels.compiler.load`, which compiles (or reads) and loads; imports and launches are not.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from calibration import command_line
from decoding import SHAPES, Bench

from spectralquant.files import write_json
from spectralquant.kernels import compiler


@torch.no_grad()
def load_all(shape: str) -> list[dict[str, Any]]:
    """Use every kernel once in this process; a line per kernel that was loaded."""
    loaded: list[dict[str, Any]] = []
    load = compiler._load_new

    def timed(source: str, definitions: Any, name: str, *rest: Any) -> compiler.Kernel:
        began = time.perf_counter()
        kernel = load(source, definitions, name, *rest)
        loaded.append({"kernel": name, "seconds": time.perf_counter() - began})
        return kernel

    compiler._load_new = timed
    torch.cuda.synchronize()
    bench = Bench.of_shape(SHAPES[shape], "high", torch.device("cuda", 0))
    ids = torch.randint(3, 1000, (1, 20_000), device="cuda")
    bench.generate(bench.cache("packed"), ids, 140, prefill_chunk_size=8192)  # 140 tokens, so that a block leaves the window
    torch.cuda.synchronize()
    return loaded


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-1.5b", help="whose shape the model has (default qwen2.5-1.5b)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON (without it: one process, lines to standard output)")
    args = parser.parse_args(argv)
    if args.out is None:
        print(json.dumps(load_all(args.shape)))
        return
    document: dict[str, Any] = {
        "command": command_line("first_use", argv),
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "cuda-core")}},
        "shape": args.shape,
    }
    with tempfile.TemporaryDirectory() as folder:
        for use in ("first", "later"):
            environment = {**os.environ, "XDG_CACHE_HOME": folder, "CUDA_CACHE_PATH": f"{folder}/driver"}  # NVRTC's own cache as well
            command = [sys.executable, __file__, f"--shape={args.shape}"]
            lines = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            document[use] = {"seconds": sum(line["seconds"] for line in lines), "kernels": lines}
            print(f"{use} use: {len(lines)} kernels in {document[use]['seconds']:.2f} s")
    write_json(args.out, document)


if __name__ == "__main__":
    main()
