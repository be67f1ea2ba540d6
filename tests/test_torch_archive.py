"""Files of torch.save, read without unpickling: equal to torch.load where they hold tensors by name, refused where they hold anything else."""

import collections
import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from spectralquant import torch_archive
from spectralquant.torch_archive import read_tensors

TENSORS: dict[str, Callable[[], Any]] = {
    "plain": lambda: {"a": torch.randn(3, 4), "b": torch.randn(5)},
    "dtypes": lambda: {str(d): torch.randn(6).to(d) for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)},
    "transposed": lambda: {"a": torch.randn(3, 4).T},
    "part of a storage": lambda: {"a": torch.randn(10)[3:7], "b": torch.randn(4, 6)[1:3, ::2]},
    "parts that share a storage": lambda: dict(zip("abc", torch.randn(3, 4), strict=True)),
    "empty": lambda: {"a": torch.empty(0), "b": torch.empty(3, 0, 2)},
    "scalar": lambda: {"a": torch.tensor(2.5)},
    "wants gradients": lambda: {"a": torch.randn(3, requires_grad=True)},
    "ordered": lambda: collections.OrderedDict(a=torch.ones(2), b=torch.zeros(1)),
    "many": lambda: {f"L{i}_H0_key_eval": torch.randn(2) for i in range(3000)},
    "one": lambda: {"a": torch.ones(1)},
    "none": dict,
}


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_equal_to_torch_load(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "x.pt")
    want, got = torch.load(tmp_path / "x.pt", weights_only=True), read_tensors(tmp_path / "x.pt")
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype and not got[name].requires_grad


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: {"a": a}, lambda a: {"a": torch.ones(2), "b": [a]}], ids=["alone", "value", "inside"])
def test_code_is_not_run(tmp_path: Path, wrap: Callable[[Any], Any], protocol: int) -> None:
    ran = tmp_path / "ran"
    torch.save(wrap(Attack(ran)), tmp_path / "x.pt", pickle_protocol=protocol)
    with pytest.raises(ValueError, match="its pickle"):
        read_tensors(tmp_path / "x.pt")
    assert not ran.exists()
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert ran.exists()  # the file is a real attack


REFUSED: dict[str, Callable[[], Any]] = {
    "list": lambda: [torch.ones(2)],
    "tensor": lambda: torch.ones(2),
    "string": lambda: {"a": "b"},
    "number": lambda: {"a": 1},
    "name": lambda: {1: torch.ones(2)},
    "inside": lambda: {"a": {"b": torch.ones(2)}},
    "integers": lambda: {"a": torch.arange(3)},
    "complex": lambda: {"a": torch.ones(2, dtype=torch.complex64)},
    "expanded": lambda: {"a": torch.ones(1).expand(1000)},
    "shared": lambda: dict.fromkeys("abcdefgh", torch.ones(1000)),
    "module": lambda: torch.nn.Linear(2, 2),
    "sparse": lambda: {"a": torch.ones(2, 2).to_sparse()},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_everything_else_is_refused(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"its pickle|shares its bytes"):
        read_tensors(tmp_path / "x.pt")


def archive(path: Path, change: Callable[[dict[str, bytes]], None] = lambda members: None, compression: int = zipfile.ZIP_STORED) -> Path:
    """A valid archive whose members `change` edits, by their names without the folder."""
    torch.save({"a": torch.arange(8.0), "b": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as read:
        members = {name.partition("/")[2]: read.read(name) for name in read.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, content in members.items():
            out.writestr(f"x/{name}", content)
    return path


def test_a_bomb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt", lambda m: m.update({"data/0": b"\0" * (1 << 24)}), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="compressed or encrypted"):
        read_tensors(path)


def test_a_large_pickle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'data\.pkl' has 4,194,305 bytes, at most 4,194,304"):
        read_tensors(archive(tmp_path / "x.pt", lambda m: m.update({"data.pkl": b"." * ((4 << 20) + 1)})))


def test_a_large_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "x.pt")
    monkeypatch.setattr(torch_archive, "MAX_DIRECTORY", 100)
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"list of members has .* at most 100"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.pop("data.pkl"), r"no member 'data\.pkl'"),
        (lambda m: m.pop("data/0"), "no member 'data/0'"),
        (lambda m: m.update({"data/0": b"1234"}), "not as many as its storage has"),
        (lambda m: m.update({"data/0": m["data/0"] + b"1234"}), "at most 32 are read"),
        (lambda m: m.update({"byteorder": b"big"}), "not little-endian"),
        (lambda m: m.update({"data.pkl": m["data.pkl"][:-1]}), "its pickle|no archive|exhausted"),
        (lambda m: m.update({"data.pkl": b"\x80\x02}q\0h\5."}), "its pickle is damaged at byte 5"),
        (lambda m: m.update({"data.pkl": b"\x80\x02(."}), "makes no dictionary"),
        (lambda m: m.update({"data.pkl": b"\x80\x02."}), "makes no dictionary"),
        (lambda m: m.update({"data.pkl": b"\x80\x02}u."}), "its pickle is damaged"),
        (lambda m: m.update({"data.pkl": b"\x80\x05}."}), "its pickle has PROTO 5"),
        (lambda m: m.update({"data.pkl": b"\x80\x02cposix\nsystem\nX\2\0\0\0id\x85R."}), r"asks for 'posix\.system'"),
        (lambda m: m.update({"data.pkl": b"\x80\x02X\2\0\0\0idQ."}), "no storage of floating-point numbers"),
    ],
)
def test_damaged_archives(tmp_path: Path, change: Callable[[dict[str, bytes]], None], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_tensors(archive(tmp_path / "x.pt", change))


def test_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt")
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "a") as out:
        out.writestr("x/data.pkl", b"other")
    with pytest.raises(ValueError, match=r"two members called 'x/data\.pkl'"):
        read_tensors(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02}.", b"\0" * 1000, pickle.dumps({}, 2)])
def test_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"no archive of torch\.save"):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (9,), (1,)), (1, (8,), (1,)), (0, (8,), (2,)), (0, (2, 8), (0, 1)), (-1, (1,), (1,)), (0, (-1,), (1,)), (0, (2**62,), (1,)), (0, (8,), (1, 1))],
)
def test_tensors_lie_in_their_storage(tmp_path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """The pickle of one tensor with other numbers in it."""
    buffer = io.BytesIO()

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 8) if obj is Storage else None

        def save_global(self, obj: Any, name: str | None = None) -> None:
            if obj is torch.FloatStorage:
                self.write(b"ctorch\nFloatStorage\n")
            else:
                super().save_global(obj, name)

        dispatch: ClassVar[dict[Any, Any]] = {**pickle._Pickler.dispatch, type(torch.FloatStorage): save_global}

    class Storage:
        pass

    class View:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage, offset, size, stride, False, collections.OrderedDict())

    Pickler(buffer, 2).dump({"a": View()})
    assert "GLOBAL" in {op.name for op, _, _ in pickletools.genops(buffer.getvalue())}
    with pytest.raises(ValueError, match="does not fit its storage"):
        read_tensors(archive(tmp_path / "x.pt", lambda m: m.update({"data.pkl": buffer.getvalue()})))


def test_sizes_of_the_end_record_are_not_believed(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pt")
    content = bytearray(path.read_bytes())
    content[-10:-6] = struct.pack("<I", 1 << 31)
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="list of members has 2,147,483,648 bytes"):
        read_tensors(path)
