"""The stages `distill` and `train`: students learn from one teacher, or from what a cache keeps of
it, or models from the text alone."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capgap.config import ABOUT_A_TEACHER, StageSettings
from capgap.corpus.given import Given
from capgap.corpus.mixture import Mixture, TrainingText
from capgap.errors import UserError, check_positive
from capgap.records import write_json_atomically
from capgap.sizes import format_count
from capgap.stages.inputs import (
    check_model,
    open_text,
    sources_read,
    text_identity,
    warn_of_beginning,
    warn_of_epochs,
)
from capgap.stages.run_folder import begin_together
from capgap.stages.step_lines import MetricsFile, StepLines
from capgap.train.trackers import check_trackers

if TYPE_CHECKING:
    from capgap.distill.teacher import TeacherSource
    from capgap.evaluate.heldout import HeldoutLoss, MixedLoss
    from capgap.models.parallel import Ranks
    from capgap.models.shape import Shape
    from capgap.train.learner import Learner
    from capgap.train.loop import LoopSettings

DATA_SEED = 2_000_003


@dataclass(frozen=True)
class DistillRequest:
    """Who learns from whom, on which tokens, and how. `learning_rate` None is the rule per size.

    `teacher` None: the students learn from the text alone, by cross-entropy. `size`: beside the
    students a new model of `architecture` and so many non-embedding parameters, with random
    weights. Every `heldout_steps` the held-out loss is taken and the best checkpoint kept; None: at
    the end alone. `track`: names of trackers (capgap.train.trackers) that are told every step.
    """

    teacher: str | None
    students: tuple[str, ...]
    corpus: Given
    out: Path
    tokens: int
    window: int = 512
    cache: Path | None = None
    learning_rate: float | None = None
    seed: int = 0
    heldout_steps: int | None = None
    size: int | None = None
    architecture: str = "llama"
    settings: StageSettings = field(default_factory=StageSettings)
    track: tuple[str, ...] = ()

    @property
    def record(self) -> Path:
        """The file of the record: distill.json, or train.json without a teacher."""
        return self.out / ("train.json" if self.teacher is None else "distill.json")

    @property
    def new(self) -> str | None:
        """The name of the new model, where one is asked for."""
        return None if self.size is None else f"{self.architecture}-{format_count(self.size)}"

    def names(self) -> list[str]:
        """The students' names in the output folder, the new one last."""
        names = [Path(student).name for student in self.students]
        if self.new is not None:
            names.append(self.new)
        if not names:
            raise UserError("nothing to train: name a model, or the --size of a new one")
        if len(set(names)) < len(names):
            raise UserError(f"two students have one name among {', '.join(names)}: rename a folder")
        return names

    def asked(self) -> dict[str, Any]:
        """What a run in the same folder must agree on to be continued."""
        return {
            "teacher": self.teacher,
            "students": list(self.students),
            "new": self.new,
            "tokens": self.tokens,
            "window": self.window,
            "cache": None if self.cache is None else str(self.cache),
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "heldout_steps": self.heldout_steps,
            "training": self.settings.training.model_dump(
                mode="json", exclude=set(ABOUT_A_TEACHER) if self.teacher is None else None
            ),
        }


