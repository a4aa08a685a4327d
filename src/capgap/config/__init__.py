"""The typed recipes of sweeps and of single runs: strict TOML, overrides, hash. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from capgap.config.base import (
    ABOUT_A_TEACHER,
    RunSection,
    TrainingSection,
    apply_override,
    first_problem,
    parsed,
    read_toml,
    shipped_recipes,
)
from capgap.config.run import (
    DistillSection,
    HardwareSection,
    PruneSection,
    RunRecipe,
    TeacherSection,
)
from capgap.config.sweep import CorpusSection, Recipe, StudentsSection, TeachersSection
from capgap.errors import UserError
from capgap.section import Architecture, Count, Fraction, Init, LearningRate, Section

__all__ = [
    "ABOUT_A_TEACHER",
    "Architecture",
    "CorpusSection",
    "Count",
    "DistillSection",
    "Fraction",
    "HardwareSection",
    "Init",
    "LearningRate",
    "PruneSection",
    "Recipe",
    "RunRecipe",
    "RunSection",
    "Section",
    "StageSettings",
    "StudentsSection",
    "TeacherSection",
    "TeachersSection",
    "TrainingSection",
    "find_recipe",
    "load_any_recipe",
    "load_recipe",
    "parse_recipe",
    "parse_run_recipe",
    "shipped_recipes",
    "stage_settings",
]

# Tables that only the recipe of a sweep has
_SWEEP = {"teachers", "students"}


class StageSettings(Section):
    """The parts of a recipe that a single stage takes: `capgap distill --set training.alpha=1`."""

    training: TrainingSection = TrainingSection()
    run: RunSection = RunSection()


def stage_settings(overrides: Sequence[str]) -> StageSettings:
    """Defaults changed by overrides; UserError names the key, its value and what was expected."""
    data: dict[str, Any] = {}
    for override in overrides:
        apply_override(data, override)
    try:
        return StageSettings.model_validate(data)
    except ValidationError as error:
        raise UserError(f"--set: {first_problem(error, StageSettings)}") from None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads the TOML recipe of a sweep and applies overrides such as `students.tokens=["1M"]`.

    UserError: no such file, not TOML, an unknown key (names the nearest), a value out of range, or
    a recipe of a single run.
    """
    return parse_recipe(read_toml(path, overrides), where=str(path))


def load_any_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe | RunRecipe:
    """The same for the recipe of a sweep or of a run, whichever it is; UserError for neither."""
    data = read_toml(path, overrides)
    if not _SWEEP & data.keys() and "teacher" not in data:
        raise UserError(
            f"{path} is no recipe: a sweep has [teachers] and [students], a run [teacher], [prune] "
            "and [distill]"
        )
    if _is_run(data):
        _find_beside(data, path.parent)
    parse = parse_run_recipe if _is_run(data) else parse_recipe
    return parse(data, where=str(path))


def _find_beside(data: dict[str, Any], folder: Path) -> None:
    """Conversations that are not where the command runs may lie beside the recipe."""
    for name in ("instruct", "prefer"):
        section = data.get(name)
        if not isinstance(section, dict):
            continue
        given = section.get("data")
        if isinstance(given, str) and not Path(given).exists() and (folder / given).exists():
            section["data"] = str(folder / given)


def parse_recipe(data: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """A sweep from plain data; UserError names the key, its value and what was expected."""
    if _is_run(data):
        raise UserError(f"{where} is the recipe of a run, not of a sweep: see `capgap plan`")
    return parsed(Recipe, data, where)


def parse_run_recipe(data: dict[str, Any], *, where: str = "recipe") -> RunRecipe:
    """A run from plain data; UserError as `parse_recipe`."""
    return parsed(RunRecipe, data, where)


def _is_run(data: dict[str, Any]) -> bool:
    return "teacher" in data and not _SWEEP & data.keys()


def find_recipe(name_or_path: str) -> Path:
    """A path as it is; a bare name such as `laptop` is looked up among the shipped recipes."""
    path = Path(name_or_path)
    if not path.is_file() and name_or_path in shipped_recipes():
        return shipped_recipes()[name_or_path]
    return path
