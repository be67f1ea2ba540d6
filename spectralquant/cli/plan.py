"""`spectralquant plan`: will this model, batch and context fit this GPU."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from spectralquant.cli.options import DTYPES, Json, Model

if TYPE_CHECKING:
    from spectralquant.sizing import Fit


def plan(
    model: Model,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens of each.")] = 32_768,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated behind them.")] = 0,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Of the device, as 80GB. Default: that of the first GPU here.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Will this model, batch and context fit this GPU? FP16 beside each preset, from the model's configuration alone.

    Exit status 1 where no preset fits.

    \b
    spectralquant plan smollm2 --batch 8 --context 8192 --memory 8GB
    spectralquant plan meta-llama/Llama-3.1-8B-Instruct --batch 12 --context 32768 --memory 80GB
    """
    from spectralquant.byte_counts import parse_bytes, told_bytes
    from spectralquant.cli.models import load_shape
    from spectralquant.cli.output import Output
    from spectralquant.config import require_int
    from spectralquant.errors import ConfigError
    from spectralquant.presets import PRESETS
    from spectralquant.sizing import fit, planner_for

    for name, value in (("--batch", batch), ("--context", context)):
        require_int(name, value, 1)
    require_int("--new-tokens", new_tokens, 0)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    room = _device_memory() if memory is None else parse_bytes("--memory", memory)
    shape, label = load_shape(model)
    planners = {name: planner_for(shape, preset, 4 if dtype == "float32" else 2) for name, preset in PRESETS.items()}
    first = planners["high"]
    fits = [fit(first, None, batch, context, new_tokens, room), *(fit(planners[n], p, batch, context, new_tokens, room) for n, p in PRESETS.items())]
    out = Output(as_json)
    told = "unknown memory (no GPU here; name it with --memory)" if room is None else told_bytes(room)
    out.say(f"{label}: weights {told_bytes(first.weights)} in {dtype}, {len(first.layers)} coded layers; {told}")
    header = ("cache", "size", "ratio", "with weights", "fits", "left", f"context at batch {batch}", f"batch at {context:,} tokens")
    rows = [(f.method, told_bytes(f.cache), f"{f.ratio:.2f}x", told_bytes(f.total), *_verdict(f, told_bytes)) for f in fits]
    caption = "Presets: at most, as promised. Buffers of the forward pass are not counted: leave some room, less with prefill_chunk_size."
    out.table(f"{batch} x {context + new_tokens:,} tokens", header, rows, caption)
    longest = getattr(shape.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest and context + new_tokens > longest:
        out.say(f"the model was made for {longest:,} tokens", style="yellow")
    figures = {"model": label, "dtype": dtype, "weights": first.weights, "memory": room, "batch": batch, "context": context, "new_tokens": new_tokens}
    out.document({**figures, "fits": [f.as_json() for f in fits]})
    if room is not None and not any(f.fits for f in fits):
        raise typer.Exit(1)


def _device_memory() -> int | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _verdict(found: "Fit", told: Callable[[int], str]) -> tuple[str, str, str, str]:
    """Whether it fits, what is left, and the largest context and batch."""
    if found.left is None:
        return "?", "?", "?", "?"
    left = told(found.left) if found.fits else f"-{told(-found.left)}"
    return "yes" if found.fits else "no", left, f"{found.most_context:,}", f"{found.most_batch:,}"
