"""Every error this package raises on purpose. The text names the argument, what was got, what was expected and the remedy."""


class SpectralQuantError(Exception):
    """Base class: `except SpectralQuantError` catches everything below and nothing else."""


class ConfigError(SpectralQuantError, ValueError):
    """An argument, dial or preset is out of its range."""


class ShapeError(SpectralQuantError, ValueError):
    """A tensor has a shape that the codec or the cache can't take."""


class CalibrationError(SpectralQuantError, RuntimeError):
    """Calibration can't be carried out or is missing: too little text, no attention seen, not calibrated yet."""


class ProfileError(SpectralQuantError, ValueError):
    """A calibration file is missing, damaged, of another version or made for another model."""


class CacheFileError(SpectralQuantError, ValueError):
    """A file with a compressed cache, or a part of one, is missing, damaged, of another version, or made for another model or calibration."""


class UnsupportedModelError(SpectralQuantError, NotImplementedError):
    """The model has nothing this package can compress, or a layer it can't be right about; the text names it."""


class NotSupportedError(UnsupportedModelError):
    """A kind of attention that can't be computed from codes; the text says why."""


class DependencyError(SpectralQuantError, ImportError):
    """A package that this one works with is installed in a release that is too old or too new."""


class GradientError(SpectralQuantError, RuntimeError):
    """A gradient was asked for that has to pass through packed keys and values."""


class MemoryLimitError(SpectralQuantError, MemoryError):
    """A generation does not fit the memory there is, or that it was given; the text says what it takes and what would fit."""


class BackendError(SpectralQuantError, RuntimeError):
    """CUDA kernels were asked for and can't be built, loaded or launched here: no usable GPU, a missing package, a compile error."""
