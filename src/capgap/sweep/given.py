"""Teachers that exist already: what can be known of them before any work."""

from collections.abc import Sequence
from pathlib import Path

from capgap.config import Recipe
from capgap.errors import UserError
from capgap.sweep.plan import Teacher


def given_teachers(recipe: Recipe) -> list[Teacher]:
    """The recipe's `teachers.models`, smallest first; none for a ladder.

    UserError: a model that is not there or of an unknown architecture, tokenizers that differ.
    """
    if not recipe.teachers.models:
        return []
    from transformers import AutoConfig

    from capgap.models.build import shape_of

    teachers = []
    for source in recipe.teachers.models:
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"teachers.models: cannot read {source!r}: {str(error).splitlines()[0]}"
            ) from None
        shape = shape_of(config)
        teachers.append(
            Teacher(
                id=Path(source).name,
                architecture=shape.architecture,
                size=shape.parameters().non_embedding,
                seed=0,
                shape=shape,
                source=source,
                tokens=0,
                learning_rate=None,
            )
        )
    _check_tokenizers(recipe, teachers)
    return sorted(teachers, key=lambda teacher: teacher.size)


def _check_tokenizers(recipe: Recipe, teachers: Sequence[Teacher]) -> None:
    """All teachers must read the same tokens, and those of the corpus."""
    from capgap.corpus.tokenizer import compare_tokenizers, load_tokenizer

    reference = recipe.corpus.tokenizer or str(teachers[0].source)
    expected = load_tokenizer(reference)
    for teacher in teachers:
        if teacher.source == reference:
            continue
        difference = compare_tokenizers(expected, load_tokenizer(str(teacher.source)))
        if difference is not None:
            raise UserError(
                f"the tokenizer of {teacher.source} is not that of {reference}: {difference}; "
                "teachers of one sweep must share their tokens"
            )
    vocabularies = {teacher.shape.vocabulary for teacher in teachers}
    if len(vocabularies) > 1:
        raise UserError(
            f"the teachers' vocabulary tables differ in size ({sorted(vocabularies)}): "
            "take teachers of one family"
        )
