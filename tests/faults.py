"""Errors at a chosen place: the n-th operation of PyTorch, or the n-th line of this package."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class FailingOperations(TorchDispatchMode):
    """From the n-th operation on, `times` of them raise `error` in place of what they do; views count as well. None: all."""

    def __init__(self, n: int, error: type[BaseException] = torch.OutOfMemoryError, times: int | None = 1) -> None:
        super().__init__()
        self.left, self.error, self.times = n, error, times

    def again(self) -> "FailingOperations":
        """The same from its beginning."""
        return FailingOperations(self.left, self.error, self.times)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left <= 0 and (self.times is None or self.left > -self.times):
            raise self.error("made up")
        return func(*args, **(kwargs or {}))


@contextmanager
def interrupted_line(n: int, folder: str) -> Generator[list[str]]:
    """KeyboardInterrupt at the n-th line that runs of the files below `folder`; gives a list that then has the place."""
    left, place, before = n, list[str](), sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if folder not in frame.f_code.co_filename:
            return None
        if event == "line" and not place:
            left -= 1
            if left <= 0:
                place.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield place
    finally:
        sys.settrace(before)
