"""A recipe becomes a plan: every teacher, column and cell with its shape, tokens and FLOPs.

Pure: nothing is read, trained or timed here, and torch is not imported.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from capgap.config import Recipe
from capgap.errors import UserError
from capgap.models.shape import Shape, ladder_shape
from capgap.prune.methods import scoring_flops
from capgap.prune.shape import pruned_shape
from capgap.sizes import format_count, forward_flops, training_flops
from capgap.train.learning_rate import auto_learning_rate

FLOP_PARTS = ("teacher_training", "teacher_forward", "pruning", "student", "evaluation")


@dataclass(frozen=True)
class Teacher:
    """A rung of the ladder to train, or with `source` a model that exists (then no tokens).

    `vocabulary` are the words of its tokenizer; the table of a given model may have more rows.
    """

    id: str
    architecture: str
    size: int
    seed: int
    shape: Shape
    vocabulary: int
    source: str | None
    tokens: int
    learning_rate: float | None

    def flops(self, heldout_tokens: int) -> dict[str, int]:
        total = self.shape.parameters().total
        return _flops(
            teacher_training=training_flops(total, self.tokens),
            evaluation=forward_flops(total, heldout_tokens),
        )


@dataclass(frozen=True)
class Cell:
    """One student's run. A baseline has alpha 0 and, for the inits that are the same for every
    teacher, no teacher. `cut_from` is the teacher whose weights the student starts from."""

    id: str
    kind: Literal["cell", "baseline"]
    architecture: str
    student_size: int
    shape: Shape
    init: str
    tokens: int
    seed: int
    learning_rate: float
    alpha: float
    teacher: Teacher | None
    cut_from: Teacher | None

    def flops(self, recipe: Recipe, heldout_tokens: int) -> dict[str, int]:
        """What this cell would cost alone; the columns of a sweep share teacher passes."""
        total = self.shape.parameters().total
        forward = pruning = 0
        if self.teacher is not None and self.alpha > 0:
            forward = forward_flops(self.teacher.shape.parameters().total, self.tokens)
        if self.cut_from is not None:
            pruning = _scoring_flops(recipe, self.cut_from.shape)
        return _flops(
            teacher_forward=forward,
            pruning=pruning,
            student=training_flops(total, self.tokens),
            evaluation=forward_flops(total, heldout_tokens),
        )


@dataclass(frozen=True)
class Column:
    """Cells that are trained together on the same batches, fed by one teacher or by none."""

    id: str
    teacher: Teacher | None
    seed: int
    cells: tuple[Cell, ...]

    @property
    def needs(self) -> set[str]:
        """Ids of the teachers that must be there before the column starts."""
        found = {cell.cut_from.id for cell in self.cells if cell.cut_from is not None}
        return found | ({self.teacher.id} if self.teacher is not None else set())

    @property
    def tokens(self) -> int:
        """Tokens of the longest cell: what the teacher reads."""
        return max(cell.tokens for cell in self.cells)


@dataclass(frozen=True)
class Plan:
    """`baselines` are all that could be asked for; see `Recipe.baselines`."""

    recipe: Recipe
    teachers: tuple[Teacher, ...]
    columns: tuple[Column, ...]
    baselines: tuple[Column, ...]

    @property
    def width(self) -> int:
        """How many tasks can run at once, at most."""
        return max(len(self.teachers), len(self.columns) + len(self.baselines))

    @property
    def cells(self) -> list[Cell]:
        return [cell for column in self.columns for cell in column.cells]

    def flops(self, baselines: Sequence[Column]) -> dict[str, int]:
        """Of the whole sweep by part, shared work counted once."""
        recipe = self.recipe
        heldout = recipe.corpus.heldout_tokens
        total = _flops()
        for teacher in self.teachers:
            _add(total, teacher.flops(heldout))
            total["pruning"] += _scoring_flops(recipe, teacher.shape)
        for column in (*self.columns, *baselines):
            if column.teacher is not None:
                parameters = column.teacher.shape.parameters().total
                total["teacher_forward"] += forward_flops(parameters, column.tokens)
            for cell in column.cells:
                own = cell.flops(recipe, heldout)
                total["student"] += own["student"]
                total["evaluation"] += own["evaluation"]
        return total


def make_plan(recipe: Recipe, given: Sequence[Teacher] = ()) -> Plan:
    """`given` are the recipe's `teachers.models`, looked at by the caller; else a ladder is built.

    UserError: a student larger than a teacher it is to be cut from, sizes that cannot be built,
    the same size twice.
    """
    teachers = tuple(given) if recipe.teachers.models else tuple(_ladder(recipe))
    _refuse_twins([teacher.id for teacher in teachers], "teachers")
    columns: list[Column] = []
    baselines: list[Column] = []
    for teacher in teachers:
        seeds = recipe.seeds if teacher.source is not None else (teacher.seed,)
        for seed in seeds:
            cells = _cells(recipe, teachers, teacher, seed)
            _refuse_twins([cell.id for cell in cells], "students")
            suffix = f"-seed{seed}" if teacher.source is not None else ""
            columns.append(Column(f"column-{teacher.id}{suffix}", teacher, seed, tuple(cells)))
            matched = [_baseline(cell) for cell in cells]
            baselines += _baseline_columns(f"{teacher.id}{suffix}", seed, matched)
    plan = Plan(recipe, teachers, tuple(columns), _without_repeats(baselines))
    _refuse_same_places(plan)
    return plan


def select_baselines(plan: Plan, best: Iterable[Cell]) -> list[Column]:
    """The baselines matched to each curve's largest teacher and to the `best` cells."""
    curves: dict[tuple[object, ...], list[Cell]] = {}
    for cell in plan.cells:
        curves.setdefault((*curve_key(cell), cell.seed), []).append(cell)
    wanted = [_largest(cells) for cells in curves.values()] + list(best)
    ids = {_baseline(cell).id for cell in wanted}
    columns = []
    for column in plan.baselines:
        cells = tuple(cell for cell in column.cells if cell.id in ids)
        if cells:
            columns.append(Column(column.id, None, column.seed, cells))
    return columns


