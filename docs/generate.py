"""Writes what the source says into the pages: options into docs/cli.md, keys of recipes into
docs/recipes.md, signatures and docstrings into docs/api.md.

    python docs/generate.py

A test holds the pages to what this writes. Everything else in them is written by hand.
"""

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from pydoc import locate
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.models import ArgumentInfo

import capgap
from capgap.config import Recipe
from capgap.pipeline.recipe import RunRecipe
from capgap.section import Count, Size, section_in
from capgap.stage import Stage, command_line

DOCS = Path(__file__).parent
SHARED = (
    "| `--quiet`, `-q` | | no progress |",
    "| `--json` | | one JSON object on standard output |",
)
NOUNS = {str: "text", Path: "path", int: "whole number", float: "number"}
IS_COUNT, IS_SIZE = get_args(Count)[1], get_args(Size)[1]
NUMBERS = {2: "two", 3: "three"}


def linked(text: str) -> str:
    """With links in place of names of pages, such as docs/output.md."""
    return re.sub(r"\bdocs/(\w+\.md)(#[\w-]+)?", r"[\1](\1\2)", text)


def row(*cells: str) -> str:
    return "|" + "|".join(f" {cell} ".replace("|", "\\|") for cell in cells) + "|"


def with_table(page: str, heading: str, rows: list[str]) -> str:
    """The page with these rows in place of the table under a heading that begins alike."""
    head, found, rest = page.partition(f"\n## {heading}\n")
    assert found, f"there is no section {heading}"
    section = re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    old = re.search(rf"^{re.escape(rows[0])}\n(?:\|.*\n)+", section, re.MULTILINE)
    assert old, f"there is no table in the section {heading}"
    return head + found + rest[: old.start()] + "\n".join(rows) + "\n" + rest[old.end() :]


def stages() -> list[type[Stage]]:
    return [getattr(capgap, name) for name in capgap.STAGES]


def options(kind: type[Stage]) -> list[str]:
    """The options of a stage's command, one a row."""
    rows = [row("option", "default", "meaning"), "|---|---|---|"]
    for parameter in command_line(kind):
        asked = parameter.annotation.__metadata__[0]
        if isinstance(asked, ArgumentInfo):
            continue
        # typer takes the first name for a default until it reads the command
        names = ", ".join(f"`{name}`" for name in (asked.default, *asked.param_decls))
        default = "required" if parameter.default is parameter.empty else ""
        if parameter.default and isinstance(parameter.default, str):
            default = f"`{parameter.default}`"
        rows.append(row(names, default, linked(asked.help.rstrip("."))))
    return [*rows, *SHARED]


def cli_page(page: str) -> str:
    """The page with the tables of all stages as they are now."""
    for kind in stages():
        page = with_table(page, f"`capgap {kind.title()}`", options(kind))
    return page


def limits(marks: list[Any]) -> str:
    """The bounds of a number, in words behind its name."""
    # what is nearer to the field comes later
    bounds = {
        name: f"{getattr(mark, name):,}"
        for mark in marks
        for kind, name in ((Gt, "gt"), (Ge, "ge"), (Lt, "lt"), (Le, "le"))
        if isinstance(mark, kind)
    }
    above, least, below, most = (bounds.get(name) for name in ("gt", "ge", "lt", "le"))
    if least and most:
        return f" from {least} to {most}"
    if above and below and not least:
        return f" between {above} and {below}"
    words = f", {least} or more" if least else ""
    # a count is above 0 by its name
    if above and not least and IS_COUNT not in marks:
        words = f" above {above}"
    if most:
        words += f", at most {most}"
    if below:
        words += f" and below {below}"
    return words


def type_in_words(kind: Any, marks: list[Any], *, several: bool = False) -> str:
    """A field's type with its bounds, as a person would say it; `several`: of many such values."""
    parts = get_args(kind)
    if get_origin(kind) is Annotated:
        return type_in_words(parts[0], [*flat(parts[1:]), *marks], several=several)
    if IS_SIZE in marks:
        return "sizes" if several else "size"
    if get_origin(kind) is Literal:
        words = [f"`{one}`" for one in parts]
        if several or len(words) == 1:
            return ", ".join(words)
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if get_origin(kind) is tuple:
        values = type_in_words(parts[0], [], several=True)
        if parts[-1] is not Ellipsis:
            return f"{NUMBERS[len(parts)]} {values}"
        if not any(isinstance(mark, MinLen) for mark in marks):
            return f"list of {values}"
        return f"list of one or more {'of ' if values.startswith('`') else ''}{values}"
    if parts:
        return " or ".join(type_in_words(one, marks) for one in parts if one is not NoneType)
    if kind is bool:
        return "true or false"
    noun = "count" if IS_COUNT in marks else NOUNS[kind]
    return f"{noun}s{limits(marks)}" if several else noun + limits(marks)


def flat(marks: Sequence[Any]) -> list[Any]:
    """What is said of a type, with the bounds that lie in pydantic's fields."""
    inner = [mark.metadata if isinstance(mark, FieldInfo) else [mark] for mark in marks]
    return [mark for some in inner for mark in some]


