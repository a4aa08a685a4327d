"""A recipe becomes a plan: every teacher, column and cell with its shape, tokens and FLOPs.

`make_plan` is pure, without torch; `plan_of` looks at this machine and at teachers that exist.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from capgap.errors import UserError
from capgap.machine import resolve_device, usable_cores, visible_gpus
from capgap.models.shape import Shape, ladder_shape
from capgap.prune.shape import pruned_shape
from capgap.sizes import format_count, forward_flops, training_flops
from capgap.sweep.cells import Assistant, Cell, Column, Task, Teacher, scores_flops, size_label
from capgap.sweep.recipe import Recipe
from capgap.train.learning_rate import auto_learning_rate
from capgap.train.recipe import RunSection

MOST_CELLS = 10_000


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

    def tasks(self, baselines: Sequence[Column]) -> list[Task]:
        """All, with these of the baselines."""
        return [*self.teachers, *self.columns, *baselines]

    def flops(self, baselines: Sequence[Column]) -> dict[str, int]:
        """Of the whole sweep by part, shared work counted once."""
        counted = [task.work.flops(self.recipe) for task in self.tasks(baselines)]
        total = {part: sum(flops[part] for flops in counted) for part in counted[0]}
        total["pruning"] += scores_flops(self.recipe, [one.shape for one in self.teachers])
        return total


def plan_of(recipe: Recipe) -> Plan:
    """The plan of a recipe, here.

    UserError for devices and teachers that are not there, and for cuts of given teachers whose
    config transformers would not take.
    """
    resolve_device(recipe.run.device)
    if recipe.run.teacher_device != "same":
        resolve_device(recipe.run.teacher_device)
    plan = make_plan(recipe, given_teachers(recipe))
    if recipe.teachers.models:
        from capgap.models.stored import read_config
        from capgap.prune.surgery import check_cut_config

        configs = {source: read_config(source) for source in recipe.teachers.models}
        cuts = {
            (cell.cut_from.source, model.shape)
            for cell in plan.cells
            if cell.cut_from is not None
            for model in (cell, cell.assistant)
            if model is not None
        }
        for source, shape in cuts:
            check_cut_config(configs[str(source)], shape)
    return plan


def given_teachers(recipe: Recipe) -> list[Teacher]:
    """The recipe's `teachers.models`, smallest first; none for a ladder.

    UserError: a model that is not there, of an unknown architecture or too small for the window
    or its tokenizer; tokenizers that differ.
    """
    if not recipe.teachers.models:
        return []
    from capgap.corpus.tokenizer import compare_tokenizers, load_tokenizer, num_words
    from capgap.models.build import shape_of
    from capgap.models.stored import read_config

    try:
        tokenizers = {source: load_tokenizer(source) for source in recipe.teachers.models}
        configs = {source: read_config(source) for source in recipe.teachers.models}
        shapes = {source: shape_of(config) for source, config in configs.items()}
    except UserError as error:
        raise UserError(f"teachers.models: {error}") from None
    teachers = []
    for source, shape in shapes.items():
        teacher = Teacher(
            id=Path(source).name,
            architecture=shape.architecture,
            size=shape.parameters().non_embedding,
            seed=0,
            shape=shape,
            vocabulary=num_words(tokenizers[source]),
            source=source,
            tokens=0,
            learning_rate=None,
            stored_bytes=getattr(configs[source].dtype, "itemsize", 4),
        )
        _check_fit(teacher, recipe.corpus.window)
        teachers.append(teacher)
    # tables may be padded to different sizes: losses take the tokens that the tokenizer has
    reference = recipe.corpus.tokenizer or next(iter(tokenizers))
    expected = tokenizers.get(reference) or load_tokenizer(reference)
    for source, tokenizer in tokenizers.items():
        difference = compare_tokenizers(expected, tokenizer)
        if difference is not None:
            raise UserError(
                f"the tokenizer of {source} is not that of {reference}: {difference}; "
                "teachers of one sweep must share their tokens"
            )
    return sorted(teachers, key=lambda teacher: teacher.size)


def _check_fit(teacher: Teacher, window: int) -> None:
    shape, vocabulary = teacher.shape, teacher.vocabulary
    if shape.positions < window:
        raise UserError(
            f"{teacher.source} reads at most {shape.positions} tokens, corpus.window is {window}: "
            f"set corpus.window={shape.positions} or less"
        )
    if shape.vocabulary < vocabulary:
        raise UserError(
            f"the tokenizer of {teacher.source} has a token {vocabulary - 1}, but the model only "
            f"{shape.vocabulary} tokens: give a model with its own tokenizer"
        )


def make_plan(recipe: Recipe, given: Sequence[Teacher] = ()) -> Plan:
    """Every teacher, column, cell and baseline with shape, tokens and FLOPs; pure, without torch.

    `given` are the recipe's `teachers.models` as `given_teachers` finds them; else a ladder is
    built.

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
            if not cells:
                continue
            _refuse_twins([cell.id for cell in cells], "students")
            columns += _cell_columns(name, teacher, seed, cells)
            own = _baseline_columns(recipe, name, seed, cells)
            baselines.update((column.id, column) for column in own)
    plan = Plan(recipe, teachers, tuple(columns), tuple(baselines.values()))
    _refuse_same_cells(plan)
    return plan


