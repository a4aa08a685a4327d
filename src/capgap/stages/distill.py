"""The stages `distill` and `train`: students learn from one teacher, or from what a cache keeps of
it, or models from the text alone."""

from pathlib import Path
from typing import Annotated

from capgap.section import Count, LearningRate, Section
from capgap.stage import ARGUMENT, SEVERAL, Mark
from capgap.stages.training import Tokens, Training, Window


class DistillSection(Section):
    """The student learns from the teacher on so many tokens, in rows of `window`."""

    tokens: Tokens
    window: Window = 512
    learning_rate: LearningRate = "auto"


class Distill(DistillSection, Training):
    """Let students learn from a teacher; the same command continues one that was stopped."""

    teacher: Annotated[str, ARGUMENT, Mark.MODEL, "A Hugging Face folder or name."]
    students: Annotated[tuple[str, ...], ARGUMENT, SEVERAL, "One or several, fed by one pass."]
    cache: Annotated[Path | None, "What `capgap cache` kept of the teacher."] = None

    @property
    def begun_with(self) -> tuple[str, ...]:
        return self.students


class Train(Training):
    """Train models on text, without a teacher; the same command continues one that was stopped."""

    models: Annotated[
        tuple[str, ...], ARGUMENT, SEVERAL, "Hugging Face folders or names to train on."
    ] = ()
    size: Annotated[
        Count | None, "Non-embedding parameters of a new model beside those named, such as 300k."
    ] = None
    architecture: Annotated[str, "Of the new model: one of the families (docs/families.md)."] = (
        "llama"
    )

    @property
    def begun_with(self) -> tuple[str, ...]:
        return self.models
