"""A run's recipe -> its steps: the stage of each, and the steps whose results it reads. Pure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgap.corpus.names import Given, Weighted
from capgap.errors import UserError
from capgap.hub import hub_name
from capgap.pipeline.recipe import RunRecipe
from capgap.stage import Stage
from capgap.stages.adapt import Adapt, AdaptSection
from capgap.stages.corpus import Prepare
from capgap.stages.distill import Distill, Train
from capgap.stages.evaluate import Evaluate
from capgap.stages.export import Export
from capgap.stages.instruct import Instruct, Prefer
from capgap.stages.prune import Prune
from capgap.stages.score import Score
from capgap.stages.tuning import Tuning, TuningSection
from capgap.train.recipe import ABOUT_A_TEACHER, TrainingSection


@dataclass(frozen=True)
class Step:
    """A stage of a run by its name there; `after`: the steps whose results it reads; `clears`: what
    else goes when it starts anew, since an earlier recipe may have made it."""

    name: str
    stage: Stage
    after: tuple[str, ...] = ()
    clears: tuple[Path, ...] = ()


def plan_steps(recipe: RunRecipe, out: Path) -> list[Step]:
    """The steps of a recipe in their order. UserError for a recipe that names no text."""
    if not recipe.corpus:
        raise UserError(
            f"the recipe {recipe.name} has no [[corpus]]: name the text that the student learns "
            'from, as [[corpus]] source = "texts/*.txt"'
        )
    return _Planner(recipe, out).steps


class _Planner:
    """Builds the steps; `needed` are those that make the teacher."""

    def __init__(self, recipe: RunRecipe, out: Path) -> None:
        self.recipe = recipe
        self.out = out
        self.steps: list[Step] = []
        self.device = recipe.run.device
        self.needed: tuple[str, ...] = ()
        window = recipe.distill.window
        self.loop: dict[str, Any] = {"window": window, "running": recipe.run, "track": recipe.track}
        changed = recipe.training.model_dump(exclude_unset=True, exclude=set(ABOUT_A_TEACHER))
        self.without_teacher = TrainingSection(**changed)
        self.teacher = self._teacher()
        if recipe.adapt is not None:
            self._adapt(recipe.adapt)
        self.corpora = self._corpora()
        self.texts = tuple(f"corpus-{entry.name}" for entry in recipe.corpus)
        self._cut()
        student = self._distill()
        self._evaluate("evaluate", student, ("distill",))
        final, last = self._answer(student)
        if final != student:
            self._evaluate("evaluate-final", final, last)
        self._export(final, last)

    def _add(self, name: str, stage: Stage, after: tuple[str, ...] = ()) -> None:
        self.steps.append(Step(name, stage, after))

    def _teacher(self) -> str:
        """The teacher's folder or name; one that is to be trained has steps of its own."""
        asked = self.recipe.teacher
        if asked.size is None:
            return hub_name(asked.weights or asked.model or "")
        folder = self.out / "teacher"
        text = Prepare(source=asked.source, vocabulary=asked.vocabulary, out=folder / "corpus")
        training = Train(
            **asked.model_dump(include={"size", "architecture", "tokens", "learning_rate"}),
            corpus=(Weighted(text.out),),
            out=folder / "training",
            training=self.without_teacher,
            **self.loop,
        )
        self._add("teacher-corpus", text)
        self._add("teacher", training, ("teacher-corpus",))
        self.needed = ("teacher",)
        return str(training.out / "models" / str(training.new))

    def _adapt(self, asked: AdaptSection) -> None:
        stage = Adapt(
            model=self.teacher,
            new=asked.source,
            out=self.out / "adapt",
            training=self.without_teacher,
            **asked.model_dump(exclude={"source"}),
            **self.loop,
        )
        self._add("adapt", stage, self.needed)
        self.teacher, self.needed = str(stage.out / "model"), ("adapt",)

    def _corpora(self) -> Given:
        """The texts by weight; each is prepared in the teacher's tokens."""
        entries = self.recipe.corpus
        folders = [self.out / "corpus" / entry.name for entry in entries]
        for entry, folder in zip(entries, folders, strict=True):
            text = entry.model_dump(exclude={"name", "weight"})
            stage = Prepare(tokenizer=self.teacher, out=folder, **text)
            self._add(f"corpus-{entry.name}", stage, self.needed)
        weights = [entry.weight if len(entries) > 1 else None for entry in entries]
        return tuple(map(Weighted, folders, weights))

    def _cut(self) -> None:
        """Scores on the texts, then the cut."""
        scoring, cut = self.recipe.score, self.recipe.prune
        scored = Score(
            teacher=self.teacher,
            corpus=self.corpora,
            out=self.out / "scores.safetensors",
            device=self.device,
            **scoring.model_dump(exclude={"window"}),
            window=min(scoring.window, self.recipe.distill.window),
        )
        self._add("score", scored, (*self.texts, *self.needed))
        student = Prune(
            teacher=self.teacher,
            scores=scored.out,
            shape=cut.sizes or None,
            out=self.out / "cut" / "student",
            keep=cut.keep,
            params=cut.params,
        )
        self._add("prune", student, ("score", *self.needed))

    def _distill(self) -> str:
        """The student's folder."""
        stage = Distill(
            teacher=self.teacher,
            students=(str(self.out / "cut" / "student"),),
            corpus=self.corpora,
            **self.recipe.distill.model_dump(exclude={"window"}),
            out=self.out / "distill",
            training=self.recipe.training,
            **self.loop,
        )
        self._add("distill", stage, ("prune", *self.texts, *self.needed))
        return str(stage.out / "students" / "student")

    def _evaluate(self, name: str, model: str, after: tuple[str, ...]) -> None:
        asked = self.recipe.evaluate
        if asked is None:
            return
        folders = tuple(corpus.folder for corpus in self.corpora)
        stage = Evaluate(
            model=model,
            corpus=folders if "heldout" in asked.tasks else (),
            window=self.recipe.distill.window,
            device=self.device,
            out=self.out / f"{name}.json",
            **asked.model_dump(),
        )
        self._add(name, stage, after)

    def _answer(self, model: str) -> tuple[str, tuple[str, ...]]:
        """The model after conversations and preferences, and the step that made it."""
        last: tuple[str, ...] = ("distill",)
        template = "minichat"
        shared: dict[str, Any] = {"device": self.device, "track": self.recipe.track}
        stages: dict[type[Tuning], TuningSection | None]
        stages = {Instruct: self.recipe.instruct, Prefer: self.recipe.prefer}
        for kind, asked in stages.items():
            if asked is None:
                continue
            name, out = kind.title(), self.out / kind.title()
            values = asked.model_dump() | shared
            self._add(name, kind(model=model, out=out, template=template, **values), last)
            # what the second one tunes has that of the first
            model, last, template = str(out / "model"), (name,), "own"
        return model, last

    def _export(self, final: str, last: tuple[str, ...]) -> None:
        asked = self.recipe.export
        if asked is None:
            return
        recorded = ("adapt", "prune", "distill", "evaluate-final", "evaluate", "instruct", "prefer")
        stages = {step.name: step.stage for step in self.steps if step.name in recorded}
        gguf = self.out / "model.gguf"
        stage = Export(
            model=final,
            record=tuple(one.record_file for one in stages.values() if one.record_file),
            dtype=asked.dtype,
            name=self.recipe.name,
            gguf=gguf if asked.gguf else None,
            out=self.out / "model",
        )
        measured = [name for name in stages if name.startswith("evaluate")]
        self.steps.append(Step("export", stage, (*last, *measured), clears=(gguf,)))
