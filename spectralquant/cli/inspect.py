"""`spectralquant inspect`: what a calibration holds, in the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralquant.cli.options import Json, Preset

if TYPE_CHECKING:
    from torch import Tensor

    from spectralquant.profile import Profile

BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 32
"""Columns of a spectrum."""


def inspect(
    file: Annotated[Path, typer.Argument(metavar="PATH", help="Calibration: a file, or a folder that holds one.")],
    preset: Preset = "high",
    as_json: Json = False,
) -> None:
    """Show a calibration: spectra, effective dimension and bits of every layer, and what was measured.

    \b
    spectralquant inspect my-model.safetensors
    spectralquant inspect path/to/model --preset ultra --json
    """
    from spectralquant.cli.certificate import describe_certificate
    from spectralquant.cli.output import Output
    from spectralquant.presets import resolve_preset
    from spectralquant.pretrained import calibration_file
    from spectralquant.profile import load_profile
    from spectralquant.spectra import describe_heads

    chosen, out = resolve_preset(preset), Output(as_json)
    profile = load_profile(calibration_file(file))
    layer, heads = next(iter(profile.layers.values())), describe_heads(profile, chosen)
    out.say(f"{profile.model.get('architecture', 'model not named')}: {len(profile.layers)} coded layers, {layer.heads} KV heads of size {layer.head_dim}")
    for side, title in (("key", "Keys"), ("value", "Values")):
        rows = [_row(profile, index, side, [h for h in heads if (h["layer"], h["side"]) == (index, side)]) for index in profile.layers]
        header = ("layer", "spectrum (log, all heads)", "effective dimension", f"bits at '{chosen.name}'", "coordinates with 0, 2, 4, 6, 8 bits")
        out.table(title, header, rows, words=header[1:3])
    out.say(f"effective dimension: coordinates that hold {chosen.d_eff_variance:.0%} of the variance, of every head; bits: mean per coordinate", style="dim")
    out.say(describe_certificate(profile))
    out.document({"model": profile.model, "preset": chosen.name, "heads": heads, "certificate": profile.certificate, "exact_share": profile.exact_share})


def _row(profile: "Profile", index: int, side: str, heads: list[dict[str, Any]]) -> tuple[str, ...]:
    from spectralquant.presets import BIT_WIDTHS

    bits = heads[0]["bits"]
    counts = [sum(h["widths"][str(width)] for h in heads) // len(heads) for width in BIT_WIDTHS]
    sizes = " ".join(str(h["d_eff"]) for h in heads)
    return str(index), spark(getattr(profile.layers[index], side).variance), sizes, f"{bits:.2f}", " ".join(map(str, counts))


def spark(variance: "Tensor") -> str:
    """Spectra [H, D] as one line of bars: the mean over heads of the logarithm, from the largest down to 10^-4 of it."""
    levels = variance.double().clamp_min(1e-30).log10()
    mean = (levels - levels[:, :1]).mean(0)
    step = len(mean) / WIDTH
    columns = [float(mean[int(i * step) : max(int((i + 1) * step), int(i * step) + 1)].mean()) for i in range(WIDTH)]
    return "".join(BARS[round(max(min(1 + c / 4, 1.0), 0.0) * (len(BARS) - 1))] for c in columns)
