"""What a process needs of a model before vLLM builds it: its calibration, checked, and the codecs of the KV heads that this process holds.

Every process reads the file for itself, so nothing has to be sent; what it computes from it is the same everywhere.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spectralquant.codec.codec import LayerCodec, build_codec
from spectralquant.codec.layout import UNIT
from spectralquant.config import Dials
from spectralquant.errors import ConfigError, ProfileError
from spectralquant.integrations.vllm.options import Options, read_options
from spectralquant.model_folder import find_calibration, fingerprint_of_folder, missing_calibration
from spectralquant.paged.layout import PageLayout
from spectralquant.paged.recent import HELD_UNITS, copies_for
from spectralquant.pretrained import calibration_file
from spectralquant.profile import Profile, load_profile

_log = logging.getLogger("vllm.spectralquant")  # below "vllm", whose messages a server shows
_MEMORY_SHARE = 1 / 4
"""Of the device's memory, at most, for exact copies unless the user says how many."""


@dataclass(frozen=True, slots=True)
class Setup:
    """One model in one process.

    Attributes:
        options: What the user said.
        codecs: By layer index, on the device of the model, with the KV heads of this rank.
        copies: Exact copies of recent pages.
        ranks: Processes that hold heads of a layer.
        file: The calibration.
    """

    options: Options
    codecs: dict[int, LayerCodec]
    copies: int
    ranks: int
    file: Path

    @property
    def layout(self) -> PageLayout:
        """Of every layer's pages."""
        codec = next(iter(self.codecs.values()))
        return PageLayout(codec.layout, codec.heads, codec.head_dim, self.options.exact_per_page)


@dataclass(slots=True)
class _Process:
    """What this process knows.

    Attributes:
        setups: What was made so far.
        config: vLLM's configuration, the latest that was seen: vLLM doesn't say it in every call.
    """

    setups: dict[tuple[Any, ...], Setup] = field(default_factory=dict)
    config: Any = None


_process = _Process()


def current_config() -> Any:
    """vLLM's configuration in this process, None before there is one."""
    from vllm.config import get_current_vllm_config_or_none

    _process.config = get_current_vllm_config_or_none() or _process.config
    return _process.config


def setup_of(vllm_config: Any) -> Setup:
    """The setup of the model of `vllm_config`, made once per process.

    Raises:
        ConfigError: An option is out of its range, or vLLM is asked for what packed pages can't do.
        CalibrationError: No calibration was named and none is found; the text says how to make one.
        ProfileError: The calibration is damaged or was made for another model.
    """
    options = read_options(vllm_config.additional_config) or Options()
    rank, size = tensor_parallel(vllm_config)
    model = vllm_config.model_config
    key = options, model.model, model.revision, rank, size
    if key not in _process.setups:
        _refuse(vllm_config)
        file, profile = _calibration(model, options)
        _require_shapes(file, profile, model)
        heads = heads_of(next(iter(profile.layers.values())).heads, rank, size)
        codecs = build_codec(profile, options.compression, Dials(), device_of(vllm_config), "joint", heads=heads)
        copies = options.recent_pages or _default_copies(codecs, vllm_config.scheduler_config.max_num_seqs)
        _process.setups[key] = made = Setup(options, codecs, copies, size, file)
        _announce(made, vllm_config)
    return _process.setups[key]


def tensor_parallel(vllm_config: Any) -> tuple[int, int]:
    """Rank and size of the tensor-parallel group; rank 0 in processes that belong to none, which ask for sizes only."""
    from vllm.distributed import parallel_state

    size = vllm_config.parallel_config.tensor_parallel_size
    return (parallel_state.get_tensor_model_parallel_rank() if parallel_state.model_parallel_is_initialized() else 0), size


