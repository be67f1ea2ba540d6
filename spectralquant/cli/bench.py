"""`spectralquant bench`: memory and speed of whole caches on this machine."""

from pathlib import Path
from typing import Annotated, Any

import typer

from spectralquant.cli.options import DEMO, Calibration, DType, Json, Model, NoCache, PresetList


def bench(
    model: Model = DEMO,
    preset: PresetList = None,
    context: Annotated[list[int] | None, typer.Option(metavar="TOKENS", help="Of the prompt; may be repeated. Default: 512, 2048 and 4096.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Decoded behind each prompt; 128 count one packing each.")] = 128,
    repeats: Annotated[int, typer.Option(help="Rounds; figures are medians.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help="Folder of an evaluation, or a new one: bench.json goes there, for report.")] = None,
    calibration: Calibration = None,
    dtype: DType = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Measure memory and decoding speed of FP16 and of presets on this machine.

    \b
    spectralquant bench smollm2 --context 2048 --preset high
    spectralquant bench path/to/model --context 8192 --context 32768 --out run
    """
    from dataclasses import replace

    from spectralquant.cli.evaluate import command_line
    from spectralquant.cli.output import Output
    from spectralquant.cli.session import open_session, require_presets
    from spectralquant.evaluation import speed

    say, contexts = Output(as_json), tuple(context) if context else speed.SpeedPlan.contexts
    plan = speed.SpeedPlan("", tuple(require_presets(preset)), contexts, new_tokens, repeats)
    session = open_session(model, calibration, no_cache, say, dtype)
    found = speed.bench(replace(plan, model=session.label), session.model, session.tokenizer, session.profile, out, command_line())
    header = ("context", "cache", "size", "ratio", "with codec", "prompt", "decoding", "slowest to fastest")
    rows = [_row(row) for row in found["rows"]]
    say.table(f"{session.label} on {found['device']}, {found['threads']} threads, {found['dtype']}", header, rows, words=("cache",))
    if out is not None:
        say.say(f"written to {out / speed.BENCH}; spectralquant report {out} makes a page of it")
    say.document(found)


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    if row.get("out_of_memory"):
        return f"{row['context']:,}", row["cache"], "out of memory", *[""] * 5
    held, dense = row["cache_bytes"], row["fp16_bytes"]
    sizes = (f"{held / 1e6:.2f} MB", f"{dense / held:.2f}x", f"{dense / (held + row['codec_bytes']):.2f}x")
    speeds = (f"{row['prompt_s']:.2f} s", f"{row['tokens_per_s']:.1f} tok/s", f"{row['tokens_per_s_low']:.1f} to {row['tokens_per_s_high']:.1f}")
    return f"{row['context']:,}", row["cache"], *sizes, *speeds
