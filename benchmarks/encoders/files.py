"""What the scripts here write at the head of a result file."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the folder of the other benchmarks

from calibration import command_line


def describe(script: str, argv: list[str]) -> dict[str, Any]:
    return {
        "command": command_line(f"encoders/{script}", argv),
        "device": f"{torch.get_num_threads()} CPU threads",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "scikit-learn")}},
    }
