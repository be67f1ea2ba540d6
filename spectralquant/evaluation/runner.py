"""Runs a plan: the plan first, then one row per unit and method as each is done, so that an interrupted run goes on where it stopped.

A run is a folder: `config.json` (the plan, the machine, versions), `rows.jsonl`, calibrations, and what `report` makes of the rows.
"""

import json
import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from spectralquant.errors import ConfigError, SpectralQuantError
from spectralquant.evaluation.methods import Prepared, Subject, find_method
from spectralquant.evaluation.plan import Plan
from spectralquant.evaluation.run_files import CONFIG, ROWS, read_config, read_rows
from spectralquant.evaluation.tasks import Task, Unit, find_task
from spectralquant.files import naming, write_json

_RECORDED = ("torch", "transformers", "optimum-quanto", "hqq", "spectralquant")


def run(plan: Plan, subject: Subject, command: str = "", progress: bool = True) -> list[dict[str, Any]]:
    """All rows of `plan`; those in `subject.folder` already are not measured again.

    A method that can't be prepared here (its package is missing, it refuses the model) is left out and named with the reason in the
    configuration.

    Args:
        command: The command line that repeats the run, for the record.
        progress: Show a progress bar.

    Raises:
        ConfigError: The folder holds another plan, or the plan names something unknown.
    """
    tasks = [find_task(name) for name in plan.tasks]
    methods = {name: find_method(name) for name in plan.methods}
    begin(plan, subject, command)
    rows = read_rows(subject.folder)
    done = {(row["task"], row["unit"], row["method"]) for row in rows}
    work = [(task, unit) for task in tasks for unit in task.units(plan, subject)]
    missing = [(task, unit, [n for n in methods if (task.name, unit.key, n) not in done]) for task, unit in work]
    prepared: dict[str, Prepared] = {}
    unavailable: dict[str, str] = {}
    with (
        tqdm(total=sum(len(names) for *_, names in missing), unit="row", disable=not progress) as bar,
        (subject.folder / ROWS).open("a", encoding="utf-8") as file,
    ):
        for task, unit, names in missing:
            for name in names:
                if name not in prepared and name not in unavailable:
                    bar.set_postfix_str(f"preparing {name}")
                    try:
                        prepared[name] = methods[name].prepare(subject)
                    except SpectralQuantError as error:
                        unavailable[name] = str(error)
                        begin(plan, subject, command, unavailable)
            for row in _measure(task, unit, plan, subject, {n: prepared[n] for n in names if n in prepared}):
                with naming(subject.folder / ROWS):
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                rows.append(row)
                bar.set_postfix_str(f"{unit.key} {row['method']}")
                bar.update()
    if not rows:
        raise ConfigError("no method could be prepared: " + "; ".join(f"{k}: {v}" for k, v in unavailable.items()))
    return rows


def _measure(task: Task, unit: Unit, plan: Plan, subject: Subject, methods: dict[str, Prepared]) -> Iterator[dict[str, Any]]:
    if not methods:
        return
    began = time.perf_counter()
    for name, columns in task.measure(unit, plan, subject, methods):
        now = time.perf_counter()
        yield {"task": task.name, "unit": unit.key, **unit.fields, "method": name, **columns, "seconds": round(now - began, 3)}
        began = time.perf_counter()


def begin(plan: Plan, subject: Subject, command: str, unavailable: dict[str, str] | None = None) -> None:
    """Check the plan against the one in the folder, if any, and write the configuration."""
    subject.folder.mkdir(parents=True, exist_ok=True)
    path = subject.folder / CONFIG
    wanted = json.loads(json.dumps(plan.as_json()))
    if path.exists():
        there = read_config(path)["plan"]
        differing = [k for k in wanted if there.get(k) != wanted[k] and k not in ("methods", "tasks")]
        if differing:
            raise ConfigError(
                f"{subject.folder} holds a run with other settings ({', '.join(f'{k}: {there.get(k)!r}' for k in differing)}); choose another folder"
            )
    document = {
        "plan": wanted,
        "command": command,
        "unavailable": unavailable or {},
        **machine(subject.model),
    }
    write_json(path, document)


def machine(model: PreTrainedModel) -> dict[str, Any]:
    """What figures depend on besides the plan: {device, threads, dtype, python, versions}."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _RECORDED},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
