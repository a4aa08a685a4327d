"""The schedule of a sweep on a cluster: simulated at scale, and what Ray itself takes.

    python benchmarks/cluster.py simulate
    python benchmarks/cluster.py overhead
    python benchmarks/cluster.py nodes

`simulate` drives the real schedule under a false clock: 2,000 columns on 500 cards that fail once
in 1,000 hours each. `overhead` and `nodes` start Ray here, with tasks that sleep; results are lines
of JSON on standard output.
"""

import argparse
import heapq
import json
import random
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from capgap.config import parse_recipe
from capgap.leases import BEATS
from capgap.sweep.cells import Context
from capgap.sweep.plan import Plan, make_plan
from capgap.sweep.schedule import (
    Alone,
    EndMessage,
    Engine,
    Schedule,
    StepMessage,
    relative_cost,
)

HOUR = 3600.0
# A process with torch that reads its model and corpus
BEGIN = 60.0


def grid(teachers: int, seeds: int, students: int, growth: float = 1.12) -> Plan:
    """teachers x seeds columns of so many students."""
    return make_plan(
        parse_recipe(
            {
                "name": "scale",
                "seeds": list(range(seeds)),
                "baselines": "best",
                "corpus": {"source": "stdlib", "vocabulary": 32768, "window": 1024},
                "teachers": {
                    "sizes": [round(2e7 * growth**number) for number in range(teachers)],
                    "tokens": "2B",
                },
                "students": {
                    "sizes": [round(4e6 * 1.3**number) for number in range(students)],
                    "tokens": ["1B"],
                },
                "training": {"batch_tokens": 262144, "micro_batch_tokens": 16384},
            }
        )
    )


@dataclass
class Cards(Engine):
    """An engine of pretended cards. A task takes `hours` by its cost; a card fails once in
    `between_failures` hours, and what its task did since the last checkpoint is done again."""

    number: int
    hours: dict[str, float]
    between_failures: float
    checkpoint_hours: float
    drawn: random.Random = field(default_factory=lambda: random.Random(0))
    now: float = 0.0
    done: dict[str, float] = field(default_factory=dict)
    ends: list[tuple[float, str, bool, float]] = field(default_factory=list)
    busy: float = 0.0
    failures: int = 0
    polls: int = 0

    def has_place(self) -> bool:
        return len(self.ends) < self.number

    def submit(self, task: Any, micro_batch_tokens: int | None) -> str:
        left = self.hours[task.id] - self.done.get(task.id, 0.0)
        fails = self.drawn.expovariate(1 / self.between_failures)
        taken = min(BEGIN / HOUR + left, fails)
        heapq.heappush(self.ends, (self.now + taken, task.id, fails < BEGIN / HOUR + left, taken))
        return "card"

    def messages(self) -> list[StepMessage | EndMessage]:
        self.polls += 1
        self.now, task, failed, taken = heapq.heappop(self.ends)
        self.busy += taken
        if not failed:
            return [EndMessage(task, "done")]
        self.failures += 1
        worked = max(0.0, taken - BEGIN / HOUR)
        self.done[task] = self.done.get(task, 0.0) + worked // self.checkpoint_hours * (
            self.checkpoint_hours
        )
        return [EndMessage(task, "lost", "the card failed", place="card")]


def untold(engine: Any, **more: Any) -> Schedule:
    """A schedule of which nobody hears."""

    def nothing(*told: object) -> None:
        pass

    told = dict.fromkeys(("on_start", "on_step", "on_end", "on_failure", "micro_batch"), nothing)
    asked: Any = dict.fromkeys(("is_done", "should_stop"), lambda *asked: False)
    return Schedule(engine, Alone(), **told, **asked, **more)


def simulate(arguments: argparse.Namespace) -> dict[str, Any]:
    plan = grid(arguments.columns // 40, 40, 2)
    tasks = plan.tasks(())
    shares = {task.id: relative_cost(task) for task in tasks}
    hours = {
        name: share * arguments.hours * len(tasks) / sum(shares.values())
        for name, share in shares.items()
    }
    cards = Cards(arguments.cards, hours, arguments.between_failures, 0.05)
    began = time.process_time()
    schedule = untold(cards, clock=lambda: HOUR * cards.now)
    finished: set[str] = set()
    schedule.run(tasks, finished)
    assert finished == {task.id for task in tasks}
    work = sum(hours.values())
    longest = max(
        hours[task.id] + max((hours[name] for name in task.needs), default=0.0) for task in tasks
    )
    bound = max(work / arguments.cards, longest)
    beats = arguments.cards * BEATS / plan.recipe.run.lease_seconds
    return {
        "tasks": len(tasks),
        "columns": len(plan.columns),
        "cards": arguments.cards,
        "failures": cards.failures,
        "hours": cards.now,
        "hours against the bound": cards.now / bound,
        "of the bound the longest chain": longest / bound,
        "wasted share of the work": cards.busy / work - 1,
        "driver, CPU seconds": time.process_time() - began,
        "driver, peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "files of records and leases": sum(len(task.runs) for task in tasks) + 2 * len(tasks),
        "lease writes a second": beats,
    }


def ray_engine(folder: Path, plan: Plan, seconds: float) -> Any:
    """RayNodes whose tasks sleep."""
    from capgap.sweep import on_ray

    def asleep(words: list[str]) -> dict[str, Any]:
        time.sleep(seconds)
        return {"code": 0, "out": '{"warnings": []}', "error": ""}

    context = Context(plan.recipe, folder, "cpu", 1, plan.recipe.training)
    with mock.patch.object(on_ray, "run_column", asleep):
        engine = on_ray.RayNodes(context, "benchmark")
        engine.__enter__()
    return engine


def through_ray(folder: Path, count: int, seconds: float) -> float:
    """Seconds that so many sleeping tasks take, the engine's start not counted."""
    plan = grid(max(1, count // 10), 10, 1, growth=1.01)
    engine = ray_engine(folder, plan, seconds)
    tasks = plan.teachers[:count]
    schedule = untold(engine)
    began = time.monotonic()
    schedule.run(tasks, set())
    taken = time.monotonic() - began
    engine.__exit__(None, None, None)
    return taken


def overhead(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for count in (10, 100, 1000):
        with TemporaryDirectory() as folder:
            taken = through_ray(Path(folder), count, 0.0)
        found.append({"tasks": count, "seconds": taken, "ms a task": 1000 * taken / count})
    return found


def nodes(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    import os

    from ray.cluster_utils import Cluster

    found = []
    for count in (1, 2, 4):
        head = {"num_cpus": 1, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(count - 1):
            cluster.add_node(num_cpus=1)
        with (
            mock.patch.dict(os.environ, RAY_ADDRESS=cluster.address),
            TemporaryDirectory() as folder,
        ):
            taken = through_ray(Path(folder), 40, 2.0)
        cluster.shutdown()
        found.append({"nodes": count, "tasks": 40, "seconds": taken, "ideal": 80.0 / count})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("simulate", "overhead", "nodes"))
    parser.add_argument("--columns", type=int, default=2000)
    parser.add_argument("--cards", type=int, default=500)
    parser.add_argument("--hours", type=float, default=4.0, help="of a task, the mean")
    parser.add_argument("--between-failures", type=float, default=1000.0, help="hours of a card")
    arguments = parser.parse_args()
    found = globals()[arguments.what](arguments)
    for line in found if isinstance(found, list) else [found]:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
