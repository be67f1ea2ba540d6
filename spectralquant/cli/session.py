"""What most verbs begin with: a model, its tokenizer, and its calibration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectralquant.cli import models
from spectralquant.cli.output import Output
from spectralquant.engine import SpectralQuantEngine
from spectralquant.errors import ConfigError
from spectralquant.presets import PRESETS, resolve_preset
from spectralquant.pretrained import calibration_file
from spectralquant.profile import Profile


@dataclass(frozen=True, slots=True)
class Session:
    """A model that is loaded and calibrated.

    Attributes:
        label: What to call the model.
        profile: One for all presets.
    """

    model: Any
    tokenizer: Any
    label: str
    profile: Profile

    def engine(self, preset: str) -> SpectralQuantEngine:
        """An engine at `preset` that holds the calibration."""
        return SpectralQuantEngine.of(self.profile, compression=preset)


def open_session(name: str, calibration: Path | None, no_cache: bool, out: Output, dtype: str | None = None) -> Session:
    """Load a model and find or make its calibration, at the default preset: the same for every verb and every preset.

    Raises:
        ConfigError: Model or calibration can't be loaded.
        ProfileError: The calibration is damaged, or another model's.
    """
    require_calibration(calibration)
    model, tokenizer, label = models.load_model(name, dtype)
    out.say(f"model: {label}, {sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M parameters, {str(model.dtype)[6:]}, {model.device}")
    engine = SpectralQuantEngine(calibration_cache=not no_cache)
    if calibration is not None:
        engine.load_calibration(calibration)
        out.say(f"calibration: {calibration}")
    elif (found := engine.ensure_calibrated(model, tokenizer)) is not None:
        out.say(f"calibration: {found}")
    return Session(model, tokenizer, label, engine.profile_of(model))


def require_calibration(calibration: Path | None) -> Path | None:
    """The file that --calibration names, None for none; asked before a model is loaded.

    Raises:
        ConfigError: There is no such file.
    """
    file = None if calibration is None else calibration_file(calibration)
    if file is not None and not file.is_file():
        raise ConfigError(f"--calibration {calibration}: there is no such file; make one with: spectralquant calibrate MODEL --out {calibration}")
    return file


def require_presets(names: list[str] | None) -> list[str]:
    """The names as `PRESETS` has them, all for None."""
    return list(dict.fromkeys(resolve_preset(name).name for name in names)) if names else list(PRESETS)
