"""A recipe becomes a plan: every teacher, column and cell with its shape, tokens and FLOPs.

Pure: nothing is read, trained or timed here, and torch is not imported.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from capgap.config import Recipe
from capgap.errors import UserError
from capgap.models.shape import Shape, ladder_shape
from capgap.prune.methods import scoring_flops
from capgap.prune.shape import pruned_shape
from capgap.sizes import format_count, forward_flops, training_flops
from capgap.train.learning_rate import auto_learning_rate

MOST_CELLS = 10_000
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
class Assistant:
    """The model between in a chain (arXiv 1902.03393): cut out of the cell's teacher and distilled
    from it for `tokens`; then the student is cut out of it and distilled from it."""

    id: str
    shape: Shape
    tokens: int
    learning_rate: float

    @property
    def column_id(self) -> str:
        """Of the column that makes it."""
        return f"column-{self.id}"


@dataclass(frozen=True)
class Cell:
    """One student's run. A baseline has alpha 0 and, for the inits that are the same for every
    teacher, no teacher. `cut_from` is the teacher whose weights the student starts from, by way of
    the `assistant` where there is one. `budget` are the tokens asked for; a chain has the FLOPs of
    a direct cell with as many, and its student sees `tokens`. `equal_flops_to`: the cell whose
    FLOPs a baseline has in place of its tokens."""

    id: str
    kind: Literal["cell", "baseline"]
    architecture: str
    student_size: int
    shape: Shape
    init: str
    budget: int
    tokens: int
    seed: int
    learning_rate: float
    alpha: float
    teacher: Teacher | None
    cut_from: Teacher | None
    assistant: Assistant | None = None
    equal_flops_to: str | None = None

    def flops(self, recipe: Recipe, heldout_tokens: int) -> dict[str, int]:
        """What this cell would cost alone; the columns of a sweep share teacher passes.

        A chain's assistant counts among the students."""
        total = self.shape.parameters().total
        above = None if self.teacher is None else self.teacher.shape
        student, forward, pruning = training_flops(total, self.tokens), 0, 0
        if self.cut_from is not None:
            pruning = _scoring_flops(recipe, self.cut_from.shape)
        if self.assistant is not None and self.cut_from is not None:
            between = self.assistant.shape
            student += training_flops(between.parameters().total, self.assistant.tokens)
            pruning += _scoring_flops(recipe, between)
            if recipe.training.alpha > 0:
                forward = forward_flops(
                    self.cut_from.shape.parameters().total, self.assistant.tokens
                )
            above = between
        if above is not None and self.alpha > 0:
            forward += forward_flops(above.parameters().total, self.tokens)
        return _flops(
            teacher_forward=forward,
            pruning=pruning,
            student=student,
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
    def teachers(self) -> set[str]:
        """Ids of the teachers that the column takes."""
        found = {cell.cut_from.id for cell in self.cells if cell.cut_from is not None}
        return found | ({self.teacher.id} if self.teacher is not None else set())

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
            if column.assistant is not None:
                # nothing is shared but the scores of the teacher, which are counted above
                (cell,) = column.cells
                assert cell.cut_from is not None
                _add(total, cell.flops(recipe, heldout))
                total["pruning"] -= _scoring_flops(recipe, cell.cut_from.shape)
                continue
            if column.teacher is not None:
                parameters = column.teacher.shape.parameters().total
                total["teacher_forward"] += forward_flops(parameters, column.tokens)
            for cell in column.cells:
                parameters = cell.shape.parameters().total
                total["student"] += training_flops(parameters, cell.tokens)
                total["evaluation"] += forward_flops(parameters, heldout)
        return total


def _check_number(recipe: Recipe) -> None:
    """UserError for more cells than anybody trains: the plan alone would take hours."""
    students, teachers = recipe.students, recipe.teachers
    axes = {
        "seeds": recipe.seeds,
        "architectures": recipe.architectures,
        "teachers": teachers.sizes or teachers.models,
        "students.sizes": students.sizes,
        "students.tokens": students.tokens,
        "students.inits": students.inits,
    }
    number = math.prod(len(axis) for axis in axes.values())
    if number > MOST_CELLS:
        longest = max(axes, key=lambda name: len(axes[name]))
        raise UserError(
            f"the sweep has {number:,} cells, more than {MOST_CELLS:,}: give fewer {longest} "
            f"({len(axes[longest]):,})"
        )


def make_plan(recipe: Recipe, given: Sequence[Teacher] = ()) -> Plan:
    """`given` are the recipe's `teachers.models`, looked at by the caller; else a ladder is built.

    UserError: a student larger than a teacher it is to be cut from, sizes that cannot be built,
    the same size twice.
    """
    _check_number(recipe)
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
            direct = tuple(cell for cell in cells if cell.assistant is None)
            if direct:
                columns.append(Column(f"column-{teacher.id}{suffix}", teacher, seed, direct))
            columns += [
                Column(cell.assistant.column_id, teacher, seed, (cell,))
                for cell in cells
                if cell.assistant is not None
            ]
            name = f"{teacher.id}{suffix}"
            baselines += _baseline_columns(name, seed, [_baseline(cell) for cell in cells])
            if recipe.equal_flops and direct:
                # of a chain there is none: it has the FLOPs of its direct cell
                longer = tuple(_equal_flops(recipe, cell) for cell in direct)
                baselines.append(Column(f"baselines-flops-{name}", None, seed, longer))
    plan = Plan(recipe, teachers, tuple(columns), _without_repeats(baselines))
    _refuse_same_places(plan)
    return plan


def select_baselines(plan: Plan, best: Iterable[Cell]) -> list[Column]:
    """The baselines matched to the `best` cells and, where the recipe says so, to each curve's
    largest teacher."""
    curves: dict[tuple[object, ...], list[Cell]] = {}
    for cell in plan.cells:
        curves.setdefault((*curve_key(cell), cell.seed), []).append(cell)
    wanted = list(best)
    if plan.recipe.baselines == "best_and_largest":
        wanted += [_largest(cells) for cells in curves.values()]
    ids = {_baseline(cell).id for cell in wanted} | {_equal_flops_id(cell) for cell in wanted}
    columns = []
    for column in plan.baselines:
        cells = tuple(cell for cell in column.cells if cell.id in ids)
        if cells:
            columns.append(Column(column.id, None, column.seed, cells))
    return columns


def expected_baselines(plan: Plan) -> Sequence[Column]:
    """The baselines that will be run, as far as can be known before the cells are.

    Where the best teachers get some, the second largest stands for the best: whichever it turns
    out to be, its baselines cost about the same.
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
    return cell.architecture, cell.init, cell.budget, cell.student_size


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
                    layers=recipe.layers,
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
        cut_from = {"pruned": teacher, "chain": teacher, "fixed": smallest, "scratch": None}[init]
        for size in sorted(recipe.students.sizes):
            shape = _student_shape(recipe, teacher, cut_from, size)
            for tokens in recipe.students.budgets(init):
                name = f"{teacher.architecture}-s{_label(size)}-t{_teacher_label(teacher)}"
                cell = Cell(
                    id=f"{name}-{init}-{_label(tokens)}-seed{seed}",
                    kind="cell",
                    architecture=teacher.architecture,
                    student_size=size,
                    shape=shape,
                    init=init,
                    budget=_whole_batches(recipe, tokens),
                    tokens=_whole_batches(recipe, tokens),
                    seed=seed,
                    learning_rate=_rate(
                        recipe.students.learning_rate, shape, is_cut=cut_from is not None
                    ),
                    alpha=recipe.training.alpha,
                    teacher=teacher,
                    cut_from=cut_from,
                )
                cells.append(_chained(recipe, cell) if init == "chain" else cell)
    return cells


def _chained(recipe: Recipe, direct: Cell) -> Cell:
    """A cell of the same FLOPs whose student learns from an assistant: of the geometric mean of
    teacher's and student's size, trained with `students.assistant_share` of the FLOPs."""
    assert direct.teacher is not None
    teacher, student = direct.teacher.shape, direct.shape
    sizes = [one.parameters().non_embedding for one in (teacher, student)]
    between = pruned_shape(
        teacher,
        round(math.sqrt(sizes[0] * sizes[1])),
        vocabulary=student.vocabulary,
        layers=recipe.layers,
    )
    shape = pruned_shape(between, sizes[1], layers=recipe.layers)
    reads = 2 if direct.alpha > 0 else 0

    def token_flops(above: Shape, below: Shape) -> int:
        return 6 * below.parameters().total + reads * above.parameters().total

    budget = direct.budget * token_flops(teacher, student)
    first = token_flops(teacher, between)
    assistant = Assistant(
        id=f"{direct.id}-assistant",
        shape=between,
        tokens=_whole_batches(recipe, recipe.students.assistant_share * budget / first),
        learning_rate=_rate(recipe.students.learning_rate, between, is_cut=True),
    )
    left = budget - assistant.tokens * first - _scoring_flops(recipe, between)
    tokens = left / token_flops(between, shape)
    if tokens < recipe.training.batch_tokens:
        raise UserError(
            f"students.tokens {direct.budget} are too few for the chain {direct.id}: its assistant "
            "and its scores leave less than one batch; give more tokens, a smaller "
            "students.assistant_share or fewer scoring_tokens"
        )
    return replace(direct, shape=shape, tokens=_whole_batches(recipe, tokens), assistant=assistant)


def _student_shape(recipe: Recipe, teacher: Teacher, cut_from: Teacher | None, size: int) -> Shape:
    # no rows that pad the table: training would leave their logits wherever they happen to be
    if cut_from is None:
        return ladder_shape(
            teacher.architecture,
            size,
            vocabulary=teacher.vocabulary,
            positions=recipe.corpus.window,
            layers=recipe.layers,
        )
    largest = cut_from.shape.parameters().non_embedding
    if size > largest:
        raise UserError(
            f"student size {format_count(size)} is larger than the teacher {cut_from.id} with "
            f"{format_count(largest)} non-embedding parameters it is to be cut from: "
            "take smaller students or larger teachers"
        )
    return pruned_shape(cut_from.shape, size, vocabulary=cut_from.vocabulary, layers=recipe.layers)


def _baseline(cell: Cell) -> Cell:
    """Same init, same tokens, cross-entropy only."""
    teacher = cell.teacher if cell.init in ("pruned", "chain") else None
    label = f"-t{_teacher_label(teacher)}" if teacher is not None else ""
    name = f"{cell.architecture}-s{_label(cell.student_size)}{label}"
    tokens = cell.id.split("-")[-2]
    return replace(
        cell,
        id=f"baseline-{name}-{cell.init}-{tokens}-seed{cell.seed}",
        kind="baseline",
        alpha=0.0,
        teacher=teacher,
    )


def _equal_flops_id(cell: Cell) -> str:
    return f"baseline-flops-{cell.id}"


def _equal_flops(recipe: Recipe, cell: Cell) -> Cell:
    """Same init, cross-entropy only, on the tokens that the teacher's forward passes would pay."""
    assert cell.teacher is not None
    student = training_flops(cell.shape.parameters().total, 1)
    above = forward_flops(cell.teacher.shape.parameters().total, 1) if cell.alpha > 0 else 0
    tokens = _whole_batches(recipe, cell.budget * (student + above) / student)
    return replace(
        _baseline(cell),
        id=_equal_flops_id(cell),
        budget=tokens,
        tokens=tokens,
        equal_flops_to=cell.id,
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


def _whole_batches(recipe: Recipe, tokens: float) -> int:
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
