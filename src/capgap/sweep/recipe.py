"""The recipe of a sweep: a grid of teachers and students over one corpus."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from capgap.prune.methods import Depth, Method
from capgap.section import MAX_EPOCHS, Architecture, Count, Init, LearningRate, Section
from capgap.train.recipe import RunSection, TrainingSection


class CorpusSection(Section):
    """Text in. `source` is `stdlib`, a file, a folder, a glob or a Hugging Face dataset name."""

    source: str = "stdlib"
    text_column: str = "text"
    separator: str = "<|endoftext|>"
    heldout_source: str | None = None
    tokenizer: str | None = None
    vocabulary: Annotated[Count, Field(ge=257, le=1 << 20)] = 2048  # every byte and an end
    window: Annotated[int, Field(ge=8)] = 128
    begin_windows: bool = False
    max_bytes: Count | None = None
    heldout_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    heldout_tokens: Count = 60_000
    max_epochs: Annotated[float, Field(gt=0)] = MAX_EPOCHS


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
    control_tokens: tuple[Count, ...] = ()
    assistant_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    learning_rate: LearningRate = "auto"

    @model_validator(mode="after")
    def _known_budgets(self) -> "StudentsSection":
        unknown = set(self.control_tokens) - set(self.tokens)
        if unknown:
            raise ValueError(f"control_tokens {sorted(unknown)} are none of tokens")
        return self

    def budgets(self, init: str) -> list[int]:
        """Tokens that students of an init learn from, ascending: the first init has all, the others
        are controls."""
        own = self.control_tokens if init != self.inits[0] else ()
        return sorted(own or self.tokens)


class Recipe(Section):
    """A sweep: a grid of teachers and students over one corpus."""

    name: str
    description: str = ""
    architectures: Annotated[tuple[Architecture, ...], Field(min_length=1)] = ("llama",)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    layers: Count | None = None
    baselines: Literal["all", "best_and_largest", "best"] = "all"
    equal_flops: bool = False
    scoring_tokens: Count = 32_768
    scoring_method: Method = "activation"
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
        self.training.check_batches("corpus.window", self.corpus.window)
        self.training.check_tokens("students.tokens", min(self.students.tokens))
        if self.teachers.tokens is not None:
            self.training.check_tokens("teachers.tokens", self.teachers.tokens)
        return self

    def hash(self) -> str:
        """Of everything that changes the results."""
        content = identity(self.model_dump(mode="json"))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def identity(recipe: dict[str, Any]) -> dict[str, Any]:
    """What changes the results, of a recipe as plain data: the name and [run] do not."""
    content = {k: v for k, v in recipe.items() if k not in ("name", "description", "run")}
    # recipes from before there were such keys stay what they were
    students = {k: v for k, v in recipe["students"].items() if v or k != "control_tokens"}
    added = ("layers", "equal_flops")
    return {k: v for k, v in content.items() if v or k not in added} | {"students": students}


class SearchSettings(Section):
    """How a recipe's grid is searched: a choice is safe when it is within `tolerance` of the best
    teacher with probability `confidence`."""

    budget: Annotated[
        float,
        Field(gt=0, le=1),
        "Share of the full grid's FLOPs that may be spent, at most 1; it is never exceeded.",
    ] = 0.35
    rungs: Annotated[
        int, Field(ge=1), "Token budgets to run on: the recipe's, a third of it, a ninth."
    ] = 3
    tolerance: Annotated[
        float,
        Field(gt=0, lt=1),
        "Share of the loss by which, at 90%, no other teacher is better than a safe choice.",
    ] = 0.0025
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.9
    seed: int = 0
