"""What a sweep is made of: teachers, cells and columns with their FLOPs, and where files lie.

Pure: nothing is read, trained or timed here, and torch is not imported.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from capgap.models.shape import Shape
from capgap.prune import scoring_flops
from capgap.sizes import format_count, forward_flops, training_flops
from capgap.sweep.recipe import Recipe
from capgap.train.recipe import TrainingSection

SEARCH_FILE = "search.json"
# What every process sees of the others where several work in one folder
SHARED = ("sweep.json", SEARCH_FILE, "records", "corpus")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a task or a run computes: models with the tokens that each takes (teachers and students
    that are trained, teachers that `read` for them), models whose units are `scored`, and models
    whose held-out loss is `measured`."""

    teachers: Sequence[tuple[Shape, int]] = ()
    students: Sequence[tuple[Shape, int]] = ()
    read: Sequence[tuple[Shape, int]] = ()
    scored: Sequence[Shape] = ()
    measured: Sequence[Shape] = ()

    @property
    def trained(self) -> list[tuple[Shape, int]]:
        return [*self.teachers, *self.students]

    @property
    def training_flops(self) -> int:
        return _total(training_flops, self.trained)

    @property
    def forward_flops(self) -> int:
        return _total(forward_flops, self.read)

    def flops(self, recipe: Recipe, heldout_tokens: int | None = None) -> dict[str, int]:
        """By part; the held-out tokens are the recipe's if none are given."""
        heldout = recipe.corpus.heldout_tokens if heldout_tokens is None else heldout_tokens
        return {
            "teacher_training": _total(training_flops, self.teachers),
            "teacher_forward": self.forward_flops,
            "pruning": scores_flops(recipe, self.scored),
            "student": _total(training_flops, self.students),
            "evaluation": _total(forward_flops, [(shape, heldout) for shape in self.measured]),
        }


def _total(flops: Callable[[int, int], int], models: Sequence[tuple[Shape, int]]) -> int:
    return sum(flops(shape.parameters().total, tokens) for shape, tokens in models)


@dataclass(frozen=True)
class Teacher:
    """A rung of the ladder to train, or with `source` a model that exists (then no tokens), whose
    table may have more rows than the `vocabulary` of its tokenizer. stored_bytes: of a weight."""

    id: str
    architecture: str
    size: int
    seed: int
    shape: Shape
    vocabulary: int
    source: str | None
    tokens: int
    learning_rate: float | None
    stored_bytes: int = 4

    @property
    def runs(self) -> tuple[str, ...]:
        """Ids of what is recorded of it."""
        return (self.id,)

    @property
    def teachers(self) -> set[str]:
        """Ids of the teachers that it needs: none."""
        return set()

    needs = teachers

    @property
    def label(self) -> str:
        """Its name within those of cells."""
        return size_label(self.size) if self.source is None else self.id

    @property
    def work(self) -> Work:
        """Without its scores, which columns need."""
        return Work(teachers=[(self.shape, self.tokens)], measured=[self.shape])


@dataclass(frozen=True)
class Assistant:
    """The model between in a chain (arXiv 1902.03393): cut out of the cell's teacher and distilled
    from it for `tokens`; then the student is cut out of it and distilled from it."""

    id: str
    shape: Shape
    tokens: int
    learning_rate: float
    alpha: float

    @property
    def column_id(self) -> str:
        """Of the column that makes it."""
        return f"column-{self.id}"


@dataclass(frozen=True)
class Cell:
    """One student's run.

    A baseline has alpha 0 and, for inits that are the same for every teacher, no teacher.
    `cut_from`: the teacher whose weights the student starts from, by way of the `assistant` of a
    chain. `asked_tokens` are the recipe's, `budget` the same in whole batches; a chain has the
    FLOPs of a direct cell with as many, and its student sees `tokens`. `equal_flops_to`: id of the
    cell whose FLOPs a baseline has in place of its tokens.
    """

    kind: Literal["cell", "baseline"]
    architecture: str
    student_size: int
    shape: Shape
    init: str
    asked_tokens: int
    budget: int
    tokens: int
    seed: int
    learning_rate: float
    alpha: float
    teacher: Teacher | None
    cut_from: Teacher | None
    assistant: Assistant | None = None
    equal_flops_to: str | None = None

    @property
    def id(self) -> str:
        if self.equal_flops_to is not None:
            return f"baseline-flops-{self.equal_flops_to}"
        teacher = "" if self.teacher is None else f"-t{self.teacher.label}"
        name = f"{self.architecture}-s{size_label(self.student_size)}{teacher}-{self.init}"
        name += f"-{size_label(self.asked_tokens)}-seed{self.seed}"
        return name if self.kind == "cell" else f"baseline-{name}"

    @property
    def curve(self) -> tuple[str, str, int, int]:
        """What the cells of one curve have in common."""
        return self.architecture, self.init, self.budget, self.student_size

    @property
    def work(self) -> Work:
        """Alone, with its assistant and the scores that both need; the cells of a column share
        teacher passes."""
        students, read = [(self.shape, self.tokens)], []
        above: Teacher | Assistant | None = self.teacher
        if self.assistant is not None:
            students.append((self.assistant.shape, self.assistant.tokens))
            if above is not None and self.assistant.alpha > 0:
                read.append((above.shape, self.assistant.tokens))
            above = self.assistant
        if above is not None and self.alpha > 0:
            read.append((above.shape, self.tokens))
        scored = [one.shape for one in (self.cut_from, self.assistant) if one is not None]
        return Work(students=students, read=read, scored=scored, measured=[self.shape])


