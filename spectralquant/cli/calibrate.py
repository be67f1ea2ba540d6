"""`spectralquant calibrate`: measure a model once, and keep the result."""

from pathlib import Path
from typing import Annotated

import typer

from spectralquant.cli.options import DType, Json, Model, NoCache, Preset


def calibrate(
    model: Model,
    out: Annotated[Path | None, typer.Option(metavar="PATH", help="Write it here: NAME.safetensors for a file, else a folder with a card.")] = None,
    text: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Text of your own, UTF-8; may be repeated. Default: the bundled corpus.")] = None,
    samples: Annotated[int | None, typer.Option(metavar="N", help="Use so many texts. Default: all.")] = None,
    preset: Preset = "high",
    dtype: DType = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Measure a model's spectra and choose its codec by measured KL.

    The same calibration is made once on a machine and found again from then on. One calibration serves every preset.

    \b
    spectralquant calibrate smollm2
    spectralquant calibrate path/to/model --out path/to/model/spectralquant
    spectralquant calibrate path/to/model --text mine.txt --text code.py --out mine.safetensors
    """
    from spectralquant.cli.certificate import describe_certificate
    from spectralquant.cli.models import load_model
    from spectralquant.cli.output import Output
    from spectralquant.engine import SpectralQuantEngine

    texts = None if text is None else [_read(file) for file in text]
    engine, say = SpectralQuantEngine(compression=preset, calibration_cache=not no_cache), Output(as_json)
    loaded, tokenizer, label = load_model(model, dtype)
    result = engine.calibrate(loaded, tokenizer, texts, samples)
    profile = engine.profile_of(loaded)
    written = None
    if out is not None:
        written = engine.save_calibration(out, loaded) if out.suffix == ".safetensors" else engine.save_pretrained(out, loaded)
    say.say(f"{label}: {result['n_heads']} heads, effective dimension {result['d_eff_mean']:.1f} ({result['d_eff_min']} to {result['d_eff_max']})")
    say.say(describe_certificate(profile))
    if result["loaded_from"]:
        say.say(f"made before and kept in {result['loaded_from']}; --no-cache measures again")
    if written is not None:
        say.say(f"written to {written}")
    say.document({"model": label, **result, "written_to": None if written is None else str(written)})


def _read(file: Path) -> str:
    from spectralquant.errors import ConfigError

    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--text {file}: {error.strerror}; expected a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text {file}: byte {error.start} is not UTF-8; expected a text file") from error
