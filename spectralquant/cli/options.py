"""Options that several verbs share."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from spectralquant.presets import PRESETS


def _complete_preset(incomplete: str) -> list[tuple[str, str]]:
    return [(name, preset.description) for name, preset in PRESETS.items() if name.startswith(incomplete)]


DEMO = "smollm2"
"""Stands for SmolLM2-135M-Instruct, which the extra demo installs."""
DTYPES = ("float32", "bfloat16", "float16")
_PRESETS = ", ".join(PRESETS)

Model: TypeAlias = Annotated[str, typer.Argument(metavar="MODEL", help="Name on the hub, folder, .gguf file, or smollm2.")]
Preset: TypeAlias = Annotated[str, typer.Option("--preset", metavar="NAME", help=f"One of {_PRESETS}.", autocompletion=_complete_preset)]
PresetList: TypeAlias = Annotated[
    list[str] | None, typer.Option("--preset", metavar="NAME", help=f"One of {_PRESETS}; may be repeated. Default: all.", autocompletion=_complete_preset)
]
Calibration: TypeAlias = Annotated[
    Path | None, typer.Option("--calibration", metavar="PATH", help="File or folder. Default: the one beside the model or kept here, else made now.")
]
NoCache: TypeAlias = Annotated[bool, typer.Option("--no-cache", help="Neither look for kept calibrations nor keep one.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, all words on stderr.")]
DType: TypeAlias = Annotated[
    str | None, typer.Option("--dtype", metavar="NAME", help="Of the model: float32, bfloat16 or float16. Default: float32 on a CPU, bfloat16 on a GPU.")
]
