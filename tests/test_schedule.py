"""Tasks run after what they need, once, and again where memory or a node failed them."""

import json
import multiprocessing
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from capgap.config import parse_recipe
from capgap.errors import Interrupted, UserError
from capgap.leases import Leases
from capgap.sweep.cells import Context
from capgap.sweep.plan import make_plan, resolve_workers
from capgap.sweep.schedule import ATTEMPTS, Alone, EndMessage, Engine, Schedule, StepMessage
from capgap.sweep.workers import Workers
from capgap.train.recipe import RunSection


@dataclass
class Pretended(Engine):
    """An engine of some places under a false clock: a task takes a second, and ends as `outcomes`
    say, first to last, then well."""

    places: int = 2
    outcomes: dict[str, list[str]] = field(default_factory=dict)
    now: float = 0.0
    begun: list[tuple[str, int | None]] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    most: int = 0

    def has_place(self) -> bool:
        return len(self.running) < self.places

    def submit(self, task: Any, micro_batch_tokens: int | None) -> str:
        assert task.id not in self.running
        self.begun.append((task.id, micro_batch_tokens))
        self.running.append(task.id)
        self.most = max(self.most, len(self.running))
        return "somewhere"

    def messages(self) -> list[Any]:
        self.now += 1.0
        if not self.running:
            return []
        task = self.running.pop(0)
        outcome: Any = (self.outcomes.get(task) or ["done"]).pop(0)
        return [StepMessage(task, 1, 1.0, None), EndMessage(task, outcome, "why", place="node 7")]

    def cancel(self, task: str) -> None:
        self.running.remove(task)
        self.cancelled.append(task)


@pytest.fixture
def plan(tiny_recipe):
    return make_plan(parse_recipe(tiny_recipe))


def schedule(engine: Pretended, **changes: Any) -> Schedule:
    told: dict[str, Any] = {
        "claims": Alone(),
        "is_done": lambda task: False,
        "micro_batch": lambda tokens: {None: 128, 128: 64}.get(tokens),
        "should_stop": lambda: False,
        "on_start": lambda task, place: None,
        "on_step": lambda message: None,
        "on_end": lambda task, message: None,
        "on_failure": lambda attempt: None,
    }
    return Schedule(engine, **(told | changes), clock=lambda: engine.now)


def test_every_task_runs_once_behind_what_it_needs(plan):
    tasks = [*plan.columns, *plan.teachers]
    engine, finished = Pretended(places=3), set()
    schedule(engine).run(tasks, finished)
    order = [name for name, _ in engine.begun]
    assert sorted(order) == sorted(task.id for task in tasks)
    assert finished == set(order)
    assert engine.most == 3
    for task in tasks:
        assert all(order.index(name) < order.index(task.id) for name in task.needs)
    # of those that can begin the costliest first
    assert order[0] == max(plan.teachers, key=lambda one: one.size).id


def test_a_task_without_memory_takes_half_at_once_and_that_is_kept(plan):
    name, failures = plan.teachers[0].id, []
    engine = Pretended(outcomes={name: ["out_of_memory", "lost", "out_of_memory"]})
    work = schedule(engine, on_failure=failures.append)
    work.run([plan.teachers[0]], set())
    assert [tokens for _, tokens in engine.begun] == [None, 128, 128, 64]
    assert [(one.outcome, one.micro_batch_tokens, one.place) for one in failures] == [
        ("out_of_memory", 128, "node 7"),
        ("lost", 128, "node 7"),
        ("out_of_memory", 64, "node 7"),
    ]
    assert "tried again with 128 tokens at once" in failures[0].sentence()
    # a later session begins with what the last one ended with
    again = Pretended()
    schedule(again, attempts=failures).run([plan.teachers[0]], set())
    assert again.begun == [(name, 64)]
    engine.outcomes[name] = ["out_of_memory"]
    with pytest.raises(UserError, match=f"{name} has no memory for one window: why"):
        work.run([plan.teachers[0]], set())