def default_in_toml(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "none"
    return f"`{json.dumps(value)}`"


def keys(section: type[BaseModel]) -> list[str]:
    """The keys of a table of a recipe, one a row."""
    rows = [row("key", "type", "default", "meaning"), "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if section_in(field.annotation) is None:
            kind = type_in_words(field.annotation, field.metadata)
            told = " ".join(mark for mark in field.metadata if isinstance(mark, str))
            assert told, f"{section.__name__}.{name} has no help"
            meaning = linked(told.rstrip(".:"))
            rows.append(row(f"`{name}`", kind, default_in_toml(field.default), meaning))
    return rows


def recipe_sections() -> dict[str, type[BaseModel]]:
    """The parts of recipes by their heading."""
    found: dict[str, type[BaseModel]] = {"Top level": Recipe, "Top level of a run": RunRecipe}
    for recipe in (Recipe, RunRecipe):
        for name, field in recipe.model_fields.items():
            section = section_in(field.annotation)
            is_list = get_origin(field.annotation) is tuple
            if section is not None:
                found[f"`[[{name}]]`" if is_list else f"`[{name}]`"] = section
    return found


def recipes_page(page: str) -> str:
    """The page with the keys of all sections as they are now."""
    for heading, section in recipe_sections().items():
        page = with_table(page, heading, keys(section))
    return page


class Dots:
    """A default that has no short literal."""

    def __repr__(self) -> str:
        return "..."


def call(found: Any) -> str:
    """A call with all defaults, without types."""
    if isinstance(found, type) and issubclass(found, BaseModel):
        # models are built when they are first used
        found.model_rebuild()
    plain = []
    for one in inspect.signature(found).parameters.values():
        has_none = repr(one.default)[0] == "<" or isinstance(one.default, BaseModel)
        default = Dots() if has_none and one.default is not one.empty else one.default
        if one.name != "self":
            plain.append(one.replace(annotation=one.empty, default=default))
    # the path of another system has another name
    text = str(inspect.Signature(plain)).replace("PosixPath(", "Path(")
    return found.__qualname__ + text.replace("'", '"')


def whole_names(module: str) -> dict[str, str]:
    """What a module defines and imports of ours, anywhere, by the short name."""
    found = {}
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[module]))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("capgap."):
            found |= {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for name, one in vars(sys.modules[module]).items():
        if getattr(one, "__module__", None) == module:
            found[name] = f"{module}.{name}"
    # every function has it
    found.pop("UserError", None)
    return found


def signature(found: Any) -> str:
    """A call and what it returns, on lines of one width."""
    told = call(found)
    if isinstance(found, type):
        told = f"class {told}"
    else:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(found)))
        returns = ast.unparse(ast.parse(source).body[0].returns)  # type: ignore[attr-defined]
        whole = whole_names(inspect.unwrap(found).__module__)
        told += " -> " + re.sub(r"\w+", lambda m: whole.get(m[0], m[0]), returns.replace("'", ""))
    lines = textwrap.wrap(
        told, 100, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    )
    return "\n".join(lines)


def description(found: Any) -> str:
    """A docstring as markdown: with lists of arguments and errors, whole names, links to pages."""
    lines: list[str] = []
    for line in (inspect.getdoc(found) or "").splitlines():
        item = re.match(r"    (\w[\w, ]*): ", line)
        if item:
            names = re.sub(r"\w+", r"`\g<0>`", item[1])
            line = f"- {names}: {line[item.end() :]}"
        elif line.startswith("        "):
            line = line[6:]
        is_behind_list = bool(lines) and lines[-1].startswith(("- ", "  "))
        if line.endswith(":") and line[:-1] in ("Args", "Raises"):
            line += "\n"
        elif line and is_behind_list and not line.startswith(("- ", "  ")):
            lines.append("")
        lines.append(line)
    whole = whole_names(inspect.unwrap(found).__module__)
    given = inspect.signature(found).parameters
    named = {short: name for short, name in whole.items() if short not in given}
    text = re.sub(r"`(\w+)", lambda m: "`" + named.get(m[1], m[1]), "\n".join(lines))
    return linked(text)


def members(kind: type[Any]) -> str:
    """The methods and properties of a class, one a line, by the first paragraphs they say."""
    lines = []
    for name, member in vars(kind).items():
        one = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(one) and one.__doc__:
            said = " ".join(description(one).split("\n\n")[0].split())
            asked = name if isinstance(member, property) else call(one).partition(".")[2]
            lines.append(f"- `{asked}`: {said}")
    return "\n".join(lines)


def block(dotted: str) -> str:
    """What the page says of a function or a class."""
    found: Any = locate(dotted)
    told = [f"```python\n{signature(found)}\n```", description(found)]
    if isinstance(found, type) and issubclass(found, Stage):
        above = [kind.__name__ for kind in found.__mro__[1:] if kind.__name__ in capgap.STAGES]
        if above:
            told.append(f"`run` is that of `capgap.{above[0]}`.")
        elif found.run.__doc__:
            told.append(f"`run`: {description(found.run)}")
        command = found.title()
        told.append(f"Its fields are the options of [`capgap {command}`](cli.md#capgap-{command}).")
    elif isinstance(found, type):
        told.append(members(found))
    return "\n\n".join([f"### `{dotted}`", *filter(None, told)]) + "\n\n"


def api_page(page: str) -> str:
    """The page with the signature and the docstring of what its headings name."""
    sections = r"^### `(capgap\.[\w.]+)`\n.*?(?=^##|\Z)"
    flags = re.MULTILINE | re.DOTALL
    return re.sub(sections, lambda found: block(found[1]), page, flags=flags).rstrip() + "\n"


PAGES = {"cli.md": cli_page, "recipes.md": recipes_page, "api.md": api_page}

if __name__ == "__main__":
    for name, written in PAGES.items():
        (DOCS / name).write_text(written((DOCS / name).read_text()))