def heads_of(heads: int, rank: int, size: int) -> slice:
    """The KV heads of a rank: `heads` / `size` of them one after another, or one, which several ranks share, where there are more ranks than heads.

    Raises:
        ConfigError: Heads and ranks don't divide.
    """
    if max(heads, size) % min(heads, size):
        raise ConfigError(f"tensor_parallel_size={size}: expected a divisor or a multiple of the model's {heads} KV heads")
    if size >= heads:
        first = rank // (size // heads)
        return slice(first, first + 1)
    return slice(rank * heads // size, (rank + 1) * heads // size)


def device_of(vllm_config: Any) -> torch.device:
    """Where this process computes."""
    kind = vllm_config.device_config.device_type
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def model_path(model_config: Any) -> Path:
    """The folder of a model: as it was named, or where the hub's client keeps it."""
    if Path(model_config.model).is_dir():
        return Path(model_config.model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True))


def _refuse(vllm_config: Any) -> None:
    """What a page of codes can't do, said before a model is loaded."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if parallel.decode_context_parallel_size > 1:
        raise ConfigError(f"decode_context_parallel_size={parallel.decode_context_parallel_size}: expected 1; a page holds whole units of 128 tokens")
    if cache.cache_dtype not in ("auto", "float16", "bfloat16"):
        raise ConfigError(f'kv_cache_dtype="{cache.cache_dtype}": expected "auto"; the pages are packed already')
    if cache.block_size is not None and cache.user_specified_block_size and cache.block_size % UNIT:
        raise ConfigError(f"block_size={cache.block_size}: expected a multiple of {UNIT}, or leave it out")


def _calibration(model_config: Any, options: Options) -> tuple[Path, Profile]:
    folder = model_path(model_config)
    fingerprint = fingerprint_of_folder(folder)
    if options.calibration is None:
        found = find_calibration(folder, fingerprint)
        if found is None:
            raise missing_calibration(folder, fingerprint)
        return found
    file = calibration_file(Path(options.calibration))
    profile = load_profile(file)
    try:
        profile.require_model(fingerprint)
    except ProfileError as error:
        raise ProfileError(f"calibration {file} is refused: {error}") from error
    return file, profile


def _require_shapes(file: Path, profile: Profile, model_config: Any) -> None:
    layer = next(iter(profile.layers.values()))
    got, want = (layer.heads, layer.head_dim), (model_config.get_total_num_kv_heads(), model_config.get_head_size())
    if got != want:
        raise ProfileError(f"calibration {file} has {got[0]} KV heads of size {got[1]}, the model has {want[0]} of size {want[1]}; calibrate this model")


def _default_copies(codecs: dict[int, LayerCodec], sequences: int) -> int:
    """Enough for all sequences that may run at a time, as far as a share of the memory goes."""
    from vllm.platforms import current_platform

    room = int(_MEMORY_SHARE * current_platform.get_device_total_memory()) // copy_bytes(codecs)
    return max(min(copies_for(sequences), room), copies_for(1))


def copy_bytes(codecs: dict[int, LayerCodec]) -> int:
    """Bytes of the exact copy of a page, in all layers."""
    return sum(2 * 2 * UNIT * codec.heads * codec.head_dim for codec in codecs.values())


def _announce(made: Setup, vllm_config: Any) -> None:
    layout, sequences = made.layout, vllm_config.scheduler_config.max_num_seqs
    dense = 2 * 2 * layout.heads * layout.head_dim
    _log.info("spectralquant packs %d layers by preset %s, calibration %s", len(made.codecs), made.options.preset, made.file)
    _log.info("a token takes %d bytes a layer instead of %d (%.2fx)", layout.bytes_per_token, dense, dense / layout.bytes_per_token)
    _log.info("exact copies of %d recent pages take %.0f MiB", made.copies, made.copies * copy_bytes(made.codecs) / 2**20)
    if made.copies < copies_for(sequences):
        _log.warning(
            "exact copies are enough for %d sequences at a time, --max-num-seqs is %d: when more run, some read their latest tokens by codes, which costs "
            'quality; lower --max-num-seqs, or raise "recent_pages"', made.copies // HELD_UNITS, sequences,
        )  # fmt: skip
