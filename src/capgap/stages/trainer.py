"""What trains columns: models that learn from the same windows, from one teacher, a cache of it, or
text. `train`, `distill` and the tasks of a sweep make, train, measure and save them by this alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from capgap.corpus.text import Text
from capgap.distill.divergences import Divergence
from capgap.distill.teacher import OnlineTeacher, TeacherSource, load_teacher
from capgap.errors import UserError
from capgap.evaluate.losses import HeldoutSet, evaluate_heldout, heldout_set
from capgap.evaluate.measured import HeldoutLoss, mixed_loss
from capgap.machine import resolve_device, versions
from capgap.models.build import save_model
from capgap.models.parallel import ALONE, Ranks, parallelize, release, whole_weights
from capgap.models.parts import Parts
from capgap.train.learner import NOT_FINITE, Learner
from capgap.train.loop import LoopSettings, Progress, train
from capgap.train.metrics import StageClock
from capgap.train.recipe import RunSection, TrainingSection
from capgap.train.settings import loop_settings

# Teachers and students read the text in different orders; scores are measured in a third
TEACHER_SEED = 1_000_003
STUDENT_SEED = 2_000_003

Loss = HeldoutLoss


@dataclass
class Trainer:
    """What columns on one text have in common. `training` has its precision resolved."""

    text: Text
    training: TrainingSection
    running: RunSection
    device: str
    say: Callable[[str], None] = lambda line: None
    should_stop: Callable[[], bool] = lambda: False
    ranks: Ranks = ALONE
    clock: StageClock = field(default_factory=StageClock)

    @cached_property
    def heldout(self) -> HeldoutSet:
        text = self.text
        return heldout_set(text.heldout_documents(), text.marks, text.window, text.vocabulary)

    def learner(
        self, name: str, model: PreTrainedModel, tokens: int, rate: float, alpha: float = 0.0
    ) -> Learner:
        """A model of the CPU that is to learn from so many tokens, on the device or sharded."""
        learner = Learner(name, model, tokens // self.training.batch_tokens, rate, alpha)
        in_bf16 = self.training.precision == "bf16_gathered"
        if in_bf16 and self.ranks.world == 1:
            raise UserError("training.precision 'bf16_gathered', but one process alone: use bf16")
        parallelize(learner.parts, self.ranks, torch.device(self.device), in_bf16=in_bf16)
        self._check_documents(learner.parts)
        return learner

    def teacher(self, source: Path | str) -> OnlineTeacher:
        """The model that is learnt from; UserError for a device that several processes cannot
        use."""
        device = self.running.teacher_device
        if self.ranks.world > 1 and device != "same":
            raise UserError(
                f"run.teacher_device {device!r}: with several processes the teacher is sharded "
                "over the devices of its students; leave it at 'same'"
            )
        teacher = load_teacher(
            source,
            self.device if device == "same" else resolve_device(device),
            dtype=self.training.teacher_dtype,
            offload=self.running.teacher_offload,
            ranks=self.ranks,
        )
        self._check_documents(teacher.parts)
        return teacher

    def evaluate(self, parts: Parts) -> Loss:
        """The held-out loss, by source where the text is a mixture."""
        with self.clock.stage("evaluation"):
            return self._evaluate(parts)

    def measured(self, learner: Learner, loss: Loss | None = None) -> Loss | None:
        """The held-out loss of a model that has learnt, `loss` if it is known; None where it
        failed, or fails now because the loss is not finite."""
        if learner.failure is None:
            loss = loss or self.evaluate(learner.parts)
            if math.isfinite(loss.loss):
                return loss
            learner.failure = NOT_FINITE
        return None

    def train(
        self,
        learners: Sequence[Learner],
        teacher: TeacherSource | None,
        *,
        data_seed: int,
        checkpoints: Path,
        on_step: Callable[[Progress], None],
        on_end: Callable[[Learner, Loss | None], None] = lambda learner, loss: None,
        heldout_steps: int | None = None,
    ) -> dict[str, Loss | None]:
        """Trains the learners, from the last checkpoint in the folder where there is one; `on_end`
        is told of each as it ends. Returns their held-out losses by id, None of those that failed.

        Interrupted when `should_stop` said so: the same call goes on.
        """
        ended: dict[str, Loss | None] = {}
        on_the_way: dict[str, Loss] = {}

        def heldout_loss(learner: Learner) -> float:
            on_the_way[learner.id] = self._evaluate(learner.parts)
            return on_the_way[learner.id].loss

        def end(learner: Learner) -> None:
            # where losses are taken on the way, so is that of the last step
            ended[learner.id] = self.measured(learner, on_the_way.get(learner.id))
            on_end(learner, ended[learner.id])

        train(
            learners,
            self.text,
            self.settings(data_seed, heldout_steps),
            teacher=teacher,
            clock=self.clock,
            checkpoint_folder=checkpoints,
            should_stop=self.should_stop,
            on_step=on_step,
            on_end=end,
            heldout_loss=None if heldout_steps is None else heldout_loss,
            ranks=self.ranks,
        )
        return ended

    @contextmanager
    def tracked(
        self, names: tuple[str, ...], out: Path, asked: dict[str, Any]
    ) -> Iterator[Callable[[Progress], None]]:
        """What tells trackers of a training's steps, and keeps them in `out`; nobody without
        names."""
        if not names:
            yield lambda progress: None
            return
        from capgap.stages.step_lines import MetricsFile, StepLines

        with MetricsFile(out, names, asked, self.say) as metrics:
            yield StepLines(metrics).add

    def save(self, learner: Learner, folder: Path) -> None:
        """The model as a Hugging Face folder."""
        weights = whole_weights(learner.parts, self.ranks)
        if self.ranks.is_first:
            save_model(learner.model, folder, self.text.tokenizer, weights=weights)

    def settings(self, data_seed: int, heldout_steps: int | None = None) -> LoopSettings:
        """UserError as `loop_settings`."""
        return loop_settings(
            self.training,
            self.running,
            self.text,
            data_seed=data_seed,
            device=self.device,
            heldout_steps=heldout_steps,
        )

    def facts(self) -> dict[str, Any]:
        """What all records of trainings say of their settings."""
        training = self.training
        return {
            "batch_tokens": training.batch_tokens,
            "temperature": training.temperature,
            "divergence": str(Divergence(training.divergence, training.divergence_mix)),
            "versions": versions(),
        }

    def _evaluate(self, parts: Parts) -> Loss:
        found = evaluate_heldout(parts, self.heldout, self.ranks)
        return mixed_loss(found, self.text.heldout_counts(), self.text.share_of)

    def _check_documents(self, parts: Parts) -> None:
        if self.training.document_mask:
            parts.check_documents()
            release(parts)
