"""The base of stages: one typed model is its command, its part of a recipe, and its checks.

A field is `name: Annotated[type, "help", ...marks] = default`; one without help is no option. What
a recipe may say stands in a Section that the stage inherits. Heavy imports happen in `run`, so that
`--help` answers at once.
"""

from collections.abc import Callable
from difflib import get_close_matches
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from capgap.errors import UserError
from capgap.section import Section

ARGUMENT = object()  # marks what is given by its place
SEVERAL = object()  # may be given several times
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

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            first = error.errors()[0]
            kind, why = first["type"], first["msg"].removeprefix("Value error, ")
            if not first["loc"]:
                raise UserError(why) from None
            if kind == "missing":
                why = "is missing"
            elif kind == "extra_forbidden":
                near = get_close_matches(str(first["loc"][0]), type(self).model_fields, n=1)
                why = "is no field" + (f": did you mean {near[0]}?" if near else "")
            elif kind != "value_error":
                why = f"{first['input']!r}: {why}"
            raise FieldError(str(first["loc"][0]), why) from None

    def run(
        self, *, say: Say = lambda text: None, should_stop: ShouldStop = lambda: False
    ) -> dict[str, Any]:
        """Does the work and returns what `--json` prints. Stopped or killed, the same call goes on;
        Interrupted when `should_stop` said so."""
        raise NotImplementedError

    def told(self, found: dict[str, Any]) -> str:
        """What a person reads in the end, of what `run` returned."""
        raise NotImplementedError

    def but(self, **changes: Any) -> Self:
        """The same with other values, checked again; what was set stays set."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)


def option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def command_line(kind: type[Stage]) -> list[Parameter]:
    """The parameters of a stage's command for typer: texts, which the model reads, and flags."""
    found = ((name, field, _help(field)) for name, field in kind.model_fields.items())
    return [_parameter(name, field, told) for name, field, told in found if told]


def _help(field: FieldInfo) -> str:
    """With the words to choose from, where it is one of several."""
    kinds = [kind for kind in _kinds(field.annotation) if get_origin(kind) is Literal]
    words = [word for kind in kinds for word in get_args(kind)]
    told = [part for part in field.metadata if isinstance(part, str)]
    choice = [f"{', '.join(words[:-1])} or {words[-1]}."] if words and told else []
    return " ".join(told + choice)


def _parameter(name: str, field: FieldInfo, told: str) -> Parameter:
    is_flag = field.annotation is bool
    kind: Any = bool if is_flag else list[str] if SEVERAL in field.metadata else str
    default: Any = field.default if is_flag else str(field.default)
    if field.is_required():
        default = Parameter.empty
    elif field.default in (None, ()):
        kind, default = kind | None, None
    made: Any = typer.Option(option(name), help=told, metavar=_metavar(field))
    if ARGUMENT in field.metadata:
        made = typer.Argument(help=told, metavar=_metavar(field))
    annotation = Annotated[kind, made]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _metavar(field: FieldInfo) -> str | None:
    """A flag has none."""
    names = {bool: "", int: "<int>", float: "<float>", Path: "<path>"}
    if SEVERAL in field.metadata:
        return "<str>"
    return next((names[kind] for kind in _kinds(field.annotation) if kind in names), None)


def _kinds(annotation: Any) -> list[Any]:
    """A type and those that it is made of."""
    inner = [] if get_origin(annotation) is Literal else get_args(annotation)
    return [annotation, *(kind for part in inner for kind in _kinds(part))]
