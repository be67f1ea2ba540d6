"""What a run found, as JSON, Markdown, tables in the terminal and plots. Every figure comes from the run's rows; nothing is measured here.

A run that was interrupted, or is still going on, has a report too: each line says on how many windows, needles or problems it rests.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from spectralquant.errors import ConfigError
from spectralquant.evaluation.methods import Method, find_method
from spectralquant.evaluation.metrics import means_by_position, standard_error, summarise_language, summarise_success
from spectralquant.evaluation.plots import write_plots
from spectralquant.evaluation.run_files import CONFIG, read_config, read_rows
from spectralquant.evaluation.tasks.problems import per_problem
from spectralquant.files import plain, write_json, write_text
from spectralquant.terminal import make_table

REPORT_JSON, REPORT_MARKDOWN = "report.json", "report.md"
NEEDLE_COLUMNS = ("length", "depth", "kind")
_NEEDLE_GROUPS = ((), ("length",), ("depth",), ("kind",), ("length", "depth"))
_SIMULATED = "† codes simulated, size counted"
_DIFFERENCES = "Differences on the same units, in percentage points, ± standard error."

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunReport:
    """Summaries of one run.

    Attributes:
        config: The run's config.json.
        methods: Those with rows, in the plan's order; measured ones that the plan has dropped since come last.
        language: One line per text, context and method, with `metrics.summarise_language`, the ratios 16 / bits, and `kl_by_position`, the mean KL of
            each piece of `chunk` scored tokens.
        needles: One line per group and method, with `metrics.summarise_success` and the mean likelihood of the answers. "length", "depth" and
            "kind" say which needles are in the group; None stands for all.
        problems: One line per method, with `metrics.summarise_success` and the share of answers in the asked form that are right.
    """

    config: dict[str, Any]
    methods: tuple[Method, ...]
    language: tuple[Row, ...]
    needles: tuple[Row, ...]
    problems: tuple[Row, ...]

    @property
    def yardstick(self) -> str:
        """The plan's first method: differences of successes are against it, on the same units."""
        return self.config["plan"]["methods"][0]

    def as_json(self) -> dict[str, Any]:
        """Plain lists and dictionaries, the configuration first. A figure that can't be given is None."""
        methods = [{"name": m.name, "label": m.label, "family": m.family, "simulated": m.simulated} for m in self.methods]
        tables = {"methods": methods, "yardstick": self.yardstick, "language": self.language, "needles": self.needles, "problems": self.problems}
        return plain({"config": self.config, **tables})

    def as_markdown(self) -> str:
        """A document: the configuration in a line, then the tables."""
        parts = [f"# {self.config['plan']['model']}", _describe(self.config, "`"), *_left_out(self.config)]
        for table in tables_of(self):
            lines = [table.header, tuple("---" for _ in table.header), *table.rows]
            parts += [f"## {table.title}", "\n".join(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines), *table.notes]
        return "\n\n".join(parts) + "\n"

    def print(self, console: Console) -> None:
        """Show the tables in the terminal."""
        console.print(f"{self.config['plan']['model']}: {_describe(self.config, '')}", style="dim", soft_wrap=True)
        for line in _left_out(self.config):
            console.print(line, style="yellow", soft_wrap=True)
        for table in tables_of(self):
            console.print(make_table(table.title, table.header, table.rows, "\n".join(table.notes)))


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text, the method's label in the first column."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def write_report(folder: Path) -> RunReport:
    """Build the report of a run and write report.json, report.md and the plots into its folder.

    Raises:
        ConfigError: `folder` holds no run, or matplotlib is not installed (the tables are written by then).
    """
    report = build_report(folder)
    write_json(folder / REPORT_JSON, report.as_json())
    write_text(folder / REPORT_MARKDOWN, report.as_markdown())
    write_plots(report, folder)
    return report


