"""What some releases of transformers can't do, with any cache."""

import pytest
import transformers
from near_lossless import Pair
from packaging.version import Version


def skip_before(until: str, reason: str, since: str = "4.56") -> None:
    """Skip a test where transformers is of a release from `since` on and before `until`."""
    if Version(since) <= Version(transformers.__version__) < Version(until):
        pytest.skip(f"transformers {transformers.__version__} {reason}, fixed in {until}")


def has_window(pair: Pair) -> bool:
    return any(pair.dense().is_sliding)


def needs_windows_that_go_back(pair: Pair) -> None:
    """Refused candidates have to leave sliding windows, which are transformers' own."""
    if has_window(pair):
        skip_before("5.15", "takes no tokens back from sliding windows")
