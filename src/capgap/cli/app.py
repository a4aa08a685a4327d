"""Shared by all commands: the application, options that several have, and how a command ends."""

import json
import re
import shlex
import sys
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from capgap.corpus.names import Weighted, check_model_name, check_prepared
from capgap.corpus.sources import check_text
from capgap.errors import UserError
from capgap.machine import started
from capgap.stage import FieldError, Mark, Stage, command_line, option, settings
from capgap.stopping import Signals, Stopped
from capgap.storage import as_urls

# Fields of stages as options
_OPTIONS: dict[str, str] = {}
USER_ERROR = 2
FAILED = 1


class _Flags:
    """The help says no type of a flag, which takes no value."""

    def get_params(self, context: Any) -> Any:
        found = super().get_params(context)  # type: ignore[misc]
        for one in found:
            if getattr(one, "is_flag", False):
                one.metavar = ""
        return found


class Command(_Flags, TyperCommand):
    pass


class Commands(_Flags, TyperGroup):
    pass


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Measure the law of capacity gap, pick the teacher, and distil the student.",
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


class Answer(Stage):
    """A stage that answers at once: it leaves no folder, and has no progress unless it says so."""

    continues: ClassVar[bool] = False
    saves_when_asked: ClassVar[bool] = False
    has_progress: ClassVar[bool] = False

    @property
    def writes(self) -> tuple[Path, ...]:
        return ()


def exit_with(line: str, code: int) -> NoReturn:
    if line:
        print(f"capgap: {as_urls(line)}", file=sys.stderr)
    sys.exit(code)


def stopped(out: Path | None, number: int) -> NoReturn:
    """Ends a command that was stopped; `out` holds what the same command continues, if any does."""
    kept = f"what is done is kept in {out}, the same command continues"
    line = f"stopped; {kept if out else 'nothing was written'}"
    exit_with("" if started()[0] else line, 128 + number)


def _check_named(stage: Stage) -> None:
    """UserError for models and corpora that are not there, before anything heavy is loaded."""
    for name in stage.marked(Mark.MODEL):
        check_model_name(name)
    for one in getattr(stage, "corpus", None) or ():
        folder = one.folder if isinstance(one, Weighted) else one
        check_text(folder) if stage.takes_text else check_prepared(folder)


def as_options(text: str) -> str:
    """A message of the library, whose `fields` are options here."""
    return re.sub(r"`([a-z_]+)`", lambda one: _OPTIONS.get(one[1], one[0]), text)


def add_stage(kind: type[Stage]) -> None:
    """The command of a stage."""

    def command(**given: Any) -> None:
        from rich.console import Console

        from capgap.sweep.progress import make_display

        quiet, as_json = given.pop("quiet", True), given.pop("json_")
        sections = settings(kind, given.pop("set_", None) or [])
        if "quiet" in kind.model_fields:
            given["quiet"] = quiet
        try:
            named = {name: value for name, value in given.items() if value is not None}
            stage = kind(**named, **sections)
            _check_named(stage)
            with Signals() as signals:
                found = signals.run(stage, make_display(Console(stderr=True), quiet=quiet))
        except FieldError as error:
            raise UserError(f"{option(error.field)} {error.why}") from None
        except Stopped as ended:
            stopped(stage.kept, ended.number)
        # the first of several processes prints, or each its own part
        if started()[0] and not kind.has_parts:
            return
        print_json(found) if as_json else print(as_urls(stage.told(found)))
        if not as_json and not stage.failure(found) and stage.after(found):
            print("next:", as_urls(shlex.join(["capgap", *map(str, stage.after(found))])))
        if stage.failure(found):
            exit_with(stage.failure(found), FAILED)

    _OPTIONS.update((name.rstrip("_"), option(name)) for name in kind.model_fields)
    parameters = command_line(kind)
    shared: dict[str, tuple[Any, Any]] = {"quiet": (Quiet, False), "json_": (Json, False)}
    if issubclass(kind, Answer) and not kind.has_progress:
        del shared["quiet"]
    for name, (annotation, default) in shared.items():
        how = {"default": default, "annotation": annotation}
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, **how))
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = kind.__doc__
    app.command(kind.title(), cls=Command)(command)


def print_json(value: dict[str, Any]) -> None:
    print(as_urls(json.dumps(value, indent=2, allow_nan=False)))
