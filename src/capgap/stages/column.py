"""A column: models that learn from the same windows, from one teacher, a cache of it, or text."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from capgap.corpus.text import Text
from capgap.distill.cache import CachedTeacher
from capgap.distill.teacher import OnlineTeacher, TeacherSource, load_teacher
from capgap.errors import UserError
from capgap.evaluate.losses import evaluate_heldout, heldout_set
from capgap.evaluate.measured import HeldoutLoss, MixedLoss, mixed_loss
from capgap.machine import machine, resolve_device, versions
from capgap.models.build import build_model, load_model, save_model
from capgap.models.identity import model_hash
from capgap.models.parallel import Ranks, joined, parallelize, release, whole_weights
from capgap.models.parts import Parts
from capgap.models.shape import Shape, ladder_shape
from capgap.models.stored import (
    LICENCES,
    copy_companions,
    empty_model,
    local_folder,
    read_config,
)
from capgap.records import write_json_atomically
from capgap.sizes import forward_flops, training_flops
from capgap.stage import Say, ShouldStop
from capgap.stages.inputs import (
    check_model,
    open_text,
    warn_of_beginning,
    warn_of_epochs,
)
from capgap.stages.prune import PROVENANCE
from capgap.stages.run_folder import begin_together
from capgap.stages.step_lines import MetricsFile, StepLines
from capgap.stages.training import Training
from capgap.train.learner import NOT_FINITE, Learner
from capgap.train.learning_rate import auto_learning_rate
from capgap.train.loop import LoopSettings, restore_best, train
from capgap.train.settings import loop_settings, matrix_peak, resolved_precision
from capgap.train.trackers import check_trackers

DATA_SEED = 2_000_003


def train_column(request: Training, say: Say, should_stop: ShouldStop) -> dict[str, Any]:
    """Trains the models and writes each as a Hugging Face folder; returns the record.

    UserError for the user's mistakes, before any work where they can be known; Interrupted when
    `should_stop` said so.
    """
    device = resolve_device(request.running.device)
    check_trackers(request.track)
    corpus = open_text(request.corpus, request.window)
    for name in (request.teacher, *request.begun_with):
        if name is not None:
            check_model(name, corpus)
    shape = _new_shape(request, corpus)
    identity = request.identity() | corpus.identity
    # its hash tells more than its folder, which may move
    del identity["corpus"]
    settings = _settings(request, corpus, device)
    with joined(device, settings.batch_windows) as ranks:
        record = begin_together(request.record_file, identity, ranks)
        if not record["finished"]:
            # what `auto` became when it began holds on every machine that it goes on with
            resolved = record.setdefault(
                "resolved", resolved_precision(request.training, request.running, device)
            )
            training = request.training.model_copy(update=resolved)
            request = request.model_copy(update={"training": training})
            settings = _settings(request, corpus, device)
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
        request: Training,
        corpus: Text,
        shape: Shape | None,
        settings: LoopSettings,
        device: str,
        ranks: Ranks,
        record: dict[str, Any],
    ) -> None:
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
        self.steps = request.tokens // request.training.batch_tokens
        self.learners: list[Learner] = []
        models = [load_model(path, dtype=torch.float32) for path in request.begun_with]
        if shape is not None:
            models.append(_new_model(shape, corpus, request.seed))
        for name, model in zip(request.names, models, strict=True):
            rate = request.learning_rate
            if rate == "auto":
                rate = _auto_rate(model, is_new=name == request.new)
            alpha = 0.0 if self.teacher is None else request.training.alpha
            learner = Learner(name, model, self.steps, rate, alpha)
            parallelize(learner.parts, ranks, torch.device(device))
            self.learners.append(learner)
        self.last_losses: dict[str, HeldoutLoss | MixedLoss] = {}

    def train(self, say: Say, should_stop: ShouldStop) -> None:
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
            before = {one.id: self._evaluate(one.parts).as_dict() for one in self.learners}
            self._record(before=before, teacher=self._about_teacher())

        def heldout_loss(learner: Learner) -> float:
            self.last_losses[learner.id] = self._evaluate(learner.parts)
            return self.last_losses[learner.id].loss

        peak = _peak(self.settings, self.device) * self.ranks.world
        request = self.request
        with MetricsFile(request.out, request.track, request.identity(), say) as metrics:
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
        students = {}
        trained = "models" if self.teacher is None else "students"
        for one in self.learners:
            loss = None
            if one.failure is None:
                loss = self.last_losses.get(one.id) or self._evaluate(one.parts)
                if not math.isfinite(loss.loss):
                    loss, one.failure = None, NOT_FINITE
            students[one.id] = {
                "folder": None if one.failure else self._save(one, trained),
                "failure": one.failure,
                "parameters": _total(one.model),
                "non_embedding": _non_embedding(one.model),
                "architecture": one.model.config.model_type,
                "cut_from": self._cut_from(one.id),
                "learning_rate": one.learning_rate,
                "heldout": None if loss is None else loss.as_dict(),
                "curve": one.curve,
            }
        batch_tokens = self.request.training.batch_tokens
        self._record(
            finished=True,
            steps=self.steps,
            flops=self._token_flops() * self.steps * batch_tokens,
            sources=self.corpus.read_of_sources(self.steps * batch_tokens),
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
        step = restore_best(self.learners, self._checkpoints, self.ranks)
        if step is None:
            return None
        sound = [one for one in self.learners if one.failure is None and step < self.steps]
        students = {
            one.id: {
                "folder": self._save(one, "best"),
                "heldout": self._evaluate(one.parts).as_dict(),
            }
            for one in sound
        }
        return {"step": step, "students": students}

    @property
    def _checkpoints(self) -> Path:
        return self.request.out / "checkpoints"

    def _about_teacher(self) -> dict[str, Any] | None:
        """Which one, its size, and its own held-out loss where it runs here."""
        name = self.request.teacher
        if name is None:
            return None
        model = empty_model(read_config(name))
        online = self.teacher if isinstance(self.teacher, OnlineTeacher) else None
        return {
            # it reads all weights, and the first process alone writes
            "hash": model_hash(name) if self.ranks.is_first else None,
            "parameters": _total(model),
            "non_embedding": _non_embedding(model),
            "heldout": None if online is None else self._evaluate(online.parts).as_dict(),
        }

    def _cut_from(self, student: str) -> str | None:
        """The hash of the model that a student was cut out of."""
        folders = {Path(name).name: local_folder(name) for name in self.request.begun_with}
        path = folders[student] / PROVENANCE if student in folders else None
        if path is None or not path.is_file():
            return None
        return str(json.loads(path.read_text())["teacher_hash"])

    def _evaluate(self, parts: Parts) -> HeldoutLoss | MixedLoss:
        found = evaluate_heldout(parts, self.heldout, self.ranks)
        return mixed_loss(found, self.corpus.heldout_counts(), self.corpus.share_of)

    def _save(self, learner: Learner, name: str) -> str:
        folder = self.request.out / name / learner.id
        weights = whole_weights(learner.parts, self.ranks)
        if self.ranks.is_first:
            save_model(learner.model, folder, self.corpus.tokenizer, weights=weights)
            # where it comes from, and on what terms, goes with it
            given = {Path(student).name: student for student in self.request.begun_with}
            if learner.id in given:
                copy_companions(local_folder(given[learner.id]), folder, (PROVENANCE, *LICENCES))
        return str(folder)

    def _token_flops(self) -> int:
        students = sum(training_flops(_total(one.model), 1) for one in self.learners)
        # who learns from the text alone has no use for the teacher's passes
        taught = any(one.alpha > 0 for one in self.learners)
        return students + (forward_flops(self.teacher_parameters, 1) if taught else 0)

    def _record(self, **values: Any) -> None:
        self.record |= values
        if self.ranks.is_first:
            write_json_atomically(self.request.record_file, self.record)


def _settings(request: Training, corpus: Text, device: str) -> LoopSettings:
    return loop_settings(
        request.training,
        request.running,
        corpus,
        data_seed=DATA_SEED + request.seed,
        device=device,
        heldout_steps=request.heldout_steps,
    )


def _say_nothing(text: str) -> None:
    """For all ranks but the first."""


def _new_shape(request: Training, corpus: Text) -> Shape | None:
    """Of the new model, which reads one window and no more; UserError as `ladder_shape`."""
    if request.size is None:
        return None
    return ladder_shape(
        request.architecture,
        request.size,
        vocabulary=corpus.vocabulary,
        positions=request.window,
    )


def _new_model(shape: Shape, corpus: Text, seed: int) -> Any:
    model = build_model(shape, seed=seed)
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(corpus.tokenizer, name))
    return model


def _auto_rate(model: Any, *, is_new: bool) -> float:
    return auto_learning_rate(_non_embedding(model), is_cut=not is_new)


def _teacher(
    request: Training, name: str, corpus: Text, device: str, ranks: Ranks
) -> tuple[TeacherSource, int]:
    """The teacher, and the parameters that work while students learn: none where it is cached."""
    training, run = request.training, request.running
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
        dtype=training.teacher_dtype,
        offload=run.teacher_offload,
        ranks=ranks,
    )
    return teacher, teacher.parameters


def _peak(settings: LoopSettings, device: str) -> float:
    return matrix_peak(torch.device(device), settings.autocast_dtype or torch.float32)


def _total(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _non_embedding(model: Any) -> int:
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    weights = {
        id(one.weight): one.weight.numel() for one in (*tables, model.get_output_embeddings())
    }
    return _total(model) - sum(weights.values())