def test_a_task_that_fails_again_and_again_ends_the_sweep(plan):
    name = plan.teachers[0].id
    engine = Pretended(outcomes={name: ["lost"] * ATTEMPTS})
    with pytest.raises(UserError, match=f"{name} failed {ATTEMPTS} times, at last on node 7: why"):
        schedule(engine).run(plan.teachers, set())
    for outcome, kind in (("user_error", UserError), ("crashed", RuntimeError)):
        with pytest.raises(kind, match="why"):
            schedule(Pretended(outcomes={name: [outcome]})).run([plan.teachers[0]], set())
    with pytest.raises(Interrupted):
        schedule(Pretended(), should_stop=lambda: True).run(plan.teachers, set())


def test_what_others_do_is_waited_for_and_not_done_again(plan):
    first, second = plan.teachers[:2]
    column = next(one for one in plan.columns if second.id in one.needs)
    ended = []

    class Others(Alone):
        def take(self, task: str) -> bool:
            return task != second.id

    engine = Pretended(places=1)
    work = schedule(
        engine,
        claims=Others(),
        is_shared=True,
        is_done=lambda task: task.id == second.id and engine.now > 8,
        on_end=lambda task, message: ended.append((task.id, message.outcome)),
    )
    work.run([first, second, column], set())
    assert [name for name, _ in engine.begun] == [first.id, column.id]
    assert ended == [(first.id, "done"), (second.id, "taken"), (column.id, "done")]
    assert engine.now > 8


def test_what_others_have_taken_over_is_ended_here(plan):
    first = plan.teachers[0]
    lost = {first.id}

    class Others(Alone):
        def lost(self) -> set[str]:
            return lost if engine.now < 5 else set()

    class Slow(Pretended):
        def messages(self) -> list[Any]:
            self.now += 1.0
            return super().messages() if self.now > 5 else []

    engine = Slow()
    work = schedule(engine, claims=Others(), is_shared=True)
    work.run([first], set())
    assert engine.cancelled[0] == first.id
    assert engine.running == []


@pytest.fixture
def processes(monkeypatch):
    """Pretended ones: of each its place, rank and GPUs, and its end of a pipe."""
    seen, pipes = [], []

    class Process:
        def __init__(self, **given: Any) -> None:
            place, _, environment, _ = given["args"]
            seen.append((place, environment.get("RANK"), environment["CUDA_VISIBLE_DEVICES"]))

        def start(self) -> None:
            pass

        kill = join = start

        def is_alive(self) -> bool:
            return True

    def pipe() -> tuple[Any, Any]:
        ours, theirs = multiprocessing.Pipe()
        pipes.append(theirs)
        # the parent closes it
        return ours, multiprocessing.Pipe()[1]

    class Begin:
        Pipe = staticmethod(pipe)
        Process = staticmethod(lambda **given: Process(**given))
        set_forkserver_preload = staticmethod(lambda names: None)

    monkeypatch.setattr("multiprocessing.get_context", lambda kind: Begin)
    monkeypatch.setattr("capgap.sweep.workers.POLL_SECONDS", 0.01)
    return seen, pipes


def workers_on(plan: Any, number: int, gpus: tuple[str, ...], each: int = 1) -> Workers:
    run = plan.recipe.run.model_copy(update={"gpus_per_column": each, "workers": "auto"})
    recipe = plan.recipe.model_copy(update={"run": run})
    return Workers(Context(recipe, Path("out"), "cuda:0", None, recipe.training), number, gpus)


