"""What a run can learn. A task is one file in this folder that defines `class Task(BaseTask)`; its name is the file's.

To add one, add a file: `--task` takes its name, and `Task.guess` lets it be chosen from the columns of the data.
"""

import importlib
import pkgutil

from fastft.data.columns import check_named
from fastft.data.errors import DataError
from fastft.data.splits import open_splits

_NOT_TASKS = ("base",)


def task_names():
    """Names of all tasks, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_TASKS)


def get_task(args):
    """The task that `args.task` names, or that the columns of the data suggest; `.reason` says which and why."""
    if args.task is None:
        name, why = _guess(args)
        return _task_class(name)(args, f"task {name}: {why}")
    if args.task not in task_names():
        raise DataError(f"--task {args.task}: must be one of {', '.join(task_names())}")
    return _task_class(args.task)(args, f"task {args.task}: given by --task")


def _guess(args):
    """(name, why) of the one task that fits the columns."""
    source = next(iter(open_splits(args).values()))
    columns = source.columns()
    check_named(columns, args, source.name)
    reasons = {name: _task_class(name).guess(columns, args) for name in task_names()}
    fitting = {name: why for name, why in reasons.items() if why is not None}
    if len(fitting) != 1:
        found = f"could be {' or '.join(fitting)}" if fitting else "fit no task"
        raise DataError(
            f"{source.name}: the columns {', '.join(columns)} {found}; choose with --task ({', '.join(task_names())}) "
            f"and name the columns with --text_column and --label_column, or --prompt_column and --completion_column"
        )
    return next(iter(fitting.items()))


def _task_class(name):
    return importlib.import_module(f"{__name__}.{name}").Task
