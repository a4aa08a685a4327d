"""A run's recipe -> its steps: the stage of each, and the steps whose results it reads. Pure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgap.corpus.given import Given, Weighted
from capgap.errors import UserError
from capgap.law.families import find_model
from capgap.pipeline.recipe import RunRecipe
from capgap.stage import Stage
from capgap.stages.adapt import Adapt
from capgap.stages.corpus import Prepare
from capgap.stages.distill import Distill, Train
from capgap.stages.evaluate import Evaluate
from capgap.stages.export import Export
from capgap.stages.prune import Prune
from capgap.stages.score import Score
from capgap.stages.tuning import Instruct, Prefer
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
    """Builds the steps. What makes a model returns it with the steps that it rests on."""

    def __init__(self, recipe: RunRecipe, out: Path) -> None:
        self.recipe = recipe
        self.out = out
        self.steps: list[Step] = []
        self.device = recipe.run.device
        self.loop: dict[str, Any] = {
            "window": recipe.distill.window,
            "running": recipe.run,
            "track": recipe.track,
        }
        changed = dict(recipe.training.model_dump(exclude_unset=True))
        own = {name: value for name, value in changed.items() if name not in ABOUT_A_TEACHER}
        self.without_teacher = TrainingSection(**own)
        teacher, needed = self._adapt(*self._teacher())
        corpora = self._corpora(teacher, needed)
        self._cut(teacher, corpora, needed)
        student = self._distill(teacher, corpora, needed)
        final, last = self._answer(student)
        if final != student:
            self._evaluate("evaluate-final", final, corpora, last)
        self._export(final, last)

    def _add(self, name: str, stage: Stage, after: tuple[str, ...] = ()) -> tuple[str, ...]:
        self.steps.append(Step(name, stage, after))
        return (name,)

    def _teacher(self) -> tuple[str, tuple[str, ...]]:
        asked = self.recipe.teacher
        if asked.model is not None and asked.weights is None and find_model(asked.model):
            raise UserError(
                f"teacher.model {asked.model} is a published name: say where its weights are, as "
                "teacher.weights=FOLDER or a name on the Hub"
            )
        if asked.size is None:
            return asked.weights or asked.model or "", ()
        assert asked.tokens is not None
        folder = self.out / "teacher"
        text = Prepare(source=asked.source, vocabulary=asked.vocabulary, out=folder / "corpus")
        training = Train(
            size=asked.size,
            architecture=asked.architecture,
            corpus=(Weighted(text.out),),
            tokens=asked.tokens,
            learning_rate=asked.learning_rate,
            out=folder / "training",
            training=self.without_teacher,
            **self.loop,
        )
        made = self._add("teacher", training, self._add("teacher-corpus", text))
        return str(training.out / "models" / str(training.new)), made

    def _adapt(self, teacher: str, needed: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        asked = self.recipe.adapt
        if asked is None:
            return teacher, needed
        stage = Adapt(
            model=teacher,
            new=asked.source,
            out=self.out / "adapt",
            training=self.without_teacher,
            **asked.model_dump(exclude={"source"}),
            **self.loop,
        )
        return str(stage.out / "model"), self._add("adapt", stage, needed)

    def _corpora(self, teacher: str, needed: tuple[str, ...]) -> Given:
        """The texts by weight; each is prepared in the teacher's tokens."""
        for entry in self.recipe.corpus:
            text = entry.model_dump(exclude={"name", "weight"})
            folder = self.out / "corpus" / entry.name
            self._add(
                f"corpus-{entry.name}", Prepare(tokenizer=teacher, out=folder, **text), needed
            )
        folders = [(self.out / "corpus" / entry.name, entry.weight) for entry in self.recipe.corpus]
        if len(folders) == 1:
            return (Weighted(folders[0][0]),)
        return tuple(Weighted(folder, weight) for folder, weight in folders)

    def _texts(self) -> tuple[str, ...]:
        return tuple(f"corpus-{entry.name}" for entry in self.recipe.corpus)

    def _cut(self, teacher: str, corpora: Given, needed: tuple[str, ...]) -> None:
        """Scores on the texts, then the cut."""
        scoring, cut = self.recipe.score, self.recipe.prune
        scored = Score(
            teacher=teacher,
            corpus=corpora,
            out=self.out / "scores.safetensors",
            device=self.device,
            **scoring.model_dump(exclude={"window"}),
            window=min(scoring.window, self.recipe.distill.window),
        )
        made = self._add("score", scored, (*self._texts(), *needed))
        size = {name: getattr(cut, name) for name in ("keep", "params", "total_params")}
        shape = cut.sizes or None
        student = self.out / "cut" / "student"
        stage = Prune(teacher=teacher, scores=scored.out, shape=shape, out=student, **size)
        self._add("prune", stage, (*made, *needed))

    def _distill(self, teacher: str, corpora: Given, needed: tuple[str, ...]) -> str:
        """The student's folder."""
        asked = self.recipe.distill
        stage = Distill(
            teacher=teacher,
            students=(str(self.out / "cut" / "student"),),
            corpus=corpora,
            tokens=asked.tokens,
            learning_rate=asked.learning_rate,
            out=self.out / "distill",
            training=self.recipe.training,
            **self.loop,
        )
        made = self._add("distill", stage, ("prune", *self._texts(), *needed))
        student = str(stage.out / "students" / "student")
        self._evaluate("evaluate", student, corpora, made)
        return student

    def _evaluate(self, name: str, model: str, corpora: Given, after: tuple[str, ...]) -> None:
        asked = self.recipe.evaluate
        if asked is None:
            return
        stage = Evaluate(
            model=model,
            corpus=tuple(one.folder for one in corpora) if "heldout" in asked.tasks else (),
            window=self.recipe.distill.window,
            device=self.device,
            out=self.out / f"{name}.json",
            **asked.model_dump(),
        )
        self._add(name, stage, after)

    def _answer(self, student: str) -> tuple[str, tuple[str, ...]]:
        """The model after conversations and preferences, and the step that made it."""
        model = student
        last: tuple[str, ...] = ("distill",)
        conversations, pairs = self.recipe.instruct, self.recipe.prefer
        shared: dict[str, Any] = {"device": self.device, "track": self.recipe.track}
        if conversations is not None:
            asked = conversations.model_dump()
            made = Instruct(model=model, out=self.out / "instruct", **asked, **shared)
            model, last = str(made.out / "model"), self._add("instruct", made, last)
        if pairs is not None:
            shared["template"] = "minichat" if conversations is None else "own"
            tuned = Prefer(model=model, out=self.out / "prefer", **pairs.model_dump(), **shared)
            model, last = str(tuned.out / "model"), self._add("prefer", tuned, last)
        return model, last

    def _export(self, final: str, last: tuple[str, ...]) -> None:
        asked = self.recipe.export
        if asked is None:
            return
        told = ("adapt", "prune", "distill", "evaluate-final", "evaluate", "instruct", "prefer")
        stages = {step.name: step.stage for step in self.steps if step.name in told}
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
