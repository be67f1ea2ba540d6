"""Mutations of files, as a disk, a network or a malicious author makes them. All take a `random.Random`, so that a seed, or hypothesis, decides what they do.

Blind ones work on bytes: flips, truncations, extensions, splices, runs of one byte, and pieces of JSON or integers that are known to hurt. Others know a format
and leave it readable: those of safetensors change names, types, shapes, offsets, metadata and values, and give the file the right checksum again, as a
malicious author would; those of archives change members, names and opcodes; those of JSON change values in place.
"""

import hashlib
import io
import json
import warnings
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from safetensors.torch import load

from spectralquant.tensor_file import checksum

INTEGERS = (0, 1, 2, 3, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400, -1, -128, -(2**63))
NUMBERS = (*INTEGERS, 0.0, -0.0, 0.5, 1e-320, 1e-30, 1e30, 1e308, -1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    "\0",
    "\x1b[2J",
    "nan",
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "\ud800",
    "é" * 3,
    "x" * 5000,
    "0",
    "-1",
    "1e999",
    "layers.0.key.mean",
    "$\\frac$",
    "<b>",
)
DTYPES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "C64": 8,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
DTYPES |= {"F4": 1, "XX": 4}
SCRAPS = (
    b"\0" * 8,
    b"\xff" * 8,
    b"{}",
    b"[]",
    b"null",
    b'"',
    b"\\",
    b"[" * 2000,
    b'{"a":' * 2000,
    b"1" * 5000,
    b"1e999",
    b"NaN",
    b"-Infinity",
    b"\xed\xa0\x80",
    b"PK\x05\x06",
    b"PK\x01\x02",
    b"cos\nsystem\n",
    b"(S'id'\ntR.",
    b"\x80\x02",
    b"\x80\x05",
)

Mutation = Callable[[Random, bytes], bytes]


