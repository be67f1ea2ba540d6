"""What files hold that anybody may have made: read within bounds, and taken out by the types that it should have.

Everything here raises ValueError with what was got and what was expected; who reads a file says which one, and what to do about it.
"""

import json
import math
from pathlib import Path
from typing import Any

MAX_DEPTH = 32
"""Lists and objects inside of each other."""
MAX_TEXT = 4096
"""Characters of a name or a note."""
_LARGEST = 1 << 63


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file, at most `limit` of them.

    Raises:
        ValueError: It is longer, or no file but a folder, a pipe or a device.
        OSError: It can't be read.
    """
    if not path.is_file():  # opening a pipe would wait for who writes to it
        raise ValueError("expected a file" if path.exists() else "there is no such file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return content


def parse_json(text: str | bytes, what: str) -> Any:
    """The value of a JSON text, at most `MAX_DEPTH` deep."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{what} is nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:  # no JSON, no UTF-8, or an integer of thousands of digits
        raise ValueError(f"{what} is no JSON ({error})") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, (dict, list)) for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return value
    raise ValueError(f"{what} is nested more than {MAX_DEPTH} deep")


def members(value: Any, what: str) -> dict[str, Any]:
    """An object."""
    return value if isinstance(value, dict) else _refuse(value, what, "an object")


def listed(value: Any, what: str) -> list[Any]:
    """A list."""
    return value if isinstance(value, list) else _refuse(value, what, "a list")


def member(value: dict[str, Any], name: str, what: str) -> Any:
    """An entry of an object."""
    if name not in value:
        raise ValueError(f"{what} has no {name!r}")
    return value[name]


def number(value: Any, what: str, low: float = -math.inf, high: float = math.inf, endless: bool = False) -> float:
    """A number from `low` to `high`; infinity only where `endless`."""
    wanted = "a number" if low == -math.inf and high == math.inf else f"a number from {low:g} to {high:g}"
    fits = not math.isnan(figure(value, what)) and low <= value <= high and (endless or math.isfinite(value))
    return float(value) if fits else _refuse(value, what, wanted)


def figure(value: Any, what: str) -> float:
    """A number, or what came of a measurement that failed: NaN or infinity."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and (isinstance(value, float) or abs(value) < _LARGEST)
    return float(value) if fits else _refuse(value, what, "a number")


def whole(value: Any, what: str, low: int, high: int) -> int:
    """An integer from `low` to `high`."""
    fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    return value if fits else _refuse(value, what, f"an integer from {low:,} to {high:,}")


def flag(value: Any, what: str) -> bool:
    """True or false."""
    return value if isinstance(value, bool) else _refuse(value, what, "true or false")


def printable(value: Any, what: str, limit: int = MAX_TEXT) -> str:
    """Text without control characters: what is shown to a user drives no terminal."""
    fits = isinstance(value, str) and len(value) <= limit and value.replace("\n", " ").replace("\t", " ").isprintable()
    return value if fits else _refuse(value, what, f"a text of at most {limit:,} characters, all of them printable")


def showable(value: Any, what: str) -> Any:
    """Lists and objects of printable texts, numbers, flags and nulls, whatever their names: what is kept, compared or shown, and never computed with."""
    level = [value]
    while level:
        inner: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inner += [*part, *part.values()]
            elif isinstance(part, list):
                inner += part
            elif isinstance(part, str):
                printable(part, f"a text in {what}")
            elif isinstance(part, (int, float)) and not isinstance(part, bool):
                figure(part, f"a number in {what}")
        level = inner
    return value


def shown(value: Any) -> str:
    """As messages show what was got."""
    told = repr(value) if not isinstance(value, int) or abs(value) < _LARGEST else "an integer of many digits"
    return told if len(told) <= 80 else f"{told[:77]}..."


def one_line(error: BaseException | str) -> str:
    """What another package said, at most 300 characters of it: it may quote a file, and with it what drives a terminal or can't be written."""
    told = " ".join(str(error).split())[:300]
    return "".join(c if c.isprintable() else "?" for c in told) or type(error).__name__


def _refuse(value: Any, what: str, wanted: str) -> Any:
    raise ValueError(f"{what} is {shown(value)}, expected {wanted}")
