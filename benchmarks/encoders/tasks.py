"""The tasks, by name."""

from base import Task
from digits import DIGITS
from moving_digits import MOVING_DIGITS
from protein import PROTEIN
from textures import TEXTURES

from spectralquant.errors import ConfigError

TASKS: dict[str, Task] = {task.name: task for task in (DIGITS, TEXTURES, MOVING_DIGITS, PROTEIN)}


def task_named(name: str) -> Task:
    if name not in TASKS:
        raise ConfigError(f"--task {name}: there is no such task; choose one of {', '.join(TASKS)}")
    return TASKS[name]
