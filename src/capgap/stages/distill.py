"""The stages `distill` and `train`: students learn from one teacher, or from what a cache keeps of
it, or models from the text alone; and what stages that train have in common."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from capgap.corpus.names import Given
from capgap.section import Count, LearningRate, Section, Size, TextOptions
from capgap.sizes import format_count, parse_size
from capgap.stage import ARGUMENT, HOW, SEVERAL, Mark, Say, ShouldStop, Stage
from capgap.train.recipe import ABOUT_A_TEACHER, RunSection, TrainingSection

Tokens = Annotated[Count, "Training tokens, such as 10M, cut to whole steps."]
Window = Annotated[int, Field(ge=8), "Tokens of a training window."]
Track = Annotated[
    tuple[str, ...],
    SEVERAL,
    HOW,
    "Also tells tensorboard, trackio or wandb every step; may be given several times.",
]


class TrainingStage(TextOptions, Stage):
    """A stage that trains, by itself or with the other processes of torchrun."""

    out: Annotated[Path, HOW, "Folder for models, metrics and record."]
    window: Window = 512
    learning_rate: LearningRate = "auto"
    seed: Annotated[int, "Decides the order of the windows, and a new model's weights."] = 0
    track: Track = ()
    training: TrainingSection = TrainingSection()
    running: Annotated[RunSection, HOW] = Field(RunSection(), alias="run")

    @property
    def record_file(self) -> Path:
        return self.out / f"{self.title()}.json"


class Training(TrainingStage):
    """What `train` and `distill` share: models learn from text, with or without a teacher.

    Every `heldout_steps` the held-out loss is taken and the best checkpoint kept; None: at the end
    alone. `size`: beside the others a new model of `architecture` with random weights.
    """

    takes_text: ClassVar[bool] = True

    corpus: Annotated[
        Given, SEVERAL, "FOLDER[=WEIGHT] that `capgap corpus` prepared, or text; several are mixed."
    ]
    tokens: Tokens
    heldout_steps: Annotated[
        Count | None,
        "Held-out loss every so many steps; the checkpoint with the lowest mean is kept too.",
    ] = None
    teacher: str | None = None
    cache: Path | None = None
    size: Size | None = None
    architecture: str = "llama"

    @property
    def begun_with(self) -> tuple[str, ...]:
        """The models that learn, as they are before: folders or names."""
        raise NotImplementedError

    @property
    def new(self) -> str | None:
        """The name of the new model, where one is asked for."""
        if self.size is None:
            return None
        parameters, is_total = parse_size(self.size)
        return f"{self.architecture}-{format_count(parameters)}{'-total' if is_total else ''}"

    @property
    def names(self) -> list[str]:
        """Of the models that learn, in the output folder; the new one last."""
        names = [Path(model).name for model in self.begun_with]
        return names if self.new is None else [*names, self.new]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.names:
            raise ValueError("nothing to train: name a model, or the size of a new one")
        if len(set(self.names)) < len(self.names):
            given = ", ".join(self.names)
            raise ValueError(f"two students have one name among {given}: rename a folder")
        self.training.check_batches("window", self.window)
        self.training.check_tokens("tokens", self.tokens)
        idle = [name for name in ABOUT_A_TEACHER if name in self.training.model_fields_set]
        if self.teacher is None and idle:
            raise ValueError(f"training.{idle[0]} is about a teacher, and there is none here")
        return self

    def identity(self) -> dict[str, Any]:
        found = super().identity() | {"new": self.new}
        for name in ("size", "architecture"):
            del found[name]
        if self.teacher is None:
            for name in ABOUT_A_TEACHER:
                del found["training"][name]
        return found

    def run(
        self, *, say: Say = lambda text: None, should_stop: ShouldStop = lambda: False
    ) -> dict[str, Any]:
        """Trains the models and writes each as a Hugging Face folder; returns the record.

        Started by torchrun, all its processes share the work; the first one writes and says.
        """
        from capgap.stages.column import train_column

        return train_column(self, say, should_stop)

    def told(self, found: dict[str, Any]) -> str:
        lines = []
        if self.teacher is not None:
            heldout = found["teacher"]["heldout"]
            loss = "unknown (read from a cache)" if heldout is None else f"{heldout['loss']:.4f}"
            lines.append(f"teacher: held-out loss {loss}, {self.teacher}")
        for name, student in found["after"].items():
            before = found["before"][name]
            if student["failure"]:
                step = student["failure"].get("step")
                where = "" if step is None else f" at step {step}"
                lines.append(f"{name}: failed{where}, {student['failure']['message']}")
                continue
            after = student["heldout"]
            change = f"{before['loss']:.4f} -> {after['loss']:.4f}"
            lines.append(f"{name}: held-out loss {change}, {student['folder']}")
            for source, one in after.get("sources", {}).items():
                change = f"{before['sources'][source]['loss']:.4f} -> {one['loss']:.4f}"
                lines.append(f"    {source} ({one['share']:.0%}): {change}")
        best = found["best"] or {"students": {}}
        for name, student in best["students"].items():
            loss = student["heldout"]["loss"]
            lines.append(
                f"{name}: held-out loss {loss:.4f} at step {best['step']}, {student['folder']}"
            )
        return "\n".join(lines)

    def after(self, found: dict[str, Any]) -> tuple[object, ...]:
        folders = [one["folder"] for one in found["after"].values() if not one["failure"]]
        corpora = [word for one in found["sources"] for word in ("--corpus", one["folder"])]
        asked = ("--tasks", "heldout", *corpora, "--window", self.window)
        return ("evaluate", folders[0], *asked) if folders else ()

    def result(self, found: dict[str, Any]) -> str:
        told = []
        for name, after in found["after"].items():
            loss = after["heldout"] and after["heldout"]["loss"]
            before = found["before"][name]["loss"]
            told.append("failed" if loss is None else f"held-out loss {before:.3f} -> {loss:.3f}")
        return "; ".join(told)

    def failure(self, found: dict[str, Any]) -> str:
        failed = all(student["failure"] for student in found["after"].values())
        return "no model was finished" if failed else ""


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
        Size | None,
        "Parameters of a new model beside those named: 300k without embeddings, or `400k total`.",
    ] = None
    architecture: Annotated[str, "Of the new model: one of the families (docs/families.md)."] = (
        "llama"
    )

    @property
    def begun_with(self) -> tuple[str, ...]:
        return self.models
