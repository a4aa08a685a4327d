"""The nodes of a Ray cluster as an engine (extra `capgap[ray]`).

A task of Ray's starts `capgap column` as a process of its own, and tells at its end what that said:
no actors, no objects but small messages, no state outside the output folder, which all nodes reach
by the same path. Who runs a task, and how far it is, stands in its lease.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from operator import itemgetter
from typing import Any

from capgap.artifact import write_json
from capgap.errors import UserError, border, is_storage_away, warn_once
from capgap.leases import Leases
from capgap.machine import GPUS
from capgap.mirror import sync
from capgap.ray_cluster import Head, connected
from capgap.storage import as_urls
from capgap.sweep.cells import Column, Context, Task
from capgap.sweep.memory import gpu_bytes
from capgap.sweep.schedule import LOOK_SECONDS, EndMessage, Engine, Outcome, StepMessage
from capgap.sweep.stages import IN_USE, OUT_OF_MEMORY

# A process with torch, before any model
PROCESS_BYTES = 1_500_000_000
BYTES_PER_PARAMETER = 16
# Labels of a node: gigabytes of each of its cards, where somebody says so; what Ray says itself
CARD_GB = "gpu-memory-gb"
CARD_KIND, NODE = "ray.io/accelerator-type", "ray.io/node-id"
STOP_SECONDS = 60.0
POLL_SECONDS = 0.2
TOLD_AT_ONCE = 20
USER_ERROR = 2
ERROR_CHARACTERS = 20_000


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
        self.head: Head | None = None
        self._slots = 0
        self._slots_at = -LOOK_SECONDS

    def __enter__(self) -> "RayNodes":
        import ray

        with ExitStack() as stack:
            self.head = stack.enter_context(connected())
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
        # asking a head that is gone would wait for it
        if self.head is not None and not self.head.is_there:
            return False
        if time.monotonic() - self._slots_at > LOOK_SECONDS:
            self._slots_at = time.monotonic()
            self._slots = sum(_times(self._needs(), node) for node in self._nodes())
        # one more, so that no node waits for us
        return len(self.running) <= self._slots

    def submit(self, task: Task, micro_batch_tokens: int | None) -> str:
        needs, nodes = self._needs(task, micro_batch_tokens), self._nodes()
        unfit = [node[NODE] for node in nodes if not _times(needs, node)]
        if len(unfit) == len(nodes):
            most = {name: max((node.get(name, 0.0) for node in nodes), default=0) for name in needs}
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
        elsewhere = {NODE: f"!in({','.join(unfit)})"} if unfit else {}
        remote = self.remote.options(**asked, label_selector=elsewhere)
        self.running[remote.remote(words)] = task
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
            # of hundreds a few at a time: each is two requests to the storage
            told = random.sample([*self.running.values()], min(TOLD_AT_ONCE, len(self.running)))
            for task in told:
                progress = self.leases.told(task.id).get("progress")
                if progress:
                    found.append(StepMessage(**progress))
        return found

    def _needs(
        self, task: Task | None = None, micro_batch_tokens: int | None = None
    ) -> dict[str, float]:
        """Of a task, at least that of any."""
        context = self.context.with_micro_batch(micro_batch_tokens)
        recipe, each = context.recipe, context.recipe.run.gpus_per_column
        on_gpu = recipe.run.device.startswith("cuda")
        if recipe.run.device == "auto":
            on_gpu = any(node.get("GPU") for node in self._nodes())
        precisions = recipe.training.precision, context.training.precision
        if on_gpu and context.device == "cpu" and precisions == ("auto", "fp32"):
            raise UserError(
                "this machine has no GPU and the nodes have: say training.precision in the recipe, "
                "or start the sweep on a node"
            )
        needs = {"CPU": each, "GPU": each * on_gpu, "memory": each * PROCESS_BYTES, CARD_GB: 0.0}
        if task is not None and on_gpu:
            needs[CARD_GB] = gpu_bytes(context, task) / 1e9
        elif task is not None:
            shapes = [shape for shape, _ in [*task.work.trained, *task.work.read]]
            needs["memory"] += BYTES_PER_PARAMETER * sum(one.parameters().total for one in shapes)
        return needs

    def _nodes(self) -> list[dict[str, Any]]:
        """What each has. A card that cannot compute as the sweep does is none; one whose memory
        nobody tells has enough."""
        import ray

        found = []
        for node in filter(itemgetter("Alive"), ray.nodes()):
            labels, has = node["Labels"], node["Resources"] | {NODE: node["NodeID"]}
            kind, gigabytes = labels.get(CARD_KIND), labels.get(CARD_GB, "inf")
            needs_bf16 = self.context.training.precision != "fp32"
            if has.get("GPU") and needs_bf16 and kind in GPUS and not GPUS[kind].has_bf16:
                warn_once(f"GPUs of {node['NodeManagerHostname']} are left out: no bf16 ({kind})")
                has["GPU"] = 0.0
            with border(f"the label {CARD_GB} of {node['NodeManagerHostname']}"):
                has[CARD_GB] = float(gigabytes)
            found.append(has)
        return found


def _times(needs: dict[str, float], node: dict[str, Any]) -> int:
    """How many of such tasks a node holds; each has whole cards."""
    if node[CARD_GB] < needs[CARD_GB]:
        return 0
    shared = [(name, need) for name, need in needs.items() if need and name != CARD_GB]
    return int(min(node.get(name, 0.0) // need for name, need in shared))


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
    # by a signal: of the node, or for memory
    is_killed = found["code"] < 0 or found["code"] > 128
    if is_killed or is_storage_away(lines[-1] if outcome == "user_error" else found["error"]):
        outcome = "lost"
    message = found["error"] if outcome == "crashed" else lines[-1].removeprefix("capgap: ")
    return EndMessage(task.id, outcome, message, place=place)
