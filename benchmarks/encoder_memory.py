"""Peak memory of one attention call of an encoder: logits in full, `scaled_dot_product_attention`, and coded keys and values.

    python benchmarks/encoder_memory.py --out FILE [--tokens N] [--heads N]

Each runs in a process of its own on the CPU in float32, with one sequence and head size 64. Its figure is by how much the process grew during the call: what
it had at most less what it had before, keys, queries and values not counted. `held_bytes` is what stands for keys and values while attention runs.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from attention import made_up_sides
from calibration import command_line

from spectralquant.codec.codec import build_codec
from spectralquant.config import Dials
from spectralquant.files import write_json
from spectralquant.integrations.calls import AttentionCall
from spectralquant.integrations.coded import attend, code
from spectralquant.integrations.encoder import CHOICES
from spectralquant.presets import PRESETS
from spectralquant.profile import LayerProfile, Profile

DIM = 64
METHODS = ("logits in full", "scaled_dot_product_attention", "standard", "high", "max")


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@torch.no_grad()
def measure(method: str, tokens: int, heads: int) -> dict[str, Any]:
    """In this process, once."""
    torch.set_num_threads(1)
    query, key, value = torch.randn(3, 1, heads, tokens, DIM)
    call = AttentionCall(query, key, value, None, DIM**-0.5)
    small = AttentionCall(*(x[:, :, :256] for x in (query, key, value)), None, DIM**-0.5)
    codec = None
    if method in PRESETS:
        layer = LayerProfile(*made_up_sides(heads, DIM), torch.full((heads,), float(DIM)), 10.0)
        codec = build_codec(Profile({0: layer}, CHOICES, {}, {}), PRESETS[method], Dials())[0]
    held = key.nbytes + value.nbytes
    for each in (small, call):  # the first one loads libraries
        before = peak_bytes()
        if codec is not None:
            coded = code(codec, each.key, each.value)
            attend(each, coded)
            held = coded.nbytes
        elif method == METHODS[0]:
            (each.query @ each.key.mT * each.scale).softmax(-1) @ each.value
        else:
            each.dense()
    return {"method": method, "peak_bytes": peak_bytes() - before, "held_bytes": held}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--heads", type=int, default=3, help="as in ViT-Ti (default 3)")
    parser.add_argument("--method", choices=METHODS, help="this one alone, in this process, its line to standard output")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args(argv)
    if args.method is not None:
        print(json.dumps(measure(args.method, args.tokens, args.heads)))
        return
    if args.out is None:
        parser.error("--out FILE is needed: where the figures go")
    document: dict[str, Any] = {
        "command": command_line("encoder_memory", argv),
        "device": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "tokens": args.tokens, "heads": args.heads, "head_dim": DIM, "rows": [],
    }  # fmt: skip
    for method in METHODS:
        command = [sys.executable, __file__, f"--method={method}", f"--tokens={args.tokens}", f"--heads={args.heads}"]
        document["rows"].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
        print(document["rows"][-1], flush=True)
    write_json(args.out, document)


if __name__ == "__main__":
    main()