@pytest.mark.parametrize(
    ("each", "places"), [(1, ["3", "5", "6", "7", "3 (2)"]), (2, ["3,5", "6,7", "3,5 (2)"])]
)
def test_each_worker_sees_its_own_gpus(plan, processes, each, places):
    seen, pipes = processes
    engine = workers_on(plan, len(places), ("3", "5", "6", "7"), each)
    engine.start()
    ranks = [None] if each == 1 else [str(rank) for rank in range(each)]
    assert seen == [(f"GPU {one}", rank, one.split()[0]) for one in places for rank in ranks]
    # all ranks of a worker get a task; where one fails of it, all begin anew with the next
    first, *others = [*plan.teachers, *plan.columns][: 1 + len(places)]
    assert engine.submit(first, None) == f"GPU {places[0]}"
    assert [one.recv() for one in pipes[:each]] == [(first, None)] * each
    failed = EndMessage(first.id, "out_of_memory")
    for one in pipes[:each]:
        one.send(failed)
    assert engine.messages() == [failed]
    begun = len(seen)
    assert engine.messages() == []
    for task in others:
        engine.submit(task, None)
    assert seen[begun:] == ([] if each == 1 else seen[:each])


def test_a_gpu_gets_another_task_where_that_gains_and_fits(plan, processes, monkeypatch):
    seen, pipes = processes
    tasks = [*plan.teachers, *plan.columns][:4]
    needs = {task.id: gb * 10**9 for task, gb in zip(tasks, (3, 3, 3, 9), strict=True)}
    monkeypatch.setattr("capgap.sweep.sharing.SETTLE_SECONDS", 0)
    monkeypatch.setattr("capgap.sweep.sharing.MEASURE_SECONDS", 0)
    for name, value in (("gpu_memory", 12e9), ("usable_cores", 8), ("free_memory", 10**12)):
        monkeypatch.setattr(f"capgap.sweep.workers.{name}", lambda *_, value=value: value)
    monkeypatch.setattr("capgap.sweep.workers.gpu_bytes", lambda _, task: needs[task.id])
    monkeypatch.setattr("capgap.sweep.workers.host_bytes", lambda *_: 10**10)
    engine = workers_on(plan, 2, ("3", "5"))
    engine.start()
    # those that share a GPU begin when they are needed
    assert [place for place, *_ in seen] == ["GPU 3", "GPU 5"]
    assert [engine.submit(task, None) for task in tasks[:2]] == ["GPU 3", "GPU 5"]
    assert not engine.has_place()
    for tokens in (10, 20, 30):
        pipes[0].send(StepMessage(tasks[0].id, tokens, 1.0, None))
        engine.messages()
    assert engine.has_place()
    assert [engine.fits(task, None) for task in tasks[2:]] == [True, False]
    monkeypatch.setattr("capgap.sweep.workers.free_memory", lambda: 10**10)
    assert not engine.fits(tasks[2], None)
    assert engine.submit(tasks[2], None) == "GPU 3 (2)"
    assert seen[2:] == [("GPU 3 (2)", None, "3")]
    # where both find no memory it is no fault of their batches: they are begun again, alone
    for task, pipe in ((tasks[2], pipes[2]), (tasks[0], pipes[0])):
        pipe.send(EndMessage(task.id, "out_of_memory"))
        assert [one.outcome for one in engine.messages()] == ["lost"]
    assert engine.submit(tasks[0], None) == "GPU 3"
    assert not engine.has_place()
    # alone it had what there is
    pipes[0].send(EndMessage(tasks[0].id, "out_of_memory"))
    assert [one.outcome for one in engine.messages()] == ["out_of_memory"]
    # the other process waited beside it, with memory of the GPU: it was ended
    assert [bool(one.ranks) for one in engine.workers[::2]] == [True, False, False, False]
    engine.cancel(tasks[1].id)
    assert engine.submit(tasks[3], None) in ("GPU 3", "GPU 5")


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_large_task_is_not_passed_by_small_ones(plan, is_shared):
    """The costliest comes first, also where only others fit at the moment; in a folder that others
    share it may be theirs."""
    large = max(plan.teachers, key=lambda one: one.size)

    class Narrow(Pretended):
        def fits(self, task: Any, micro_batch_tokens: int | None) -> bool:
            return task.id != large.id or not self.running

    # one that is at work already when the large one may begin
    engine = Narrow(places=2, running=["other"])
    schedule(engine, is_shared=is_shared).run(plan.teachers, set())
    begun = [name for name, _ in engine.begun]
    assert sorted(begun) == sorted(one.id for one in plan.teachers)
    assert (begun[0] == large.id) != is_shared


