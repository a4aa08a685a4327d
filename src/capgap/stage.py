"""The base of stages: one typed model is its command, its part of a recipe, and its checks.

A field is `name: Annotated[type, "help", ...marks] = default`; one without help is no option, and
the keys of a field that is a Section are set by `--set`. What a recipe may say stands in a Section
that the stage inherits. Heavy imports happen in `run`, so that `--help` answers at once.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

import typer
from pydantic import ConfigDict, PrivateAttr, ValidationError
from pydantic.fields import FieldInfo

from capgap.errors import UserError
from capgap.hub import hub_name
from capgap.mirror import mirrored
from capgap.section import WRITTEN, Problem, Section, apply_override, keys_of, kinds_in, section_in
from capgap.storage import is_url


class Mark(Enum):
    """What a field is, besides its type."""

    ARGUMENT = "given by its place"
    SEVERAL = "may be given several times"
    HOW = "changes nothing of what comes out"
    MODEL = "a model that is read"
    SOURCE = "text as `capgap corpus` takes it"
    FILE = "a file that is read"
    FOLDER = "a folder that is read"


ARGUMENT, SEVERAL, HOW = Mark.ARGUMENT, Mark.SEVERAL, Mark.HOW
Say = Callable[[str], None]
ShouldStop = Callable[[], bool]


class FieldError(UserError):
    """A value that cannot be; `field` is its name."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field} {why}")
        self.field = field
        self.why = why

    def __reduce__(self) -> Any:
        return type(self), (self.field, self.why)


class Stage(Section):
    """What is asked of a stage, and the work. UserError for values that cannot be."""

    model_config = ConfigDict(populate_by_name=True)

    # Whether the same call goes on with what a stopped one left
    continues: ClassVar[bool] = True
    # Whether it saves its state when it is asked to stop; others are stopped where they are
    saves_when_asked: ClassVar[bool] = True
    # Whether each of several processes has a part of its own
    has_parts: ClassVar[bool] = False
    # Whether its `corpus` may be text that is not prepared yet
    takes_text: ClassVar[bool] = False
    # The command's name, where the class has another
    command_name: ClassVar[str] = ""
    # Where it writes that is not on a disk
    _urls: list[str] = PrivateAttr(default=[])

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "run" in vars(cls):
            cls.run = _with_mirrors(cls.run)  # type: ignore[method-assign]

    def __init__(self, **given: Any) -> None:
        for name, field in type(self).model_fields.items():
            if Mark.MODEL in field.metadata and isinstance(given.get(name), str):
                given[name] = hub_name(given[name])
        try:
            super().__init__(**given)
        except ValidationError as error:
            problem = Problem.of(error, type(self))
            if not problem.key:
                raise UserError(problem.why) from None
            if "." in problem.key or problem.is_unknown:
                raise UserError(problem.line()) from None
            is_told = problem.given is None or problem.given in problem.why
            value = "" if is_told else f"{problem.given}: "
            raise FieldError(problem.key, value + problem.why) from None
        self._urls = [given[name] for name in WRITTEN if is_url(given.get(name))]

    @classmethod
    def title(cls) -> str:
        """The command's name."""
        return cls.command_name or cls.__name__.lower()

    @property
    def record_file(self) -> Path | None:
        """The file that holds what `run` returns, where there is one."""
        return None

    @property
    def kept(self) -> Path | None:
        """Where the same call finds, after it was stopped, what is done."""
        return next(iter(self.writes), None) if self.continues else None

    @property
    def shares(self) -> tuple[str, ...]:
        """What each of several processes that write into its folder has to see of the others; none
        where one is alone in it."""
        return ()

    @property
    def writes(self) -> tuple[Path, ...]:
        """The folders and files that it makes."""
        return (getattr(self, "out"),)  # noqa: B009

    def run(
        self, *, say: Say = lambda text: None, should_stop: ShouldStop = lambda: False
    ) -> dict[str, Any]:
        """Does the work and returns what `--json` prints. Stopped or killed, the same call goes on;
        Interrupted when `should_stop` said so."""
        raise NotImplementedError

    def told(self, found: dict[str, Any]) -> str:
        """What a person reads in the end, of what `run` returned."""
        raise NotImplementedError

    def after(self, found: dict[str, Any]) -> Sequence[object]:
        """The words behind `capgap` of the command that usually comes next, in capitals what only
        its user knows; none where nothing does."""
        return ()

    def result(self, found: dict[str, Any]) -> str:
        """One phrase of it, beside the name of the step in a run; may be empty."""
        return ""

    def failure(self, found: dict[str, Any]) -> str:
        """Why the command fails though the stage came to its end; empty where it does not."""
        return ""

    def but(self, **changes: Any) -> Self:
        """The same with other values, checked again; what was set stays set."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)

    def identity(self) -> dict[str, Any]:
        """The values that decide what comes out."""
        how = {name for name, field in type(self).model_fields.items() if HOW in field.metadata}
        return self.model_dump(mode="json", exclude=how)

    def marked(self, mark: Mark) -> list[str]:
        """The values of the fields with this mark, as text."""
        names = [n for n, field in type(self).model_fields.items() if mark in field.metadata]
        return [text for name in names for text in _texts(getattr(self, name))]

    def command(self) -> list[str]:
        """The words after `capgap` that ask for the same, without what is as it is by default."""
        fields = [(name, field) for name, field in type(self).model_fields.items() if _help(field)]
        words = [self.title()]
        for name, field in fields:
            if ARGUMENT in field.metadata:
                words += _texts(getattr(self, name))
        for name, field in fields:
            value = getattr(self, name)
            if ARGUMENT not in field.metadata and value != field.default:
                flag = field.annotation is bool
                texts = [] if flag else _texts(value)
                if texts and SEVERAL not in field.metadata:
                    texts = [",".join(texts)]
                words += [option(name)] if flag else [w for t in texts for w in (option(name), t)]
        return words + [word for text in self._overrides() for word in ("--set", text)]

    def _overrides(self) -> Iterator[str]:
        for name, field in type(self).model_fields.items():
            if _is_settings(field):
                section = getattr(self, name)
                for key, value in section.model_dump(
                    mode="json", exclude_unset=True, exclude_none=True
                ).items():
                    yield f"{field.alias or name}.{key}={toml(value)}"


def _with_mirrors(run: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A stage's `run`, which works in local copies of what it writes at URLs."""

    @wraps(run)
    def runs(self: Stage, **how: Any) -> dict[str, Any]:
        with mirrored(self._urls, self.shares):
            return run(self, **how)

    return runs


