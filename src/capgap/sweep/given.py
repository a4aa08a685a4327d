"""Teachers that exist already: what can be known of them before any work."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from capgap.corpus.tokenizer import compare_tokenizers, load_tokenizer, num_words
from capgap.errors import UserError
from capgap.machine import resolve_device
from capgap.models.build import shape_of
from capgap.models.shape import Shape
from capgap.models.stored import read_config
from capgap.prune.surgery import check_cut_config
from capgap.sweep.plan import Plan, Teacher, make_plan
from capgap.sweep.recipe import Recipe


def plan_of(recipe: Recipe) -> Plan:
    """The plan of a recipe, here.

    UserError for devices and teachers that are not there, and for cuts of given teachers whose
    config transformers would not take.
    """
    resolve_device(recipe.run.device)
    if recipe.run.teacher_device != "same":
        resolve_device(recipe.run.teacher_device)
    plan = make_plan(recipe, given_teachers(recipe))
    _check_cuts(plan)
    return plan


def _check_cuts(plan: Plan) -> None:
    cuts: dict[tuple[str, Shape], None] = {}
    for cell in plan.cells:
        if cell.cut_from is not None and cell.cut_from.source is not None:
            for model in (cell, cell.assistant):
                if model is not None:
                    cuts[cell.cut_from.source, model.shape] = None
    configs = {source: read_config(source) for source, _ in cuts}
    for source, shape in cuts:
        check_cut_config(configs[source], shape)


def given_teachers(recipe: Recipe) -> list[Teacher]:
    """The recipe's `teachers.models`, smallest first; none for a ladder.

    UserError: a model that is not there, of an unknown architecture or too small for the window
    or its tokenizer; tokenizers that differ.
    """
    try:
        tokenizers = {source: load_tokenizer(source) for source in recipe.teachers.models}
        shapes = {source: shape_of(read_config(source)) for source in recipe.teachers.models}
    except UserError as error:
        raise UserError(f"teachers.models: {error}") from None
    teachers = [
        Teacher(
            id=Path(source).name,
            architecture=shape.architecture,
            size=shape.parameters().non_embedding,
            seed=0,
            shape=shape,
            vocabulary=num_words(tokenizers[source]),
            source=source,
            tokens=0,
            learning_rate=None,
        )
        for source, shape in shapes.items()
    ]
    for teacher in teachers:
        _check_fit(teacher, recipe.corpus.window)
    if teachers:
        _check_tokenizers(recipe.corpus.tokenizer, tokenizers)
    return sorted(teachers, key=lambda teacher: teacher.size)


def _check_fit(teacher: Teacher, window: int) -> None:
    shape, words = teacher.shape, teacher.vocabulary
    if shape.positions < window:
        raise UserError(
            f"{teacher.source} reads at most {shape.positions} tokens, corpus.window is {window}: "
            f"set corpus.window={shape.positions} or less"
        )
    if shape.vocabulary < words:
        raise UserError(
            f"the tokenizer of {teacher.source} has a token {words - 1}, but the model only "
            f"{shape.vocabulary} tokens: give a model with its own tokenizer"
        )


def _check_tokenizers(
    of_corpus: str | None, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    """All teachers must read the same tokens, and those of the corpus.

    Their tables may be padded to different sizes: losses take the words that the tokenizer has.
    """
    reference = of_corpus or next(iter(tokenizers))
    expected = tokenizers.get(reference) or load_tokenizer(reference)
    for source, tokenizer in tokenizers.items():
        difference = compare_tokenizers(expected, tokenizer)
        if difference is not None:
            raise UserError(
                f"the tokenizer of {source} is not that of {reference}: {difference}; "
                "teachers of one sweep must share their tokens"
            )