@dataclass(frozen=True)
class Column:
    """Cells that are trained together on the same batches, fed by one teacher or by none."""

    id: str
    teacher: Teacher | None
    seed: int
    cells: tuple[Cell, ...]

    @property
    def runs(self) -> tuple[str, ...]:
        """Ids of what is recorded of it."""
        return tuple(cell.id for cell in self.cells)

    @property
    def teachers(self) -> set[str]:
        """Ids of the teachers that the column takes."""
        models = [self.teacher, *(cell.cut_from for cell in self.cells)]
        return {teacher.id for teacher in models if teacher is not None}

    @property
    def needs(self) -> set[str]:
        """Ids of what must be there before the column starts: teachers, and for the baseline of a
        chain the column that makes its assistant."""
        assistants = (cell.assistant for cell in self.cells if cell.kind == "baseline")
        return self.teachers | {one.column_id for one in assistants if one is not None}

    @property
    def assistant(self) -> Assistant | None:
        """What the column makes first."""
        return None if self.teacher is None else self.cells[0].assistant

    @property
    def tokens(self) -> int:
        """Tokens of the longest cell, after those of the assistant: what the column reads."""
        longest = max(cell.tokens for cell in self.cells)
        return longest + (0 if self.assistant is None else self.assistant.tokens)

    @property
    def work(self) -> Work:
        """The teacher reads once for all cells; of a chain nothing is shared. Without the scores of
        its teachers."""
        if self.assistant is not None:
            return replace(self.cells[0].work, scored=[self.assistant.shape])
        reads = self.teacher is not None and any(cell.alpha > 0 for cell in self.cells)
        return Work(
            students=[(cell.shape, cell.tokens) for cell in self.cells],
            read=[(self.teacher.shape, self.tokens)] if reads and self.teacher else [],
            measured=[cell.shape for cell in self.cells],
        )


# What a worker is given
Task = Teacher | Column


def scores_flops(recipe: Recipe, shapes: Sequence[Shape]) -> int:
    """Of the units of these models."""
    asked = recipe.scoring_method, recipe.scoring_depth
    return sum(
        scoring_flops(*asked, shape.parameters().total, recipe.scoring_tokens) for shape in shapes
    )


def size_label(count: int) -> str:
    return format_count(count).replace(".", "p")


@dataclass(frozen=True)
class Context:
    """Paths are functions of ids, so that a restart finds what is there. `training`: the recipe's,
    with the precision that the sweep began with."""

    recipe: Recipe
    out: Path
    device: str
    threads: int | None
    training: TrainingSection

    def with_micro_batch(self, tokens: int | None) -> "Context":
        """With so many tokens at once, the recipe's if None."""
        if tokens is None:
            return self
        changed = self.training.model_copy(update={"micro_batch_tokens": tokens})
        return replace(self, training=changed)

    @property
    def batch_windows(self) -> int:
        return self.training.batch_tokens // self.recipe.corpus.window

    def smaller(self, tokens: int | None) -> int | None:
        """Half of what went through the models at once (None: the recipe's), in whole windows that
        divide a process' share of a batch; None where that is one window."""
        share = self.batch_windows // self.recipe.run.gpus_per_column
        asked = tokens or self.recipe.training.micro_batch_tokens
        windows = min(asked // self.recipe.corpus.window, share) if asked else share
        smaller = [one for one in range(1, windows // 2 + 1) if windows % one == 0]
        return smaller[-1] * self.recipe.corpus.window if smaller else None

    @property
    def corpus_folder(self) -> Path:
        return self.out / "corpus"

    def record_folder(self, run_id: str) -> Path:
        return self.out / "records" / run_id

    def teacher_folder(self, teacher_id: str) -> Path:
        return self.out / "teachers" / teacher_id

    def importance_file(self, teacher_id: str) -> Path:
        return self.out / "work" / "importance" / f"{teacher_id}.safetensors"

    def weights_of(self, model: Teacher | Assistant) -> Path | str:
        """Where a model that others are cut out of or learn from lies."""
        if isinstance(model, Assistant):
            return self.assistant_folder(model.id)
        return model.source or self.teacher_folder(model.id)

    def student_folder(self, cell_id: str) -> Path:
        return self.out / "work" / "students" / cell_id

    def assistant_folder(self, assistant_id: str) -> Path:
        return self.out / "work" / "assistants" / assistant_id

    def assistant_outcome(self, assistant_id: str) -> Path:
        return self.out / "work" / "assistants" / f"{assistant_id}.json"

    @property
    def leases(self) -> Path:
        return self.out / "work" / "leases"

    def checkpoint_folder(self, task_id: str) -> Path:
        return self.out / "work" / "checkpoints" / task_id

    def files_of(self, task: "Task") -> list[Path]:
        """Which others may have made, and a task reads."""
        found = [self.checkpoint_folder(task.id)]
        for name in task.teachers:
            found += [self.teacher_folder(name), self.importance_file(name)]
        cells = task.cells if isinstance(task, Column) else ()
        for name in {cell.assistant.id for cell in cells if cell.assistant is not None}:
            found += [self.assistant_folder(name), self.assistant_outcome(name)]
            found.append(self.importance_file(name))
        return found

    def is_recorded(self, run_id: str) -> bool:
        return (self.record_folder(run_id) / "record.json").exists()

    def is_done(self, task: Task) -> bool:
        return all(map(self.is_recorded, task.runs))
