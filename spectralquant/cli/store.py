"""`spectralquant store`: compressed prefixes on disk, see `prefix_store`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from spectralquant.cli.options import Json

if TYPE_CHECKING:
    from spectralquant.prefix_store.store import PrefixStore

store: typer.Typer = typer.Typer(no_args_is_help=True, help="Look into a store of compressed prefixes, check it, make it smaller.")

Directory: TypeAlias = Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a spectralquant.PrefixStore.")]
DAY = 86_400


@store.command()
def ls(directory: Directory, as_json: Json = False) -> None:
    """List what is stored, one line for each model, calibration and setting.

    \b
    spectralquant store ls prefixes
    """
    from spectralquant.byte_counts import told_bytes
    from spectralquant.cli.output import Output
    from spectralquant.codec.layout import UNIT
    from spectralquant.prefix_store.entries import BLOCK
    from spectralquant.prefix_store.folder import Entry, root_of

    out, opened = Output(as_json), _opened(directory)
    roots: dict[str, list[Entry]] = {}
    for entry in opened.entries():
        roots.setdefault(root_of(entry.path).name, []).append(entry)
    found: list[dict[str, Any]] = []
    for name, entries in roots.items():
        blocks = sum(entry.kind == BLOCK for entry in entries)
        size, used = sum(entry.nbytes for entry in entries), max(entry.used for entry in entries)
        found.append({"root": name, "blocks": blocks, "tokens": UNIT * blocks, "tails": len(entries) - blocks, "bytes": size, "used": used})
    found.sort(key=lambda root: root["used"], reverse=True)
    rows = [(r["root"][:12], f"{r['tokens']:,}", str(r["blocks"]), str(r["tails"]), told_bytes(r["bytes"]), _ago(r["used"])) for r in found]
    out.table(f"Prefixes in {directory}", ("root", "tokens", "blocks", "tails", "size", "last used"), rows, words=("root",))
    out.say(f"{told_bytes(sum(r['bytes'] for r in found))} in all; a root is one model with one calibration, preset and setting", style="dim")
    out.document({"directory": str(directory), "roots": found})


@store.command()
def verify(directory: Directory, as_json: Json = False) -> None:
    """Read every entry and compare checksums and names. Exit status 1 where an entry is broken.

    \b
    spectralquant store verify prefixes
    """
    from tqdm.auto import tqdm

    from spectralquant.cli.output import Output

    out, opened = Output(as_json), _opened(directory)
    count = len(opened.entries())
    with tqdm(total=count, desc="verifying", unit=" files", delay=1.0, leave=False) as bar:
        problems = opened.verify(bar.update)
    for problem in problems:
        out.say(f"{'broken' if problem.broken else 'left over'}: {problem.path}: {problem.text}")
    broken = sum(problem.broken for problem in problems)
    out.say(f"{count:,} entries, {broken} broken, {len(problems) - broken} left over" + ("; prune removes them" if problems else ""))
    listed = [{"path": str(problem.path), "text": problem.text, "broken": problem.broken} for problem in problems]
    out.document({"directory": str(directory), "entries": count, "problems": listed})
    if broken:
        raise typer.Exit(1)


@store.command()
def prune(
    directory: Directory,
    max_size: Annotated[str | None, typer.Option("--max-size", metavar="SIZE", help="As 5GB: the least recently used beyond it go.")] = None,
    unused_days: Annotated[float | None, typer.Option("--unused-days", metavar="DAYS", help="What was not used for so long goes.")] = None,
    as_json: Json = False,
) -> None:
    """Remove what is broken or left over, and what is old or too much.

    \b
    spectralquant store prune prefixes --max-size 5GB
    spectralquant store prune prefixes --unused-days 30
    """
    from spectralquant.byte_counts import parse_bytes, told_bytes
    from spectralquant.cli.output import Output

    _require_days(unused_days)
    limit = parse_bytes("--max-size", max_size) if max_size is not None else 2**62
    out, opened = Output(as_json), _opened(directory)
    before = sum(entry.nbytes for entry in opened.entries())
    removed = opened.prune(limit, None if unused_days is None else unused_days * DAY)
    after = sum(entry.nbytes for entry in opened.entries())
    out.say(f"{removed:,} files removed, {told_bytes(before)} before, {told_bytes(after)} now")
    out.document({"directory": str(directory), "removed": removed, "bytes_before": before, "bytes": after})


@store.command()
def archive(
    directory: Directory,
    unused_days: Annotated[float, typer.Option("--unused-days", metavar="DAYS", help="What was not used for so long.")] = 7.0,
    as_json: Json = False,
) -> None:
    """Code what is seldom used in fewer bytes, without loss.

    \b
    spectralquant store archive prefixes --unused-days 7
    """
    from tqdm.auto import tqdm

    from spectralquant.byte_counts import told_bytes
    from spectralquant.cli.output import Output

    _require_days(unused_days)
    out, opened = Output(as_json), _opened(directory)
    before = sum(entry.nbytes for entry in opened.entries())
    with tqdm(desc="archiving", unit=" blocks", delay=1.0, leave=False) as bar:
        saved = opened.archive(unused_days * DAY, bar.update)
    out.say(f"{told_bytes(saved)} saved, {told_bytes(before)} before")
    out.document({"directory": str(directory), "saved": saved, "bytes_before": before})


def _require_days(days: float | None) -> None:
    from spectralquant.errors import ConfigError

    if days is not None and not days >= 0:
        raise ConfigError(f"--unused-days {days}: expected 0 or more")


def _opened(directory: Path) -> "PrefixStore":
    from spectralquant.errors import ConfigError
    from spectralquant.prefix_store.store import PrefixStore

    if not directory.is_dir():
        raise ConfigError(f"FOLDER {directory}: there is no such folder; generate --store makes one")
    return PrefixStore(directory)


def _ago(used: float) -> str:
    seconds = max(time.time() - used, 0.0)
    for unit, size in (("days", DAY), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"
