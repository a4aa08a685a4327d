"""The recipe of a single run: the stages from a teacher to a student that answers."""

from typing import Annotated

from pydantic import Field, model_validator

from capgap.errors import UserError
from capgap.machine import UTILISATION, parse_gpus
from capgap.section import (
    Architecture,
    Count,
    LearningRate,
    PositiveFinite,
    PositiveFraction,
    Section,
    Size,
    TextSource,
    Track,
    Vocabulary,
)
from capgap.stages.adapt import AdaptSection
from capgap.stages.corpus import TextSection
from capgap.stages.distill import DistillSection
from capgap.stages.evaluate import EvaluateSection
from capgap.stages.export import ExportSection
from capgap.stages.instruct import InstructSection, PreferSection
from capgap.stages.prune import PruneSection
from capgap.stages.score import ScoreSection
from capgap.train.recipe import RunSection, TrainingSection


class TeacherSection(Section):
    """A model that exists, or a small one to train from nothing."""

    model: Annotated[
        str | None, "A Hugging Face folder, or a model of `capgap recommend`, as Llama-2-7B."
    ] = None
    weights: Annotated[str | None, "Of a published model: a folder or a name on the Hub."] = None
    size: Annotated[
        Size | None, "In place of `model`: parameters of one to train from nothing."
    ] = None
    architecture: Annotated[Architecture, "The new model's."] = "llama"
    source: TextSource = "stdlib"
    vocabulary: Vocabulary = 2048
    tokens: Annotated[Count | None, "Tokens that it is trained on."] = None
    learning_rate: LearningRate = "auto"

    @model_validator(mode="after")
    def _one_kind(self) -> "TeacherSection":
        if (self.model is None) == (self.size is None):
            raise ValueError("give either model (a name or folder) or size (a model to train)")
        if self.size is not None and self.tokens is None:
            raise ValueError("a model to train needs tokens")
        if self.weights is not None and self.model is None:
            raise ValueError("weights belong to model")
        return self


class CorpusEntry(TextSection):
    """Text that the student learns from; several make a mixture by their weights."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$"), "Names its folder; all differ."] = "text"
    weight: Annotated[PositiveFinite, "Share of the training tokens, against the others'."] = 1.0


class HardwareSection(Section):
    """What the run is meant for: time and memory are told for it."""

    gpus: Annotated[str | None, "What the run is meant for, as 16xA100; `--gpus` comes first."] = (
        None
    )
    utilisation: Annotated[PositiveFraction, "Share of the GPUs' 16-bit peak that is reached."] = (
        UTILISATION
    )
    processes: Annotated[
        Count, "Processes on this machine that share the training, started as torchrun would."
    ] = 1

    @model_validator(mode="after")
    def _known(self) -> "HardwareSection":
        if self.gpus is not None:
            try:
                parse_gpus(self.gpus, where="gpus")
            except UserError as error:
                raise ValueError(str(error)) from None
        return self


class RunRecipe(Section):
    """One run: a student is cut out of a teacher and distilled from it; what comes before and after
    is there where its section is."""

    name: Annotated[str, "Names the run."]
    description: Annotated[str, "For the reader."] = ""
    track: Track = ()
    teacher: TeacherSection
    corpus: tuple[CorpusEntry, ...] = ()
    adapt: AdaptSection | None = None
    score: ScoreSection = ScoreSection()
    prune: PruneSection
    distill: DistillSection
    evaluate: EvaluateSection | None = None
    instruct: InstructSection | None = None
    prefer: PreferSection | None = None
    export: ExportSection | None = None
    training: TrainingSection = TrainingSection()
    run: RunSection = RunSection()
    hardware: HardwareSection = HardwareSection()

    @model_validator(mode="after")
    def _consistent(self) -> "RunRecipe":
        self.training.check_batches("distill.window", self.distill.window)
        self.training.check_tokens("distill.tokens", self.distill.tokens)
        for name, section in (("teacher", self.teacher), ("adapt", self.adapt)):
            if section is not None and section.tokens is not None:
                self.training.check_tokens(f"{name}.tokens", section.tokens)
        names = [entry.name for entry in self.corpus]
        if len(set(names)) < len(names):
            raise ValueError(f"[[corpus]] names {', '.join(names)}: give every text its own name")
        return self
