"""Every source compiles for every architecture, and the cache is neither wrong nor in the way. No GPU, save for the last tests."""

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernel_definitions
import numpy as np
import pytest
import torch

from spectralquant.errors import BackendError
from spectralquant.kernels import compiler, disk_cache
from spectralquant.kernels.compiler import compile_cubin, find_obstacle, find_toolchain, load
from spectralquant.kernels.sources import SOURCES

pytest.importorskip("cuda.core", reason="needs the extra cuda", exc_type=ImportError)

ARCH = "sm_90"
DENSE = kernel_definitions.REPRESENTATIVE["dense.cu"][0]


@pytest.fixture
def stored(cache_home: Path) -> Path:
    """The cache file of dense.cu, compiled just now."""
    compile_cubin("dense.cu", DENSE, ARCH)
    (file,) = (cache_home / "spectralquant" / "kernels").iterdir()
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sources of the test's own."""
    made = tmp_path / "sources"
    made.mkdir()
    (made / "tiny.cu").write_text('#include "value.cuh"\nextern "C" __global__ void store(int* out, int x) { *out = x + VALUE + ADDED; }\n')
    (made / "value.cuh").write_text("constexpr int VALUE = 1;\n")
    return made


def test_every_source_has_representative_definitions() -> None:
    assert {file.name for file in SOURCES.glob("*.cu")} == kernel_definitions.REPRESENTATIVE.keys()


@pytest.mark.parametrize("arch", kernel_definitions.ARCHITECTURES)
@pytest.mark.parametrize("source", kernel_definitions.REPRESENTATIVE)
def test_compile_cubin(source: str, arch: str) -> None:
    for definitions in kernel_definitions.REPRESENTATIVE[source]:
        assert compile_cubin(source, definitions, arch)[:4] == b"\x7fELF"


def test_compile_cubin_takes_what_is_stored(stored: Path) -> None:
    disk_cache.write_cubin(stored.stem, b"not from a compiler")
    assert compile_cubin("dense.cu", DENSE, ARCH) == b"not from a compiler"
    assert compile_cubin("dense.cu", dict(reversed(DENSE.items())), ARCH) == b"not from a compiler"  # the order of definitions says nothing


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, None], ids=["empty", "garbage", "truncated"])
def test_compile_cubin_replaces_a_damaged_file(content: bytes | None, stored: Path) -> None:
    whole = stored.read_bytes()
    stored.write_bytes(whole[:1000] if content is None else content)
    assert compile_cubin("dense.cu", DENSE, ARCH)[:4] == b"\x7fELF"
    assert disk_cache.read_cubin(stored.stem) == whole[32:]


