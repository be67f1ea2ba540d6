"""`spectralquant demo`: a real model, real bytes, FP16 beside every preset."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralquant.cli.options import DEMO, Calibration, Json, Model, NoCache, PresetList
from spectralquant.presets import PRESETS

if TYPE_CHECKING:
    from spectralquant.evaluation.side_by_side import Run


def demo(
    model: Model = DEMO,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt of your own; may be repeated. Default: four bundled ones.")] = None,
    preset: PresetList = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate per prompt and preset.")] = 32,
    calibration: Calibration = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Compress the cache of a real model and compare with FP16.

    \b
    spectralquant demo
    spectralquant demo Qwen/Qwen2.5-1.5B-Instruct --preset high --prompt "Why is the sky blue?"
    """
    from spectralquant.cli.certificate import describe_certificate
    from spectralquant.cli.output import Output
    from spectralquant.cli.session import open_session, require_presets
    from spectralquant.config import require_int
    from spectralquant.evaluation.side_by_side import bundled_prompts, compare

    require_int("--max-new-tokens", max_new_tokens, 1)
    names, out, began = require_presets(preset), Output(as_json), time.perf_counter()
    session = open_session(model, calibration, no_cache, out)
    out.say("\n" + describe_certificate(session.profile) + "\n")
    engines = {name: session.engine(name) for name in names}
    runs: list[Run] = []
    for title, text in [(f"prompt {i}", text) for i, text in enumerate(prompt, 1)] if prompt else bundled_prompts():
        for run in compare(title, text, engines, session.model, session.tokenizer, max_new_tokens):
            if run.method not in engines:
                out.say(f"--- {title}: {run.context} tokens of context", style="bold")
            out.say(_row(run))
            runs.append(run)
        out.say()
    seconds = time.perf_counter() - began
    _summarise(out, runs, names, seconds)
    out.document(_document(session, runs, seconds))


def _row(run: "Run") -> str:
    figures = f"{run.cache_bytes / 1e6:6.2f} MB  {run.tokens_per_second:5.1f} tok/s"
    if run.method in PRESETS:
        figures += f"  {run.ratio:4.2f}x (with codec {run.ratio_with_codec:4.2f}x)  KL {run.kl:.4f}  same token {run.agreement:.0%}"
    return f"{run.method:>9}  {figures}\n           {' '.join(run.text.split())[:300]}"


def _summarise(out: Any, runs: list["Run"], presets: list[str], seconds: float) -> None:
    rows: list[tuple[str, ...]] = []
    scored = {run.prompt: run.new_tokens for run in runs if run.method not in presets}  # errors are along what FP16 said
    for name in dict.fromkeys(run.method for run in runs):
        mine = [r for r in runs if r.method == name]
        held, dense, codec, tokens = (sum(getattr(r, part) for r in mine) for part in ("cache_bytes", "fp16_bytes", "codec_bytes", "new_tokens"))
        kl, agreement = (sum(getattr(r, part) * scored[r.prompt] for r in mine) / sum(scored.values()) for part in ("kl", "agreement"))
        rate = tokens / sum(r.new_tokens / r.tokens_per_second for r in mine)
        promise = f"{PRESETS[name].ratio:.2f}x" if name in presets else ""
        sizes = (f"{held / 1e6:.2f} MB", f"{dense / held:.2f}x", f"{dense / (held + codec):.2f}x")
        rows.append((name, promise, *sizes, f"{kl:.4f}", f"{agreement:.1%}", f"{rate:.1f}"))
    caption = (
        "promise: the packed history alone. ratio: the whole cache as allocated, exact sinks and recent window (128 to 255 tokens, 16-bit) "
        f"included: it grows towards the promise with the context. {seconds:.0f} s in all."
    )
    out.table("Summary", ("", "promise", "cache", "ratio", "with codec", "KL", "same token", "tok/s"), rows, caption)


def _document(session: Any, runs: list["Run"], seconds: float) -> dict[str, Any]:
    import platform
    from dataclasses import asdict
    from importlib.metadata import version

    import torch

    rows = [{**asdict(r), "ratio": r.ratio, "ratio_with_codec": r.ratio_with_codec} for r in runs]
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "device": str(session.model.device)}
    versions = {name: version(name) for name in ("torch", "transformers", "spectralquant")}
    return {"model": session.label, "dtype": str(session.model.dtype), "seconds": seconds, "machine": machine, "versions": versions, "runs": rows}
