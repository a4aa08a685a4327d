"""What a person sees while a sweep runs: a live display on a terminal, lines elsewhere."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from capgap.sizes import clock_time, format_count
from capgap.stage import paced
from capgap.sweep.plan import Column, Teacher
from capgap.sweep.schedule import relative_cost
from capgap.sweep.worker import EndMessage, StepMessage

LINE_EVERY = 10.0  # seconds between two lines of a running task where there is no terminal


@dataclass
class _Running:
    task: Teacher | Column
    tell: Callable[[Callable[[], str]], None]
    message: StepMessage | None = None

    @property
    def share(self) -> float:
        return self.message.tokens / max(1, self.task.tokens) if self.message else 0.0


class Ledger:
    """Work done and to do, in the units of `relative_cost`, and the time left."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.work_began: float | None = None
        self.running: dict[int, _Running] = {}
        self.known = self.later = 0.0
        self.before = self.finished = 0.0
        self.tasks = self.ended = 0

    def expect(
        self,
        tasks: Sequence[Teacher | Column],
        done: Sequence[str],
        later: Sequence[Column] = (),
    ) -> None:
        """`later` are tasks that will come but are not settled yet; the next call replaces them."""
        costs_before = [relative_cost(task) for task in tasks if task.id in done]
        self.tasks += len(tasks)
        self.ended += len(costs_before)
        self.known += sum(relative_cost(task) for task in tasks)
        self.later = sum(relative_cost(task) for task in later)
        self.before += sum(costs_before)
        self.finished += sum(costs_before)

    def end(self, worker: int) -> None:
        self.finished += relative_cost(self.running.pop(worker).task)
        self.ended += 1

    @property
    def total(self) -> float:
        return self.known + self.later

    @property
    def done(self) -> float:
        running = self.running.values()
        return self.finished + sum(one.share * relative_cost(one.task) for one in running)

    def eta(self) -> float | None:
        """Seconds to go at the speed so far; None before anything can be said."""
        if self.work_began is None:
            return None
        now = self.done - self.before
        # the corpus took its time before, and says nothing of the time to train
        elapsed = time.monotonic() - self.work_began
        if elapsed < 5 or now < 0.02 * self.total:
            return None
        return elapsed * (self.total - self.done) / now


def describe(task: Teacher | Column) -> str:
    if isinstance(task, Teacher):
        return f"teacher {task.id}"
    names = f"{len(task.cells)} {'baseline' if task.teacher is None else 'student'}"
    names += "s" if len(task.cells) > 1 else ""
    return f"{task.id} ({names})"


class Display:
    """Where a sweep tells what it does: in lines, or `live` in a table that is drawn anew, with one
    row a worker and the whole sweep below. A console that is quiet shows neither."""

    def __init__(self, console: Console, *, live: bool = False) -> None:
        self.console = console
        self.ledger = Ledger()
        self.live = None
        if live:
            self.live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> "Display":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """Tell a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=self.live is None)

    def expect(
        self,
        tasks: Sequence[Teacher | Column],
        done: Sequence[str],
        later: Sequence[Column] = (),
    ) -> None:
        self.ledger.expect(tasks, done, later)

    def started(self, worker: int, task: Teacher | Column) -> None:
        self.ledger.work_began = self.ledger.work_began or time.monotonic()
        self.ledger.running[worker] = _Running(task, paced(self.say, LINE_EVERY))
        if self.live is None:
            self.say(f"start {describe(task)}")

    def step(self, message: StepMessage) -> None:
        running = self.ledger.running[message.worker]
        running.message = message
        if self.live is None:
            running.tell(lambda: self._line(message, running.task))

    def ended(self, task: Teacher | Column, message: EndMessage) -> None:
        self.ledger.end(message.worker)
        if message.outcome == "done":
            for warning in message.message.splitlines():
                self.say(warning)
            self.say(f"done {describe(task)} in {clock_time(message.busy)}")

    def _line(self, message: StepMessage, task: Teacher | Column) -> str:
        loss = "" if message.loss is None else f", loss {message.loss:.3f}"
        return (
            f"{message.task}: {format_count(message.tokens)} of {format_count(task.tokens)} "
            f"tokens, {message.tokens_per_second:,.0f} tokens/s{loss}; sweep "
            f"{self.ledger.done / self.ledger.total:.0%}, "
            f"about {clock_time(self.ledger.eta())} to go"
        )

    def _render(self) -> RenderableType:
        ledger = self.ledger
        if not ledger.total:
            return Text("")
        table = Table(box=None, padding=(0, 1), show_header=True, header_style="dim")
        for name in ("running", "", "tokens", "tokens/s", "loss"):
            table.add_column(name, justify="left" if name in ("running", "") else "right")
        for _, one in sorted(ledger.running.items()):
            message = one.message
            table.add_row(
                describe(one.task),
                ProgressBar(total=1.0, completed=one.share, width=20),
                f"{format_count(message.tokens) if message else 0}/{format_count(one.task.tokens)}",
                f"{message.tokens_per_second:,.0f}" if message else "",
                f"{message.loss:.3f}" if message and message.loss is not None else "",
            )
        total = Text(
            f" {ledger.ended} of {ledger.tasks} tasks, {ledger.done / ledger.total:.0%} of the "
            f"work, {clock_time(time.monotonic() - ledger.start)} so far, "
            f"about {clock_time(ledger.eta())} to go"
        )
        return Group(table, total)


def make_lines(console: Console, *, quiet: bool) -> Callable[[str], None]:
    """Where a single stage tells what it does: plain lines, or nothing if `quiet`."""
    return Display(Console(quiet=True) if quiet else console).say


def make_display(console: Console, *, quiet: bool) -> Display:
    """A live table on a terminal, lines elsewhere, nothing if `quiet`."""
    return Display(Console(quiet=True)) if quiet else Display(console, live=console.is_terminal)


def table(title: str, first: str, *others: str) -> Table:
    """Without lines; all columns but the first are numbers."""
    made = Table(title=title, box=None, title_justify="left")
    made.add_column(first)
    for name in others:
        made.add_column(name, justify="right", no_wrap=True)
    return made