def test_compile_cubin_keeps_apart_what_differs(folder: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Architecture, definitions, source, included file, NVRTC and package: each makes another entry."""

    def entries() -> int:
        return len(list((cache_home / "spectralquant" / "kernels").iterdir()))

    compile_cubin("tiny.cu", {"ADDED": 1}, ARCH, folder)
    assert entries() == 1
    compile_cubin("tiny.cu", {"ADDED": 1}, "sm_80", folder)
    compile_cubin("tiny.cu", {"ADDED": 2}, ARCH, folder)
    assert entries() == 3
    (folder / "value.cuh").write_text("constexpr int VALUE = 2;\n")
    compile_cubin("tiny.cu", {"ADDED": 1}, ARCH, folder)
    assert entries() == 4
    (folder / "tiny.cu").write_text((folder / "tiny.cu").read_text() + "// more\n")
    compile_cubin("tiny.cu", {"ADDED": 1}, ARCH, folder)
    assert entries() == 5
    monkeypatch.setattr(compiler, "__version__", "0.0.0")
    compile_cubin("tiny.cu", {"ADDED": 1}, ARCH, folder)
    monkeypatch.setattr(compiler, "_nvrtc_version", lambda: (99, 0))
    compile_cubin("tiny.cu", {"ADDED": 1}, ARCH, folder)
    assert entries() == 7


def test_compile_cubin_is_safe_in_several_processes_at_once(cache_home: Path) -> None:
    code = f"from spectralquant.kernels.compiler import compile_cubin; print(len(compile_cubin('dense.cu', {DENSE}, {ARCH!r})))"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [p.communicate() for p in processes]
    (file,) = (cache_home / "spectralquant" / "kernels").iterdir()
    cubin = disk_cache.read_cubin(file.stem)
    assert cubin is not None and outputs == [(f"{len(cubin)}\n", "")] * 3


def test_compile_cubin_works_without_a_cache(cache_home: Path) -> None:
    cache_home.write_text("not a folder")
    assert compile_cubin("dense.cu", DENSE, ARCH)[:4] == b"\x7fELF"


def test_compile_cubin_shows_the_log_of_the_compiler(folder: Path, cache_home: Path) -> None:
    (folder / "value.cuh").write_text("\nint VALUE = nonsense;\n")
    with pytest.raises(BackendError, match=r"tiny\.cu can't be compiled for sm_90") as caught:
        compile_cubin("tiny.cu", {"ADDED": 1}, ARCH, folder)
    assert 'value.cuh(2): error: identifier "nonsense" is undefined' in str(caught.value)
    assert not cache_home.exists()


def test_compile_cubin_rejects_unknown_architectures() -> None:
    with pytest.raises(BackendError, match="gpu-architecture"):
        compile_cubin("dense.cu", DENSE, "sm_1")


def test_compile_cubin_rejects_missing_definitions() -> None:
    with pytest.raises(BackendError, match="define D, KEY_PLANES, VALUE_PLANES, IS_KEY"):
        compile_cubin("dense.cu", {"KEY_PLANES": 16}, ARCH)


@pytest.mark.parametrize("missing", ["cuda.core", "cuda.bindings.nvrtc"])
def test_missing_packages_name_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BackendError, match=r"spectralquant\[cuda\]"):
        compile_cubin("dense.cu", DENSE, ARCH)
    assert "spectralquant[cuda]" in (find_obstacle(ARCH) or "") and find_toolchain().nvrtc is None


def test_missing_nvrtc_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bindings are there, the library that they open is not."""
    from cuda.bindings import nvrtc

    def absent() -> None:
        raise RuntimeError("libnvrtc.so was not found")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", absent)
    with pytest.raises(BackendError, match=r"libnvrtc.so was not found.*spectralquant\[cuda\]"):
        compile_cubin("dense.cu", DENSE, ARCH)


@pytest.mark.parametrize(
    ("arch", "driver", "text"),
    [
        ("sm_90", None, "there is none"),
        ("sm_90", (12, 4), "this one supports CUDA 12.4"),
        ("sm_999", (99, 0), "doesn't compile for sm_999"),
        ("sm_90", (99, 0), None),
    ],
)
def test_find_obstacle(arch: str, driver: tuple[int, int] | None, text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_driver_version", lambda: driver)
    obstacle = find_obstacle(arch)
    assert obstacle is None if text is None else text in (obstacle or "")


def test_load_rejects_other_devices() -> None:
    with pytest.raises(BackendError, match="expected a CUDA device"):
        load("dense.cu", DENSE, "decode_units", torch.device("cpu"))


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_load_gives_the_same_kernel_every_time(folder: Path) -> None:
    device = torch.device("cuda", 0)
    first = load("tiny.cu", {"ADDED": 1}, "store", device, folder)
    assert load("tiny.cu", {"ADDED": 1}, "store", device, folder) is first
    assert load("tiny.cu", {"ADDED": 2}, "store", device, folder) is not first


@pytest.mark.gpu
def test_load_and_launch_in_many_threads(folder: Path) -> None:
    """One kernel for all; each thread launches, though cuda.core keeps its devices per thread."""
    device = torch.device("cuda", 0)

    def work(number: int) -> tuple[int, int]:
        kernel = load("tiny.cu", {"ADDED": 1}, "store", device, folder)
        out = torch.zeros(1, dtype=torch.int32, device=device)
        kernel(1, 1, 0, (out.data_ptr(), np.int32(number)))
        return id(kernel), int(out.item()) - number

    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(work, range(32)))
    assert len(results) == 1 and results.pop()[1] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("integer", [np.int32, ctypes.c_int32])
def test_launch_on_default_and_other_streams_of_every_device(integer: type, folder: Path) -> None:
    """Device 0 is current all the time: a kernel runs on its own device."""
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        kernel = load("tiny.cu", {"ADDED": 1}, "store", device, folder)
        for stream in (torch.cuda.default_stream(device), torch.cuda.Stream(device)):
            out = torch.zeros(1, dtype=torch.int32, device=device)
            torch.cuda.synchronize(device)
            before = torch.cuda.current_stream(device)
            with torch.cuda.device(device):
                torch.cuda.set_stream(stream)
            try:
                with torch.cuda.device(0):
                    kernel(1, 1, 0, (out.data_ptr(), integer(5)))
            finally:
                with torch.cuda.device(device):
                    torch.cuda.set_stream(before)
            stream.synchronize()
            assert out.item() == 7


@pytest.mark.gpu
def test_launch_is_captured_in_a_graph(folder: Path) -> None:
    device = torch.device("cuda", 0)
    kernel = load("tiny.cu", {"ADDED": 1}, "store", device, folder)
    out = torch.zeros(1, dtype=torch.int32, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(1, 1, 0, (out.data_ptr(), np.int32(5)))
    torch.cuda.synchronize()
    assert out.item() == 0
    graph.replay()
    torch.cuda.synchronize()
    assert out.item() == 7


@pytest.mark.gpu
def test_launch_takes_more_shared_memory_than_the_default(folder: Path) -> None:
    """The last byte of 48 to 64 KiB is written and read; more than any device has is refused by name."""
    (folder / "shared.cu").write_text(
        'extern "C" __global__ void touch(int* out, long long bytes) {\n'
        "    extern __shared__ char memory[];\n    __shared__ int fixed;\n    fixed = 3;\n"
        "    memory[bytes - 1] = 4;\n    *out = memory[bytes - 1] + fixed;\n}\n"
    )
    kernel = load("shared.cu", {}, "touch", torch.device("cuda", 0), folder)
    out = torch.zeros(1, dtype=torch.int32, device="cuda:0")
    for size in (1024, 48 * 1024, 64 * 1024, 50 * 1024):  # with the static 4 bytes 48 KiB is already over the default
        out.zero_()
        kernel(1, 1, size, (out.data_ptr(), size))
        assert out.item() == 7
    with pytest.raises(BackendError, match=r"touch: cuda:0 gives no \d+ bytes of shared memory"):
        kernel(1, 1, 1 << 20, (out.data_ptr(), 1 << 20))


@pytest.mark.gpu
def test_launch_rejects_a_wrong_number_of_arguments(folder: Path) -> None:
    kernel = load("tiny.cu", {"ADDED": 1}, "store", torch.device("cuda", 0), folder)
    with pytest.raises(BackendError, match="takes 2 arguments, got 1"):
        kernel(1, 1, 0, (0,))


@pytest.mark.gpu
def test_load_names_a_kernel_that_is_not_there(folder: Path) -> None:
    with pytest.raises(BackendError, match=r"kernel nowhere of tiny\.cu can't be loaded on cuda:0"):
        load("tiny.cu", {"ADDED": 1}, "nowhere", torch.device("cuda", 0), folder)
