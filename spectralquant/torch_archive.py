"""Tensors of a file that torch.save wrote, read without unpickling anything.

Such a file is a ZIP archive: `data.pkl`, a pickle that says which tensors there are, and their bytes as members `data/0`, `data/1`, ... A pickle is a
program, and running one may run anything. Here it is data: `pickletools` lists its opcodes, and what a dictionary of tensors is made of is
understood (a few opcodes and six names of functions and classes, which are compared, and never imported or called); all else is refused.

Nothing is read before its size is known to be in bounds. Members have to be stored as they are, as torch writes them, and tensors can't have more
elements in all than the file has: so what comes out is no larger than the file.
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralquant.untrusted import one_line, shown

MAX_PICKLE, MAX_DIRECTORY = 4 << 20, 16 << 20
"""Bytes of the pickle and of the archive's list of members; a tensor takes some 150 of one and 80 of the other."""
MAX_DIMENSIONS, MAX_STRIDE = 8, 1 << 31
STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
}
REBUILD, ORDERED = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_END, _LOCATOR, _END_BYTES, _LOCATOR_BYTES, _END64_BYTES = b"PK\5\6", b"PK\6\7", 22, 20, 56
"""Signatures and sizes of the records at the end of a ZIP archive."""


@dataclass(frozen=True, slots=True)
class _Name:
    """A class or function that the pickle names."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """The bytes of a member, as elements of a type."""

    key: str
    dtype: torch.dtype
    elements: int


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor: which elements of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Mark:
    """What MARK puts on the stack."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a dictionary that torch.save wrote, by name, on the CPU.

    Raises:
        ValueError: The file is no such archive, or holds anything else than tensors of floating-point numbers; the text says what.
        OSError: It can't be read.
    """
    _require_small_directory(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path.stat().st_size)
            if "byteorder" in members and _stored(archive, members, "byteorder", 16) != b"little":
                raise ValueError("its numbers are not little-endian")
            views = _interpret(_stored(archive, members, "data.pkl", MAX_PICKLE))
            return _tensors(archive, members, views)
    except (zipfile.BadZipFile, RuntimeError, EOFError, LookupError, OverflowError, struct.error) as error:
        raise ValueError(f"it is no archive of torch.save ({one_line(error)})") from error


# The archive ----------------------------------------------------------------------------------------------------------


def _require_small_directory(path: Path) -> None:
    """Raise ValueError unless the archive ends as torch's do, with a list of members of bounded size: zipfile reads it as a whole."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _END_BYTES - _LOCATOR_BYTES - _END64_BYTES, 0))
        tail = file.read()
    end, locator, end64 = tail[-_END_BYTES:], tail[-_END_BYTES - _LOCATOR_BYTES : -_END_BYTES], tail[: -_END_BYTES - _LOCATOR_BYTES]
    if not end.startswith(_END) or not end.endswith(b"\0\0"):
        raise ValueError("it is no archive of torch.save, or it is cut off")
    size = int.from_bytes(end64[40:48] if locator.startswith(_LOCATOR) else end[12:16], "little")
    if size > MAX_DIRECTORY:
        raise ValueError(f"its list of members has {size:,} bytes, at most {MAX_DIRECTORY:,} are read")


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Members by their names without the folder that torch puts them in; raises ValueError unless all of them fit the file."""
    out: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size or member.flag_bits & 1:
            raise ValueError(f"its member {shown(member.filename)} is compressed or encrypted, which torch.save does not do")
        if out.setdefault(member.filename.partition("/")[2], member) is not member:
            raise ValueError(f"it has two members called {shown(member.filename)}")
    if sum(member.file_size for member in out.values()) > size:
        raise ValueError("its members overlap")
    return out


def _stored(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str, limit: int) -> bytes:
    """The bytes of a member, whose checksum zipfile compares."""
    if name not in members:
        raise ValueError(f"it has no member {shown(name)}")
    if members[name].file_size > limit:
        raise ValueError(f"its member {shown(name)} has {members[name].file_size:,} bytes, at most {limit:,} are read")
    return archive.read(members[name])


def _tensors(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], views: Mapping[str, _View]) -> dict[str, Tensor]:
    """Tensors in the bytes of their members, which they may share, but not so that they are larger in all."""
    held: dict[str, tuple[_Storage, Tensor]] = {}
    left = sum(member.file_size for member in members.values())
    out: dict[str, Tensor] = {}
    for name, view in views.items():
        storage = view.storage
        if storage.key not in held:
            content = bytearray(_stored(archive, members, f"data/{storage.key}", storage.elements * storage.dtype.itemsize))
            if len(content) != storage.elements * storage.dtype.itemsize:
                raise ValueError(f"the bytes of {shown(name)} are not as many as its storage has")
            held[storage.key] = storage, torch.frombuffer(content, dtype=storage.dtype) if content else torch.empty(0, dtype=storage.dtype)
        known, elements = held[storage.key]
        left -= math.prod(view.size) * storage.dtype.itemsize
        if known != storage or left < 0:
            raise ValueError(f"{shown(name)} shares its bytes with other tensors, which those of a calibration don't")
        out[name] = elements.as_strided(view.size, view.stride, view.offset)
    return out


# The pickle -----------------------------------------------------------------------------------------------------------


def _interpret(pickle: bytes) -> dict[str, _View]:
    """What the pickle would make, a dictionary of tensors, found by walking over its opcodes."""
    machine = _Machine()
    for opcode, argument, at in pickletools.genops(pickle):
        if opcode.name == "STOP":
            return machine.result()
        try:
            machine.step(opcode.name, argument)
        except (LookupError, TypeError) as error:
            raise ValueError(f"its pickle is damaged at byte {at}") from error
    raise ValueError("its pickle has no end")


class _Machine:
    """The stack and the memory of a pickle: strings, integers, constants, tuples, dictionaries of tensors, and the classes above."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """One opcode. Raises ValueError for what no dictionary of tensors is made of, LookupError or TypeError where the stack holds something else."""
        match name:
            case "PROTO" if argument == 2:
                pass
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                self.stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append(_CONSTANTS[name])
            case "BINPUT" | "LONG_BINPUT":
                self.memory[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memory[argument])
            case "MARK":
                self.stack.append(_Mark)
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(reversed([self._pop() for _ in range(int(name[-1]))])))
            case "TUPLE":
                self.stack.append(tuple(self._pop_marked()))
            case "GLOBAL":
                self.stack.append(_named(argument))
            case "BINPERSID":
                self.stack.append(_storage(self._pop()))
            case "REDUCE":
                arguments = self._pop()
                self.stack.append(_reduced(self._pop(), arguments))
            case "SETITEM":
                value, key = self._pop(), self._pop()
                _put(self.stack[-1], [key, value])
            case "SETITEMS":
                items = self._pop_marked()
                _put(self.stack[-1], items)
            case _:
                raise ValueError(f"its pickle has {name} {shown(argument)}, which no dictionary of tensors is made of")

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _Mark:
            raise LookupError
        return value

    def _pop_marked(self) -> list[Any]:
        """All values above the last mark, in the order in which they were put there."""
        values: list[Any] = []
        while (value := self.stack.pop()) is not _Mark:
            values.append(value)
        return values[::-1]

    def result(self) -> dict[str, _View]:
        if len(self.stack) != 1 or not isinstance(self.stack[0], dict):
            raise ValueError("its pickle makes no dictionary of tensors")
        return self.stack[0]


def _named(name: str) -> _Name:
    """A name, unless it is one that no dictionary of tensors needs."""
    if name not in (*STORAGES, REBUILD, ORDERED):
        raise ValueError(f"its pickle asks for {shown(name.replace(' ', '.'))}, which is not called: only tensors of floating-point numbers are read")
    return _Name(name)


def _storage(value: Any) -> _Storage:
    """From a persistent id: ("storage", class, key, device, elements)."""
    match value:
        case ("storage", _Name(name), str(key), str(), int(elements)) if name in STORAGES and elements >= 0:
            return _Storage(key, STORAGES[name], elements)
        case _:
            raise ValueError("its pickle has a reference that is no storage of floating-point numbers")


def _reduced(function: Any, arguments: Any) -> Any:
    """What the call of a known name would give."""
    match function, arguments:
        case _Name(name), () if name == ORDERED:
            return {}
        case _Name(name), (_Storage() as storage, int(offset), tuple(size), tuple(stride), bool(), {}, *_) if name == REBUILD:
            view = _View(storage, offset, size, stride)
            _require_inside(view)
            return view
        case _:
            raise ValueError("its pickle makes something else than a tensor")


def _require_inside(view: _View) -> None:
    """Raise ValueError unless every element of the tensor lies in its storage, and none is there twice by a stride of 0."""
    numbers = (view.offset, *view.size, *view.stride)
    fits = len(view.size) == len(view.stride) <= MAX_DIMENSIONS and all(isinstance(n, int) and 0 <= n <= MAX_STRIDE for n in numbers)
    if fits and (count := math.prod(view.size)):
        last = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
        fits = last < view.storage.elements and count <= view.storage.elements
    if not fits:
        raise ValueError("its pickle has a tensor that does not fit its storage")


def _put(target: Any, items: list[Any]) -> None:
    """Keys and tensors, one after another, into a dictionary."""
    if not isinstance(target, dict) or len(items) % 2:
        raise LookupError
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str) or not isinstance(value, _View):
            raise ValueError("its pickle has a dictionary of something else than tensors by name")
        target[key] = value
