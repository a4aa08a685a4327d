"""Teachers that exist already: what can be known of them before any work."""

from pathlib import Path
from typing import TYPE_CHECKING

from capgap.config import Recipe
from capgap.errors import UserError
from capgap.machine import resolve_device
from capgap.models.shape import Shape
from capgap.sweep.plan import Plan, Teacher, make_plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
    cuts: dict[str, dict[Shape, None]] = {}
    for cell in plan.cells:
        if cell.cut_from is not None and cell.cut_from.source is not None:
            shapes = cuts.setdefault(cell.cut_from.source, {})
            shapes[cell.shape] = None
            if cell.assistant is not None:
                shapes[cell.assistant.shape] = None
    if not cuts:
        return
    from capgap.models.stored import read_config
    from capgap.prune.surgery import check_cut_config

    for source, shapes in cuts.items():
        config = read_config(source)
        for shape in shapes:
            check_cut_config(config, shape)


def given_teachers(recipe: Recipe) -> list[Teacher]:
    """The recipe's `teachers.models`, smallest first; none for a ladder.

    UserError: a model that is not there, of an unknown architecture or too small for the window
    or its tokenizer; tokenizers that differ.
    """
    if not recipe.teachers.models:
        return []
    from capgap.corpus.tokenizer import load_tokenizer, num_words
    from capgap.models.build import shape_of
    from capgap.models.stored import read_config

    teachers = []
    try:
        tokenizers = {source: load_tokenizer(source) for source in recipe.teachers.models}
        shapes = {source: shape_of(read_config(source)) for source in recipe.teachers.models}
    except UserError as error:
        raise UserError(f"teachers.models: {error}") from None
    for source, shape in shapes.items():
        _check_fit(recipe, source, shape, tokenizers[source])
        teachers.append(
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
        )
    _check_tokenizers(recipe, tokenizers)
    return sorted(teachers, key=lambda teacher: teacher.size)


def _check_fit(
    recipe: Recipe, source: str, shape: Shape, tokenizer: "PreTrainedTokenizerFast"
) -> None:
    window = recipe.corpus.window
    if shape.positions < window:
        raise UserError(
            f"{source} reads at most {shape.positions} tokens, corpus.window is {window}: set "
            f"corpus.window={shape.positions} or less"
        )
    from capgap.corpus.tokenizer import num_words

    words = num_words(tokenizer)
    if shape.vocabulary < words:
        raise UserError(
            f"the tokenizer of {source} has a token {words - 1}, but the model only "
            f"{shape.vocabulary} tokens: give a model with its own tokenizer"
        )


def _check_tokenizers(recipe: Recipe, tokenizers: "dict[str, PreTrainedTokenizerFast]") -> None:
    """All teachers must read the same tokens, and those of the corpus.

    Their tables may be padded to different sizes: losses take the words that the tokenizer has.
    """
    from capgap.corpus.tokenizer import compare_tokenizers, load_tokenizer

    reference = recipe.corpus.tokenizer or next(iter(tokenizers))
    expected = tokenizers.get(reference) or load_tokenizer(reference)
    for source, tokenizer in tokenizers.items():
        difference = compare_tokenizers(expected, tokenizer)
        if difference is not None:
            raise UserError(
                f"the tokenizer of {source} is not that of {reference}: {difference}; "
                "teachers of one sweep must share their tokens"
            )
