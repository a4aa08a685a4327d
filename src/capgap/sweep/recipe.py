"""The recipe of a sweep: a grid of teachers and students over one corpus."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from capgap.artifact import digest
from capgap.hub import hub_name
from capgap.models.shape import ladder_size
from capgap.prune import Depth, Method
from capgap.section import (
    MAX_EPOCHS,
    Architecture,
    BeginWindows,
    Count,
    Init,
    LadderSize,
    LearningRate,
    OneOrMore,
    Positive,
    PositiveFraction,
    ProperFraction,
    Section,
    TextOptions,
    TextSource,
    Track,
    Vocabulary,
)
from capgap.train.recipe import RunSection, TrainingSection


class CorpusSection(TextOptions):
    """The text that a sweep trains and evaluates on."""

    source: TextSource = "stdlib"
    heldout_source: Annotated[str | None, "Other text to evaluate on, of the same kinds."] = None
    tokenizer: Annotated[str | None, "One to take instead of training it: folder or name."] = None
    vocabulary: Annotated[Vocabulary, Field(le=1 << 20)] = 2048
    window: Annotated[int, Field(ge=8), "Tokens of a row; a ladder's models read no more."] = 128
    begin_windows: BeginWindows = False
    heldout_fraction: Annotated[float, Field(gt=0, lt=0.5), "Share of documents held out."] = 0.02
    heldout_tokens: Annotated[Count, "Most tokens that every model is evaluated on."] = 60_000
    max_epochs: Annotated[Positive, "Most times that a run may read the corpus."] = MAX_EPOCHS


class TeachersSection(Section):
    """Either a ladder to train (`sizes`, `tokens`) or models that exist (`models`)."""

    sizes: Annotated[tuple[LadderSize, ...], "Parameters of each; four or more for a fit."] = ()
    tokens: Annotated[Count | None, "Training tokens of each, rounded to whole batches."] = None
    models: Annotated[
        tuple[Annotated[str, AfterValidator(hub_name)], ...],
        "Folders, or names on the Hub, of models of families (docs/families.md) of one tokenizer.",
    ] = ()
    learning_rate: LearningRate = "auto"

    @model_validator(mode="after")
    def _one_kind(self) -> "TeachersSection":
        if bool(self.sizes) == bool(self.models):
            raise ValueError("give either sizes (a ladder to train) or models (folders or names)")
        if self.sizes and self.tokens is None:
            raise ValueError("a ladder to train needs tokens")
        return self


class StudentsSection(Section):
    """The students of every teacher."""

    sizes: Annotated[
        OneOrMore[LadderSize], "Parameters of each; of cuts at most the smallest teacher's."
    ]
    tokens: Annotated[tuple[Count, ...], "Budgets for every size, rounded to whole batches."] = ()
    tokens_per_parameter: Annotated[
        tuple[Positive, ...], "Budgets in proportion to each size, in place of `tokens`."
    ] = ()
    inits: Annotated[OneOrMore[Init], "Where the first weights come from."] = ("pruned",)
    control_tokens: Annotated[
        tuple[Count, ...], "Budgets of the controls, all inits but the first; else all `tokens`."
    ] = ()
    assistant_share: Annotated[ProperFraction, "Of a chain's FLOPs, its assistant's part."] = 0.5
    learning_rate: LearningRate = "auto"

    @model_validator(mode="after")
    def _known_budgets(self) -> "StudentsSection":
        if bool(self.tokens) == bool(self.tokens_per_parameter):
            raise ValueError("give either tokens or tokens_per_parameter")
        unknown = set(self.control_tokens) - set(self.tokens)
        if unknown:
            raise ValueError(f"control_tokens {sorted(unknown)} are none of tokens")
        return self

    def budgets(self, init: str, size: int) -> list[int]:
        """Tokens that a student of an init learns from, ascending: the first init has all, the
        others are controls."""
        own = self.control_tokens if init != self.inits[0] else ()
        each = [round(ratio * size) for ratio in self.tokens_per_parameter]
        return sorted(own or self.tokens or each)


class Recipe(Section):
    """A sweep: a grid of teachers and students over one corpus."""

    name: Annotated[str, "Names the sweep and its default output folder."]
    description: Annotated[str, "For the reader."] = ""
    track: Track = ()
    architectures: Annotated[
        OneOrMore[Architecture], "What a ladder is built of; given teachers bring their own."
    ] = ("llama",)
    seeds: Annotated[
        OneOrMore[Annotated[int, Field(ge=0)]],
        "Every seed trains its own teachers, students and baselines, on its own order of the text.",
    ] = (0,)
    layers: Annotated[
        Count | None, "Of every model, so that cuts are of width; else depth grows with size."
    ] = None
    baselines: Annotated[
        Literal["all", "best_and_largest", "best"],
        "Cells that get a baseline (same init, same tokens, no teacher), by their teacher.",
    ] = "all"
    equal_flops: Annotated[
        bool, "Run baselines also on the tokens that their teacher's forward passes would pay for."
    ] = False
    larger_teachers_only: Annotated[
        bool,
        "Students learn from larger teachers alone, where a grid has others.",
    ] = False
    scoring_tokens: Annotated[Count, "Training tokens to score a teacher's units on."] = 32_768
    scoring_method: Annotated[Method, "How units are scored (docs/pruning.md)."] = "activation"
    scoring_depth: Annotated[Depth | None, "How layers are scored, if not by the method."] = None
    corpus: CorpusSection = CorpusSection()
    teachers: TeachersSection
    students: StudentsSection
    training: TrainingSection = TrainingSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _without_embeddings(self) -> "Recipe":
        """Sizes in total become those without embeddings that a ladder's models of it have."""
        rows = {
            "vocabulary": self.corpus.vocabulary,
            "positions": self.corpus.window,
            "layers": self.layers,
        }
        for name in ("teachers", "students"):
            section = getattr(self, name)
            if all(isinstance(size, int) for size in section.sizes):
                continue
            if len(self.architectures) > 1 or self.teachers.models or self.corpus.tokenizer:
                raise ValueError(
                    f"{name}.sizes in total need one architecture and a vocabulary that is trained "
                    "here: give them without embeddings"
                )
            kind = self.architectures[0]
            sizes = [ladder_size(kind, size, **rows) for size in section.sizes]
            # frozen but for its own making
            self.__dict__[name] = section.model_copy(update={"sizes": tuple(sizes)})
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        for name in ("seeds", "architectures"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {list(values)} names one of them twice")
        self.training.check_batches("corpus.window", self.corpus.window)
        run, windows = self.run, self.training.batch_tokens // self.corpus.window
        each, name = run.gpus_per_column, "run.gpus_per_column"
        if windows % each:
            raise ValueError(f"{name} {each} does not divide a batch of {windows} windows")
        if each % (run.shard_size or each):
            raise ValueError(f"run.shard_size {run.shard_size} does not divide {name} {each}")
        if each == 1 and self.training.precision == "bf16_gathered":
            raise ValueError(f"training.precision 'bf16_gathered' needs {name} above 1: use bf16")
        if each > 1 and run.teacher_device != "same":
            raise ValueError("run.gpus_per_column share the teacher too: no run.teacher_device")
        students = self.students
        name = "tokens" if students.tokens else "tokens_per_parameter"
        least = students.budgets(students.inits[0], min(students.sizes))[0]
        self.training.check_tokens(f"students.{name}", least)
        if self.teachers.tokens is not None:
            self.training.check_tokens("teachers.tokens", self.teachers.tokens)
        return self

    def hash(self) -> str:
        """Of everything that changes the results."""
        return digest(identity(self.model_dump(mode="json")))[:16]


_BUDGETS = ("tokens", "control_tokens", "tokens_per_parameter")


def identity(recipe: dict[str, Any]) -> dict[str, Any]:
    """What changes the results, of a recipe as plain data: the name and [run] do not."""
    told = ("name", "description", "track", "run")
    # recipes from before there were such keys stay what they were
    students = {k: v for k, v in recipe["students"].items() if v or k not in _BUDGETS}
    corpus = {k: v for k, v in recipe["corpus"].items() if v or k != "max_documents"}
    added = ("layers", "equal_flops", "larger_teachers_only")
    kept = {k: v for k, v in recipe.items() if k not in told and (v or k not in added)}
    return kept | {"corpus": corpus, "students": students}


class SearchSettings(Section):
    """How a recipe's grid is searched: a choice is safe when it is within `tolerance` of the best
    teacher with probability `confidence`."""

    budget: Annotated[
        PositiveFraction,
        "Share of the full grid's FLOPs that may be spent, at most 1; it is never exceeded.",
    ] = 0.35
    rungs: Annotated[
        int, Field(ge=1), "Token budgets to run on: the recipe's, a third of it, a ninth."
    ] = 3
    tolerance: Annotated[
        ProperFraction,
        "Share of the loss by which, at 90%, no other teacher is better than a safe choice.",
    ] = 0.0025
    confidence: ProperFraction = 0.9
    seed: int = 0
