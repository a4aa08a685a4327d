"""A run's recipe -> its steps: the command of each, what it reads and what it writes. Pure.

Every step is a command of capgap that serves alone as well.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgap.config import ABOUT_A_TEACHER, RunRecipe
from capgap.errors import UserError
from capgap.law.families import find_model
from capgap.stages.tuning import TuningSection

# A step of these is continued by its own command; of all others a half-done one leaves nothing
CONTINUED = {"train", "adapt", "distill", "evaluate", "instruct", "prefer"}
# These train, and several processes may share them
SHARED = {"train", "adapt", "distill"}


@dataclass(frozen=True)
class Step:
    """One command.

    `arguments` follow the command's name, then `options`, each with its value, a list of values, or
    True for a flag. `writes`: what is deleted before it starts anew. `texts` are sources as `capgap
    corpus` takes them, `files`, `models` and `folders` are read as they are; where one has changed,
    the step runs again. `after`: the steps whose results it reads.
    """

    name: str
    command: str
    arguments: tuple[str, ...]
    options: dict[str, Any]
    writes: tuple[Path, ...]
    record: Path | None = None
    texts: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def argv(self) -> list[str]:
        """The command line after `capgap`."""
        found = [self.command, *self.arguments]
        for name, value in self.options.items():
            for one in value if isinstance(value, tuple) else (value,):
                if one is True:
                    found.append(name)
                elif one is not None and one is not False:
                    found += [name, str(one)]
        return found

    @property
    def is_continued(self) -> bool:
        """Whether its own command goes on with what a stopped one left."""
        return self.command in CONTINUED


def plan_steps(recipe: RunRecipe, out: Path) -> list[Step]:
    """The steps of a recipe in their order. UserError for a recipe that names no text."""
    if not recipe.corpus:
        raise UserError(
            f"the recipe {recipe.name} has no [[corpus]]: name the text that the student learns "
            'from, as [[corpus]] source = "texts/*.txt"'
        )
    return _Planner(recipe, out).steps


class _Planner:
    """Builds the steps; `teacher`, `student` and `answering` are the models as they stand."""

    def __init__(self, recipe: RunRecipe, out: Path) -> None:
        self.recipe = recipe
        self.out = out
        self.steps: list[Step] = []
        self.training = _training_options(recipe)
        self.plain_training = _training_options(recipe, without=ABOUT_A_TEACHER)
        teacher, needed = self._teacher()
        teacher, needed = self._adapt(teacher, needed)
        corpora = self._corpora(teacher, needed)
        student = self._cut(teacher, corpora, needed)
        student = self._distill(teacher, student, corpora, needed)
        final, last = self._answer(student)
        if recipe.evaluate is not None and final != student:
            self._evaluate("evaluate-final", final, corpora, last)
        self._export(final, last)

    def _add(self, step: Step) -> None:
        self.steps.append(step)

    def _teacher(self) -> tuple[str, tuple[str, ...]]:
        """The model, and the steps that make it."""
        asked = self.recipe.teacher
        if asked.model is not None and asked.weights is None and find_model(asked.model):
            raise UserError(
                f"teacher.model {asked.model} is a published name: say where its weights are, as "
                "teacher.weights=FOLDER or a name on the Hub"
            )
        if asked.size is None:
            return asked.weights or asked.model or "", ()
        folder = self.out / "teacher"
        self._add(
            Step(
                "teacher-corpus",
                "corpus",
                (asked.source,),
                {"--vocabulary": asked.vocabulary, "--out": folder / "corpus"},
                (folder / "corpus",),
                folder / "corpus" / "manifest.json",
                texts=(asked.source,),
            )
        )
        training = folder / "training"
        self._add(
            Step(
                "teacher",
                "train",
                (),
                {
                    "--size": asked.size,
                    "--architecture": asked.architecture,
                    "--corpus": folder / "corpus",
                    "--tokens": asked.tokens,
                    "--window": self.recipe.distill.window,
                    "--learning-rate": _rate(asked.learning_rate),
                    "--out": training,
                    **self.plain_training,
                },
                (training,),
                training / "train.json",
                after=("teacher-corpus",),
            )
        )
        return str(training / "models" / new_name(asked.architecture, asked.size)), ("teacher",)

    def _adapt(self, teacher: str, needed: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        asked = self.recipe.adapt
        if asked is None:
            return teacher, needed
        folder = self.out / "adapt"
        self._add(
            Step(
                "adapt",
                "adapt",
                (teacher,),
                {
                    "--new": asked.source,
                    "--old": asked.old,
                    "--pieces": asked.pieces,
                    "--tokens": asked.tokens,
                    "--new-share": asked.new_share,
                    "--window": self.recipe.distill.window,
                    "--learning-rate": _rate(asked.learning_rate),
                    "--out": folder,
                    **self.plain_training,
                },
                (folder,),
                folder / "adapt.json",
                texts=tuple(text for text in (asked.source, asked.old) if text is not None),
                models=() if needed else (teacher,),
                after=needed,
            )
        )
        return str(folder / "model"), ("adapt",)

    def _corpora(self, teacher: str, needed: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the texts; each is prepared in the teacher's tokens."""
        for entry in self.recipe.corpus:
            folder = self.out / "corpus" / entry.name
            self._add(
                Step(
                    f"corpus-{entry.name}",
                    "corpus",
                    (entry.source,),
                    {
                        "--tokenizer": teacher,
                        "--text-column": entry.text_column,
                        "--separator": entry.separator,
                        "--out": folder,
                    },
                    (folder,),
                    folder / "manifest.json",
                    texts=(entry.source,),
                    models=() if needed else (teacher,),
                    after=needed,
                )
            )
        return tuple(entry.name for entry in self.recipe.corpus)

    def _cut(self, teacher: str, corpora: tuple[str, ...], needed: tuple[str, ...]) -> str:
        """Scores on the texts, then the cut; the folder of the student."""
        scoring, cut = self.recipe.score, self.recipe.prune
        scores, student = self.out / "scores.safetensors", self.out / "cut" / "student"
        reads = (*(f"corpus-{name}" for name in corpora), *needed)
        self._add(
            Step(
                "score",
                "score",
                (teacher,),
                {
                    "--corpus": self._weighted(corpora),
                    "--method": scoring.method,
                    "--depth": scoring.depth,
                    "--tokens": scoring.tokens,
                    "--window": min(scoring.window, self.recipe.distill.window),
                    "--device": self.recipe.run.device,
                    "--out": scores,
                },
                (scores,),
                models=() if needed else (teacher,),
                after=reads,
            )
        )
        sizes = ",".join(f"{name}={number}" for name, number in cut.sizes.items())
        self._add(
            Step(
                "prune",
                "prune",
                (teacher,),
                {
                    "--scores": scores,
                    "--keep": cut.keep,
                    "--params": cut.params,
                    "--total-params": cut.total_params,
                    "--shape": sizes or None,
                    "--out": student,
                },
                (student,),
                student / "pruning.json",
                after=("score", *needed),
            )
        )
        return str(student)

    def _distill(
        self, teacher: str, student: str, corpora: tuple[str, ...], needed: tuple[str, ...]
    ) -> str:
        asked, folder = self.recipe.distill, self.out / "distill"
        texts = [f"corpus-{name}" for name in corpora]
        self._add(
            Step(
                "distill",
                "distill",
                (teacher, student),
                {
                    "--corpus": self._weighted(corpora),
                    "--tokens": asked.tokens,
                    "--window": asked.window,
                    "--learning-rate": _rate(asked.learning_rate),
                    "--out": folder,
                    **self.training,
                },
                (folder,),
                folder / "distill.json",
                after=("prune", *texts, *needed),
            )
        )
        trained = str(folder / "students" / "student")
        if self.recipe.evaluate is not None:
            self._evaluate("evaluate", trained, corpora, ("distill",))
        return trained

    def _weighted(self, corpora: tuple[str, ...]) -> tuple[str, ...]:
        weights = {entry.name: entry.weight for entry in self.recipe.corpus}
        folders = [self.out / "corpus" / name for name in corpora]
        if len(folders) == 1:
            return (str(folders[0]),)
        return tuple(f"{folder}={weights[folder.name]:g}" for folder in folders)

    def _evaluate(
        self, name: str, model: str, corpora: tuple[str, ...], after: tuple[str, ...]
    ) -> None:
        asked = self.recipe.evaluate
        assert asked is not None
        record = self.out / f"{name}.json"
        heldout = "heldout" in asked.tasks
        self._add(
            Step(
                name,
                "evaluate",
                (model,),
                {
                    "--tasks": ",".join(asked.tasks),
                    "--data": asked.data,
                    "--corpus": tuple(str(self.out / "corpus" / one) for one in corpora)
                    if heldout
                    else None,
                    "--window": self.recipe.distill.window if heldout else None,
                    "--shots": asked.shots or None,
                    "--limit": asked.limit,
                    "--batch-size": asked.batch_size,
                    "--allow-code": asked.allow_code,
                    "--device": self.recipe.run.device,
                    "--out": record,
                },
                (record,),
                record,
                folders=() if asked.data is None else (asked.data,),
                after=after,
            )
        )

    def _answer(self, student: str) -> tuple[str, tuple[str, ...]]:
        """The model after conversations and preferences, and the step that made it."""
        model = student
        last: tuple[str, ...] = ("distill",)
        conversations, pairs = self.recipe.instruct, self.recipe.prefer
        if conversations is not None:
            own = {"--neftune": conversations.neftune, "--system": conversations.system or None}
            model, last = self._tune("instruct", conversations, own, model, last)
        if pairs is not None:
            template = "minichat" if conversations is None else "own"
            own = {"--beta": pairs.beta, "--template": template}
            model, last = self._tune("prefer", pairs, own, model, last)
        return model, last

    def _tune(
        self,
        name: str,
        asked: TuningSection,
        own: dict[str, Any],
        model: str,
        last: tuple[str, ...],
    ) -> tuple[str, tuple[str, ...]]:
        """The step of this name, with options of its own besides those that both have."""
        folder = self.out / name
        options = {
            "--data": asked.data,
            "--batch": asked.batch,
            "--micro-batch": asked.micro_batch,
            "--window": asked.window,
            "--learning-rate": asked.learning_rate,
            "--epochs": asked.epochs,
            "--lora": asked.lora,
            **own,
            "--device": self.recipe.run.device,
            "--track": self.recipe.track or None,
            "--out": folder,
        }
        record, files = folder / f"{name}.json", (str(asked.data),)
        self._add(Step(name, name, (model,), options, (folder,), record, files=files, after=last))
        return str(folder / "model"), (name,)

    def _export(self, final: str, last: tuple[str, ...]) -> None:
        asked = self.recipe.export
        if asked is None:
            return
        known = {step.name for step in self.steps}
        told = ("adapt", "prune", "distill", "evaluate-final", "evaluate", "instruct", "prefer")
        records = [step.record for step in self.steps if step.name in told]
        folder, gguf = self.out / "model", self.out / "model.gguf"
        measured = tuple(name for name in ("evaluate", "evaluate-final") if name in known)
        self._add(
            Step(
                "export",
                "export",
                (final,),
                {
                    "--record": tuple(str(one) for one in records if one is not None),
                    "--dtype": None if asked.dtype == "stored" else asked.dtype,
                    "--name": self.recipe.name,
                    "--gguf": gguf if asked.gguf else None,
                    "--out": folder,
                },
                (folder, gguf),
                after=(*last, *measured),
            )
        )


def new_name(architecture: str, size: int) -> str:
    """What `capgap train --size` calls the model that it makes."""
    from capgap.sizes import format_count

    return f"{architecture}-{format_count(size)}"


def _rate(rate: Any) -> Any:
    return None if rate == "auto" else rate


def _training_options(recipe: RunRecipe, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the recipe changes in [training] and [run], as the stages take it, and who is told of
    the steps; `without` keys of [training] that a stage has no use for."""
    changed = [
        (f"{name}.{key}", value)
        for name, section in (("training", recipe.training), ("run", recipe.run))
        for key, value in section.model_dump(mode="json", exclude_defaults=True).items()
        if not (name == "training" and key in without)
    ]
    return {
        "--set": tuple(f"{key}={_toml(value)}" for key, value in changed) or None,
        "--track": recipe.track or None,
    }


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    # a JSON string is a TOML string
    return json.dumps(value) if isinstance(value, str) else repr(value)
