"""Source + definitions + architecture -> a kernel that launches on torch's current stream.

CUDA C++ is compiled by NVRTC at first use: no build step, no CUDA toolkit, one wheel for all GPUs. Compiling needs no GPU, loading does.
A compiled kernel (cubin) is kept on disk under a hash of everything it depends on, a loaded one for the life of the process.

This is the only file that imports `cuda`, and it does so inside functions: the packages are the extra `spectralquant[cuda]`.
"""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from spectralquant.errors import BackendError
from spectralquant.kernels.disk_cache import read_cubin, write_cubin
from spectralquant.kernels.sources import SOURCES, read_source
from spectralquant.version import __version__

DIALECT = "c++17"
DEFAULT_SHARED_BYTES = 48 * 1024
"""Shared memory of a block that needs no permission from the driver, static and dynamic together."""

_INSTALL = 'install it with: pip install "spectralquant[cuda]"'

# Compiling -----------------------------------------------------------------------------------------------------------


def compile_cubin(source: str, definitions: Mapping[str, int], arch: str, folder: Path = SOURCES) -> bytes:
    """The cubin of one source file, from the disk cache or from NVRTC. Needs no GPU.

    Args:
        source: Name of a `.cu` file in `folder`.
        definitions: Macro -> value.
        arch: Real architecture, as "sm_90".

    Raises:
        BackendError: The text has the source's name and NVRTC's log, or the extra to install.
    """
    text = read_source(source, folder)
    key = _cubin_key(text, definitions, arch, _nvrtc_version())
    cubin = read_cubin(key)
    if cubin is None:
        cubin = _run_nvrtc(source, text, definitions, arch)
        write_cubin(key, cubin)
    return cubin