def test_as_many_tasks_at_once_as_gpus_can_hold():
    run = RunSection(gpus_per_column=4)
    assert resolve_workers(run, "cuda", most=9, gpus=8) == (2, None)
    assert resolve_workers(run, "cuda", most=1, gpus=8) == (1, None)
    with pytest.raises(
        UserError, match=r"run\.gpus_per_column=4: ask for no more GPUs than 2, all here"
    ):
        resolve_workers(run, "cuda", most=9, gpus=2)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("sweep", "quickstart", "--on", "ray"), "--on ray needs it installed: `pip install"),
        (("sweep", "quickstart", "--on", "ray", "--worker"), "worker and on=ray: take one"),
        (("sweep", "quickstart", "--on", "slurm"), "Input should be 'here' or 'ray'"),
        (("column", "quickstart", "--runs", "x"), "--runs are those of a task: name it"),
        (("column", "quickstart", "x", "--runs", "x"), "no column of this sweep has the run 'x'"),
    ],
)
def test_mistakes_are_told_in_one_line_before_any_work(typed, tmp_path, monkeypatch, asked, told):
    monkeypatch.setattr("capgap.ray_cluster.find_spec", lambda name: None)
    answer = typed(*asked, "--out", tmp_path / "out")
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert told in answer.err
    assert not (tmp_path / "out").exists()


def test_storage_that_fails_for_a_while_costs_no_lease(tmp_path, monkeypatch):
    with Leases(tmp_path, stale=0.2) as mine:
        assert mine.take("task")
        before = json.loads((tmp_path / "task" / "1").read_text())["beat"]
        listdir = os.listdir

        def fails(*given: Any) -> Any:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("os.listdir", fails)
        time.sleep(0.1)
        monkeypatch.setattr("os.listdir", listdir)
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / "task" / "1").read_text())["beat"] <= before + 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert mine.lost() == set()


# --- leases ---------------------------------------------------------------------------------------


def test_one_of_many_takes_a_task(tmp_path):
    leases = [Leases(tmp_path, stale=60) for _ in range(16)]
    taken: list[int] = []
    begin = threading.Barrier(len(leases))

    def take(number: int) -> None:
        begin.wait()
        if leases[number].take("task"):
            taken.append(number)

    threads = [threading.Thread(target=take, args=(n,)) for n in range(len(leases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    owner = leases[taken[0]]
    owner.release("task")
    # given back: another may, and the first no more
    others = [one for one in leases if one is not owner]
    assert others[0].take("task")
    assert not owner.take("task")


def test_a_lease_that_nobody_renews_is_taken_over_once(tmp_path):
    now = [0.0]
    gone = Leases(tmp_path, stale=10)
    assert gone.take("task")
    others = [Leases(tmp_path, stale=10, clock=lambda: now[0]) for _ in range(2)]
    for second in range(11):
        now[0] = float(second)
        assert not any(one.take("task") for one in others), second
    now[0] = 11.0
    assert [one.take("task") for one in others] == [True, False]
    # its clock begins with what it sees now
    assert json.loads((tmp_path / "task" / "2").read_text())["owner"] == others[0].owner
    # the same owner needs not wait for itself
    assert Leases(tmp_path, others[0].owner, stale=10).take("task")


def test_an_owner_that_lives_keeps_its_lease_and_hears_of_its_loss(tmp_path):
    with Leases(tmp_path, stale=0.5) as mine, Leases(tmp_path, stale=0.5) as other:
        assert mine.take("task")
        mine.tell("task", {"tokens": 5})
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert not other.take("task")
            time.sleep(0.05)
        assert other.told("task")["progress"] == {"tokens": 5}
        assert mine.lost() == set()
        (tmp_path / "task" / "2").write_text("{}")
        deadline = time.monotonic() + 10
        while mine.lost() != {"task"}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert json.loads((tmp_path / "task" / "2").read_text()) == {}
