"""The parts of a run that the page shows, and words for them."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from spectralquant.evaluation.report import RunReport
from spectralquant.presets import PRESETS, CompressionPreset
from spectralquant.profile import Profile

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """The parts of a run that its folder holds.

    Attributes:
        name: Of the folder.
        report: Of an evaluation.
        bench: What `speed.bench` wrote.
        profile: The calibration.
    """

    name: str
    report: RunReport | None
    bench: dict[str, Any] | None
    profile: Profile | None

    @property
    def model(self) -> str:
        return self.documents[0]["plan"]["model"]

    @property
    def documents(self) -> list[dict[str, Any]]:
        """Configurations of what was run: plan, command, machine, versions."""
        return [document for document in (self.report and self.report.config, self.bench) if document]

    @property
    def preset(self) -> CompressionPreset:
        """The one that is looked into: "high" where it was measured, else the first that was."""
        measured = [m.name for m in self.report.methods] if self.report else []
        measured += self.bench["plan"]["presets"] if self.bench else []
        ours = [name for name in measured if name in PRESETS]
        return PRESETS["high" if "high" in ours or not ours else ours[0]]

    @property
    def bench_rows(self) -> list[Row]:
        """Those with figures: memory sufficed."""
        return [row for row in (self.bench or {"rows": []})["rows"] if "out_of_memory" not in row]

    def command(self, verb: str) -> str:
        """The command line that adds what is missing."""
        return f"spectralquant {verb} MODEL --out {shlex.quote(self.name if verb != 'calibrate' else self.name + '/calibration.safetensors')}"


def listed(words: Iterable[str]) -> str:
    *most, last = [str(word) for word in words]
    return f"{', '.join(most)} and {last}" if most else last


def counted(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")
