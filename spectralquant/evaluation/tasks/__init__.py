"""What can be measured: each module has a Task; see `base`."""

from spectralquant.errors import ConfigError
from spectralquant.evaluation.tasks.base import Task, Unit
from spectralquant.evaluation.tasks.language import LANGUAGE
from spectralquant.evaluation.tasks.needles import NEEDLES
from spectralquant.evaluation.tasks.problems import PROBLEMS

__all__ = ["TASKS", "Task", "Unit", "find_task"]

TASKS = {task.name: task for task in (LANGUAGE, NEEDLES, PROBLEMS)}


def find_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        ConfigError: There is none.
    """
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is unknown: expected one of {', '.join(TASKS)}")
    return TASKS[name]
