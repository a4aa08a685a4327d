"""What all commands share: the application, options that several have, and how a command ends."""

import json
import signal
import sys
from collections.abc import Callable
from inspect import Parameter, Signature
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from capgap.errors import UserError
from capgap.machine import started

if TYPE_CHECKING:
    from capgap.corpus.given import Given
    from capgap.stage import Stage

USER_ERROR = 2
FAILED = 1

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Measure the law of capacity gap, pick the teacher, and distil the student.",
)

Out = Annotated[Path, typer.Option(help="Output folder.", show_default=True)]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="One JSON object on standard output.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="No progress.")]
Corpora = Annotated[
    list[str],
    typer.Option(
        metavar="FOLDER[=WEIGHT]", help="What `capgap corpus` prepared; several are mixed."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="training.clip=0.5, run.device=cpu."),
]
Track = Annotated[
    list[str] | None,
    typer.Option(help="Also tell tensorboard, trackio or wandb; may be given several times."),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", metavar="", help="Run the model's own code, for other architectures."
    ),
]
Override = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Change a value of the recipe."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", metavar="", help="Print every cell, its cost and the time; run nothing."
    ),
]


def exit_with(line: str, code: int) -> NoReturn:
    if line:
        print(f"capgap: {line}", file=sys.stderr)
    sys.exit(code)


class StopFlag:
    """Ctrl-C and SIGTERM wait until the state is saved; the second one does not."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


def stopped(folder: Path, number: signal.Signals) -> NoReturn:
    line = f"stopped; what is done is kept in {folder}, the same command continues"
    exit_with("" if started()[0] else line, 128 + number)


def run_stoppable(
    stage: Callable[..., dict[str, Any]], request: Any, *, out: Path | str, quiet: bool
) -> dict[str, Any]:
    """Runs a stage that saves its state when it is asked to stop; `out` is what it writes."""
    from rich.console import Console

    from capgap.sweep.progress import make_lines

    quieten_transformers()
    flag = StopFlag()
    from capgap.train.loop import Interrupted

    try:
        return stage(
            request,
            say=make_lines(Console(stderr=True), quiet=quiet),
            should_stop=lambda: flag.signal is not None,
        )
    except (Interrupted, KeyboardInterrupt):
        stopped(Path(out), flag.signal or signal.SIGINT)


def corpora(texts: list[str]) -> "Given":
    """What --corpus names, once or several times."""
    from capgap.corpus.given import parse_mixture

    try:
        return parse_mixture(texts)
    except UserError as error:
        raise UserError(f"--corpus {error}") from None


def add_stage(kind: "type[Stage]") -> None:
    """The command of a stage."""
    from capgap.stage import FieldError, command_line, option

    def command(**given: Any) -> None:
        quiet, as_json = given.pop("quiet"), given.pop("json_")
        try:
            stage = kind(**{name: value for name, value in given.items() if value is not None})
        except FieldError as error:
            raise UserError(f"{option(error.field)} {error.why}") from None
        found = run_stoppable(kind.run, stage, out=given["out"], quiet=quiet)
        if as_json:
            print_json(found)
        else:
            print(stage.told(found))

    shared = [
        Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=Quiet),
        Parameter("json_", Parameter.KEYWORD_ONLY, default=False, annotation=Json),
    ]
    command.__signature__ = Signature([*command_line(kind), *shared])  # type: ignore[attr-defined]
    command.__doc__ = kind.__doc__
    app.command(kind.__name__.lower())(command)


def quieten_transformers() -> None:
    """Its progress bars and hints would break into our own output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))
