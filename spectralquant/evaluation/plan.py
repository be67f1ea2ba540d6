"""What a run measures: everything that decides a figure, written down before the first one is taken."""

from dataclasses import asdict, dataclass, field
from typing import Any

from spectralquant.config import require_int
from spectralquant.errors import ConfigError

DEFAULT_TEXTS = {
    "prose": "stdlib:pydoc_data.topics",
    "code": "stdlib:argparse,ast,asyncio.base_events,configparser,dataclasses,doctest,email.message,enum,fractions",
}
"""Text that every machine with Python has. Benchmarks should bring their own, see `texts.read_text`."""
NEEDLE_KINDS = ("sentence", "key-value", "multi-key")


@dataclass(frozen=True, slots=True)
class Plan:
    """One run.

    Attributes:
        model: Name of the model, for the record.
        methods: Names of methods, see `methods.METHODS`; the first one is the yardstick of paired differences.
        tasks: Among "language", "needles" and "problems".
        texts: Name -> source, see `texts.read_text`.
        contexts: Tokens in the cache before the first scored token.
        windows: Windows per text, spread evenly over it; all contexts of a window end at the same token.
        scored: Scored tokens per window, fed in pieces of `chunk` so that they read codes.
        chunk: 1 to 16; a long piece would attend to itself uncoded.
        needle_lengths: Tokens of haystack.
        needle_depths: Places of the needle, shares of the haystack in [0, 1].
        needle_kinds: Among NEEDLE_KINDS.
        needle_samples: Different needles per kind, length and depth.
        problems: Number of word problems.
        problem_file: JSON lines with "question" and "answer" (ending in "#### 42"), or None for generated ones.
        seed: Of window offsets, needles, and generated problems.
    """

    model: str
    methods: tuple[str, ...]
    tasks: tuple[str, ...] = ("language",)
    texts: dict[str, str] = field(default_factory=lambda: dict(DEFAULT_TEXTS))
    contexts: tuple[int, ...] = (512, 2048)
    windows: int = 8
    scored: int = 256
    chunk: int = 16
    needle_lengths: tuple[int, ...] = (1024, 4096)
    needle_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needle_kinds: tuple[str, ...] = NEEDLE_KINDS
    needle_samples: int = 4
    problems: int = 100
    problem_file: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("windows", "scored", "needle_samples", "problems"):
            require_int(name, getattr(self, name), 1)
        for name in ("contexts", "needle_lengths"):
            for value in getattr(self, name):
                require_int(name, value, 1)
        require_int("chunk", self.chunk, 1)
        if self.chunk > 16:
            raise ConfigError(f"chunk={self.chunk}: expected 1 to 16, longer pieces attend to themselves uncoded and flatter the method")
        if self.scored < 2:
            raise ConfigError(f"scored={self.scored}: expected at least 2, the perplexity needs a next token")
        unknown = set(self.needle_kinds) - set(NEEDLE_KINDS)
        if unknown:
            raise ConfigError(f"needle_kinds has {sorted(unknown)}: expected some of {', '.join(NEEDLE_KINDS)}")
        if not all(0 <= depth <= 1 for depth in self.needle_depths):
            raise ConfigError(f"needle_depths={self.needle_depths}: expected shares between 0 and 1")
        if not self.methods:
            raise ConfigError("methods is empty: name at least one")

    def as_json(self) -> dict[str, Any]:
        """Plain lists and dictionaries."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
