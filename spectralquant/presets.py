"""Presets: names for a promise about the all-in size of the packed history.

The promise counts codes, gains and the share of tokens kept exact; `codec.budget` turns it into plane counts. The
four dials (`avg_bits`, `noise_bits`, `value_noise_bits`, `d_eff_variance`) are the original API's: a preset lists the
values that describe it there, and a caller who sets one replaces pure water-filling by a two-band allocation.
"""

from dataclasses import dataclass, fields

from spectralquant.errors import ConfigError

BIT_WIDTHS = (0, 2, 4, 6, 8)
"""Widths in bits of one coordinate in the packed format; every one is a whole number of 2-bit planes."""


@dataclass(frozen=True, slots=True)
class CompressionPreset:
    """One preset.

    Attributes:
        name: `standard`, `high`, `max` or `ultra`.
        avg_bits: Mean width of the semantic band in bits per coordinate.
        noise_bits: Width of the tail of K in bits per coordinate.
        value_noise_bits: Width of the tail of V in bits per coordinate.
        d_eff_variance: Share of the variance that the semantic band holds, in (0, 1].
        ratio: FP16 bytes / packed bytes promised for the packed history.
        risk: What a user risks by choosing it, in a word.
        description: One sentence.
    """

    name: str
    avg_bits: int
    noise_bits: int
    value_noise_bits: int
    d_eff_variance: float
    ratio: float
    risk: str
    description: str


PRESETS: dict[str, CompressionPreset] = {
    preset.name: preset
    for preset in (
        CompressionPreset("standard", 3, 2, 2, 0.90, 5.95, "lowest", "The most faithful preset: 2.69 bits per element, all-in."),
        CompressionPreset("high", 2, 2, 2, 0.95, 6.55, "low", "The default: 2.44 bits per element, all-in."),
        CompressionPreset("max", 2, 2, 2, 0.92, 6.68, "moderate", "A little smaller: 2.40 bits per element or fewer, all-in."),
        CompressionPreset("ultra", 2, 2, 2, 0.90, 8.00, "high", "The smallest cache: 2.00 bits per element or fewer, all-in."),
    )
}


def resolve_preset(compression: "str | CompressionPreset") -> CompressionPreset:
    """Return the preset called `compression` (any case), or `compression` itself when it is one.

    Raises:
        ConfigError: There is no such preset.
    """
    if isinstance(compression, CompressionPreset):
        return compression
    if isinstance(compression, str) and compression.lower() in PRESETS:
        return PRESETS[compression.lower()]
    raise ConfigError(f"compression={compression!r} is no preset; choose one of {', '.join(map(repr, PRESETS))}")


def describe_presets() -> dict[str, dict[str, object]]:
    """All presets as plain dictionaries, by name, for printing."""
    return {name: {f.name: getattr(preset, f.name) for f in fields(preset) if f.name != "name"} for name, preset in PRESETS.items()}
