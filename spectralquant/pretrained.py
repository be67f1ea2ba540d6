"""A calibration as a folder, as transformers saves models: the file, and a card that says what was measured. Beside a model, it is found by itself."""

import logging
from pathlib import Path
from typing import Any

from spectralquant.codec.budget import plane_counts
from spectralquant.config import Dials
from spectralquant.errors import ConfigError, ProfileError
from spectralquant.files import write_text
from spectralquant.presets import PRESETS
from spectralquant.profile import Profile, load_profile
from spectralquant.tensor_file import with_suffix

_log = logging.getLogger("spectralquant")

FILE, CARD, BESIDE = "calibration.safetensors", "README.md", "spectralquant"
_FRONT = "---\nlibrary_name: spectralquant\ntags:\n- kv-cache\n- quantization\n---\n"
"""First lines of every card; a README that begins otherwise is somebody else's."""


def save_folder(profile: Profile, folder: Path) -> Path:
    """Write FILE and CARD into `folder`; returns it.

    Raises:
        ConfigError: `folder` is a file, or has a README that is no card of a calibration.
    """
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; expected a folder, or use save_calibration for a single file")
    card = folder / CARD
    if card.is_file() and not card.read_text(encoding="utf-8", errors="replace").startswith(_FRONT):
        raise ConfigError(f"{card} is no card of a calibration and would be lost; save to {folder / BESIDE}, where the calibration is found beside the model")
    folder.mkdir(parents=True, exist_ok=True)
    profile.save(folder / FILE)
    write_text(card, describe(profile))
    return folder


def calibration_file(path: Path) -> Path:
    """The file that `path` names: itself (".safetensors" may be left out), or the one in a folder of `save_folder` or of a model."""
    if path.is_dir():
        return next((file for file in (path / FILE, path / BESIDE / FILE) if file.is_file()), path / FILE)
    return with_suffix(path)


def find_beside(model: Any, fingerprint: dict[str, Any]) -> tuple[Path, Profile] | None:
    """The calibration in the folder that `model` was loaded from, or None. One that was made for another model is not used, with a warning."""
    origin = str(getattr(model.config, "_name_or_path", "") or "")
    return find_in(Path(origin), fingerprint) if origin else None


def find_in(folder: Path, fingerprint: dict[str, Any]) -> tuple[Path, Profile] | None:
    """`find_beside` for the folder of a model with this fingerprint."""
    file = folder / BESIDE / FILE
    try:
        if not file.is_file():
            return None
        profile = load_profile(file)
        profile.require_model(fingerprint)
    except (ProfileError, OSError) as error:  # the folder may be closed to this user
        _log.warning("%s is not used: %s", file, error)
        return None
    return file, profile


def describe(profile: Profile) -> str:
    """The card: Markdown that begins with `_FRONT`."""
    model, certificate, layer = profile.model, profile.certificate, next(iter(profile.layers.values()))
    title = f"# KV-cache calibration of {model.get('architecture', 'an unnamed model')}"
    shape = f"{len(profile.layers)} coded layers, {layer.heads} KV heads of size {layer.head_dim}, fingerprint `{model.get('weights', 'not known')}`."
    sizes = ["| preset | packed bits per element, all-in | ratio |", "|---|---|---|", *(_size(profile, name, layer.head_dim) for name in PRESETS)]
    use = 'from spectralquant import SpectralQuant\n\nsq = SpectralQuant.from_pretrained("this/folder", compression="high")'
    usage = f"```python\n{use}\n```\n\nIt loads for the model it was made for, and is refused for any other."
    return "\n\n".join([_FRONT + "\n" + title, shape, usage, *_measured(certificate), "## Size", "\n".join(sizes)]) + "\n"


def _measured(certificate: dict[str, Any]) -> list[str]:
    if "kl" not in certificate:
        return ["Nothing is known about its quality: it comes without a certificate."]
    line = (
        f"KL {certificate['kl']:.4f} nats per token to the uncompressed model, the same most likely token for {certificate['agreement']:.1%}, at preset "
        f"`{certificate['preset']}` on {certificate['scored_tokens']:,} tokens kept out of the statistics ({certificate.get('tokens', 0):,} tokens of the "
        f"{certificate.get('corpus', 'own')} corpus, {certificate.get('seconds', 0):.0f} s)."
    )
    rows = [
        f"| {', '.join(f'{k}={v}' for k, v in row['changed'].items()) or 'starting recipe'} | {row['kl']:.4f} | {row['agreement']:.1%} | "
        f"{'yes' if row['kept'] else 'no'} |"
        for row in certificate["menu"]
    ]
    note = "The codec was chosen on these tokens, so the figure is optimistic; `spectralquant evaluate` measures on your text."
    return ["## Measured quality", line, note, "\n".join(["| tried | KL | same token | kept |", "|---|---|---|---|", *rows])]


def _size(profile: Profile, name: str, dim: int) -> str:
    try:
        planes = sum(plane_counts(profile, PRESETS[name], Dials()))
    except ConfigError:
        return f"| {name} | not possible with heads of size {dim} | |"
    bits = (2 * planes + 16) / (2 * dim) + 16 * profile.exact_share
    return f"| {name} | {bits:.2f} | {16 / bits:.2f}x |"
