"""`spectralquant`: demo, doctor, evaluate, inspect, presets."""

import argparse
import json
import sys

from spectralquant.cli.evaluate import add_arguments as add_evaluate_arguments
from spectralquant.cli.evaluate import run_evaluate
from spectralquant.errors import SpectralQuantError
from spectralquant.presets import PRESETS, describe_presets
from spectralquant.version import __version__


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors of this package are one line on stderr, not a traceback."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except SpectralQuantError as error:
        print(f"spectralquant: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(prog="spectralquant", description="KV-cache compression for transformer models.")
    parser.add_argument("--version", action="version", version=f"spectralquant {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="compress the cache of a real model and compare with FP16")
    demo.add_argument("--model", help="folder, GGUF file or hub name; default: SmolLM2-135M-Instruct from the demo extra")
    demo.add_argument("--prompt", action="append", help="a prompt of your own (may be repeated); default: four bundled ones")
    demo.add_argument("--preset", action="append", choices=list(PRESETS), help="preset to show (may be repeated); default: all")
    demo.add_argument("--max-new-tokens", type=int, default=32, help="tokens to generate per prompt and preset (default 32)")
    demo.add_argument("--calibration", help="calibration file: loaded if it exists, else written")
    demo.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="show versions, devices, and what runs on CUDA kernels here")
    doctor.add_argument("--json", action="store_true", help="print one JSON document")
    doctor.set_defaults(run=_doctor)

    evaluate = commands.add_parser("evaluate", help="measure KL, retrieval and word problems for this package and its peers on the same windows")
    add_evaluate_arguments(evaluate)
    evaluate.set_defaults(run=run_evaluate)

    inspect = commands.add_parser("inspect", help="show what a calibration file holds and what it measured")
    inspect.add_argument("file")
    inspect.set_defaults(run=_inspect)

    presets = commands.add_parser("presets", help="list the presets")
    presets.set_defaults(run=_presets)
    return parser


def _demo(args: argparse.Namespace) -> int:
    from spectralquant.cli.demo import run_demo

    return run_demo(args.model, args.prompt, args.preset, args.max_new_tokens, args.calibration, args.json)


def _doctor(args: argparse.Namespace) -> int:
    from spectralquant.cli.doctor import run_doctor

    return run_doctor(args.json)


def _inspect(args: argparse.Namespace) -> int:
    from spectralquant.cli.certificate import describe_certificate
    from spectralquant.profile import load_profile

    profile = load_profile(args.file)
    layer = next(iter(profile.layers.values()))
    print(f"{profile.model['architecture']}: {len(profile.layers)} coded layers, {layer.heads} KV heads of size {layer.head_dim}")
    print(describe_certificate(profile))
    return 0


def _presets(args: argparse.Namespace) -> int:
    print(json.dumps(describe_presets(), indent=2))
    return 0
