"""Numbers of bytes as people write them."""

from spectralquant.errors import ConfigError

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def told_bytes(count: int) -> str:
    """In decimal units, as "1.5 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def parse_bytes(name: str, value: object) -> int:
    """An int of bytes, or text as "12GB", "500 MB".

    Raises:
        ConfigError: It is neither, or not positive.
    """
    number: float | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str):
        text = value.strip().lower().removesuffix("b").strip()
        scale = _UNITS.get(text[-1:]) if text[-1:].isalpha() else 1
        try:
            number = float(text[:-1] if text[-1:].isalpha() else text) * scale if scale else None
        except ValueError:
            number = None
    if number is None or not 0 < number < 2**63:
        raise ConfigError(f"{name}={value!r}: expected a positive number of bytes, or text as '12GB'")
    return int(number)
