"""The stages `distill` and `train`: students learn from one teacher, or from what a cache keeps of
it, or models from the text alone."""

from pathlib import Path
from typing import Annotated, Any

from capgap.section import Count, Section
from capgap.stage import ARGUMENT, SEVERAL, Mark, Say, ShouldStop
from capgap.stages.training import Rate, Tokens, Training, Window


class DistillSection(Section):
    """The student learns from the teacher on so many tokens, in rows of `window`."""

    tokens: Tokens
    window: Window = 512
    learning_rate: Rate = "auto"


class _Trained(Training):
    """Both write models, metrics and a record of the same form."""

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
        for name, student in found["after"].items():
            before = found["before"][name]["loss"]
            if student["failure"]:
                step = student["failure"].get("step")
                where = "" if step is None else f" at step {step}"
                lines.append(f"{name}: failed{where}, {student['failure']['message']}")
                continue
            after = student["heldout"]["loss"]
            lines.append(f"{name}: held-out loss {before:.4f} -> {after:.4f}, {student['folder']}")
            for source, one in student["heldout"].get("sources", {}).items():
                began = found["before"][name]["sources"][source]["loss"]
                lines.append(f"    {source} ({one['share']:.0%}): {began:.4f} -> {one['loss']:.4f}")
        for name, student in (found["best"] or {"students": {}})["students"].items():
            loss, step = student["heldout"]["loss"], found["best"]["step"]
            lines.append(f"{name}: held-out loss {loss:.4f} at step {step}, {student['folder']}")
        return "\n".join(lines)

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


class Distill(DistillSection, _Trained):
    """Let students learn from a teacher; the same command continues one that was stopped."""

    teacher: Annotated[str, ARGUMENT, Mark.MODEL, "A Hugging Face folder or name."]
    students: Annotated[tuple[str, ...], ARGUMENT, SEVERAL, "One or several, fed by one pass."]
    cache: Annotated[Path | None, "What `capgap cache` kept of the teacher."] = None

    @property
    def begun_with(self) -> tuple[str, ...]:
        return self.students


class Train(_Trained):
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
