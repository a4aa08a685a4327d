"""A worker process: takes tasks from its queue, tells what happens, stops when asked."""

import multiprocessing
import os
import queue
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import Literal

from capgap.errors import UserError, is_disk_full
from capgap.sweep.context import Context
from capgap.sweep.plan import Column, Teacher

TOLD_EVERY = 0.25  # seconds between two messages about steps
PARENT_CHECK_SECONDS = 1.0


@dataclass(frozen=True)
class StepMessage:
    worker: int
    task: str
    tokens: int
    tokens_per_second: float
    loss: float | None


@dataclass(frozen=True)
class EndMessage:
    """How a task ended. `seconds` are those of its stages, `busy` of the whole task;
    `peak_memory` is the worker's so far, in bytes."""

    worker: int
    task: str
    outcome: Literal["done", "stopped", "user_error", "crashed"]
    message: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    busy: float = 0.0
    peak_memory: int = 0


def work(
    worker: int,
    context: Context,
    tasks: "Queue[Teacher | Column | None]",
    messages: "Queue[StepMessage | EndMessage]",
    stop: Event,
) -> None:
    """Runs tasks until None comes. Ctrl-C is the parent's to handle: it sets `stop`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    started_by = multiprocessing.parent_process()
    assert started_by is not None
    assert started_by.pid is not None
    parent = started_by.pid
    import torch

    if context.threads is not None:
        torch.set_num_threads(context.threads)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    while (task := _next_task(tasks, parent)) is not None:
        messages.put(_run(worker, context, task, messages, stop, parent))


def _next_task(tasks: "Queue[Teacher | Column | None]", parent: int) -> Teacher | Column | None:
    """Waits for a task; None at the end, or when the parent was killed and can give no more."""
    while os.getppid() == parent:
        try:
            return tasks.get(timeout=PARENT_CHECK_SECONDS)
        except queue.Empty:
            continue
    return None


def _run(
    worker: int,
    context: Context,
    asked: Teacher | Column,
    messages: "Queue[StepMessage | EndMessage]",
    stop: Event,
    parent: int,
) -> EndMessage:
    from capgap.errors import Interrupted
    from capgap.sweep.task import Task
    from capgap.sweep.tasks import run_column, run_teacher
    from capgap.train.loop import Progress
    from capgap.train.metrics import StageClock

    clock = StageClock(context.device)
    start = told = time.monotonic()
    learner_tokens = 0

    def on_step(progress: Progress) -> None:
        nonlocal told, learner_tokens
        learner_tokens += progress.learner_tokens
        now = time.monotonic()
        if now - told > TOLD_EVERY:
            told = now
            last = [one for step in progress.reports for one in step.learners.values()][-1:]
            loss = last[0].loss if last else None
            rate = learner_tokens / (now - start)
            messages.put(StepMessage(worker, asked.id, progress.tokens, rate, loss))

    def should_stop() -> bool:
        # a parent that was killed cannot ask any more
        return stop.is_set() or os.getppid() != parent

    task = Task(context, clock, should_stop, on_step)
    outcome: Literal["done", "stopped", "user_error", "crashed"] = "done"
    message = ""
    try:
        if isinstance(asked, Teacher):
            run_teacher(task, asked)
        else:
            run_column(task, asked)
        message = "\n".join(task.warnings)
    except Interrupted:
        outcome = "stopped"
    except UserError as error:
        outcome, message = "user_error", str(error)
    except Exception as error:
        if is_disk_full(error):
            outcome, message = "user_error", no_space(context)
        else:
            outcome, message = "crashed", traceback.format_exc()
    return EndMessage(worker, asked.id, outcome, message, clock.seconds, time.monotonic() - start)


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def no_space(context: Context) -> str:
    return (
        f"no disk space left in {context.out}: free some and run the same command again; "
        "what is finished is kept"
    )
