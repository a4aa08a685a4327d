"""What all recipes are made of: sections, numbers, strict reading with one line a mistake."""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError

from capgap.errors import UserError, check_regular, first_line
from capgap.section import Beta, Count, Fraction, Section


class TrainingSection(Section):
    """What teachers, students and baselines share; alpha weighs the teacher's part of the loss."""

    batch_tokens: Count = 2048
    micro_batch_tokens: Count | None = None
    alpha: Fraction = 0.5
    temperature: Annotated[float, Field(gt=0)] = 1.0
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation"] = (
        "forward_kl"
    )
    divergence_mix: Annotated[float, Field(gt=0, lt=1)] = 0.5
    warmup_fraction: Fraction = 0.05
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    final_rate: Fraction = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    decay_embeddings: bool = False
    clip: Annotated[float, Field(gt=0)] = 1.0
    document_mask: bool = False
    ignored_tokens: tuple[str, ...] = ()
    activation_checkpointing: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    teacher_dtype: Literal["auto", "stored", "fp32", "bf16"] = "auto"


# Keys of [training] that have no meaning without a teacher
ABOUT_A_TEACHER = ("alpha", "temperature", "divergence", "divergence_mix", "teacher_dtype")


class RunSection(Section):
    """How the work is carried out; nothing here changes what is asked for."""

    device: str = "auto"
    teacher_device: str = "same"
    teacher_offload: bool = False
    workers: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 30.0
    checkpoint_share: Annotated[float, Field(gt=0, lt=1)] = 0.02
    checkpoints: Annotated[int, Field(ge=1)] = 2
    compile: Literal["auto", "on", "off"] = "auto"


def check_batches(training: TrainingSection, name: str, window: int) -> None:
    batch, micro = training.batch_tokens, training.micro_batch_tokens
    if batch % window:
        raise ValueError(f"training.batch_tokens {batch} is not a multiple of {name} {window}")
    if micro is not None and (micro % window or batch % micro):
        raise ValueError(
            f"training.micro_batch_tokens {micro} must be a multiple of {name} {window} and divide "
            f"training.batch_tokens {batch}"
        )


def check_tokens(training: TrainingSection, name: str, tokens: int) -> None:
    if tokens < training.batch_tokens:
        raise ValueError(f"{name} {tokens} is less than one batch of {training.batch_tokens}")


_Kind = TypeVar("_Kind", bound=BaseModel)


def parsed(kind: type[_Kind], data: dict[str, Any], where: str) -> _Kind:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error, kind)}") from None


def read_toml(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    check_regular(path, "a recipe")
    try:
        data = tomllib.loads(path.read_text())
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
    folder = Path(__file__).parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    *parents, leaf = key.strip().split(".")
    table = data
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UserError(f"override {override!r}: {parent!r} is not a table")
    table[leaf] = value


def first_problem(error: ValidationError, root: type[BaseModel]) -> str:
    # a misspelt key is also a missing one: the spelling is what to tell
    problems = error.errors()
    problem = min(problems, key=lambda found: found["type"] != "extra_forbidden")
    key = _key_of(problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys_at(problem["loc"][:-1], root)
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if problem["type"] == "missing":
        return f"{key!r} is missing"
    # a value that may be one of several kinds has a problem with each of them
    messages = [found["msg"] for found in problems if _key_of(found["loc"]) == key]
    message = " or ".join(text.removeprefix("Value error, ") for text in messages)
    message = message.replace(" or Input should be", " or")
    if problem["type"] == "tuple_type":
        message = """a list was expected, such as ["50k"]; in a shell put '' around it"""
    if isinstance(problem["input"], dict):
        return f"{key}: {message}" if key else message
    return f"{key} = {problem['input']!r}: {message}"


def _key_of(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if not _is_branch(part))


def _is_branch(part: object) -> bool:
    """Pydantic adds the tried branch of a union to the location; a user has not written that."""
    return isinstance(part, str) and (
        part.startswith(("literal[", "constrained-")) or part in {"float", "int", "str"}
    )


def _keys_at(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    section = root
    for part in location:
        if isinstance(part, str) and not _is_branch(part):
            section = _section_in(section.model_fields[part].annotation)
    return sorted(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel]:
    """The section of a field that is one, or may be one, or is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(_section_in(part) for part in get_args(annotation) if part is not type(None))
