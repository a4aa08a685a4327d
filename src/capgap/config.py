"""The typed recipes of sweeps and of single runs: strict TOML, overrides, hash. No torch."""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from capgap.errors import UserError
from capgap.hardware import UTILISATION, parse_gpus
from capgap.prune.methods import Depth, Method
from capgap.sizes import parse_count


def _count(value: Any) -> int:
    try:
        return parse_count(value)
    except UserError as error:
        # pydantic then tells the key as well
        raise ValueError(str(error)) from None


Count = Annotated[int, BeforeValidator(_count), Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LearningRate = Literal["auto"] | Annotated[float, Field(gt=0)]
Init = Literal["pruned", "fixed", "scratch", "chain"]
Architecture = Literal[
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "phi3", "gpt_neox", "gpt2"
]


_Kind = TypeVar("_Kind", bound=BaseModel)
# Tables that only the recipe of a sweep has
_SWEEP = {"teachers", "students"}


class Section(BaseModel):
    """A table of a recipe: unknown keys are errors, values cannot change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CorpusSection(Section):
    """Text in. `source` is `stdlib`, a file, a folder, a glob or a Hugging Face dataset name."""

    source: str = "stdlib"
    text_column: str = "text"
    separator: str = "<|endoftext|>"
    heldout_source: str | None = None
    tokenizer: str | None = None
    vocabulary: Annotated[Count, Field(ge=257)] = 2048  # every byte and the end of a document
    window: Annotated[int, Field(ge=8)] = 128
    max_bytes: Count | None = None
    heldout_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    heldout_tokens: Count = 60_000
    max_epochs: Annotated[float, Field(gt=0)] = 4.0


class TeachersSection(Section):
    """Either a ladder to train (`sizes`, `tokens`) or models that exist (`models`)."""

    sizes: tuple[Count, ...] = ()
    tokens: Count | None = None
    models: tuple[str, ...] = ()
    learning_rate: LearningRate = "auto"

    @model_validator(mode="after")
    def _one_kind(self) -> "TeachersSection":
        if bool(self.sizes) == bool(self.models):
            raise ValueError("give either sizes (a ladder to train) or models (folders or names)")
        if self.sizes and self.tokens is None:
            raise ValueError("a ladder to train needs tokens")
        return self


class StudentsSection(Section):
    """Sizes are non-embedding parameters; every size is distilled for every token budget."""

    sizes: Annotated[tuple[Count, ...], Field(min_length=1)]
    tokens: Annotated[tuple[Count, ...], Field(min_length=1)]
    inits: Annotated[tuple[Init, ...], Field(min_length=1)] = ("pruned",)
    assistant_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    learning_rate: LearningRate = "auto"


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
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    decay_embeddings: bool = False
    clip: Annotated[float, Field(gt=0)] = 1.0
    document_mask: bool = False
    ignored_tokens: tuple[str, ...] = ()
    activation_checkpointing: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    teacher_dtype: Literal["stored", "fp32", "bf16"] = "stored"


class RunSection(Section):
    """How the work is carried out; nothing here changes what is asked for."""

    device: str = "auto"
    teacher_device: str = "same"
    teacher_offload: bool = False
    workers: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 30.0
    checkpoints: Annotated[int, Field(ge=1)] = 2
    compile: Literal["auto", "on", "off"] = "auto"


class TeacherSection(Section):
    """A published model by its name, or a Hugging Face folder. `vocabulary`: rows of its tables
    after they were extended; None leaves them as they are."""

    model: str
    vocabulary: Count | None = None


class PruneSection(Section):
    """What is cut out of the teacher: a share, a number of parameters, or sizes; one of the three.

    Sizes that are not named stay as the teacher has them.
    """

    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    params: Count | None = None
    total_params: Count | None = None
    hidden: Count | None = None
    heads: Count | None = None
    kv_heads: Count | None = None
    ffn: Count | None = None
    layers: Count | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Those that are named."""
        names = ("hidden", "heads", "kv_heads", "ffn", "layers")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _one_way(self) -> "PruneSection":
        asked = (self.keep, self.params, self.total_params, self.sizes or None)
        if sum(one is not None for one in asked) != 1:
            raise ValueError(
                "give one of keep, params, total_params, or sizes (hidden, heads, kv_heads, ffn, "
                "layers) for the student"
            )
        return self


class DistillSection(Section):
    """The student learns from the teacher on so many tokens, in rows of `window`."""

    tokens: Count
    window: Annotated[int, Field(ge=8)] = 512
    learning_rate: LearningRate = "auto"


class HardwareSection(Section):
    """What the run is meant for: time and memory are told for it."""

    gpus: str | None = None
    utilisation: Annotated[float, Field(gt=0, le=1)] = UTILISATION

    @model_validator(mode="after")
    def _known(self) -> "HardwareSection":
        if self.gpus is not None:
            try:
                parse_gpus(self.gpus, where="gpus")
            except UserError as error:
                raise ValueError(str(error)) from None
        return self


def _check_batches(training: TrainingSection, name: str, window: int) -> None:
    batch, micro = training.batch_tokens, training.micro_batch_tokens
    if batch % window:
        raise ValueError(f"training.batch_tokens {batch} is not a multiple of {name} {window}")
    if micro is not None and (micro % window or batch % micro):
        raise ValueError(
            f"training.micro_batch_tokens {micro} must be a multiple of {name} {window} and divide "
            f"training.batch_tokens {batch}"
        )


def _check_tokens(training: TrainingSection, name: str, tokens: int) -> None:
    if tokens < training.batch_tokens:
        raise ValueError(f"{name} {tokens} is less than one batch of {training.batch_tokens}")


class RunRecipe(Section):
    """One run: a student is cut out of a teacher and distilled from it."""

    name: str
    description: str = ""
    teacher: TeacherSection
    prune: PruneSection
    distill: DistillSection
    training: TrainingSection = TrainingSection()
    run: RunSection = RunSection()
    hardware: HardwareSection = HardwareSection()

    @model_validator(mode="after")
    def _consistent(self) -> "RunRecipe":
        _check_batches(self.training, "distill.window", self.distill.window)
        _check_tokens(self.training, "distill.tokens", self.distill.tokens)
        return self


class Recipe(Section):
    """A sweep: a grid of teachers and students over one corpus."""

    name: str
    description: str = ""
    architectures: Annotated[tuple[Architecture, ...], Field(min_length=1)] = ("llama",)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    baselines: Literal["all", "best_and_largest"] = "all"
    scoring_tokens: Count = 32_768
    scoring_method: Method = "first_order"
    scoring_depth: Depth | None = None
    corpus: CorpusSection = CorpusSection()
    teachers: TeachersSection
    students: StudentsSection
    training: TrainingSection = TrainingSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        for name in ("seeds", "architectures"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {list(values)} names one of them twice")
        _check_batches(self.training, "corpus.window", self.corpus.window)
        _check_tokens(self.training, "students.tokens", min(self.students.tokens))
        if self.teachers.tokens is not None:
            _check_tokens(self.training, "teachers.tokens", self.teachers.tokens)
        return self

    def hash(self) -> str:
        """Of everything that changes the results: the name and [run] do not."""
        content = self.model_dump(mode="json", exclude={"name", "description", "run"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class StageSettings(Section):
    """The parts of a recipe that a single stage takes: `capgap distill --set training.alpha=1`."""

    training: TrainingSection = TrainingSection()
    run: RunSection = RunSection()


def stage_settings(overrides: Sequence[str]) -> StageSettings:
    """Defaults changed by overrides; UserError names the key, its value and what was expected."""
    data: dict[str, Any] = {}
    for override in overrides:
        _apply_override(data, override)
    try:
        return StageSettings.model_validate(data)
    except ValidationError as error:
        raise UserError(f"--set: {_first_problem(error, StageSettings)}") from None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads the TOML recipe of a sweep and applies overrides such as `students.tokens=["1M"]`.

    UserError: no such file, not TOML, an unknown key (names the nearest), a value out of range, or
    a recipe of a single run.
    """
    return parse_recipe(_read(path, overrides), where=str(path))


def load_any_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe | RunRecipe:
    """The same for the recipe of a sweep or of a run, whichever it is; UserError for neither."""
    data = _read(path, overrides)
    if not _SWEEP & data.keys() and "teacher" not in data:
        raise UserError(
            f"{path} is no recipe: a sweep has [teachers] and [students], a run [teacher], [prune] "
            "and [distill]"
        )
    parse = parse_run_recipe if _is_run(data) else parse_recipe
    return parse(data, where=str(path))


def parse_recipe(data: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """A sweep from plain data; UserError names the key, its value and what was expected."""
    if _is_run(data):
        raise UserError(f"{where} is the recipe of a run, not of a sweep: see `capgap plan`")
    return _parsed(Recipe, data, where)


def parse_run_recipe(data: dict[str, Any], *, where: str = "recipe") -> RunRecipe:
    """A run from plain data; UserError as `parse_recipe`."""
    return _parsed(RunRecipe, data, where)


def _is_run(data: dict[str, Any]) -> bool:
    return "teacher" in data and not _SWEEP & data.keys()


def _parsed(kind: type[_Kind], data: dict[str, Any], where: str) -> _Kind:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_problem(error, kind)}") from None


def _read(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(shipped_recipes()))
        raise UserError(f"no recipe {str(path)!r}; shipped recipes: {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe {str(path)!r}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        _apply_override(data, override)
    return data


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_recipe(name_or_path: str) -> Path:
    """A path as it is; a bare name such as `laptop` is looked up among the shipped recipes."""
    path = Path(name_or_path)
    if not path.is_file() and name_or_path in shipped_recipes():
        return shipped_recipes()[name_or_path]
    return path


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = key.strip().split(".")
    table = data
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UserError(f"override {override!r}: {parent!r} is not a table")
    table[leaf] = value


def _first_problem(error: ValidationError, root: type[BaseModel]) -> str:
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
        annotation = section.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        section = annotation
    return sorted(section.model_fields)