def expected_baselines(plan: Plan) -> Sequence[Column]:
    """The baselines that will be run, as far as can be known before the cells are.

    Where only the best and the largest teacher get some, the second largest stands for the best:
    whichever it turns out to be, its baselines cost about the same.
    """
    if plan.recipe.baselines == "all":
        return plan.baselines
    sizes = sorted({teacher.size for teacher in plan.teachers})
    stand_in = sizes[-2] if len(sizes) > 1 else sizes[0]
    return select_baselines(
        plan,
        [cell for cell in plan.cells if cell.teacher is not None and cell.teacher.size == stand_in],
    )


def curve_key(cell: Cell) -> tuple[str, str, int, int]:
    """What the cells of one curve have in common."""
    return cell.architecture, cell.init, cell.tokens, cell.student_size


def _largest(cells: Sequence[Cell]) -> Cell:
    return max(cells, key=lambda cell: cell.teacher.size if cell.teacher is not None else 0)


def _ladder(recipe: Recipe) -> Iterable[Teacher]:
    assert recipe.teachers.tokens is not None
    for architecture in recipe.architectures:
        for seed in recipe.seeds:
            for size in sorted(recipe.teachers.sizes):
                shape = ladder_shape(
                    architecture,
                    size,
                    vocabulary=recipe.corpus.vocabulary,
                    positions=recipe.corpus.window,
                )
                yield Teacher(
                    id=f"{architecture}-t{_label(size)}-seed{seed}",
                    architecture=architecture,
                    size=size,
                    seed=seed,
                    shape=shape,
                    vocabulary=shape.vocabulary,
                    source=None,
                    tokens=_whole_batches(recipe, recipe.teachers.tokens),
                    learning_rate=_rate(recipe.teachers.learning_rate, shape),
                )


def _cells(recipe: Recipe, teachers: Sequence[Teacher], teacher: Teacher, seed: int) -> list[Cell]:
    family = [
        other
        for other in teachers
        if other.architecture == teacher.architecture
        and (other.source is not None or other.seed == seed)
    ]
    smallest = min(family, key=lambda other: other.shape.parameters().non_embedding)
    cells = []
    for init in recipe.students.inits:
        cut_from = {"pruned": teacher, "fixed": smallest, "scratch": None}[init]
        for size in sorted(recipe.students.sizes):
            shape = _student_shape(recipe, teacher, cut_from, size)
            for tokens in sorted(recipe.students.tokens):
                name = f"{teacher.architecture}-s{_label(size)}-t{_teacher_label(teacher)}"
                cells.append(
                    Cell(
                        id=f"{name}-{init}-{_label(tokens)}-seed{seed}",
                        kind="cell",
                        architecture=teacher.architecture,
                        student_size=size,
                        shape=shape,
                        init=init,
                        tokens=_whole_batches(recipe, tokens),
                        seed=seed,
                        learning_rate=_rate(
                            recipe.students.learning_rate, shape, is_cut=cut_from is not None
                        ),
                        alpha=recipe.training.alpha,
                        teacher=teacher,
                        cut_from=cut_from,
                    )
                )
    return cells


