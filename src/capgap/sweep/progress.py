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
from capgap.sweep.plan import Column, Teacher
from capgap.sweep.schedule import relative_cost
from capgap.sweep.worker import EndMessage, StepMessage

LINE_EVERY = 10.0  # seconds between two lines of a running task where there is no terminal


@dataclass
class _Running:
    task: Teacher | Column
    message: StepMessage | None = None
    said_at: float = 0.0

    @property
    def share(self) -> float:
        return self.message.tokens / max(1, self.task.tokens) if self.message else 0.0


class Ledger:
    """Work done and to do, in the units of `relative_cost`, and the time left."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.work_began: float | None = None
        self.running: dict[int, _Running] = {}
        self.known = 0.0
        self.later = 0.0
        self.before = 0.0
        self.finished = 0.0
        self.tasks = self.ended = 0

    def expect(
        self,
        tasks: Sequence[Teacher | Column],
        done: Sequence[str],
        later: Sequence[Column] = (),
    ) -> None:
        """`later` are tasks that will come but are not settled yet; the next call replaces them."""
        self.tasks += len(tasks)
        self.known += sum(relative_cost(task) for task in tasks)
        self.later = sum(relative_cost(task) for task in later)
        self.before += sum(relative_cost(task) for task in tasks if task.id in done)
        self.finished += sum(relative_cost(task) for task in tasks if task.id in done)
        self.ended += sum(task.id in done for task in tasks)

    def begin(self, worker: int, task: Teacher | Column) -> None:
        now = time.monotonic()
        self.work_began = self.work_began or now
        self.running[worker] = _Running(task, said_at=now)

    def end(self, worker: int) -> None:
        self.finished += relative_cost(self.running.pop(worker).task)
        self.ended += 1

    @property
    def total(self) -> float:
        return self.known + self.later

    @property
    def done(self) -> float:
        return self.finished + sum(
            one.share * relative_cost(one.task) for one in self.running.values()
        )

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


class CorpusProgress:
    """Says now and then how far the preparation of a corpus is."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.said_at = time.monotonic()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """`stage` is read or tokenize; `done` and `total` count bytes of text."""
        now = time.monotonic()
        if now - self.said_at < LINE_EVERY:
            return
        self.said_at = now
        of_all = "" if total is None else f" of {total / 1e6:,.0f}"
        self.say(f"corpus, {stage}: {done / 1e6:,.0f}{of_all} MB of text")


def describe(task: Teacher | Column) -> str:
    if isinstance(task, Teacher):
        return f"teacher {task.id}"
    names = f"{len(task.cells)} {'baseline' if task.teacher is None else 'student'}"
    names += "s" if len(task.cells) > 1 else ""
    return f"{task.id} ({names})"


class Display:
    """Where a sweep tells what it does. This one keeps account and says nothing."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.ledger = Ledger()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is left open."""

    def say(self, text: str) -> None:
        """Tell a line."""

    def expect(
        self,
        tasks: Sequence[Teacher | Column],
        done: Sequence[str],
        later: Sequence[Column] = (),
    ) -> None:
        self.ledger.expect(tasks, done, later)

    def started(self, worker: int, task: Teacher | Column) -> None:
        self.ledger.begin(worker, task)

    def step(self, message: StepMessage) -> None:
        self.ledger.running[message.worker].message = message

    def ended(self, task: Teacher | Column, message: EndMessage) -> None:
        self.ledger.end(message.worker)
        if message.outcome == "done":
            for warning in message.message.splitlines():
                self.say(warning)
            self.say(f"done {describe(task)} in {clock_time(message.busy)}")


class LineDisplay(Display):
    """Plain lines for a log file or a pipe."""

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def started(self, worker: int, task: Teacher | Column) -> None:
        super().started(worker, task)
        self.say(f"start {describe(task)}")

    def step(self, message: StepMessage) -> None:
        super().step(message)
        one = self.ledger.running[message.worker]
        if time.monotonic() - one.said_at < LINE_EVERY:
            return
        one.said_at = time.monotonic()
        loss = "" if message.loss is None else f", loss {message.loss:.3f}"
        self.say(
            f"{message.task}: {format_count(message.tokens)} of {format_count(one.task.tokens)} "
            f"tokens, {message.tokens_per_second:,.0f} tokens/s{loss}; sweep "
            f"{self.ledger.done / self.ledger.total:.0%}, "
            f"about {clock_time(self.ledger.eta())} to go"
        )


class LiveDisplay(Display):
    """A table that is drawn anew: one row a worker, and the whole sweep with its ETA."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> "LiveDisplay":
        self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        self.live.console.print(text, highlight=False, markup=False)

    def _render(self) -> RenderableType:
        ledger = self.ledger
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
        if not ledger.total:
            return Text("")
        share = ledger.done / ledger.total
        total = Text(
            f" {ledger.ended} of {ledger.tasks} tasks, {share:.0%} of the work, "
            f"{clock_time(time.monotonic() - ledger.start)} so far, "
            f"about {clock_time(ledger.eta())} to go"
        )
        return Group(table, total)


def make_lines(console: Console, *, quiet: bool) -> Callable[[str], None]:
    """Where a single stage tells what it does: plain lines, or nothing if `quiet`."""
    return (Display(console) if quiet else LineDisplay(console)).say


def make_display(console: Console, *, quiet: bool) -> Display:
    """A live table on a terminal, lines elsewhere, nothing if `quiet`."""
    if quiet:
        return Display(console)
    return LiveDisplay(console) if console.is_terminal else LineDisplay(console)
