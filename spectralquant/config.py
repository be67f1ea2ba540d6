"""Validated settings. Frozen: a setting never changes after a cache or a codec was built from it."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from spectralquant.errors import ConfigError
from spectralquant.presets import BIT_WIDTHS

Backend = Literal["auto", "reference", "cuda"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "cuda")


def require_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high], or a ConfigError that names the argument and the range."""
    limit = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not number.is_integer():
        raise ConfigError(f"{name}={value!r}: expected {limit}; fractions are never rounded for you")
    if number < low or (high is not None and number > high):
        raise ConfigError(f"{name}={value!r} is out of range: expected {limit}")
    return int(number)


@dataclass(frozen=True, slots=True)
class Dials:
    """The original API's dials; None means "not set": pure water-filling at the preset's budget.

    Raises:
        ConfigError: A dial is out of its range.
    """

    avg_bits: int | None = None
    noise_bits: int | None = None
    value_noise_bits: int | None = None
    d_eff_variance: float | None = None

    def __post_init__(self) -> None:
        if self.avg_bits is not None:
            require_int("avg_bits", self.avg_bits, 1, 8)
        for name in ("noise_bits", "value_noise_bits"):
            bits = getattr(self, name)
            if bits is not None and require_int(name, bits, 0, 8) not in BIT_WIDTHS:
                raise ConfigError(f"{name}={bits!r}: the packed format holds widths of {BIT_WIDTHS} bits")
        share = self.d_eff_variance
        if share is not None and (not isinstance(share, Real) or not 0.0 < share <= 1.0):
            raise ConfigError(f"d_eff_variance={share!r} is out of range: expected a number in (0, 1]")

    @property
    def any_set(self) -> bool:
        return any(v is not None for v in (self.avg_bits, self.noise_bits, self.value_noise_bits, self.d_eff_variance))


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """What a cache keeps exact, in tokens, and what reads it.

    Attributes:
        sinks: First tokens of every sequence, kept exact for ever.
        window: Most recent tokens that are always exact; blocks of 128 leave it for the packed store.
        max_exact_share: Bound on the share of a layer's packed tokens kept exact besides the sinks.
        tile_tokens: Tokens of one layer that are unpacked at a time, at most, by all but the fused kernel; None for what suits the device, see `tile_on`.
        cuda_graphs: On GPUs with kernels, `generate` captures a decode step as a CUDA graph where the model allows it, see `decode_graph`.
        compile_steps: Such a step is compiled by torch.compile first: faster steps, for some seconds once per model and batch size.
        backend: "auto", "reference" (PyTorch) or "cuda" (the fused kernels, or an error that says why they can't run), see `backend.resolve_backend`.
    """

    sinks: int = 4
    window: int = 128
    max_exact_share: float = 0.04
    tile_tokens: int | None = None
    backend: Backend = "auto"
    cuda_graphs: bool = True
    compile_steps: bool = False

    def __post_init__(self) -> None:
        require_int("sinks", self.sinks, 0, 64)
        require_int("window", self.window, 1, 65_536)
        if self.tile_tokens is not None and require_int("tile_tokens", self.tile_tokens, 256) % 256:
            raise ConfigError(f"tile_tokens={self.tile_tokens}: expected a multiple of 256")
        if not 0.0 <= self.max_exact_share <= 0.25:
            raise ConfigError(f"max_exact_share={self.max_exact_share!r} is out of range: expected 0 to 0.25")
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend={self.backend!r}: expected one of {', '.join(BACKENDS)}")
        for name in ("cuda_graphs", "compile_steps"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected True or False")

    def tile_on(self, device_type: str) -> int:
        """`tile_tokens`, or its default: short on a CPU, where a tile should stay in its caches, long where every operation is a launch."""
        if self.tile_tokens is not None:
            return self.tile_tokens
        return 2048 if device_type == "cpu" else 32_768