def _check_number(recipe: Recipe) -> None:
    """UserError for more cells than anybody trains: the plan alone would take hours."""
    students, teachers = recipe.students, recipe.teachers
    axes = {
        "seeds": recipe.seeds,
        "architectures": recipe.architectures,
        "teachers": teachers.sizes or teachers.models,
        "students.sizes": students.sizes,
        "students.tokens": students.tokens or students.tokens_per_parameter,
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
                    id=f"{architecture}-t{size_label(size)}-seed{seed}",
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
    starts = {"pruned": teacher, "chain": teacher, "fixed": smallest, "scratch": None}
    cells = []
    for init in recipe.students.inits:
        for size in sorted(recipe.students.sizes):
            cut_from = starts[init]
            if recipe.larger_teachers_only and size >= teacher.size:
                continue
            shape = _student_shape(recipe, teacher, cut_from, size)
            for asked_tokens in recipe.students.budgets(init, size):
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
    left = budget - assistant.tokens * first - scores_flops(recipe, [between])
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
    matched = [baseline_of(cell) for cell in cells]
    shared = f"{cells[0].architecture}-seed{seed}"
    columns = {
        f"baselines-{name}": [cell for cell in matched if cell.teacher is not None],
        f"baselines-{shared}": [cell for cell in matched if cell.teacher is None],
    }
    if recipe.equal_flops:
        # of a chain there is none: it has the FLOPs of its direct cell
        direct = [cell for cell in cells if cell.assistant is None]
        columns[f"baselines-flops-{name}"] = [_equal_flops(recipe, cell) for cell in direct]
    for column_id, own in columns.items():
        if own:
            yield Column(column_id, None, seed, tuple(own))


def _equal_flops(recipe: Recipe, cell: Cell) -> Cell:
    """Same init, cross-entropy only, on the tokens that the teacher's forward passes would pay."""
    assert cell.teacher is not None
    flops = cell.budget * _token_flops(cell.shape, cell.teacher.shape, cell.alpha)
    tokens = _whole_batches(recipe, flops / training_flops(cell.shape.parameters().total, 1))
    return replace(baseline_of(cell), budget=tokens, tokens=tokens, equal_flops_to=cell.id)


def _whole_batches(recipe: Recipe, tokens: float) -> int:
    batch = recipe.training.batch_tokens
    return max(1, round(tokens / batch)) * batch


def _rate(asked: float | Literal["auto"], shape: Shape, *, is_cut: bool = False) -> float:
    if asked != "auto":
        return asked
    return auto_learning_rate(shape.parameters().non_embedding, is_cut=is_cut)


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


def select_baselines(plan: Plan, best: Iterable[Cell]) -> list[Column]:
    """The baselines matched to the `best` cells and, where the recipe says so, to each curve's
    largest teacher."""
    wanted = list(best)
    if plan.recipe.baselines == "best_and_largest":
        largest: dict[tuple[object, ...], Cell] = {}
        for cell in sorted(plan.cells, key=lambda cell: cell.teacher.size if cell.teacher else 0):
            largest[*cell.curve, cell.seed] = cell
        wanted += largest.values()
    ids = {baseline_of(cell).id for cell in wanted}
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


def baseline_of(cell: Cell) -> Cell:
    """Same init, same tokens, cross-entropy only."""
    teacher = cell.teacher if cell.init in ("pruned", "chain") else None
    return replace(cell, kind="baseline", alpha=0.0, teacher=teacher)


def resolve_workers(
    run: RunSection, device: str, *, most: int, gpus: int | None = None
) -> tuple[int, int | None]:
    """(tasks at once, torch threads of each process); `most` tasks can run at once. `gpus`: how
    many there are, None for those in sight.

    Small models gain more from one thread a process on every core than from many threads in one.
    A GPU begins with a single task, unless more are asked for than there are GPUs. UserError where
    there are fewer than one task needs.
    """
    each, is_cpu = run.gpus_per_column, device == "cpu"
    number = usable_cores() if is_cpu else gpus or len(visible_gpus(run.device)) or 1
    if not is_cpu and number < each:
        raise UserError(f"run.gpus_per_column={each}: ask for no more GPUs than {number}, all here")
    workers = min(most, max(1, number // each) if run.workers == "auto" else run.workers)
    return workers, max(1, number // (workers * each)) if is_cpu else None
