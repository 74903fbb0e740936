"""One task: a function and its arguments as bytes, executed in the same way by every engine."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from sbp_assets.fan_out.threads import limited_threads

# Bytes, pickled. Ray keeps a result of up to 100 kB in the memory of the process that submitted the task; a larger one
# would be in the object store of the node that computed it, and lost with the node.
LARGEST_ARGUMENTS = 2**20
LARGEST_RESULT = 2**16


class TaskError(RuntimeError):
    """A task has failed: the message names its key and says why. The task's own exception is the `__cause__`."""


@dataclass(frozen=True)
class Task:
    """A task as it is sent to a process: `payload` is its pickled function and arguments.

    It computes on `cpus` threads; None: as many as the process has.
    """

    key: str
    payload: bytes
    cpus: int | None


@dataclass(frozen=True)
class Failure:
    """Why a task failed: its exception, or one with the same message where it cannot be pickled, and the traceback."""

    error: BaseException
    trace: str


def prepared(key: str, function: Callable[..., Any], arguments: tuple[Any, ...], cpus: int | None) -> Task:
    """Return the task `key`, which calls `function` with `arguments` on `cpus` threads.

    Raises TypeError where a node could not import `function` or unpickle `arguments`, and ValueError where those are
    larger than LARGEST_ARGUMENTS.
    """
    name = getattr(function, "__qualname__", repr(function))
    if getattr(function, "__module__", "__main__") == "__main__" or not name.isidentifier():
        raise TypeError(f"{name} cannot be a task: nodes import it, so it has to be a function at the top of a module")
    try:
        payload = pickle.dumps((function, arguments))
    except Exception as error:  # pickle's own, and whatever the arguments' classes raise
        raise TypeError(f"task {key}: {name} and its arguments cannot be pickled: {error}") from error
    if len(payload) > LARGEST_ARGUMENTS:
        raise ValueError(
            f"task {key}: its arguments are {len(payload):,} bytes, and {LARGEST_ARGUMENTS:,} is the limit: write them "
            "to a file that all nodes can read, and pass its path"
        )
    return Task(key, payload, cpus)


def execute(task: Task) -> bytes | Failure:
    """Execute `task` on its threads; return its result, pickled, or why it failed.

    KeyboardInterrupt alone is not caught: it is how a task is cancelled.
    """
    try:
        with limited_threads(task.cpus) if task.cpus else nullcontext():
            function, arguments = pickle.loads(task.payload)
            result = pickle.dumps(function(*arguments))
        if len(result) > LARGEST_RESULT:
            raise ValueError(
                f"its result is {len(result):,} bytes, and {LARGEST_RESULT:,} is the limit: write it to a file, and "
                "return its path"
            )
        return result
    except (Exception, SystemExit) as error:
        return _failure(error)


def result_of(key: str, outcome: bytes | Failure, where: str = "") -> Any:
    """Return what the task `key` has returned; a TaskError where it has failed, on the node `where`."""
    if isinstance(outcome, bytes):
        return pickle.loads(outcome)
    outcome.error.add_note(f"In task {key}{where and f' on node {where}'}:\n{outcome.trace}")
    failure = TaskError(f"task {key}: {str(outcome.error) or type(outcome.error).__name__}")
    failure.__cause__ = outcome.error
    return failure


def _failure(error: BaseException) -> Failure:
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of an exception's own making: one whose __init__ takes other arguments, say
        error = RuntimeError(str(error) or type(error).__name__)
    return Failure(error, trace)
