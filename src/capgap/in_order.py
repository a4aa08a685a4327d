"""One function on many arguments: here, in processes of this machine, or on a Ray cluster."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

from capgap.errors import UserError, WorkerDied, first_line
from capgap.ray_cluster import connected

On = Literal["here", "ray"]

# How often Ray begins one again whose node is lost
ATTEMPTS = 5


def check_workers(number: int) -> None:
    """UserError for none, and in a process that loads the calling script as it begins."""
    from multiprocessing import current_process

    if number < 1:
        raise UserError(f"workers {number} must be 1 or more")
    # as multiprocessing itself tells it, whose word would come too late
    if number > 1 and getattr(current_process(), "_inheriting", False):
        raise UserError(
            "workers: processes load the calling script again; call it under "
            '`if __name__ == "__main__":`'
        )


def in_order(
    function: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    *,
    workers: int = 1,
    on: On = "here",
) -> Iterator[Any]:
    """The results in the order of the arguments, of which few are asked for ahead.

    `workers`: processes here; a cluster's are as many as it has cores. WorkerDied where one ended.
    """
    if on == "here" and workers == 1:
        for one in arguments:
            yield function(*one)
        return
    with ExitStack() as stack:
        if on == "ray":
            submit, workers = _on_ray(stack, function)
        else:
            submit = _in_processes(stack, function, workers)
        begun: deque[Callable[[], Any]] = deque()
        for one in arguments:
            begun.append(submit(*one))
            if len(begun) > 2 * workers:
                yield begun.popleft()()
        while begun:
            yield begun.popleft()()


def _in_processes(stack: ExitStack, function: Callable[..., Any], workers: int) -> Any:
    import multiprocessing
    from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, context, _alone)

    @stack.push
    def end(kind: Any, *_: Any) -> None:
        if kind is not None:
            # a chunk may take long; what it writes appears whole or not at all
            for process in list((getattr(pool, "_processes", None) or {}).values()):
                process.terminate()
        pool.shutdown(cancel_futures=True)

    def submit(*one: Any) -> Callable[[], Any]:
        future = pool.submit(function, *one)

        def result() -> Any:
            try:
                return future.result()
            except BrokenProcessPool:
                raise WorkerDied(
                    "a worker process ended by itself, mostly for lack of memory: try fewer "
                    "`workers`; the same command continues (in a script it stands under "
                    '`if __name__ == "__main__":`)'
                ) from None

        return result

    return submit


def _alone() -> None:
    """One of several processes: libraries take one thread, Ctrl-C ends it without a word, and so
    does the end of whoever asks."""
    from multiprocessing import connection, parent_process

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent: Any = parent_process()

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _on_ray(stack: ExitStack, function: Callable[..., Any]) -> tuple[Any, int]:
    import ray

    stack.enter_context(connected())
    folder = os.getcwd()

    def there(*one: Any) -> Any:
        # paths may be relative
        os.chdir(folder)
        return function(*one)

    remote = ray.remote(max_retries=ATTEMPTS, num_cpus=1)(there)

    def submit(*one: Any) -> Callable[[], Any]:
        reference = remote.remote(*one)

        def result() -> Any:
            try:
                return ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise WorkerDied(
                    f"the cluster lost what it was at {ATTEMPTS + 1} times ({first_line(error)}); "
                    "the same command continues"
                ) from None

        return result

    return submit, int(ray.cluster_resources().get("CPU", 1))
