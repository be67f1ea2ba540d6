"""What users say with `--additional-config '{"spectralquant": {...}}'`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from spectralquant.config import require_int
from spectralquant.errors import ConfigError
from spectralquant.presets import CompressionPreset, resolve_preset

KEY = "spectralquant"


@dataclass(frozen=True, slots=True)
class Options:
    """Of one server, the same in all its processes.

    Attributes:
        preset: Name of a preset.
        calibration: A calibration file, or a folder of `save_pretrained`; None: it is looked for.
        exact_per_page: Tokens of a page of 128 that stand in it in 8 bits, where their codes would serve them badly.
        sinks: First tokens of every sequence that stay exact, at most `exact_per_page`.
        recent_pages: Exact copies of recent pages that a process keeps; None: enough for `--max-num-seqs`, but no more than a quarter of the device's memory.
    """

    preset: str = "high"
    calibration: str | None = None
    exact_per_page: int = 8
    sinks: int = 1
    recent_pages: int | None = None

    def __post_init__(self) -> None:
        resolve_preset(self.preset)
        require_int("exact_per_page", self.exact_per_page, 1, 64)
        require_int("sinks", self.sinks, 0, self.exact_per_page)
        if self.recent_pages is not None:
            require_int("recent_pages", self.recent_pages, 4)
        if self.calibration is not None and not isinstance(self.calibration, str):
            raise ConfigError(f"calibration={self.calibration!r}: expected the path of a calibration file")

    @property
    def compression(self) -> CompressionPreset:
        return resolve_preset(self.preset)


def read_options(additional: Any) -> Options | None:
    """The options in vLLM's `additional_config`; None where it says nothing of us.

    Raises:
        ConfigError: An option is unknown or out of its range.
    """
    said = additional.get(KEY) if isinstance(additional, Mapping) else None
    if said is None:
        return None
    if not isinstance(said, Mapping):
        raise ConfigError(f'additional_config["{KEY}"]={said!r}: expected an object such as {{"preset": "high"}}')
    known = [f.name for f in fields(Options)]
    unknown = sorted(said.keys() - set(known))
    if unknown:
        raise ConfigError(f'additional_config["{KEY}"] has {", ".join(map(repr, unknown))}; expected {", ".join(known)}')
    return Options(**said)