def run_distill(
    request: DistillRequest,
    *,
    say: Callable[[str], None] = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains the students and writes each as a Hugging Face folder; returns the record.

    Stopped or killed, the same call continues from the last checkpoint. Started by torchrun, all
    its processes share the work; the first one writes and says. UserError for the user's mistakes,
    before any work where they can be known; Interrupted when `should_stop` said so.
    """
    from transformers.utils import logging as transformers_logging

    from capgap.machine import resolve_device
    from capgap.models.parallel import joined

    transformers_logging.disable_progress_bar()
    device = resolve_device(request.settings.run.device)
    check_request(request)
    check_trackers(request.track)
    corpus = open_text(request.corpus, request.window)
    for name in (request.teacher, *request.students):
        if name is not None:
            check_model(name, corpus)
    shape = _new_shape(request, corpus)
    settings = _settings(request, corpus, device)
    asked = request.asked() | text_identity(corpus)
    with joined(device, settings.batch_windows) as ranks:
        record = begin_together(request.record, asked, ranks)
        if not record["finished"]:
            say = say if ranks.is_first else _say_nothing
            warn_of_epochs(corpus, request.tokens, say)
            run = _Run(request, corpus, shape, settings, device, ranks, record)
            try:
                run.train(say, should_stop)
            except UserError as error:
                # a damaged window of a cache, say: one rank may meet it alone
                error.rank = ranks.rank
                raise
            run.finish()
        return record


class _Run:
    """One call's models, and what it adds to the record."""

    def __init__(
        self,
        request: DistillRequest,
        corpus: TrainingText,
        shape: "Shape | None",
        settings: "LoopSettings",
        device: str,
        ranks: "Ranks",
        record: dict[str, Any],
    ) -> None:
        import torch

        from capgap.evaluate.heldout import heldout_set
        from capgap.models.build import load_model
        from capgap.models.parallel import parallelize
        from capgap.train.learner import Learner

        self.request = request
        self.corpus = corpus
        self.settings = settings
        self.device = device
        self.ranks = ranks
        self.record = record
        self.heldout = heldout_set(
            corpus.heldout_documents(), corpus.marks, corpus.window, corpus.vocabulary
        )
        self.teacher, self.teacher_parameters = None, 0
        if request.teacher is not None:
            found = _teacher(request, request.teacher, corpus, device, ranks)
            self.teacher, self.teacher_parameters = found
        self.steps = request.tokens // request.settings.training.batch_tokens
        self.learners: list[Learner] = []
        models = [load_model(path, dtype=torch.float32) for path in request.students]
        if shape is not None:
            models.append(_new_model(shape, corpus, request.seed))
        for name, model in zip(request.names(), models, strict=True):
            rate = request.learning_rate or _auto_rate(model, is_new=name == request.new)
            alpha = 0.0 if self.teacher is None else request.settings.training.alpha
            learner = Learner(name, model, self.steps, rate, alpha)
            parallelize(learner.parts, ranks, torch.device(device))
            self.learners.append(learner)
        self.last_losses: dict[str, HeldoutLoss | MixedLoss] = {}

    def train(self, say: Callable[[str], None], should_stop: Callable[[], bool]) -> None:
        from capgap.distill.teacher import OnlineTeacher
        from capgap.models.parallel import release
        from capgap.train.loop import train

        if self.teacher is not None:
            say(f"teacher: computes in {self.teacher.dtype}")
        if self.settings.document_mask:
            online = [self.teacher.parts] if isinstance(self.teacher, OnlineTeacher) else []
            for parts in (*online, *(one.parts for one in self.learners)):
                parts.check_documents()
                release(parts)
        if isinstance(self.teacher, OnlineTeacher):
            name = str(self.request.teacher)
            warn_of_beginning(self.teacher.parts, self.corpus, name, say, self.ranks)
        if "before" not in self.record:
            self._record(before={one.id: self._evaluate(one).as_dict() for one in self.learners})

        def heldout_loss(learner: "Learner") -> float:
            self.last_losses[learner.id] = self._evaluate(learner)
            return self.last_losses[learner.id].loss

        peak = _peak(self.settings, self.device) * self.ranks.world
        request = self.request
        with MetricsFile(request.out, request.track, request.asked(), say) as metrics:
            lines = StepLines(
                metrics, tokens=request.tokens, flops=self._token_flops(), peak=peak, say=say
            )
            train(
                self.learners,
                self.corpus,
                self.settings,
                teacher=self.teacher,
                checkpoint_folder=self._checkpoints,
                should_stop=should_stop,
                on_step=lines.add if self.ranks.is_first else lambda progress: None,
                heldout_loss=None if self.settings.heldout_steps is None else heldout_loss,
                ranks=self.ranks,
            )

    def finish(self) -> None:
        """The students as folders, and the record."""
        from capgap.machine import machine, versions
        from capgap.train.learner import NOT_FINITE

        students = {}
        trained = "models" if self.teacher is None else "students"
        for one in self.learners:
            loss = None
            if one.failure is None:
                loss = self.last_losses.get(one.id) or self._evaluate(one)
                if not math.isfinite(loss.loss):
                    loss, one.failure = None, NOT_FINITE
            students[one.id] = {
                "folder": None if one.failure else self._save(one, trained),
                "failure": one.failure,
                "parameters": _total(one.model),
                "non_embedding": _non_embedding(one.model),
                "learning_rate": one.learning_rate,
                "heldout": None if loss is None else loss.as_dict(),
                "curve": one.curve,
            }
        batch_tokens = self.request.settings.training.batch_tokens
        self._record(
            finished=True,
            steps=self.steps,
            flops=self._token_flops() * self.steps * batch_tokens,
            sources=sources_read(self.corpus, self.steps * batch_tokens),
            after=students,
            best=self._best(),
            teacher_dtype=None if self.teacher is None else self.teacher.dtype,
            processes=self.ranks.world,
            versions=versions(),
            machine=machine(self.device, None),
        )
        if self.ranks.is_first:
            shutil.rmtree(self._checkpoints, ignore_errors=True)

    def _best(self) -> dict[str, Any] | None:
        """The students of the checkpoint with the lowest held-out loss, where it is not the last;
        None where no loss was taken on the way."""
        from capgap.train.loop import restore_best

        step = restore_best(self.learners, self._checkpoints, self.ranks)
        if step is None:
            return None
        sound = [one for one in self.learners if one.failure is None and step < self.steps]
        students = {
            one.id: {"folder": self._save(one, "best"), "heldout": self._evaluate(one).as_dict()}
            for one in sound
        }
        return {"step": step, "students": students}

    @property
    def _checkpoints(self) -> Path:
        return self.request.out / "checkpoints"

    def _evaluate(self, learner: "Learner") -> "HeldoutLoss | MixedLoss":
        from capgap.evaluate.heldout import evaluate_heldout, mixed_loss

        found = evaluate_heldout(learner.parts, self.heldout, self.ranks)
        if not isinstance(self.corpus, Mixture):
            return found
        return mixed_loss(found, self.corpus.heldout_counts(), self.corpus.share_of)

    def _save(self, learner: "Learner", name: str) -> str:
        from capgap.models.build import save_model
        from capgap.models.parallel import whole_weights
        from capgap.models.stored import LICENCES, copy_companions, local_folder
        from capgap.stages.prune import PROVENANCE

        folder = self.request.out / name / learner.id
        weights = whole_weights(learner.parts, self.ranks)
        if self.ranks.is_first:
            save_model(learner.model, folder, self.corpus.tokenizer, weights=weights)
            # where it comes from, and on what terms, goes with it
            given = {Path(student).name: student for student in self.request.students}
            if learner.id in given:
                copy_companions(local_folder(given[learner.id]), folder, (PROVENANCE, *LICENCES))
        return str(folder)

    def _token_flops(self) -> int:
        from capgap.sizes import forward_flops, training_flops

        students = sum(training_flops(_total(one.model), 1) for one in self.learners)
        return students + forward_flops(self.teacher_parameters, 1)

    def _record(self, **values: Any) -> None:
        self.record |= values
        if self.ranks.is_first:
            write_json_atomically(self.request.record, self.record)


def check_request(request: DistillRequest) -> None:
    """UserError for what can be told wrong without models and text."""
    request.names()
    window, training = request.window, request.settings.training
    check_positive("--window", window)
    check_positive("--learning-rate", request.learning_rate)
    for name, tokens in (
        ("training.batch_tokens", training.batch_tokens),
        ("training.micro_batch_tokens", training.micro_batch_tokens),
    ):
        if tokens is not None and tokens % window:
            raise UserError(f"{name} {tokens} is not a multiple of --window {window}")
    if request.tokens < training.batch_tokens:
        raise UserError(
            f"--tokens {request.tokens} is less than one batch of {training.batch_tokens}"
        )
    if request.heldout_steps is not None and request.heldout_steps < 1:
        raise UserError(f"--heldout-steps {request.heldout_steps} must be above 0")
    without_effect = [name for name in ABOUT_A_TEACHER if name in training.model_fields_set]
    if request.teacher is None and without_effect:
        raise UserError(f"training.{without_effect[0]} is about a teacher, and there is none here")


def _settings(request: DistillRequest, corpus: TrainingText, device: str) -> "LoopSettings":
    from capgap.train.settings import loop_settings

    return loop_settings(
        request.settings.training,
        request.settings.run,
        corpus,
        data_seed=DATA_SEED + request.seed,
        device=device,
        heldout_steps=request.heldout_steps,
    )


def _say_nothing(text: str) -> None:
    """For all ranks but the first."""


def _new_shape(request: DistillRequest, corpus: TrainingText) -> "Shape | None":
    """Of the new model, which reads one window and no more; UserError as `ladder_shape`."""
    from capgap.models.shape import ladder_shape

    if request.size is None:
        return None
    return ladder_shape(
        request.architecture,
        request.size,
        vocabulary=corpus.vocabulary,
        positions=request.window,
    )


def _new_model(shape: "Shape", corpus: TrainingText, seed: int) -> Any:
    from capgap.models.build import build_model

    model = build_model(shape, seed=seed)
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(corpus.tokenizer, name))
    return model


