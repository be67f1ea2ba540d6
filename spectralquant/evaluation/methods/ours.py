"""This package at each preset, or with any other arguments of its engine: real packed codes, read by the real attention."""

from typing import Any

from transformers.cache_utils import Cache

from spectralquant.cache.hf import SpectralCache
from spectralquant.codec.budget import INDEX_BITS
from spectralquant.engine import SpectralQuantEngine
from spectralquant.evaluation.methods.base import Method, Prepared, Subject
from spectralquant.presets import PRESETS

CALIBRATION = "calibration.safetensors"
"""In the folder of a run."""


def method_for(name: str, label: str, family: str = "spectralquant", **options: Any) -> Method:
    """This package as a method, with the arguments `options` of `SpectralQuantEngine`.

    All such methods share the subject's calibration, which is made where it is missing: arguments of an engine change how a calibration is used.

    Raises:
        ConfigError: An argument is out of its range.
    """
    SpectralQuantEngine(**options)  # refuses bad arguments now, not in the middle of a run
    return Method(name, label, family, False, lambda subject: _prepare(subject, options))


def _prepare(subject: Subject, options: dict[str, Any]) -> Prepared:
    engine = SpectralQuantEngine(**options)
    _load(engine, subject)
    return Prepared(lambda: engine.cache(subject.model), bits_all_in, exact_tokens)


def _load(engine: SpectralQuantEngine, subject: Subject) -> None:
    """Give `engine` the subject's calibration, of which the run's folder keeps a copy, or one that is found or made now."""
    kept = subject.folder / CALIBRATION
    path = subject.calibration or kept
    if not path.exists():
        finder = SpectralQuantEngine(compression="high", calibration_cache=subject.calibration_cache)
        finder.ensure_calibrated(subject.model, subject.tokenizer)
        finder.save_calibration(path, subject.model)
    profile = engine.load_calibration(path)
    if not kept.exists():
        profile.save(kept)


def bits_all_in(cache: Cache) -> float:
    """Bits per element of the packed history: planes, gains, and the tokens that stay exact in mid-text, their index included."""
    assert isinstance(cache, SpectralCache)
    layers = [(layer.codec, layer.segment) for layer in cache.coded_layers if layer.segment is not None]
    packed = sum(segment.packed for _, segment in layers)
    bits = 0.0
    for codec, segment in layers:
        heads, dim = segment.recent_keys.shape[1], codec.head_dim
        secondary = float(segment.secondary.sum()) / len(segment.start)
        record = codec.layout.bytes_per_token * 8 / (2 * dim)
        bits += segment.packed * record + secondary * (16 + INDEX_BITS / (2 * heads * dim))
    return bits / packed if packed else 16.0


def exact_tokens(cache: Cache) -> int:
    """Sinks and recent window of one layer."""
    assert isinstance(cache, SpectralCache)
    layer = cache.coded_layers[0]
    if layer.segment is None:
        return 0
    return layer.segment.length - layer.segment.packed + min(layer.config.sinks, layer.segment.packed)


DIALS = tuple(  # bits per leading coordinate on average, and per coordinate of the tails of K and of V
    method_for(f"dials-{avg}-{k}-{v}", f"avg {avg}, tails K {k} V {v}", "spectralquant dials", total_bits=avg, noise_bits=k, value_noise_bits=v)
    for avg, k, v in ((2, 0, 2), (2, 2, 2), (3, 0, 0), (3, 0, 2), (3, 2, 2), (4, 0, 0), (4, 2, 2))
)
METHODS = (*(method_for(preset, f"spectralquant {preset}", compression=preset) for preset in PRESETS), *DIALS)
