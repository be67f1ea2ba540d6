"""All methods: every module of this folder that has a tuple METHODS."""

import importlib
import pkgutil

from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods.base import Method, Prepared, Subject

__all__ = ["METHODS", "Method", "Prepared", "Subject", "find_method"]


def _discover() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for info in pkgutil.iter_modules(__path__):
        for method in getattr(importlib.import_module(f"{__name__}.{info.name}"), "METHODS", ()):
            if method.name in found:
                raise ConfigError(f"two evaluation methods are called {method.name!r}")
            found[method.name] = method
    return found


METHODS = _discover()


def find_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        ConfigError: There is none.
    """
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is unknown: expected one of {', '.join(METHODS)}")
    return METHODS[name]
