"""What all commands share: the application, options that several have, and how a command ends."""

import json
import sys
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from capgap.errors import UserError
from capgap.machine import started

if TYPE_CHECKING:
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


def stopped(out: Path, number: int, *, continues: bool = True) -> NoReturn:
    kept = f"what is done is kept in {out}, the same command continues"
    line = f"stopped; {kept if continues else 'nothing was written'}"
    exit_with("" if started()[0] else line, 128 + number)


def add_stage(kind: "type[Stage]") -> None:
    """The command of a stage."""
    from capgap.stage import FieldError, command_line, option, settings
    from capgap.stopping import Signals, Stopped

    def command(**given: Any) -> None:
        from rich.console import Console

        from capgap.sweep.progress import make_lines

        quiet, as_json = given.pop("quiet"), given.pop("json_")
        sections = settings(kind, given.pop("set_", None) or [])
        try:
            named = {name: value for name, value in given.items() if value is not None}
            stage = kind(**named, **sections)
            quieten_transformers()
            with Signals() as signals:
                found = signals.run(stage, make_lines(Console(stderr=True), quiet=quiet))
        except FieldError as error:
            raise UserError(f"{option(error.field)} {error.why}") from None
        except Stopped as ended:
            stopped(stage.writes[0], ended.number, continues=kind.continues)
        # the first of several processes tells, or each of its own part
        if started()[0] and not kind.has_parts:
            return
        if as_json:
            print_json(found)
        else:
            print(stage.told(found))
        if stage.failure(found):
            exit_with(stage.failure(found), FAILED)

    shared = [
        Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=Quiet),
        Parameter("json_", Parameter.KEYWORD_ONLY, default=False, annotation=Json),
    ]
    command.__signature__ = Signature([*command_line(kind), *shared])  # type: ignore[attr-defined]
    command.__doc__ = kind.__doc__
    app.command(kind.title())(command)


def quieten_transformers() -> None:
    """Its progress bars and hints would break into our own output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))
