"""The typed recipes of sweeps and of single runs: strict TOML, overrides, hash. No torch."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from capgap.errors import UserError, check_regular, first_line
from capgap.mirror import local
from capgap.section import Problem, apply_override
from capgap.sweep.recipe import Recipe

if TYPE_CHECKING:
    from capgap.pipeline.recipe import RunRecipe

# Tables that only the recipe of a sweep has
_SWEEP = {"teachers", "students"}
_Kind = TypeVar("_Kind", bound=BaseModel)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads the TOML recipe of a sweep and applies overrides such as `students.tokens=["1M"]`.

    UserError: no such file, not TOML, an unknown key (names the nearest), a value out of range, or
    a recipe of a single run.
    """
    return parse_recipe(_read_toml(path, overrides), where=str(path), overrides=overrides)


def load_any_recipe(path: Path, overrides: Sequence[str] = ()) -> "Recipe | RunRecipe":
    """The same for the recipe of a sweep or of a run, whichever it is; UserError for neither."""
    data = _read_toml(path, overrides)
    if not _SWEEP & data.keys() and "teacher" not in data:
        raise UserError(
            f"{path} is no recipe: a sweep has [teachers] and [students], a run [teacher], [prune] "
            "and [distill]"
        )
    if not _is_run(data):
        return parse_recipe(data, where=str(path), overrides=overrides)
    from capgap.pipeline.recipe import RunRecipe

    _find_beside(data, path.parent)
    return _parsed(RunRecipe, data, str(path), overrides)


def _find_beside(data: dict[str, Any], folder: Path) -> None:
    """Conversations that are not where the command runs may lie beside the recipe."""
    for name in ("instruct", "prefer"):
        section = data.get(name)
        if not isinstance(section, dict):
            continue
        given = section.get("data")
        if isinstance(given, str) and not Path(given).exists() and (folder / given).exists():
            section["data"] = str(folder / given)


def parse_recipe(
    data: dict[str, Any], *, where: str = "recipe", overrides: Sequence[str] = ()
) -> Recipe:
    """A sweep from plain data, such as `recipe` in a sweep.json. UserError, which begins with
    `where`, names the key, its value and what was expected; what the `overrides` in it are to
    blame for is told as theirs."""
    if _is_run(data):
        raise UserError(f"{where} is the recipe of a run, not of a sweep: see `capgap plan`")
    return _parsed(Recipe, data, where, overrides)


def _is_run(data: dict[str, Any]) -> bool:
    return "teacher" in data and not _SWEEP & data.keys()


def find_recipe(name_or_path: str) -> Path:
    """A path as it is; a bare name such as `laptop` is looked up among the shipped recipes."""
    path = Path(local(name_or_path))
    if not path.is_file() and name_or_path in shipped_recipes():
        return shipped_recipes()[name_or_path]
    return path


def _parsed(kind: type[_Kind], data: dict[str, Any], where: str, overrides: Sequence[str]) -> _Kind:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problem = Problem.of(error, kind)
        for override in overrides:
            key = override.partition("=")[0].strip()
            near = f"{problem.key}.", f"{key}."
            if near[0].startswith(near[1]) or near[1].startswith(near[0]):
                where = "`set`"
        raise UserError(f"{where}: {problem.line()}") from None


def _read_toml(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    check_regular(path, "a recipe")
    try:
        text = path.read_text()
        # what a sweep writes for the processes of its tasks
        data = json.loads(text)["recipe"] if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        known = ", ".join(sorted(shipped_recipes()))
        raise UserError(f"no recipe {str(path)!r}; shipped recipes: {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe {str(path)!r}: {error}") from None
    # deep nesting, and numbers of thousands of digits
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {first_line(error)}") from None
    for override in overrides:
        apply_override(data, override)
    return data


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}