def build_report(folder: Path) -> RunReport:
    """Summarise the rows of a run so far.

    Raises:
        ConfigError: `folder` holds no run, one that can't be read, or a row names a method that this version does not have.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder} has no {CONFIG}; expected the folder of a run, as `spectralquant evaluate --out` writes it")
    config, rows = read_config(path), read_rows(folder)
    measured = dict.fromkeys(row["method"] for row in rows)
    planned = config["plan"]["methods"]
    names = [name for name in planned if name in measured] + [name for name in measured if name not in planned]
    by_task = _group(rows, ("task",))
    return RunReport(
        config,
        tuple(find_method(name) for name in names),
        tuple(_language_lines(by_task.get(("language",), []), names, config["plan"]["chunk"])),
        tuple(_needle_lines(by_task.get(("needles",), []), names, planned[0])),
        tuple(_problem_lines(per_problem(by_task.get(("problems",), [])), names, planned[0])),
    )


# Lines ----------------------------------------------------------------------------------------------------------------


def _language_lines(rows: Sequence[Row], names: Sequence[str], chunk: int) -> Iterable[Row]:
    groups = _group(rows, ("text", "context", "method"))
    for text, context in dict.fromkeys((text, context) for text, context, _ in groups):
        for name in (n for n in names if (text, context, n) in groups):
            summary = summarise_language(groups[text, context, name])
            ratios = {"ratio": 16 / summary["bits"], "whole_ratio": 16 / summary["whole_bits"]}
            by_position = means_by_position([row["kl"] for row in groups[text, context, name]], chunk)
            yield {"text": text, "context": context, "method": name, **ratios, **summary, "kl_by_position": by_position}


def _needle_lines(rows: Sequence[Row], names: Sequence[str], yardstick: str) -> Iterable[Row]:
    for columns in _NEEDLE_GROUPS:
        groups = _group(rows, (*columns, "method"))
        for place in dict.fromkeys(group[:-1] for group in groups):
            for name in (n for n in names if (*place, n) in groups):
                chosen = groups[(*place, name)]
                nll = [row["answer_nll"] for row in chosen]
                likelihood = {"answer_nll": sum(nll) / len(nll), "answer_nll_se": standard_error(nll)}
                where = {**dict.fromkeys(NEEDLE_COLUMNS), **dict(zip(columns, place, strict=True))}
                yield {**where, "method": name, **summarise_success(chosen, groups.get((*place, yardstick), [])), **likelihood}


def _problem_lines(rows: Sequence[Row], names: Sequence[str], yardstick: str) -> Iterable[Row]:
    groups = _group(rows, ("method",))
    for name in (n for n in names if (n,) in groups):
        chosen = groups[(name,)]
        strict = sum(row["correct_strict"] for row in chosen) / len(chosen)
        yield {"method": name, **summarise_success(chosen, groups.get((yardstick,), [])), "accuracy_strict": strict}


def _group(rows: Iterable[Row], columns: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of `columns`, groups in the order in which they first appear."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


# Tables ---------------------------------------------------------------------------------------------------------------


def tables_of(report: RunReport) -> list[Table]:
    """Of every task that was run."""
    tables = _language_tables(report)
    if report.needles:
        tables += [_needle_table(report), _depth_table(report)]
    if report.problems:
        tables.append(_problem_table(report))
    return tables


def _language_tables(report: RunReport) -> list[Table]:
    header = ("method", "windows", "bits", "ratio", "whole cache", "ratio", "KL", "median", "99 %", "same token", "perplexity ratio")
    note = (
        "KL in nats per scored token against the uncompressed model, ± its standard error over windows. Bits per element all-in: codes, scales and "
        "what stays exact in mid-text; the whole cache adds the sinks and the recent window. Ratio: 16 / bits."
    )
    groups = _group(report.language, ("text", "context"))
    return [
        Table(f"{text}, {context:,} tokens of context", header, tuple(map(_language_cells, lines)), _notes(lines, note))
        for (text, context), lines in groups.items()
    ]


def _language_cells(line: Row) -> tuple[str, ...]:
    return (
        _label(line["method"]),
        str(line["windows"]),
        f"{line['bits']:.2f}",
        f"{line['ratio']:.2f}x",
        f"{line['whole_bits']:.2f}",
        f"{line['whole_ratio']:.2f}x",
        f"{line['kl']:.3g}" + _error(line["kl_se"], ".2g"),
        f"{line['kl_median']:.3g}",
        f"{line['kl_99']:.3g}",
        f"{100 * line['agreement']:.1f} %",
        f"{line['perplexity_ratio']:.4f}" + _error(line["perplexity_ratio_se"], ".4f"),
    )


def _needle_table(report: RunReport) -> Table:
    """All needles, and those of each kind and length."""
    overall = select_needles(report.needles)
    groups: list[Row] = [{column: value} for column in ("kind", "length") for value in _values(report, column)]
    names = [g["kind"] if "kind" in g else f"{g['length']:,} tokens" for g in groups]
    header = ("method", "needles", "found", "95 % interval", _against(report), "answer NLL", *names)
    rows = tuple((*_success_cells(report, line), f"{line['answer_nll']:.3g}", *(_found(report, line["method"], g) for g in groups)) for line in overall)
    note = f"Found: the answer occurs in the output. NLL: mean negative log-likelihood of the answer's tokens in nats. {_DIFFERENCES}"
    return Table("Needles", header, rows, _notes(overall, note))


def _depth_table(report: RunReport) -> Table:
    """Shares with their 95 % intervals by depth, all kinds and lengths together."""
    overall, depths = select_needles(report.needles), sorted(_values(report, "depth"))
    rows = tuple((_label(name), *(_found(report, name, {"depth": d}, True) for d in depths)) for name in (line["method"] for line in overall))
    note = "Share of needles found, with its 95 % interval. Depth 0 % is the beginning of the text."
    return Table("Needles by depth", ("method", *(f"{100 * d:.4g} %" for d in depths)), rows, _notes(overall, note))


def _problem_table(report: RunReport) -> Table:
    header = ("method", "problems", "right", "95 % interval", _against(report), "right after ####")
    rows = tuple((*_success_cells(report, line), f"{100 * line['accuracy_strict']:.1f} %") for line in report.problems)
    note = f"Right: the number after ####, or the last one where there is no ####. {_DIFFERENCES}"
    return Table("Word problems", header, rows, _notes(report.problems, note))


def _success_cells(report: RunReport, line: Row) -> tuple[str, ...]:
    paired = line["method"] != report.yardstick and math.isfinite(line["difference"])
    difference = f"{100 * line['difference']:+.1f}{_error(100 * line['difference_se'], '.1f')}" if paired else "-"
    return _label(line["method"]), str(line["units"]), f"{100 * line['accuracy']:.1f} %", _interval(line), difference


def select_needles(lines: Iterable[Row], **where: Any) -> list[Row]:
    """The lines of exactly one group per method: a column that is not named is None there, all of them."""
    return [line for line in lines if all(line[column] == where.get(column) for column in NEEDLE_COLUMNS)]


def _values(report: RunReport, column: str) -> list[Any]:
    """What a column of the needle lines holds, in the order of the rows."""
    return list(dict.fromkeys(line[column] for line in report.needles if line[column] is not None))


def _found(report: RunReport, method: str, where: Row, interval: bool = False) -> str:
    line = next((line for line in select_needles(report.needles, **where) if line["method"] == method), None)
    if line is None:
        return "-"
    return f"{100 * line['accuracy']:.1f} %" + (f" ({_interval(line)})" if interval else "")


def _interval(line: Row) -> str:
    return f"{100 * line['accuracy_low']:.0f} to {100 * line['accuracy_high']:.0f}"


def _error(error: float, form: str) -> str:
    """Nothing for NaN: one window has no standard error."""
    return f" ± {error:{form}}" if math.isfinite(error) else ""


def _against(report: RunReport) -> str:
    return f"against {find_method(report.yardstick).label}"


def _label(name: str) -> str:
    method = find_method(name)
    return f"{method.label} †" if method.simulated else method.label


def _notes(lines: Iterable[Row], note: str) -> tuple[str, ...]:
    """What the columns mean, and the dagger where a method in `lines` has it."""
    return (note, _SIMULATED) if any(find_method(line["method"]).simulated for line in lines) else (note,)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def _left_out(config: dict[str, Any]) -> list[str]:
    """Why methods of the plan are missing."""
    return [f"Not run: {reason}." for reason in config.get("unavailable", {}).values()]


def _describe(config: dict[str, Any], quote: str) -> str:
    """The configuration in a line; `quote` goes around the command."""
    plan = config["plan"]
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items() if version)
    machine = f"{config['dtype']}, {config['device']}, {config['threads']} threads, Python {config['python']}, {versions}"
    scoring = f"{plan['windows']} windows of {plan['scored']} scored tokens in pieces of {plan['chunk']}, seed {plan['seed']}"
    return f"{machine}; {scoring}" + (f"; {quote}{config['command']}{quote}" if config["command"] else "")