def _auto_rate(model: Any, *, is_new: bool) -> float:
    from capgap.train.learning_rate import auto_learning_rate

    return auto_learning_rate(_non_embedding(model), is_cut=not is_new)


def _teacher(
    request: DistillRequest, name: str, corpus: TrainingText, device: str, ranks: "Ranks"
) -> "tuple[TeacherSource, int]":
    """The teacher, and the parameters that work while students learn: none where it is cached."""
    from capgap.distill.cache import CachedTeacher
    from capgap.distill.teacher import load_teacher
    from capgap.machine import resolve_device
    from capgap.models.identity import model_hash
    from capgap.train.precision import teacher_dtype

    training, run = request.settings.training, request.settings.run
    if request.cache is not None:
        cached = CachedTeacher(
            request.cache,
            corpus,
            document_mask=training.document_mask,
            teacher_hash=model_hash(name),
        )
        cached.check(training.temperature, training.divergence)
        return cached, 0
    if ranks.world > 1 and run.teacher_device != "same":
        raise UserError(
            f"run.teacher_device {run.teacher_device!r}: with several processes the teacher is "
            "sharded over the devices of its students; leave it at 'same'"
        )
    place = device if run.teacher_device == "same" else resolve_device(run.teacher_device)
    teacher = load_teacher(
        name,
        place,
        dtype=teacher_dtype(training.teacher_dtype, training.precision, place),
        offload=run.teacher_offload,
        ranks=ranks,
    )
    return teacher, teacher.parameters


def _peak(settings: "LoopSettings", device: str) -> float:
    import torch

    from capgap.train.peak import matrix_peak

    return matrix_peak(torch.device(device), settings.autocast_dtype or torch.float32)


def _total(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _non_embedding(model: Any) -> int:
    from torch import nn

    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    weights = {
        id(one.weight): one.weight.numel() for one in (*tables, model.get_output_embeddings())
    }
    return _total(model) - sum(weights.values())