def flip(random: Random, data: bytes) -> bytes:
    """One to eight bits."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 8))):
        if out:
            out[_place(random, len(out))] ^= 1 << random.randrange(8)
    return bytes(out)


def truncate(random: Random, data: bytes) -> bytes:
    return data[: _place(random, len(data) + 1)]


def extend(random: Random, data: bytes) -> bytes:
    return data + random.choice((b"\0", random.choice(SCRAPS), random.randbytes(random.randrange(1, 600)), data))


def splice(random: Random, data: bytes) -> bytes:
    """A piece of the file, put somewhere else, over what is there or between."""
    size = random.choice((1, 4, 8, 64, 512))
    start, target = _place(random, len(data) + 1), _place(random, len(data) + 1)
    return data[:target] + data[start : start + size] + data[target + random.choice((0, size)) :]


def scrap(random: Random, data: bytes) -> bytes:
    """Bytes that are known to hurt, over what is there or between."""
    piece, target = random.choice(SCRAPS), _place(random, len(data) + 1)
    return data[:target] + piece + data[target + random.choice((0, len(piece))) :]


def erase(random: Random, data: bytes) -> bytes:
    """A run of one byte: a page that was never written."""
    start, size = _place(random, len(data) + 1), random.choice((1, 16, 512, 4096))
    return data[:start] + bytes([random.choice((0, 255))]) * len(data[start : start + size]) + data[start + size :]


def integer(random: Random, data: bytes) -> bytes:
    """A little-endian integer."""
    width, start = random.choice((1, 2, 4, 8)), _place(random, len(data) + 1)
    value = random.choice(INTEGERS) % (1 << 8 * width)
    return data[:start] + value.to_bytes(width, "little") + data[start + width :]


def _place(random: Random, size: int) -> int:
    """Half of the time near the beginning or the end, where the structure is."""
    near = random.choice((8, 64, 1024, size, size))
    at = random.randrange(max(min(near, size), 1))
    return at if random.random() < 0.8 else max(size - 1 - at, 0)


BLIND: tuple[Mutation, ...] = (flip, truncate, extend, splice, scrap, erase, integer)


# JSON -----------------------------------------------------------------------------------------------------------------


def edit_value(random: Random, value: Any) -> Any:
    """A JSON value with one part of it replaced, removed, added, repeated or renamed."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        name = random.choice(list(value))
        match random.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != name}
            case 1:
                return {(random.choice((*TEXTS, f"{k}0")) if k == name else k): v for k, v in value.items()}
            case 2:
                return {**value, random.choice((*TEXTS, *map(str, range(4)))): any_value(random)}
            case _:
                return {**value, name: edit_value(random, value[name])}
    if isinstance(value, list) and value and random.random() < 0.85:
        at = random.randrange(len(value))
        match random.randrange(6):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value[:at] + value[at : at + 1] * random.choice((2, 3, 40)) + value[at + 1 :]
            case _:
                return [*value[:at], edit_value(random, value[at]), *value[at + 1 :]]
    if isinstance(value, str) and value[:1] in ("{", "[") and random.random() < 0.8:  # metadata are JSON inside of JSON
        return json.dumps(edit_value(random, json.loads(value)))
    if isinstance(value, (int, float)) and not isinstance(value, bool) and random.random() < 0.4:
        return random.choice((value + 1, -value, value * 2, value // 3, value * 1000, str(value), [value]))
    return any_value(random)


def any_value(random: Random) -> Any:
    nested: Any = 1
    for _ in range(random.choice((40, 200))):
        nested = [nested]
    return random.choice(
        (None, True, False, [], {}, [[]], {"": None}, nested, random.choice(NUMBERS), random.choice(NUMBERS), random.choice(TEXTS), [random.choice(TEXTS)])
    )


def edit_json(random: Random, data: bytes) -> bytes:
    """A JSON document, or JSON lines, with some values edited. Names may come twice."""
    try:
        json.loads(data)
        lines = [data.decode("utf-8")]
    except ValueError:
        lines = data.decode("utf-8").splitlines()
    at = random.randrange(len(lines))
    value = json.loads(lines[at])
    for _ in range(random.choice((1, 1, 2, 4))):
        value = edit_value(random, value)
    lines[at] = json.dumps(value)
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


# safetensors ----------------------------------------------------------------------------------------------------------


def edit_tensors(random: Random, data: bytes) -> bytes:
    """Names, types, shapes, offsets or metadata in the header of a safetensors file; offsets are right again most of the time, and the checksum."""
    header, body = _open(data)
    entries: dict[str, Any] = {name: dict(entry) for name, entry in header.items() if name != "__metadata__"}
    parts = {name: body[slice(*entry["data_offsets"])] for name, entry in entries.items()}
    metadata = dict(header.get("__metadata__", {}))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        name = random.choice(list(entries)) if entries else ""
        match random.randrange(10) if entries else 9:
            case 0:
                entries.pop(name), parts.pop(name)
            case 1:
                other = random.choice((*entries, *TEXTS, name.replace("0", random.choice(("00", "1", "9999999", "-1", "x", "7")))))
                entries[other], parts[other] = entries.pop(name), parts.pop(name)
            case 2:
                entries[name]["dtype"] = random.choice(list(DTYPES))
                parts[name] = _filled(random, entries[name])
            case 3 | 4:
                entries[name]["shape"] = _other_shape(random, entries[name]["shape"])
                parts[name] = _filled(random, entries[name], parts[name])
            case 5:
                other = random.choice(list(entries))
                entries[name], parts[name] = dict(entries[other]), parts[other]
            case 6 | 7:
                parts[name] = _other_values(random, parts[name])
            case _:
                metadata = edit_value(random, metadata) if random.random() < 0.9 else any_value(random)
                metadata = metadata if isinstance(metadata, dict) else {}
                metadata = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    return _close(random, entries, parts, metadata)


def _open(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _close(random: Random, entries: dict[str, Any], parts: dict[str, bytes], metadata: dict[str, str]) -> bytes:
    at = 0
    for name, entry in entries.items():
        entry["data_offsets"] = [at, at + len(parts[name])]
        at += len(parts[name])
    if entries and random.random() < 0.03:
        random.choice(list(entries.values()))["data_offsets"] = [random.choice((0, 1, 8, at, 2**40)), random.choice((0, at, at + 1, 2**40))]

    def packed() -> bytes:
        header = json.dumps({"__metadata__": metadata, **entries}).encode("utf-8", "surrogatepass")
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + b"".join(parts[name] for name in entries)

    if "checksum" in metadata and random.random() < 0.97:
        try:
            metadata["checksum"] = checksum(load(packed()), metadata)
        except Exception:  # what safetensors can't read has no checksum
            metadata["checksum"] = hashlib.sha256(b"").hexdigest()
    return packed()


def _other_shape(random: Random, shape: list[int]) -> list[int]:
    if not shape or random.random() < 0.2:
        return random.choice(([], [0], [1], [1, 1], [0, 2**40], [2**40, 2**40], [1] * 70, [16], [3, 5]))
    at = random.randrange(len(shape))
    return random.choice(
        (
            [*shape[:at], random.choice((0, 1, 2, 16, 31, 33, shape[at] + 1, 2 * shape[at], 2**20, 2**63 - 1)), *shape[at + 1 :]],
            shape[::-1], shape[:at] + shape[at + 1 :], [*shape, 1], [1, *shape], [*shape[:at], shape[at] * shape[-1], *shape[at + 1 : -1]],
        )
    )  # fmt: skip


def _filled(random: Random, entry: dict[str, Any], content: bytes = b"") -> bytes:
    """As many bytes as the entry asks for, where they are not too many."""
    size = DTYPES.get(entry["dtype"], 4)
    for n in entry["shape"]:
        size *= n
    return (content or random.randbytes(64))[:size].ljust(size, random.choice((b"\0", b"\x3f", b"\xff"))) if size < 1 << 20 else content


def _other_values(random: Random, content: bytes) -> bytes:
    """Floats of some kind, in the type that most tensors have."""
    if len(content) % 4 or not content:
        return random.randbytes(len(content))
    values = torch.frombuffer(bytearray(content), dtype=torch.float32).clone()
    value = random.choice((0.0, 1.0, -1.0, 1e-45, 1e-38, 1e-20, 1e10, 1e19, 1e30, 3e38, float("nan"), float("inf")))
    match random.randrange(5):
        case 0:
            values.fill_(value)
        case 1:
            values[random.randrange(len(values))] = value
        case 2:
            values.mul_(value)
        case 3:
            values[: random.randrange(len(values) + 1)] = value
        case _:
            values = values.flip(0)
    return values.numpy().tobytes()


# Archives of torch.save -----------------------------------------------------------------------------------------------


def edit_archive(random: Random, data: bytes) -> bytes:
    """Members of an archive: their content, names, number and compression; its pickle above all."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(member.filename, archive.read(member)) for member in archive.infolist()]
    compression = zipfile.ZIP_STORED
    for _ in range(random.choice((1, 1, 2))):
        pickles = [i for i, (name, _) in enumerate(members) if name.endswith("data.pkl")]
        at = random.choice(pickles if pickles and random.random() < 0.7 else range(len(members)))
        name, content = members[at]
        match random.randrange(12):
            case 0:
                members.pop(at)
                return _zipped(members, compression)
            case 1:
                members.append((name, content))
            case 2:
                members[at] = random.choice(TEXTS[4:]), content
            case 3:
                compression = zipfile.ZIP_DEFLATED
                members[at] = name, content + b"\0" * random.choice((0, 1 << 20))
            case 4 if name.endswith("data.pkl"):
                members[at] = name, _hostile(random)
            case _:
                members[at] = name, random.choice(BLIND)(random, content)
    return _zipped(members, compression)


def _zipped(members: list[tuple[str, bytes]], compression: int) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", compression) as archive:
        warnings.simplefilter("ignore")  # names may come twice
        for name, content in members:
            archive.writestr(name.encode("utf-8", "replace").decode(), content)
    return out.getvalue()


def _hostile(random: Random) -> bytes:
    """A pickle that would run something, or grow without end."""
    bomb = b"\x80\x02)" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(200)) + b"."
    calls = (b"cposix\nsystem\nX\x02\0\0\0id\x85R.", b"cbuiltins\neval\nX\x011\0\0\x85R.", b"ctorch\nload\n)R.", b"(dq\0X\1\0\0\0aq\1h\0s.")
    return random.choice((bomb, *(b"\x80\x02" + call for call in calls), b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".", b"\x80\x02}" + b"(" * 5000 + b"u."))
