"""`spectralquant presets`: names for a promise about size."""

from spectralquant.cli.options import Json
from spectralquant.presets import PRESETS, describe_presets


def presets(as_json: Json = False) -> None:
    """List the presets.

    \b
    spectralquant presets
    """
    from spectralquant.cli.output import Output

    out = Output(as_json)
    rows = [(p.name, f"{p.ratio:.2f}x", f"{16 / p.ratio:.2f}", p.risk, p.description) for p in PRESETS.values()]
    out.table("Presets", ("name", "promise", "bits per element", "risk", "description"), rows, words=("risk", "description"))
    out.document(describe_presets())
