"""What the tasks of one worker share: the corpus, the loop's settings, evaluation, teachers."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from capgap.corpus.text import Text
from capgap.distill.teacher import OnlineTeacher, load_teacher
from capgap.evaluate.losses import HeldoutSet, evaluate_heldout, heldout_set
from capgap.evaluate.measured import HeldoutLoss
from capgap.machine import resolve_device
from capgap.models.parts import Parts
from capgap.prune.importance import score, scoring_batches
from capgap.prune.scores import save_importance
from capgap.sweep.context import Context
from capgap.sweep.plan import Teacher
from capgap.train.learner import Learner
from capgap.train.loop import LoopSettings, Progress, train
from capgap.train.metrics import StageClock
from capgap.train.settings import loop_settings

# Teachers and students read the corpus in different orders; scores are measured in a third.
DATA_SEEDS = {"teacher": 1_000_003, "student": 2_000_003}


@dataclass
class Task:
    """What the tasks of one worker share."""

    context: Context
    clock: StageClock
    should_stop: Callable[[], bool]
    on_step: Callable[[Progress], None]
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def corpus(self) -> Text:
        window = self.context.recipe.corpus.window
        return Text.open([(self.context.corpus_folder, None)], window)

    @cached_property
    def heldout(self) -> HeldoutSet:
        corpus = self.corpus
        return heldout_set(
            corpus.heldout_documents(), corpus.marks, corpus.window, corpus.vocabulary
        )

    def settings(self, kind: str, seed: int) -> LoopSettings:
        recipe = self.context.recipe
        return loop_settings(
            self.context.training,
            recipe.run,
            self.corpus,
            data_seed=DATA_SEEDS[kind] + seed,
            device=self.context.device,
        )

    def run(
        self, learners: Sequence[Learner], name: str, settings: LoopSettings, **more: Any
    ) -> None:
        train(
            learners,
            self.corpus,
            settings,
            clock=self.clock,
            checkpoint_folder=self.context.checkpoint_folder(name),
            should_stop=self.should_stop,
            on_step=self.on_step,
            **more,
        )
        shutil.rmtree(self.context.checkpoint_folder(name), ignore_errors=True)

    def evaluate(self, model: PreTrainedModel) -> HeldoutLoss:
        with self.clock.stage("evaluation"):
            return evaluate_heldout(Parts(model), self.heldout)

    def score(self, model: PreTrainedModel, name: str) -> None:
        """Measures the importance of a model's units and keeps it under that name.

        UserError where the model's loss is not finite.
        """
        recipe = self.context.recipe
        with self.clock.stage("pruning"):
            importance = score(
                model,
                scoring_batches(self.corpus, recipe.scoring_tokens),
                method=recipe.scoring_method,
                depth=recipe.scoring_depth,
            )
        save_importance(self.context.importance_file(name), importance)

    def load_teacher(self, path: Path | str) -> OnlineTeacher:
        """A model to learn from, where the recipe wants it."""
        recipe = self.context.recipe
        device = recipe.run.teacher_device
        device = self.context.device if device == "same" else resolve_device(device)
        return load_teacher(
            path,
            device,
            dtype=self.context.training.teacher_dtype,
            offload=recipe.run.teacher_offload,
        )


def teacher_path(context: Context, teacher: Teacher) -> Path | str:
    return teacher.source if teacher.source is not None else context.teacher_folder(teacher.id)
