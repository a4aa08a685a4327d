"""The recipe of a single run: the stages from a teacher to a student that answers."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from capgap.config.base import (
    RunSection,
    TrainingSection,
    check_batches,
    check_tokens,
)
from capgap.errors import UserError
from capgap.hardware import UTILISATION, parse_gpus
from capgap.section import Architecture, Count, LearningRate, Section
from capgap.stages.instruct import InstructSection
from capgap.stages.prefer import PreferSection
from capgap.stages.score import ScoreSection

Tracker = Literal["tensorboard", "trackio", "wandb"]


class TeacherSection(Section):
    """A model that exists, or a small one to train from nothing (`size` on `tokens` of `source`).

    `model` is a published name or a Hugging Face folder; `weights` where the weights of a published
    one are: a folder or a name on the Hub. `vocabulary` is that of the tokenizer of a new one.
    """

    model: str | None = None
    weights: str | None = None
    size: Count | None = None
    architecture: Architecture = "llama"
    source: str = "stdlib"
    vocabulary: Annotated[Count, Field(ge=257)] = 2048
    tokens: Count | None = None
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


class CorpusEntry(Section):
    """Text that the student learns from; several make a mixture by their weights."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "text"
    source: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    text_column: str = "text"
    separator: str = "<|endoftext|>"


class AdaptSection(Section):
    """The teacher learns the text `source` with `pieces` new tokens, beside `old` text."""

    source: str
    pieces: Count
    tokens: Count
    old: str | None = None
    new_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    learning_rate: LearningRate = "auto"


class PruneSection(Section):
    """What is cut out of the teacher: a share, a number of parameters, or sizes; one of the three.

    Sizes that are not named stay as the teacher has them.
    """

    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    params: Count | None = None
    total_params: Count | None = None
    hidden: Count | None = None
    heads: Count | None = None
    kv_heads: Count | None = None
    ffn: Count | None = None
    layers: Count | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Those that are named."""
        names = ("hidden", "heads", "kv_heads", "ffn", "layers")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _one_way(self) -> "PruneSection":
        asked = (self.keep, self.params, self.total_params, self.sizes or None)
        if sum(one is not None for one in asked) != 1:
            raise ValueError(
                "give one of keep, params, total_params, or sizes (hidden, heads, kv_heads, ffn, "
                "layers) for the student"
            )
        return self


class DistillSection(Section):
    """The student learns from the teacher on so many tokens, in rows of `window`."""

    tokens: Count
    window: Annotated[int, Field(ge=8)] = 512
    learning_rate: LearningRate = "auto"


class EvaluateSection(Section):
    """What the student, and the model that answers in the end, are measured by."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = ("heldout",)
    data: str | None = None
    shots: tuple[str, ...] = ()
    limit: Count | None = None
    batch_size: Count = 8
    allow_code: bool = False


class ExportSection(Section):
    """The folder to hand on; `gguf` writes that file beside it."""

    gguf: bool = False
    dtype: Literal["stored", "fp32", "bf16", "fp16"] = "stored"


class HardwareSection(Section):
    """What the run is meant for: time and memory are told for it. `processes` on this machine share
    the training."""

    gpus: str | None = None
    utilisation: Annotated[float, Field(gt=0, le=1)] = UTILISATION
    processes: Count = 1

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

    name: str
    description: str = ""
    track: tuple[Tracker, ...] = ()
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
        check_batches(self.training, "distill.window", self.distill.window)
        check_tokens(self.training, "distill.tokens", self.distill.tokens)
        for name, section in (("teacher", self.teacher), ("adapt", self.adapt)):
            if section is not None and section.tokens is not None:
                check_tokens(self.training, f"{name}.tokens", section.tokens)
        names = [entry.name for entry in self.corpus]
        if len(set(names)) < len(names):
            raise ValueError(f"[[corpus]] names {', '.join(names)}: give every text its own name")
        return self
