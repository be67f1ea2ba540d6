"""Which models read packed caches directly: attention and `generate` of one instance, changed and put back.

What is noted about a model lies on the model, so that any number of engines and threads agree on it. A model stays as it is as long as somebody asked for it:
`apply` for good, `applied` for the length of a with block, by any number of threads at once.
"""

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock, get_ident
from typing import Any

from spectralquant.attention.hf import register
from spectralquant.calibration.hf import unwrapped
from spectralquant.follow_up import install_generate, remove_generate

_NOTE = "_spectralquant"
_lock = RLock()


@dataclass(slots=True)
class _Application:
    """What a model was, and who needs it changed.

    Attributes:
        before: Its attention implementation.
        lasting: Asked for without an end.
        blocks: Thread -> its open with blocks.
    """

    before: str
    lasting: bool = False
    blocks: Counter[int] = field(default_factory=Counter)


def is_applied(model: Any) -> bool:
    """Whether `model` reads packed caches directly."""
    return hasattr(unwrapped(model), _NOTE)


def apply(model: Any) -> None:
    """Make `model` read packed caches directly: until `remove`, or inside a with block of this thread until its end."""
    with _lock:
        note = _noted(model)
        note.lasting |= not note.blocks[get_ident()]


def remove(model: Any) -> None:
    """Make `model` what it was before, whoever changed it."""
    model = unwrapped(model)
    with _lock:
        if is_applied(model):
            _set_attention(model, getattr(model, _NOTE).before)
            remove_generate(model)
            delattr(model, _NOTE)


@contextmanager
def applied(model: Any) -> Generator[None]:
    """`apply` for the length of a with block. The last one to end puts the model back, unless it was asked for without an end."""
    model, thread = unwrapped(model), get_ident()
    with _lock:
        note = _noted(model)
        note.blocks[thread] += 1
    try:
        yield
    finally:
        with _lock:
            note.blocks[thread] -= 1
            if not note.lasting and not any(note.blocks.values()) and getattr(model, _NOTE, None) is note:
                remove(model)


def _noted(model: Any) -> _Application:
    model = unwrapped(model)
    if not is_applied(model):
        note = _Application(model.config._attn_implementation)
        _set_attention(model, register())
        install_generate(model)
        setattr(model, _NOTE, note)
    return getattr(model, _NOTE)


def _set_attention(model: Any, name: str) -> None:
    if model._can_set_attn_implementation():  # others keep their own attention, which reads packed caches as ordinary tensors
        model.set_attn_implementation(name)
