"""Real KV-cache compression for transformer models: 6.55x smaller, attention on the codes.

`import spectralquant` is cheap: torch and transformers are imported when a name that needs them is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectralquant.presets import PRESETS as PRESETS
from spectralquant.presets import CompressionPreset as CompressionPreset
from spectralquant.presets import describe_presets as describe_presets
from spectralquant.presets import resolve_preset as resolve_preset
from spectralquant.requirements import require_transformers

if TYPE_CHECKING:
    from spectralquant.api import SpectralQuant as SpectralQuant
    from spectralquant.cache.hf import SpectralCache as SpectralCache
    from spectralquant.corpus import get_default_calibration_texts as get_default_calibration_texts
    from spectralquant.engine import SpectralQuantEngine as SpectralQuantEngine
    from spectralquant.heads import EigenspectralCalibrator as EigenspectralCalibrator
    from spectralquant.heads import HeadCalibrationData as HeadCalibrationData
    from spectralquant.heads import HeadEngine as HeadEngine
    from spectralquant.prefix_store.store import PrefixStore as PrefixStore

    DEFAULT_CALIBRATION_TEXTS: list[str]

from spectralquant.version import __version__ as __version__

require_transformers()

_LAZY = {
    "SpectralQuant": "spectralquant.api",
    "SpectralQuantEngine": "spectralquant.engine",
    "EigenspectralCalibrator": "spectralquant.heads",
    "HeadCalibrationData": "spectralquant.heads",
    "HeadEngine": "spectralquant.heads",
    "PrefixStore": "spectralquant.prefix_store.store",
    "SpectralCache": "spectralquant.cache.hf",
    "get_default_calibration_texts": "spectralquant.corpus",
}
__all__ = [
    "DEFAULT_CALIBRATION_TEXTS",
    "PRESETS",
    "CompressionPreset",
    "EigenspectralCalibrator",
    "HeadCalibrationData",
    "HeadEngine",
    "PrefixStore",
    "SpectralCache",
    "SpectralQuant",
    "SpectralQuantEngine",
    "__version__",
    "describe_presets",
    "get_default_calibration_texts",
    "resolve_preset",
]


def __getattr__(name: str) -> Any:
    if name == "DEFAULT_CALIBRATION_TEXTS":
        return import_module("spectralquant.corpus").get_default_calibration_texts()
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'spectralquant' has no attribute {name!r}")
