"""`spectralquant generate`: text from a compressed cache, as it is made."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spectralquant.cli.options import Calibration, DType, Json, Model, NoCache, Preset


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text; - reads it from standard input.")],
    preset: Preset = "high",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the most likely tokens that hold this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Give the prompt as a user's message where the model has a chat template.")] = True,
    store: Annotated[
        Path | None, typer.Option("--store", metavar="FOLDER", help="Keep the compressed prompt here, and load what is there instead of reading it again.")
    ] = None,
    store_size: Annotated[str, typer.Option("--store-size", metavar="SIZE", help="What --store may take; the least recently used goes first.")] = "10GB",
    calibration: Calibration = None,
    dtype: DType = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Generate text from a compressed cache.

    \b
    spectralquant generate smollm2 "Why is the sky blue?"
    spectralquant generate smollm2 - --max-new-tokens 64 < question.txt
    spectralquant generate smollm2 - --store prefixes < document-and-question.txt
    """
    from spectralquant.cli.output import Output, told_cache
    from spectralquant.cli.session import open_session
    from spectralquant.config import require_int
    from spectralquant.errors import ConfigError
    from spectralquant.generation_options import sampling_options
    from spectralquant.prefix_store.store import PrefixStore
    from spectralquant.presets import resolve_preset
    from spectralquant.prompts import as_message

    require_int("--max-new-tokens", max_new_tokens, 1)
    sampling, name = sampling_options(temperature, top_p), resolve_preset(preset).name
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ConfigError("PROMPT is empty; expected some text")
    out = Output(as_json)
    words = Output(True)  # what is no answer goes to stderr, so that the answer can be piped on
    kept = {} if store is None else {"store": PrefixStore(store, store_size)}
    session = open_session(model, calibration, no_cache, words, dtype)
    options: dict[str, Any] = {} if as_json else {"streamer": _streamer(session.tokenizer)}
    _seed(seed)
    given = as_message(session.tokenizer, text) if chat else text
    answer = session.engine(name).generate(session.model, session.tokenizer, given, max_new_tokens, **kept, **sampling, **options)
    stats = answer["stats"]
    words.say(f"\n{stats['new_tokens']} tokens, {stats['tokens_per_second']:.1f} tokens/s; {told_cache(stats)}", style="dim")
    if store is not None:
        words.say(_told_store(stats["store"]), style="dim")
    out.document({"model": session.label, "prompt": text, **answer})


def _told_store(use: dict[str, Any]) -> str:
    written = f"{use['written_bytes'] / 1e6:.1f} MB written"
    if not use["hit_tokens"]:
        return f"store: nothing of this prompt was there; {written}"
    return f"store: {use['hit_tokens']:,} tokens loaded in {use['load_seconds']:.3f} s, {use['saved_seconds']:.1f} s saved; {written}"


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)
