from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from spectralquant.config import CacheConfig, Dials, require_int
from spectralquant.errors import ConfigError


@pytest.mark.parametrize("value", [3, 3.0])
def test_require_int_takes_whole_numbers(value: Any) -> None:
    got = require_int("n", value, 3, 3)
    assert got == 3 and type(got) is int


@pytest.mark.parametrize("value", [2.5, "3", None, True, 3j, [3]])
def test_require_int_rejects_what_is_no_integer(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"n=.*: expected an integer from 1 to 9; fractions are never rounded"):
        require_int("n", value, 1, 9)


@pytest.mark.parametrize("value", [0, -5, 10])
def test_require_int_rejects_out_of_range(value: int) -> None:
    with pytest.raises(ConfigError, match=f"n={value} is out of range: expected an integer from 1 to 9"):
        require_int("n", value, 1, 9)


def test_require_int_without_upper_bound() -> None:
    assert require_int("n", 10**12, 1) == 10**12
    with pytest.raises(ConfigError, match=r"expected an integer >= 1$"):
        require_int("n", 0, 1)


GOOD: list[dict[str, Any]] = [
    *({"avg_bits": b} for b in range(1, 9)),
    *({n: b} for n in ("noise_bits", "value_noise_bits") for b in (0, 2, 4, 6, 8)),
    {"d_eff_variance": 1.0},
    {"d_eff_variance": 1e-3},
]
BAD: list[dict[str, Any]] = [
    *({"avg_bits": b} for b in (0, 9, 2.5, "2", True)),
    *({n: b} for n in ("noise_bits", "value_noise_bits") for b in (-2, 1, 3, 7, 10, 2.5, "2")),
    *({"d_eff_variance": s} for s in (0.0, -0.1, 1.01, "0.9", float("nan"))),
]


@pytest.mark.parametrize("dial", GOOD, ids=str)
def test_dials_any_set_sees_every_dial(dial: dict[str, Any]) -> None:
    """Zero counts as set."""
    assert Dials(**dial).any_set and not Dials().any_set


@pytest.mark.parametrize("dial", BAD, ids=str)
def test_dials_rejects_out_of_range(dial: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(dial))}="):
        Dials(**dial)


@pytest.mark.parametrize(
    "setting",
    [
        {"sinks": -1}, {"sinks": 65}, {"sinks": 1.5}, {"window": 0}, {"window": 65_537}, {"tile_tokens": 128}, {"tile_tokens": 300}, {"backend": "triton"},
        {"max_exact_share": -0.01}, {"max_exact_share": 0.26}, {"max_exact_share": float("nan")},
        {"cuda_graphs": "no"}, {"compile_steps": 1},
    ],
    ids=str,
)  # fmt: skip
def test_cache_config_rejects_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(setting))}="):
        CacheConfig(**setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"sinks": 0},
        {"sinks": 64},
        {"window": 1},
        {"window": 65_536},
        {"tile_tokens": 256},
        {"max_exact_share": 0.0},
        {"max_exact_share": 0.25},
        {"backend": "cuda"},
    ],
    ids=str,
)
def test_cache_config_takes_its_bounds(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    assert getattr(CacheConfig(**setting), name) == value


@pytest.mark.parametrize("settings", [CacheConfig(), Dials()])
def test_settings_are_frozen(settings: CacheConfig | Dials) -> None:
    name = next(iter(settings.__dataclass_fields__))
    with pytest.raises(FrozenInstanceError):
        setattr(settings, name, 1)


def test_tiles_follow_the_device_unless_told() -> None:
    assert CacheConfig().tile_on("cpu") < CacheConfig().tile_on("cuda")
    assert CacheConfig(tile_tokens=512).tile_on("cuda") == CacheConfig(tile_tokens=512).tile_on("cpu") == 512