def paced(say: Say, seconds: float = 10.0) -> Callable[[Callable[[], str]], None]:
    """Says what it is asked to, but at most so often, and not at once."""
    said = time.monotonic()

    def tell(text: Callable[[], str]) -> None:
        nonlocal said
        if time.monotonic() - said >= seconds:
            said = time.monotonic()
            say(text())

    return tell


def text_table(names: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 0) -> str:
    """Columns of text, the first so many set left, the others right."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if place < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(file=StringIO(), width=1000, highlight=False, markup=False)
    console.print(table)
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]


def option(field: str) -> str:
    return f"--{field.rstrip('_').replace('_', '-')}"


def settings(kind: type[Stage], overrides: list[str]) -> dict[str, Any]:
    """What `--set` says of a stage's sections, by section. UserError names the key."""
    data: dict[str, Any] = {}
    for override in overrides:
        apply_override(data, override)
    sections = {key for key, field in keys_of(kind).items() if _is_settings(field)}
    unknown = data.keys() - sections
    if unknown:
        known = ", ".join(sorted(sections))
        raise UserError(f"`set`: unknown key {min(unknown)!r}; known keys: {known}")
    return data


def command_line(kind: type[Stage]) -> list[Parameter]:
    """The parameters of a stage's command for typer: texts, which the model reads, and flags."""
    fields = sorted(kind.model_fields.items(), key=lambda one: not one[1].is_required())
    found = ((name, field, _help(field)) for name, field in fields)
    parameters = [_parameter(name, field, told) for name, field, told in found if told]
    if any(_is_settings(field) for field in kind.model_fields.values()):
        told = "A key of [training] or [run], such as training.clip=0.5; several times."
        made = typer.Option("--set", "-s", metavar="KEY=VALUE", help=told)
        annotation = Annotated[list[str] | None, made]
        place = Parameter.KEYWORD_ONLY
        parameters.append(Parameter("set_", place, default=None, annotation=annotation))
    return parameters


def _is_settings(field: FieldInfo) -> bool:
    return not _help(field) and section_in(field.annotation) is not None


def _help(field: FieldInfo) -> str:
    """With the words to choose from, where it is one of several."""
    kinds = [kind for kind in kinds_in(field.annotation) if get_origin(kind) is Literal]
    words = [word for kind in kinds for word in get_args(kind)]
    told = [part for part in field.metadata if isinstance(part, str)]
    choice = [f"{', '.join(words[:-1])} or {words[-1]}."] if len(words) > 1 and told else []
    return " ".join(told + choice)


def _parameter(name: str, field: FieldInfo, told: str) -> Parameter:
    is_flag = field.annotation is bool
    kind: Any = bool if is_flag else list[str] if SEVERAL in field.metadata else str
    default: Any = field.default if is_flag else ",".join(_texts(field.default))
    if field.is_required():
        default = Parameter.empty
    elif field.default in (None, ()):
        kind, default = kind | None, None
    short = ["-s"] if name == "set" else []
    made: Any = typer.Option(option(name), *short, help=told, metavar=_metavar(field))
    if ARGUMENT in field.metadata:
        made = typer.Argument(help=told, metavar=_metavar(field))
    annotation = Annotated[kind, made]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _metavar(field: FieldInfo) -> str | None:
    names = {int: "<int>", float: "<float>", Path: "<path>"}
    if SEVERAL in field.metadata:
        return None if ARGUMENT in field.metadata else "<str>"
    return next((names[kind] for kind in kinds_in(field.annotation) if kind in names), None)


def _texts(value: Any) -> list[str]:
    """A value as words of a command line: none, one, or several."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [",".join(f"{name}={number}" for name, number in value.items())]
    return [str(one) for one in value] if isinstance(value, tuple | list) else [str(value)]


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, list):
        return f"[{', '.join(toml(one) for one in value)}]"
    # TOML writes texts and truth as JSON does
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)
