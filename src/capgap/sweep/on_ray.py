"""The nodes of a Ray cluster as an engine (extra `capgap[ray]`).

A task of Ray's starts `capgap column` as a process of its own, and tells at its end what that said:
no actors, no objects but small messages, no state outside the output folder, which all nodes reach
by the same path. Who runs a task, and how far it is, stands in its lease.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from typing import Any

from capgap.artifact import write_json
from capgap.errors import UserError
from capgap.leases import Leases
from capgap.machine import install_command, usable_cores
from capgap.mirror import sync
from capgap.stage import FieldError
from capgap.storage import as_urls
from capgap.sweep.cells import Column, Context, Task
from capgap.sweep.schedule import LOOK_SECONDS, EndMessage, Engine, Outcome, StepMessage
from capgap.sweep.stages import IN_USE, OUT_OF_MEMORY

# A process with torch, before any model
PROCESS_BYTES = 1_500_000_000
BYTES_PER_PARAMETER = 16
STOP_SECONDS = 60.0
POLL_SECONDS = 0.2
USER_ERROR = 2
ERROR_CHARACTERS = 20_000


def check_installed() -> None:
    """UserError without Ray."""
    if find_spec("ray") is None:
        raise FieldError("on", f"ray needs it installed: `{install_command('ray')}`")


def run_column(words: list[str]) -> dict[str, Any]:
    """On a node: `capgap` with these words, to its end, or until Ray cancels it."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = subprocess.Popen(
            [sys.executable, "-m", "capgap", *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=error,
            # capgap's own threads and GPU are those that Ray gives this task
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
        try:
            # a wait in one call would not hear of a cancellation
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
                process.kill()
        out.seek(0)
        error.seek(0)
        told = error.read()[-ERROR_CHARACTERS:]
        return {"code": process.returncode, "out": out.read(), "error": told}


class RayNodes(Engine):
    """Tasks on all nodes of the cluster that RAY_ADDRESS or this machine knows, else on one that is
    started here; `owner` is whoever drives them."""

    def __init__(self, context: Context, owner: str) -> None:
        self.context, self.owner = context, owner
        self.leases = Leases(context.leases, owner, stale=context.recipe.run.lease_seconds)
        self.running: dict[Any, Task] = {}
        self._looked = 0.0
        self._slots = 0
        self._slots_at = -LOOK_SECONDS

    def __enter__(self) -> "RayNodes":
        import ray

        with ExitStack() as stack:
            stack.enter_context(_standard_output_to_nobody())
            quiet: Any = {"log_to_driver": False, "logging_level": "error"}
            if not ray.is_initialized():
                try:
                    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **quiet)
                except ConnectionError:
                    ray.init(num_cpus=usable_cores(), include_dashboard=False, **quiet)
            stack.callback(ray.shutdown)
            # a try that is lost is ours to count
            self.remote = ray.remote(max_retries=0)(run_column)
            self.recipe = self.context.out / "work" / "recipe.json"
            write_json(self.recipe, {"recipe": self.context.recipe.model_dump(mode="json")})
            sync(self.context.out)
            self._opened = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        import ray

        with self._opened:
            for reference in self.running:
                ray.cancel(reference)
            if self.running:
                ray.wait(list(self.running), num_returns=len(self.running), timeout=STOP_SECONDS)

    def has_place(self) -> bool:
        """As many at once as the nodes hold now; others may come and go."""
        if time.monotonic() - self._slots_at > LOOK_SECONDS:
            self._slots_at = time.monotonic()
            self._slots = sum(_times(self._needs(0), node) for node in self._nodes())
        # one more, so that no node waits for us
        return len(self.running) <= self._slots

    def submit(self, task: Task, micro_batch_tokens: int | None) -> str:
        size = sum(shape.parameters().total for shape, _ in [*task.work.trained, *task.work.read])
        needs = self._needs(BYTES_PER_PARAMETER * size)
        nodes = self._nodes()
        if not any(_times(needs, node) for node in nodes):
            most = {name: max(node.get(name, 0.0) for node in nodes) for name in needs}
            lacks = [name for name in needs if most[name] < needs[name]] or list(needs)
            raise UserError(
                f"no node of the cluster can run {task.id}: it needs {needs[lacks[0]]:g} "
                f"{lacks[0]}, the largest has {most[lacks[0]]:g}"
            )
        recipe, out = as_urls(str(self.recipe)), as_urls(str(self.context.out))
        words = ["column", recipe, task.id, "--out", out, "--json"]
        words += ["--owner", self.owner]
        if isinstance(task, Column):
            words += [word for run in task.runs for word in ("--runs", run)]
        if micro_batch_tokens is not None:
            words += ["--micro-batch-tokens", str(micro_batch_tokens)]
        asked = {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"], "memory": needs["memory"]}
        self.running[self.remote.options(**asked).remote(words)] = task
        return "ray"

    def messages(self) -> Sequence[StepMessage | EndMessage]:
        import ray

        found: list[StepMessage | EndMessage] = []
        if not self.running:
            time.sleep(POLL_SECONDS)
            return found
        done, _ = ray.wait(list(self.running), num_returns=1, timeout=POLL_SECONDS)
        for reference in done:
            task = self.running.pop(reference)
            place = self.leases.told(task.id).get("host", "a node that did not begin it")
            try:
                found.append(_ended(task, ray.get(reference), place))
            except ray.exceptions.RayTaskError as error:
                found.append(EndMessage(task.id, "crashed", str(error), place=place))
            # the node, its worker or the driver's word to it is gone
            except ray.exceptions.RayError as error:
                is_memory = isinstance(error, ray.exceptions.OutOfMemoryError)
                outcome: Outcome = "out_of_memory" if is_memory else "lost"
                found.append(EndMessage(task.id, outcome, type(error).__name__, place=place))
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            for task in self.running.values():
                progress = self.leases.told(task.id).get("progress")
                if progress:
                    found.append(StepMessage(**progress))
        return found

    def _needs(self, model_bytes: int) -> dict[str, float]:
        asked = self.context.recipe.run.device
        on_gpu = asked.startswith("cuda")
        if asked == "auto":
            on_gpu = any(node.get("GPU") for node in self._nodes())
        training = self.context.recipe.training
        if on_gpu and self.context.device == "cpu" and training.precision == "auto":
            raise UserError(
                "this machine has no GPU and the nodes have: say training.precision in the recipe, "
                "or start the sweep on a node"
            )
        memory = float(PROCESS_BYTES + (0 if on_gpu else model_bytes))
        return {"CPU": 1.0, "GPU": float(on_gpu), "memory": memory}

    def _nodes(self) -> list[dict[str, float]]:
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _times(needs: dict[str, float], node: dict[str, float]) -> int:
    """How many of such tasks a node holds."""
    return int(min(node.get(name, 0.0) // need for name, need in needs.items() if need))


def _ended(task: Task, found: dict[str, Any], place: str) -> EndMessage:
    """What a process said that has ended."""
    lines = found["error"].strip().splitlines() or [f"exit code {found['code']}"]
    if found["code"] == 0:
        told = json.loads(found["out"])
        cost = {name: told.get(name, 0) for name in ("busy", "peak_memory")}
        return EndMessage(
            task.id,
            "done",
            "\n".join(told["warnings"]),
            told.get("seconds", {}),
            **cost,
            place=place,
        )
    outcome: Outcome = "crashed"
    if found["code"] == USER_ERROR:
        outcome = "user_error"
        if OUT_OF_MEMORY in lines[-1]:
            outcome = "out_of_memory"
        elif IN_USE in lines[-1]:
            outcome = "taken"
    elif found["code"] < 0 or found["code"] > 128:
        # by a signal: of the node, or for memory
        outcome = "lost"
    message = found["error"] if outcome == "crashed" else lines[-1].removeprefix("capgap: ")
    return EndMessage(task.id, outcome, message, place=place)


@contextmanager
def _standard_output_to_nobody() -> Iterator[None]:
    """Answers go there, and what Ray's processes print does not belong to them."""
    sys.stdout.flush()
    kept = os.dup(1)
    nobody = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nobody, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nobody)
