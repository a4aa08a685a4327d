"""A recipe becomes a plan: every teacher, column and cell with its shape, tokens and FLOPs.

Pure: nothing is read, trained or timed here, and torch is not imported.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from capgap.errors import UserError
from capgap.models.shape import Shape, ladder_shape
from capgap.prune.methods import scoring_flops
from capgap.prune.shape import pruned_shape
from capgap.sizes import format_count, forward_flops, training_flops
from capgap.sweep.recipe import Recipe
from capgap.train.learning_rate import auto_learning_rate

MOST_CELLS = 10_000
FLOP_PARTS = ("teacher_training", "teacher_forward", "pruning", "student", "evaluation")


class Work(NamedTuple):
    """Models with the tokens that each takes: those that are trained, and teachers that read."""

    trained: list[tuple[Shape, int]]
    read: list[tuple[Shape, int]]

    @property
    def training_flops(self) -> int:
        return sum(
            training_flops(shape.parameters().total, tokens) for shape, tokens in self.trained
        )

    @property
    def forward_flops(self) -> int:
        return sum(forward_flops(shape.parameters().total, tokens) for shape, tokens in self.read)


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

    @property
    def label(self) -> str:
        """What names of cells call it."""
        return _label(self.size) if self.source is None else self.id

    @property
    def work(self) -> Work:
        return Work([(self.shape, self.tokens)], [])

    def flops(self, heldout_tokens: int) -> dict[str, int]:
        return _parts(
            teacher_training=self.work.training_flops,
            evaluation=forward_flops(self.shape.parameters().total, heldout_tokens),
        )


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
    """One student's run. A baseline has alpha 0 and, for the inits that are the same for every
    teacher, no teacher. `cut_from` is the teacher whose weights the student starts from, by way of
    the `assistant` where there is one. `asked_tokens` are the recipe's, `budget` the same in whole
    batches; a chain has the FLOPs of a direct cell with as many, and its student sees `tokens`.
    `equal_flops_to`: id of the cell whose FLOPs a baseline has in place of its tokens."""

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
        name = f"{self.architecture}-s{_label(self.student_size)}{teacher}-{self.init}"
        name += f"-{_label(self.asked_tokens)}-seed{self.seed}"
        return name if self.kind == "cell" else f"baseline-{name}"

    @property
    def curve(self) -> tuple[str, str, int, int]:
        """What the cells of one curve have in common."""
        return self.architecture, self.init, self.budget, self.student_size

    @property
    def work(self) -> Work:
        """Of this cell alone; a chain's assistant is trained too."""
        work = Work([(self.shape, self.tokens)], [])
        above = None if self.teacher is None else self.teacher.shape
        if self.assistant is not None:
            work.trained.append((self.assistant.shape, self.assistant.tokens))
            if above is not None and self.assistant.alpha > 0:
                work.read.append((above, self.assistant.tokens))
            above = self.assistant.shape
        if above is not None and self.alpha > 0:
            work.read.append((above, self.tokens))
        return work

    def flops(self, recipe: Recipe, heldout_tokens: int) -> dict[str, int]:
        """What this cell would cost alone; the columns of a sweep share teacher passes.

        A chain's assistant counts among the students."""
        scored = [model.shape for model in (self.cut_from, self.assistant) if model is not None]
        return _parts(
            teacher_forward=self.work.forward_flops,
            pruning=sum(_scoring_flops(recipe, shape) for shape in scored),
            student=self.work.training_flops,
            evaluation=forward_flops(self.shape.parameters().total, heldout_tokens),
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
        """The teacher reads once for all cells; of a chain nothing is shared."""
        if self.assistant is not None:
            return self.cells[0].work
        work = Work([(cell.shape, cell.tokens) for cell in self.cells], [])
        if self.teacher is not None and any(cell.alpha > 0 for cell in self.cells):
            work.read.append((self.teacher.shape, self.tokens))
        return work

    def flops(self, recipe: Recipe) -> dict[str, int]:
        """Work that its cells share counted once, without the scores of its teachers."""
        heldout = recipe.corpus.heldout_tokens
        totals = [cell.shape.parameters().total for cell in self.cells]
        scored = 0 if self.assistant is None else _scoring_flops(recipe, self.assistant.shape)
        return _parts(
            teacher_forward=self.work.forward_flops,
            pruning=scored,
            student=self.work.training_flops,
            evaluation=sum(forward_flops(total, heldout) for total in totals),
        )


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

    @property
    def baseline_cells(self) -> list[Cell]:
        return [cell for column in self.baselines for cell in column.cells]

    @property
    def runs(self) -> dict[str, Teacher | Cell]:
        """Everything that could be recorded, by id."""
        runs: list[Teacher | Cell] = [*self.teachers, *self.cells, *self.baseline_cells]
        return {run.id: run for run in runs}

    def tasks(self, baselines: Sequence[Column]) -> list[Teacher | Column]:
        """What workers are given, with these of the baselines."""
        return [*self.teachers, *self.columns, *baselines]

    def flops(self, baselines: Sequence[Column]) -> dict[str, int]:
        """Of the whole sweep by part, shared work counted once."""
        recipe = self.recipe
        counted = [column.flops(recipe) for column in (*self.columns, *baselines)]
        for teacher in self.teachers:
            counted.append(teacher.flops(recipe.corpus.heldout_tokens))
            counted.append(_parts(pruning=_scoring_flops(recipe, teacher.shape)))
        return {part: sum(parts[part] for parts in counted) for part in FLOP_PARTS}


def make_plan(recipe: Recipe, given: Sequence[Teacher] = ()) -> Plan:
    """`given` are the recipe's `teachers.models`, looked at by the caller; else a ladder is built.

    UserError: a student larger than a teacher it is to be cut from, sizes that cannot be built,
    the same size twice, more cells than anybody trains.
    """
    _check_number(recipe)
    teachers = tuple(given) if recipe.teachers.models else tuple(_ladder(recipe))
    _refuse_twins([teacher.id for teacher in teachers], "teachers")
    columns: list[Column] = []
    baselines: dict[str, Column] = {}
    for teacher in teachers:
        is_given = teacher.source is not None
        for seed in recipe.seeds if is_given else (teacher.seed,):
            name = f"{teacher.id}-seed{seed}" if is_given else teacher.id
            cells = _cells(recipe, teachers, teacher, seed)
            _refuse_twins([cell.id for cell in cells], "students")
            columns += _cell_columns(name, teacher, seed, cells)
            own = _baseline_columns(recipe, name, seed, cells)
            baselines.update((column.id, column) for column in own)
    plan = Plan(recipe, teachers, tuple(columns), tuple(baselines.values()))
    _refuse_same_cells(plan)
    return plan


def select_baselines(plan: Plan, best: Iterable[Cell]) -> list[Column]:
    """The baselines matched to the `best` cells and, where the recipe says so, to each curve's
    largest teacher."""
    wanted = list(best)
    if plan.recipe.baselines == "best_and_largest":
        largest: dict[tuple[object, ...], Cell] = {}
        for cell in sorted(plan.cells, key=lambda cell: cell.teacher.size if cell.teacher else 0):
            largest[*cell.curve, cell.seed] = cell
        wanted += largest.values()
    ids = {_baseline(cell).id for cell in wanted}
    of_cells = {cell.id for cell in wanted}
    columns = []
    for column in plan.baselines:
        own = [cell for cell in column.cells if cell.id in ids or cell.equal_flops_to in of_cells]
        if own:
            columns.append(replace(column, cells=tuple(own)))
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
    best = [cell for cell in plan.cells if cell.teacher and cell.teacher.size == stand_in]
    return select_baselines(plan, best)


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


def _ladder(recipe: Recipe) -> Iterator[Teacher]:
    assert recipe.teachers.tokens is not None
    for architecture in recipe.architectures:
        for seed in recipe.seeds:
            for size in sorted(recipe.teachers.sizes):
                shape = _ladder_shape(recipe, architecture, size, recipe.corpus.vocabulary)
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
            rate = _rate(recipe.students.learning_rate, shape, is_cut=cut_from is not None)
            for asked_tokens in recipe.students.budgets(init):
                tokens = _whole_batches(recipe, asked_tokens)
                cell = Cell(
                    kind="cell",
                    architecture=teacher.architecture,
                    student_size=size,
                    shape=shape,
                    init=init,
                    asked_tokens=asked_tokens,
                    budget=tokens,
                    tokens=tokens,
                    seed=seed,
                    learning_rate=rate,
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
    sizes = [shape.parameters().non_embedding for shape in (teacher, student)]
    between = pruned_shape(
        teacher,
        round(math.sqrt(sizes[0] * sizes[1])),
        vocabulary=student.vocabulary,
        layers=recipe.layers,
    )
    shape = pruned_shape(between, sizes[1], layers=recipe.layers)
    budget = direct.budget * _token_flops(student, teacher, direct.alpha)
    first = _token_flops(between, teacher, direct.alpha)
    assistant = Assistant(
        id=f"{direct.id}-assistant",
        shape=between,
        tokens=_whole_batches(recipe, recipe.students.assistant_share * budget / first),
        learning_rate=_rate(recipe.students.learning_rate, between, is_cut=True),
        alpha=direct.alpha,
    )
    left = budget - assistant.tokens * first - _scoring_flops(recipe, between)
    tokens = left / _token_flops(shape, between, direct.alpha)
    if tokens < recipe.training.batch_tokens:
        raise UserError(
            f"students.tokens {direct.budget} are too few for the chain {direct.id}: its assistant "
            "and its scores leave less than one batch; give more tokens, a smaller "
            "students.assistant_share or fewer scoring_tokens"
        )
    return replace(direct, shape=shape, tokens=_whole_batches(recipe, tokens), assistant=assistant)


def _token_flops(student: Shape, teacher: Shape, alpha: float) -> int:
    """Of training a student on one token, which its teacher reads if alpha is above 0."""
    read = forward_flops(teacher.parameters().total, 1) if alpha > 0 else 0
    return training_flops(student.parameters().total, 1) + read


def _student_shape(recipe: Recipe, teacher: Teacher, cut_from: Teacher | None, size: int) -> Shape:
    # no rows that pad the table: training would leave their logits wherever they happen to be
    if cut_from is None:
        return _ladder_shape(recipe, teacher.architecture, size, teacher.vocabulary)
    largest = cut_from.shape.parameters().non_embedding
    if size > largest:
        raise UserError(
            f"student size {format_count(size)} is larger than the teacher {cut_from.id} with "
            f"{format_count(largest)} non-embedding parameters it is to be cut from: "
            "take smaller students or larger teachers"
        )
    return pruned_shape(cut_from.shape, size, vocabulary=cut_from.vocabulary, layers=recipe.layers)


def _ladder_shape(recipe: Recipe, architecture: str, size: int, vocabulary: int) -> Shape:
    return ladder_shape(
        architecture,
        size,
        vocabulary=vocabulary,
        positions=recipe.corpus.window,
        layers=recipe.layers,
    )


def _cell_columns(
    name: str, teacher: Teacher, seed: int, cells: Sequence[Cell]
) -> Iterator[Column]:
    """All direct cells of a teacher together, and every chain alone."""
    direct = tuple(cell for cell in cells if cell.assistant is None)
    if direct:
        yield Column(f"column-{name}", teacher, seed, direct)
    for cell in cells:
        if cell.assistant is not None:
            yield Column(cell.assistant.column_id, teacher, seed, (cell,))


def _baseline_columns(
    recipe: Recipe, name: str, seed: int, cells: Sequence[Cell]
) -> Iterator[Column]:
    """Baselines that belong to one teacher, and those that are the same for all teachers."""
    matched = [_baseline(cell) for cell in cells]
    own = tuple(cell for cell in matched if cell.teacher is not None)
    shared = tuple(cell for cell in matched if cell.teacher is None)
    if own:
        yield Column(f"baselines-{name}", None, seed, own)
    if shared:
        yield Column(f"baselines-{shared[0].architecture}-seed{seed}", None, seed, shared)
    # of a chain there is none: it has the FLOPs of its direct cell
    longer = tuple(_equal_flops(recipe, cell) for cell in cells if cell.assistant is None)
    if recipe.equal_flops and longer:
        yield Column(f"baselines-flops-{name}", None, seed, longer)


def _baseline(cell: Cell) -> Cell:
    """Same init, same tokens, cross-entropy only."""
    teacher = cell.teacher if cell.init in ("pruned", "chain") else None
    return replace(cell, kind="baseline", alpha=0.0, teacher=teacher)


def _equal_flops(recipe: Recipe, cell: Cell) -> Cell:
    """Same init, cross-entropy only, on the tokens that the teacher's forward passes would pay."""
    assert cell.teacher is not None
    flops = cell.budget * _token_flops(cell.shape, cell.teacher.shape, cell.alpha)
    tokens = _whole_batches(recipe, flops / training_flops(cell.shape.parameters().total, 1))
    return replace(_baseline(cell), budget=tokens, tokens=tokens, equal_flops_to=cell.id)


def _whole_batches(recipe: Recipe, tokens: float) -> int:
    batch = recipe.training.batch_tokens
    return max(1, round(tokens / batch)) * batch


def _rate(asked: float | Literal["auto"], shape: Shape, *, is_cut: bool = False) -> float:
    if asked != "auto":
        return asked
    return auto_learning_rate(shape.parameters().non_embedding, is_cut=is_cut)


def _scoring_flops(recipe: Recipe, shape: Shape) -> int:
    """Of the units of one model."""
    return scoring_flops(
        recipe.scoring_method,
        recipe.scoring_depth,
        shape.parameters().total,
        recipe.scoring_tokens,
    )


def _label(count: int) -> str:
    return format_count(count).replace(".", "p")


def _refuse_twins(ids: Sequence[str], what: str) -> None:
    twins = sorted({name for name in ids if ids.count(name) > 1})
    if twins:
        raise UserError(f"{what}: {twins[0]!r} is asked for twice")


def _refuse_same_cells(plan: Plan) -> None:
    """Two names may mean one cell of the grid: token budgets that are the same in whole batches,
    teachers of the same size."""
    cells: dict[tuple[object, ...], Cell] = {}
    for cell in plan.cells:
        assert cell.teacher is not None
        other = cells.setdefault((*cell.curve, cell.teacher.size, cell.seed), cell)
        if other is not cell:
            raise UserError(
                f"{other.id} and {cell.id} have the same size of teacher and student and the same "
                f"tokens in batches of {plan.recipe.training.batch_tokens}: keep one of them"
            )


def _parts(**parts: int) -> dict[str, int]:
    return dict.fromkeys(FLOP_PARTS, 0) | parts
