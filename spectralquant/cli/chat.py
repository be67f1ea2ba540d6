"""`spectralquant chat`: turns that share one compressed cache."""

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralquant.cli.options import DEMO, Calibration, DType, Json, Model, NoCache, Preset

if TYPE_CHECKING:
    from spectralquant.cli.output import Output
    from spectralquant.conversation import Conversation

_HELP = "/stats: what the cache takes   /reset: forget everything   /exit: stop (so does Ctrl-D; Ctrl-C stops an answer)"


def chat(
    model: Model = DEMO,
    preset: Preset = "high",
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message. Default: what the model's template says.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the most likely tokens that hold this probability.")] = 1.0,
    calibration: Calibration = None,
    dtype: DType = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Talk to a model; all turns are remembered in one compressed cache.

    Inside: /stats, /reset, /help, /exit. With --json each turn is one line of JSON.

    \b
    spectralquant chat smollm2
    echo "Name three rivers." | spectralquant chat smollm2 --json
    """
    from spectralquant.cli.output import Output
    from spectralquant.cli.session import open_session
    from spectralquant.config import require_int
    from spectralquant.conversation import Conversation
    from spectralquant.generation_options import sampling_options
    from spectralquant.presets import resolve_preset

    require_int("--max-new-tokens", max_new_tokens, 1)
    sampling, name, out = sampling_options(temperature, top_p), resolve_preset(preset).name, Output(as_json)
    session = open_session(model, calibration, no_cache, out, dtype)
    conversation = Conversation(session.engine(name), session.model, session.tokenizer, system)
    out.say(_HELP, style="dim")
    for line in _lines(as_json):
        _turn(conversation, line, out, {"max_new_tokens": max_new_tokens, **sampling}, session.tokenizer)


def _lines(quiet: bool) -> Iterator[str]:
    """What the user types, until /exit or the end of input; empty lines are nothing."""
    interactive = sys.stdin.isatty() and not quiet
    while True:
        try:
            line = (input("> ") if interactive else sys.stdin.readline() or "/exit").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line


def _turn(conversation: "Conversation", line: str, out: "Output", options: dict[str, Any], tokenizer: Any) -> None:
    from transformers import TextStreamer

    from spectralquant.cli.output import told_cache

    if line == "/stats":
        stats = conversation.stats()
        out.say(f"{stats['turns']} turns at '{stats['preset']}'; {told_cache(stats)}", style="dim")
        _emit(out, stats)
    elif line == "/reset":
        conversation.reset()
        out.say("forgotten", style="dim")
    elif line.startswith("/"):
        out.say(_HELP, style="dim")
    else:
        streamer = None if out.as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            _emit(out, conversation.reply(line, streamer=streamer, **options))
        except KeyboardInterrupt:
            out.say("\nstopped; this turn is forgotten", style="dim")


def _emit(out: "Output", content: dict[str, Any]) -> None:
    if out.as_json:
        print(json.dumps(content), flush=True)
