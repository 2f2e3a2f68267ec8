"""Tasks by name: a task is one file here, with its data, its metric and its presets, in an object called `task`."""

import difflib
import importlib
import pkgutil

from titans.training.task import Task

TASKS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_"))


def get_task(name: str) -> Task:
    """The task of that name; a dash is as good as an underscore.

    Raises:
        ValueError: no such task; the message names the nearest.
    """
    module = name.replace("-", "_")
    if module not in TASKS:
        close = difflib.get_close_matches(module, TASKS, n=1)
        raise ValueError(f"task={name!r} is unknown; use {repr(close[0]) if close else 'one of ' + ', '.join(TASKS)}")
    return importlib.import_module(f"titans.tasks.{module}").task
