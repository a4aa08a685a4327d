"""What recipes and stages are made of: sections, the types of their fields, and what is wrong with
a value in one line. Light."""

import json
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from capgap.errors import UserError
from capgap.mirror import local
from capgap.sizes import parse_count, parse_size
from capgap.storage import is_url, place


def _count(value: Any) -> int:
    try:
        return parse_count(value)
    except UserError as error:
        # pydantic then tells the key as well
        raise ValueError(str(error)) from None


def _size(value: Any) -> int | str:
    try:
        parameters, is_total = parse_size(value)
    except UserError as error:
        raise ValueError(str(error)) from None
    return f"{parameters} total" if is_total else parameters


# Text that is read more often teaches less than new text
MAX_EPOCHS = 4.0


def _words(given: Any) -> Any:
    """As typed, parted by commas, or as they are."""
    return [word.strip() for word in given.split(",")] if isinstance(given, str) else given


Positive = Annotated[float, Field(gt=0)]
PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
ProperFraction = Annotated[float, Field(gt=0, lt=1)]
_Kind = TypeVar("_Kind")
OneOrMore = Annotated[tuple[_Kind, ...], Field(min_length=1)]
# Fields that name what is written; other paths are read
WRITTEN = ("out", "folder", "gguf", "samples", "figure", "report", "write")
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
Count = Annotated[int, BeforeValidator(_count), Field(gt=0)]
# Of a model, without its embeddings, or with them as "360M total"
Size = Annotated[int | str, PlainValidator(_size)]
# The same, of which a recipe makes parameters without embeddings
LadderSize = Annotated[int, PlainValidator(_size)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
LearningRate = Annotated[
    Literal["auto"] | PositiveFinite,
    "Peak rate; auto is a rule per size, half of it for what has weights already.",
]
TextSource = Annotated[str, "stdlib, pydoc, a file, a folder, a glob or a Hugging Face dataset."]
# every byte and an end
Vocabulary = Annotated[Count, Field(ge=257), "Tokens of the tokenizer to train."]
BeginWindows = Annotated[
    bool, "Every window begins with the tokenizer's own first token, if it has one."
]
Recomputed = Annotated[
    bool, "Layers are computed again in the backward pass: less memory, about a third more work."
]
Track = Annotated[
    tuple[Literal["tensorboard", "trackio", "wandb"], ...],
    "Trackers told every step (docs/distillation.md).",
]
Dtype = Literal["stored", "fp32", "bf16"]
Init = Literal["pruned", "fixed", "scratch", "chain"]
Architecture = Literal[
    "llama",
    "mistral",
    "ministral3",
    "smollm3",
    "granite",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "olmo3",
    "phi3",
    "gpt_neox",
    "gpt2",
]


class Section(BaseModel):
    """A table of a recipe: unknown keys are errors, values cannot change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _in_local_copies(cls, given: Any) -> Any:
        """A URL would lose a slash as a path."""
        changed = dict(given) if isinstance(given, dict) else {}
        for name, field in keys_of(cls).items():
            if name in changed and Path in kinds_in(field.annotation):
                changed[name] = _local_copy(name, changed[name])
        return changed or given


class TextOptions(Section):
    """How text is read that is not prepared yet."""

    text_column: Annotated[str, "Column with the text, for JSON lines, parquet and datasets."] = (
        "text"
    )
    separator: Annotated[
        str, "Line that parts documents within a text file; if empty, none does."
    ] = "<|endoftext|>"
    max_bytes: Annotated[Count | None, "Take documents until they are so many bytes."] = None
    max_documents: Annotated[Count | None, "Take so many documents and read no further."] = None

    @property
    def reading(self) -> dict[str, Any]:
        """As `prepare_corpus` takes them."""
        return self.model_dump(include=set(TextOptions.model_fields))


class Problem(NamedTuple):
    """What is wrong with the value of a key such as `training.alpha`; `given` as a user sees it,
    None where the value does not matter."""

    key: str
    given: str | None
    why: str
    is_unknown: bool = False

    @classmethod
    def of(cls, error: ValidationError, root: type[BaseModel]) -> "Problem":
        """The first one; a misspelt key is also a missing one: the spelling is what to tell."""
        problems = error.errors()
        first = min(problems, key=lambda found: found["type"] != "extra_forbidden")
        key = _key_of(first["loc"])
        if first["type"] == "extra_forbidden":
            known = _keys_at(first["loc"][:-1], root)
            near = get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            return cls(key, None, hint, is_unknown=True)
        if first["type"] == "missing":
            return cls(key, None, "is missing")
        # a value that may be one of several kinds has a problem with each of them
        messages = [found["msg"] for found in problems if _key_of(found["loc"]) == key]
        why = " or ".join(text.removeprefix("Value error, ") for text in messages)
        why = why.replace(" or Input should be", " or")
        if first["type"] == "tuple_type":
            asked = json.dumps([first["input"]], default=str)
            why = f"a list was expected, such as {asked}; in a shell put '' around it"
        return cls(key, None if isinstance(first["input"], dict) else repr(first["input"]), why)

    def line(self) -> str:
        if self.is_unknown:
            return f"unknown key {self.key!r}; {self.why}"
        if self.why == "is missing":
            return f"{self.key!r} is missing"
        given = "" if self.given is None else f" = {self.given}"
        return f"{self.key}{given}: {self.why}" if self.key else self.why


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets `section.key=value` in plain data; the value as TOML, or else as text."""
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


def section_in(annotation: Any) -> type[Section] | None:
    """The section of a field that is one, or may be one, or is a list of them."""
    kinds = kinds_in(annotation)
    return next((one for one in kinds if isinstance(one, type) and issubclass(one, Section)), None)


def _local_copy(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_local_copy(name, one) for one in value]
    if not is_url(value):
        return value
    return place(value, "mirrors") if name in WRITTEN else local(value)


def kinds_in(annotation: Any) -> list[Any]:
    """A type and those that it is made of."""
    inner = [] if get_origin(annotation) is Literal else get_args(annotation)
    return [annotation, *(kind for part in inner for kind in kinds_in(part))]


def _key_of(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if not _is_branch(part))


def _is_branch(part: object) -> bool:
    """Pydantic adds the tried branch of a union to the location; a user has not written that."""
    return isinstance(part, str) and (
        part.startswith(("literal[", "constrained-")) or part in {"float", "int", "str"}
    )


def _keys_at(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    section: Any = root
    for part in location:
        if isinstance(part, str) and not _is_branch(part):
            section = section_in(keys_of(section)[part].annotation)
    return sorted(keys_of(section))


def keys_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields by what users call them."""
    return {field.alias or name: field for name, field in section.model_fields.items()}
