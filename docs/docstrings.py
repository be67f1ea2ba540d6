"""What the reference needs to read this package's docstrings: one line may describe several parameters, griffe reads one."""

import re
from typing import Any

import griffe

_SEVERAL = re.compile(r"^( {4,})(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class OneByOne(griffe.Extension):
    """Gives each of several names the text that they share."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _SEVERAL.sub(_apart, obj.docstring.value)


def _apart(found: re.Match[str]) -> str:
    return "\n".join(f"{found[1]}{name}: {found[3]}" for name in found[2].split(", "))
