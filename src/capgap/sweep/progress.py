"""What a person sees while a sweep runs: a live display on a terminal, lines elsewhere."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from capgap.sizes import clock_time, format_count
from capgap.stage import Say, paced
from capgap.storage import as_urls
from capgap.sweep.cells import Column, Task, Teacher
from capgap.sweep.schedule import EndMessage, StepMessage, relative_cost

LINE_EVERY = 10.0  # seconds between two lines of a running task where there is no terminal


@dataclass
class _Running:
    task: Task
    tell: Callable[[Callable[[], str]], None]
    bar: TaskID
    share: float = 0.0


class Display:
    """Where a sweep says what it does: in lines, and on a `live` console in bars, one a worker and
    one for the whole sweep. It counts work in the units of `relative_cost`."""

    def __init__(self, say: Say, live: Console | None = None) -> None:
        self.say = say
        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            TextColumn("{task.fields[state]}"),
        )
        self.bars = Progress(*columns, console=live, disable=live is None)
        self.is_live = live is not None
        self.whole = TaskID(0)
        self.start = time.monotonic()
        self.work_began: float | None = None
        self.warned: set[str] = set()
        self.running: dict[str, _Running] = {}
        self.known = self.later = 0.0
        self.before = self.finished = 0.0
        self.tasks = self.ended_tasks = 0

    def __call__(self, text: str) -> None:
        self.say(text)

    def __enter__(self) -> "Display":
        self.bars.start()
        self.whole = self.bars.add_task("sweep", state="")
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def expect(
        self, tasks: Sequence[Task], done: Sequence[str], later: Sequence[Column] = ()
    ) -> None:
        """`later` are tasks that will come but are not settled yet; the next call replaces them."""
        before = [relative_cost(task) for task in tasks if task.id in done]
        self.tasks += len(tasks)
        self.ended_tasks += len(before)
        self.known += sum(map(relative_cost, tasks))
        self.later = sum(map(relative_cost, later))
        self.before += sum(before)
        self.finished += sum(before)

    def started(self, task: Task, place: str) -> None:
        self.work_began = self.work_began or time.monotonic()
        where = "" if place.startswith("worker") else f" on {place}"
        bar = self.bars.add_task(f"{describe(task)}{where}", total=max(1, task.tokens), state="")
        self.running[task.id] = _Running(task, paced(self.say, LINE_EVERY), bar)
        if not self.is_live:
            self.say(f"start {describe(task)}{where}")

    def step(self, message: StepMessage) -> None:
        running = self.running[message.task]
        task = running.task
        running.share = message.tokens / max(1, task.tokens)
        loss = "" if message.loss is None else f", loss {message.loss:.3f}"
        state = (
            f"{format_count(message.tokens)} of {format_count(task.tokens)} tokens, "
            f"{message.tokens_per_second:,.0f} tokens/s{loss}"
        )
        to_go = f"about {clock_time(self.eta())} to go"
        if not self.is_live:
            running.tell(lambda: f"{task.id}: {state}; sweep {self.share:.0%}, {to_go}")
            return
        spent = clock_time(time.monotonic() - self.start)
        whole = f"{self.ended_tasks} of {self.tasks} tasks, {spent} so far, {to_go}"
        self.bars.update(running.bar, completed=message.tokens, state=state)
        self.bars.update(self.whole, completed=100 * self.share, state=whole)

    def ended(self, task: Task, message: EndMessage) -> None:
        running = self.running.pop(message.task, None)
        if running is not None:
            self.bars.update(running.bar, visible=False)
        if message.outcome == "done" or running is None:
            self.finished += relative_cost(task)
            self.ended_tasks += 1
            for warning in message.message.splitlines():
                if warning not in self.warned:
                    self.say(warning)
                self.warned.add(warning)
            how = "by another process" if running is None else f"in {clock_time(message.busy)}"
            self.say(f"done {describe(task)} {how}")

    @property
    def done(self) -> float:
        running = self.running.values()
        return self.finished + sum(one.share * relative_cost(one.task) for one in running)

    @property
    def share(self) -> float:
        """Of the whole sweep's work."""
        return self.done / (self.known + self.later)

    def eta(self) -> float | None:
        """Seconds to go at the speed so far; None before anything can be said."""
        if self.work_began is None:
            return None
        total, now = self.known + self.later, self.done - self.before
        # the corpus took its time before, and says nothing of the time to train
        elapsed = time.monotonic() - self.work_began
        if elapsed < 5 or now < 0.02 * total:
            return None
        return elapsed * (total - self.done) / now


def describe(task: Task) -> str:
    if isinstance(task, Teacher):
        return f"teacher {task.id}"
    kind = "baselines" if task.teacher is None else "students"
    return f"{task.id} ({kind}: {len(task.cells)})"


def make_display(console: Console, *, quiet: bool) -> Display:
    """Bars on a terminal, lines elsewhere, nothing if `quiet`. Called with a text, it says that."""
    if quiet:
        return Display(lambda text: None)
    live = console if console.is_terminal else None

    def say(text: str) -> None:
        console.print(as_urls(text), highlight=False, markup=False, soft_wrap=live is None)

    return Display(say, live)