def _cubin_key(text: str, definitions: Mapping[str, int], arch: str, nvrtc: tuple[int, int]) -> str:
    """SHA-256 (hexadecimal) of all that a cubin depends on; `text` has the includes in it."""
    parts = [text, sorted((name, int(value)) for name, value in definitions.items()), arch, DIALECT, nvrtc, __version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _run_nvrtc(source: str, text: str, definitions: Mapping[str, int], arch: str) -> bytes:
    core = _import_core()
    macros = [(name, str(int(value))) for name, value in definitions.items()]
    try:
        options = core.ProgramOptions(name=source, std=DIALECT, arch=arch, define_macro=macros or None, no_source_include=True)
        return bytes(core.Program(text, "c++", options).compile("cubin").code)
    except Exception as error:  # cuda.core's exceptions have no public common class; the text of NVRTC's holds its log
        raise BackendError(f"{source} can't be compiled for {arch} with {dict(definitions)}: {error}") from error


def _nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC library that is found.

    Raises:
        BackendError: A package of the extra is missing.
    """
    try:
        _import_core()  # NVRTC alone won't do
        nvrtc = _import_bindings("nvrtc")
    except ImportError as error:
        raise BackendError(f"CUDA kernels need the package cuda-core with its CUDA 13 bindings ({error}); {_INSTALL}") from error
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        raise BackendError(f"CUDA kernels need the package nvidia-cuda-nvrtc ({error}); {_INSTALL}") from error
    return major, minor


# cuda.core fills itself at import, so type checkers know none of its names: Any.


def _import_core() -> Any:
    import cuda.core

    return cuda.core


def _import_bindings(name: Literal["driver", "nvrtc"]) -> Any:
    return import_module(f"cuda.bindings.{name}")


# What is there -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Toolchain:
    """Versions found on this machine, None where nothing is: of the package cuda-core, of the NVRTC library and of the newest CUDA that
    the driver supports."""

    cuda_core: str | None
    nvrtc: tuple[int, int] | None
    driver: tuple[int, int] | None


def find_toolchain() -> Toolchain:
    """What is installed; never raises and makes no CUDA context."""
    try:
        nvrtc = _nvrtc_version()
    except BackendError:
        nvrtc = None
    try:
        core = version("cuda-core")
    except PackageNotFoundError:
        core = None
    return Toolchain(core, nvrtc, _driver_version())


def find_obstacle(arch: str) -> str | None:
    """Why kernels for `arch` can't be compiled and loaded here, in words with the remedy, or None. Makes no CUDA context."""
    try:
        major, minor = _nvrtc_version()
    except BackendError as error:
        return str(error)
    _, supported = _import_bindings("nvrtc").nvrtcGetSupportedArchs()
    if arch not in {f"sm_{number}" for number in supported}:
        return f"NVRTC {major}.{minor} doesn't compile for {arch}; install a nvidia-cuda-nvrtc that does"
    driver = _driver_version()
    if driver is None or driver[0] < major:
        found = "there is none" if driver is None else f"this one supports CUDA {driver[0]}.{driver[1]}"
        return f"kernels compiled by NVRTC {major}.{minor} need a driver for CUDA {major} ({found}); update the NVIDIA driver"
    return None


def _driver_version() -> tuple[int, int] | None:
    try:
        driver = _import_bindings("driver")
        status, number = driver.cuDriverGetVersion()
    except (ImportError, RuntimeError):  # no bindings; no driver library
        return None
    return (number // 1000, number % 1000 // 10) if status == driver.CUresult.CUDA_SUCCESS else None


# Loading and launching -----------------------------------------------------------------------------------------------


class Kernel:
    """A kernel loaded on one device; made by `load`."""

    name: str
    device: int

    def __init__(self, name: str, cubin: bytes, device: int) -> None:
        core = _import_core()
        self.name, self.device = name, device
        self._code = core.ObjectCode.from_cubin(cubin, name=name)
        self._kernel = self._code.get_kernel(name)
        self._launch = core.launch
        self._parameters = self._kernel.num_arguments
        self._shared_limit = DEFAULT_SHARED_BYTES - self._kernel.attributes[device].shared_size_bytes
        self._lock = threading.Lock()

    def __call__(self, grid: int | tuple[int, ...], block: int | tuple[int, ...], shared_bytes: int, args: Sequence[Any]) -> None:
        """Launch on the current stream of the kernel's device; returns before the kernel has run.

        Args:
            grid, block: Blocks and threads per block, in one to three dimensions.
            shared_bytes: Dynamic shared memory per block.
            args: One per parameter. An int is passed as 64 bits: a pointer (`tensor.data_ptr()`) or a `long long`. Other scalars carry
                their size: `numpy.int32`, `numpy.float32` or `ctypes` values; a Python float is a double. Sizes are not checked.

        Raises:
            BackendError: The number of arguments is wrong, or the device has less shared memory.
        """
        if len(args) != self._parameters:
            raise BackendError(f"kernel {self.name} takes {self._parameters} arguments, got {len(args)}")
        if shared_bytes > self._shared_limit:
            self._raise_shared_limit(shared_bytes)
        config = _launch_config(grid, block, shared_bytes)
        if torch.cuda.current_device() == self.device:
            self._launch(_current_stream(self.device), config, self._kernel, *args)
        else:  # torch's default stream has the handle 0, which means the default stream of whichever device is current
            with torch.cuda.device(self.device):
                self._launch(_current_stream(self.device), config, self._kernel, *args)

    def _raise_shared_limit(self, shared_bytes: int) -> None:
        driver = _import_bindings("driver")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with self._lock:
            if shared_bytes <= self._shared_limit:
                return
            (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, driver.CUkernel(int(self._kernel.handle)), driver.CUdevice(self.device))
            if status != driver.CUresult.CUDA_SUCCESS:
                raise BackendError(f"kernel {self.name}: cuda:{self.device} gives no {shared_bytes} bytes of shared memory to a block ({status.name})")
            self._shared_limit = shared_bytes


_loaded: dict[tuple[Any, ...], Kernel] = {}
_loading = threading.Lock()


def load(source: str, definitions: Mapping[str, int], name: str, device: torch.device, folder: Path = SOURCES) -> Kernel:
    """The kernel `name` (declared `extern "C"`) of a source file on a CUDA device, compiled if need be; the same object every time.

    The first call for a kernel takes about a second without the disk cache. It may not be inside the capture of a CUDA graph; launches may.

    Raises:
        BackendError: No CUDA device, or compiling or loading fails.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise BackendError(f"kernel {name} of {source} can't be loaded on device {str(device)!r}: expected a CUDA device that torch can use")
    index = torch.cuda.current_device() if device.index is None else device.index  # pyright: ignore[reportUnnecessaryComparison]
    key = (index, folder, source, name, frozenset(definitions.items()))
    kernel = _loaded.get(key)
    if kernel is None:
        with _loading:  # two threads would compile the same thing
            kernel = _loaded.get(key)
            if kernel is None:
                kernel = _loaded[key] = _load_new(source, definitions, name, index, folder)
    return kernel


def _load_new(source: str, definitions: Mapping[str, int], name: str, index: int, folder: Path) -> Kernel:
    cubin = compile_cubin(source, definitions, arch_of(torch.device("cuda", index)), folder)
    with torch.cuda.device(index):
        _make_current(index)
        try:
            return Kernel(name, cubin, index)
        except Exception as error:  # as above: no public common class
            raise BackendError(f"kernel {name} of {source} can't be loaded on cuda:{index}: {error}") from error


def arch_of(device: torch.device) -> str:
    """The real architecture of a CUDA device, as "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _make_current(index: int) -> Any:
    """cuda.core's object of the device, which it wants made current in every thread; for torch it is current already."""
    device = _import_core().Device(index)
    device.set_current()
    return device


# Building a stream object or a launch configuration takes longer than a launch, so both are kept. Bounded: grids follow lengths.


@lru_cache(maxsize=1024)
def _launch_config(grid: int | tuple[int, ...], block: int | tuple[int, ...], shared_bytes: int) -> Any:
    return _import_core().LaunchConfig(grid=grid, block=block, shmem_size=shared_bytes)


def _current_stream(index: int) -> Any:
    # What torch.compile's generated code calls: torch.cuda.current_stream would build an object to tell the same number.
    return _stream(index, torch._C._cuda_getCurrentRawStream(index))  # pyright: ignore[reportPrivateUsage]


@lru_cache(maxsize=256)
def _stream(index: int, handle: int) -> Any:
    return _make_current(index).create_stream(_ForeignStream(handle))


class _ForeignStream:
    """A stream of torch's, in the protocol by which CUDA libraries pass streams."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle
