import pytest

from spectralquant.errors import ConfigError
from spectralquant.presets import BIT_WIDTHS, PRESETS, describe_presets, resolve_preset


@pytest.mark.parametrize("name", list(PRESETS))
def test_resolve_preset_ignores_case(name: str) -> None:
    assert resolve_preset(name) is resolve_preset(name.upper()) is PRESETS[name]
    assert PRESETS[name].name == name


def test_resolve_preset_returns_a_preset_itself() -> None:
    assert resolve_preset(PRESETS["max"]) is PRESETS["max"]


@pytest.mark.parametrize("wrong", ["", "highest", "high ", None, 2, ["high"]])
def test_resolve_preset_rejects_other_names(wrong: object) -> None:
    """The text lists what there is."""
    with pytest.raises(ConfigError, match="choose one of " + ", ".join(map(repr, PRESETS))):
        resolve_preset(wrong)  # pyright: ignore[reportArgumentType]


def test_presets_promise_more_in_order_of_risk() -> None:
    ratios = [PRESETS[name].ratio for name in PRESETS]
    assert ratios == sorted(set(ratios)) and list(PRESETS) == ["standard", "high", "max", "ultra"]


def test_presets_describe_their_ratio() -> None:
    """The bits per element in the text are those of the ratio."""
    for preset in PRESETS.values():
        assert f"{16 / preset.ratio:.2f} bits per element" in preset.description


def test_presets_hold_widths_of_the_format() -> None:
    for preset in PRESETS.values():
        assert {preset.noise_bits, preset.value_noise_bits} <= set(BIT_WIDTHS) and 0 < preset.d_eff_variance <= 1


def test_describe_presets_is_complete() -> None:
    described = describe_presets()
    assert list(described) == list(PRESETS)
    for name, fields in described.items():
        assert all(value == getattr(PRESETS[name], field) for field, value in fields.items())
        assert fields.keys() == set(PRESETS[name].__dataclass_fields__) - {"name"}