def _student_shape(recipe: Recipe, teacher: Teacher, cut_from: Teacher | None, size: int) -> Shape:
    # no rows that pad the table: training would leave their logits wherever they happen to be
    if cut_from is None:
        return ladder_shape(
            teacher.architecture,
            size,
            vocabulary=teacher.vocabulary,
            positions=recipe.corpus.window,
        )
    largest = cut_from.shape.parameters().non_embedding
    if size > largest:
        raise UserError(
            f"student size {format_count(size)} is larger than the teacher {cut_from.id} with "
            f"{format_count(largest)} non-embedding parameters it is to be cut from: "
            "take smaller students or larger teachers"
        )
    return pruned_shape(cut_from.shape, size, vocabulary=cut_from.vocabulary)


def _baseline(cell: Cell) -> Cell:
    """Same init, same tokens, cross-entropy only."""
    teacher = cell.teacher if cell.init == "pruned" else None
    label = f"-t{_teacher_label(teacher)}" if teacher is not None else ""
    name = f"{cell.architecture}-s{_label(cell.student_size)}{label}"
    tokens = cell.id.split("-")[-2]
    return Cell(
        id=f"baseline-{name}-{cell.init}-{tokens}-seed{cell.seed}",
        kind="baseline",
        architecture=cell.architecture,
        student_size=cell.student_size,
        shape=cell.shape,
        init=cell.init,
        tokens=cell.tokens,
        seed=cell.seed,
        learning_rate=cell.learning_rate,
        alpha=0.0,
        teacher=teacher,
        cut_from=cell.cut_from,
    )


def _baseline_columns(name: str, seed: int, cells: Sequence[Cell]) -> list[Column]:
    """Baselines that belong to one teacher, and those that are the same for all teachers."""
    own = tuple(cell for cell in cells if cell.teacher is not None)
    shared = tuple(cell for cell in cells if cell.teacher is None)
    columns = [Column(f"baselines-{name}", None, seed, own)] if own else []
    if shared:
        columns.append(Column(f"baselines-{shared[0].architecture}-seed{seed}", None, seed, shared))
    return columns


def _without_repeats(columns: Sequence[Column]) -> tuple[Column, ...]:
    return tuple({column.id: column for column in columns}.values())


def _whole_batches(recipe: Recipe, tokens: int) -> int:
    batch = recipe.training.batch_tokens
    return max(1, round(tokens / batch)) * batch


def _rate(asked: float | Literal["auto"], shape: Shape, *, is_cut: bool = False) -> float:
    if asked != "auto":
        return asked
    return auto_learning_rate(shape.parameters().non_embedding, is_cut=is_cut)


def _scoring_flops(recipe: Recipe, shape: Shape) -> int:
    """Of the units of one teacher."""
    return scoring_flops(
        recipe.scoring_method,
        recipe.scoring_depth,
        shape.parameters().total,
        recipe.scoring_tokens,
    )


def _label(count: int) -> str:
    return format_count(count).replace(".", "p")


def _teacher_label(teacher: Teacher) -> str:
    return _label(teacher.size) if teacher.source is None else teacher.id


def _refuse_twins(ids: Sequence[str], what: str) -> None:
    twins = sorted({name for name in ids if ids.count(name) > 1})
    if twins:
        raise UserError(f"{what}: {twins[0]!r} is asked for twice")


def _refuse_same_places(plan: Plan) -> None:
    """Two names may mean one place of the grid: token budgets that are the same in whole batches,
    teachers of the same size."""
    places: dict[tuple[object, ...], Cell] = {}
    for cell in plan.cells:
        assert cell.teacher is not None
        place = (*curve_key(cell), cell.teacher.size, cell.seed)
        other = places.setdefault(place, cell)
        if other is not cell:
            raise UserError(
                f"{other.id} and {cell.id} have the same size of teacher and student and the same "
                f"tokens in batches of {plan.recipe.training.batch_tokens}: keep one of them"
            )


def _flops(**parts: int) -> dict[str, int]:
    return dict.fromkeys(FLOP_PARTS, 0) | parts


def _add(total: dict[str, int], parts: dict[str, int]) -> None:
    for name, value in parts.items():
        total[name] += value
