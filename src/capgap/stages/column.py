"""The work of `train` and `distill`: one column, with its record and metrics."""

import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from capgap.artifact import begun, check_free, read_json, write_json
from capgap.corpus.text import Text
from capgap.distill.cache import CachedTeacher
from capgap.distill.teacher import OnlineTeacher, TeacherSource
from capgap.errors import UserError
from capgap.machine import machine, resolve_device, started
from capgap.models.build import build_model, load_model, shape_of
from capgap.models.identity import count_parameters, model_hash
from capgap.models.parallel import joined
from capgap.models.shape import Shape, ladder_shape, ladder_size
from capgap.models.stored import (
    LICENCES,
    RECORDS,
    copy_companions,
    empty_model,
    local_folder,
    read_config,
)
from capgap.sizes import format_count, forward_flops, training_flops
from capgap.stage import Say, ShouldStop
from capgap.stages.distill import Training
from capgap.stages.inputs import check_model, open_text, warn_of_beginning, warn_of_epochs
from capgap.stages.prune import PROVENANCE
from capgap.stages.step_lines import MetricsFile, StepLines
from capgap.stages.trainer import STUDENT_SEED, Loss, Trainer
from capgap.train.learner import Learner
from capgap.train.learning_rate import auto_learning_rate
from capgap.train.loop import restore_best
from capgap.train.settings import matrix_peak, resolved_precision
from capgap.train.trackers import check_trackers


def train_column(request: Training, say: Say, should_stop: ShouldStop) -> dict[str, Any]:
    """Trains the models and writes each as a Hugging Face folder; returns the record.

    UserError for the user's mistakes, before any work where they can be known; Interrupted when
    `should_stop` said so.
    """
    device = resolve_device(request.running.device)
    check_trackers(request.track)
    if not request.record_file.exists():
        check_free(request.record_file)
    first = request.teacher or next(iter(request.begun_with), None)
    into = request.out / "corpus"
    tell = (lambda line: None) if started()[0] else say
    given, reading = request.corpus, request.reading
    text = open_text(given, request.window, into=into, tokenizer=first, say=tell, **reading)
    for name in (request.teacher, *request.begun_with):
        if name is not None:
            check_model(name, text)
    shape = None
    if request.size is not None:
        # reads one window and no more
        limits = {"vocabulary": text.vocabulary, "positions": request.window}
        size = ladder_size(request.architecture, request.size, **limits)
        shape = ladder_shape(request.architecture, size, **limits)
    identity = request.identity() | text.identity
    # its hash tells more than its folder, which may move
    del identity["corpus"]
    trainer = Trainer(text, request.training, request.running, device, should_stop=should_stop)
    data_seed = STUDENT_SEED + request.seed
    windows = trainer.settings(data_seed).batch_windows
    with joined(device, windows, request.running.shard_size) as ranks, ExitStack() as stack:
        trainer.ranks = ranks
        record = ranks.first(lambda: stack.enter_context(begun(request.record_file, identity)))
        if not record["finished"]:
            # what `auto` became when it began holds on every machine that it goes on with
            resolved = record.setdefault(
                "resolved", resolved_precision(request.training, request.running, device)
            )
            trainer.training = request.training.model_copy(update=resolved)
            if ranks.is_first:
                trainer.say = say
            warn_of_epochs(text, request.tokens, trainer.say)
            run = _Run(request, trainer, record, shape)
            run.begin()
            try:
                run.train()
            except UserError as error:
                # a damaged window of a cache, say: one rank may meet it alone
                error.rank = ranks.rank
                raise
        return record


class _Run:
    """One call's models, and what it adds to the record."""

    def __init__(
        self, request: Training, trainer: Trainer, record: dict[str, Any], shape: Shape | None
    ) -> None:
        self.request = request
        self.trainer = trainer
        self.record = record
        self.checkpoints = request.out / "checkpoints"
        self.sources = {Path(model).name: model for model in request.begun_with}
        self.teacher = _teacher(request, trainer)
        models = [load_model(path, dtype=torch.float32) for path in request.begun_with]
        if shape is not None:
            models.append(_new_model(shape, trainer.text, request.seed))
        alpha = 0.0 if self.teacher is None else request.training.alpha
        self.learners = []
        for name, model in zip(request.names, models, strict=True):
            rate = request.learning_rate
            if rate == "auto":
                rate = auto_learning_rate(count_parameters(model)[0], is_cut=name != request.new)
            self.learners.append(trainer.learner(name, model, request.tokens, rate, alpha))

    def begin(self) -> None:
        """The losses before the first step; UserError where the teacher should be the student."""
        request, trainer = self.request, self.trainer
        if self.teacher is not None:
            trainer.say(f"teacher: computes in {self.teacher.dtype}")
        if isinstance(self.teacher, OnlineTeacher):
            name = str(request.teacher)
            warn_of_beginning(self.teacher.parts, trainer.text, name, trainer.say, trainer.ranks)
        if "before" not in self.record:
            before = {one.id: trainer.evaluate(one.parts).as_dict() for one in self.learners}
            teacher = self._about_teacher()
            if teacher is not None:
                self._compare(teacher, before)
            self._record(before=before, teacher=teacher)

    def _compare(self, teacher: dict[str, Any], before: dict[str, dict[str, Any]]) -> None:
        """Tells where a student is larger or better than its teacher; UserError if it is both."""
        loss = teacher["heldout"] and teacher["heldout"]["loss"]
        for one in self.learners:
            size, own = count_parameters(one.model)[0], before[one.id]["loss"]
            is_larger = size > teacher["non_embedding"]
            is_better = loss is not None and own < loss
            sizes = " and ".join(map(format_count, (size, teacher["non_embedding"])))
            losses = f"{own:.4f} and {'unknown' if loss is None else format(loss, '.4f')}"
            facts = f"{sizes} non-embedding parameters, held-out loss {losses}"
            if is_larger and is_better:
                if self.trainer.ranks.is_first:
                    # nothing was trained, so the folder stays free
                    self.request.record_file.unlink()
                raise UserError(
                    f"{one.id} is larger and better than its teacher ({facts}): they seem to be "
                    f"swapped, so ask for `capgap distill {self.sources[one.id]} "
                    f"{self.request.teacher}`"
                )
            if is_larger or is_better:
                what = "is larger" if is_larger else "reads the held-out text better"
                self.trainer.say(f"warning: {one.id} {what} than its teacher ({facts})")

    def train(self) -> None:
        request, trainer = self.request, self.trainer
        data_seed = STUDENT_SEED + request.seed
        dtype = trainer.settings(data_seed).autocast_dtype or torch.float32
        peak = matrix_peak(torch.device(trainer.device), dtype) * trainer.ranks.world
        with MetricsFile(request.out, request.track, request.identity(), trainer.say) as metrics:
            share = self._token_flops() / peak
            lines = StepLines(metrics, share, tokens=request.tokens, say=trainer.say)
            losses = trainer.train(
                self.learners,
                self.teacher,
                data_seed=data_seed,
                checkpoints=self.checkpoints,
                on_step=lines.add if trainer.ranks.is_first else lambda progress: None,
                heldout_steps=request.heldout_steps,
            )
        self._finish(losses)

    def _finish(self, losses: dict[str, Loss | None]) -> None:
        """The students as folders, and the record."""
        request, trainer = self.request, self.trainer
        trained = "models" if self.teacher is None else "students"
        heldout = {name: loss and loss.as_dict() for name, loss in losses.items()}
        students = {
            one.id: {
                "folder": None if one.failure else self._save(one, trained),
                "failure": one.failure,
                **_sizes(one.model),
                "architecture": one.model.config.model_type,
                "cut_from": self._cut_from(one.id),
                "learning_rate": one.learning_rate,
                "alpha": one.alpha,
                "heldout": heldout[one.id],
                "curve": one.curve,
            }
            for one in self.learners
        }
        steps = request.tokens // request.training.batch_tokens
        tokens = steps * request.training.batch_tokens
        self._record(
            **trainer.facts(),
            finished=True,
            steps=steps,
            tokens=tokens,
            flops=self._token_flops() * tokens,
            sources=trainer.text.read_of_sources(tokens),
            after=students,
            best=self._best(steps),
            teacher_dtype=None if self.teacher is None else self.teacher.dtype,
            processes=trainer.ranks.world,
            machine=machine(trainer.device, None),
        )
        if trainer.ranks.is_first:
            self._tell_lineage()
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _tell_lineage(self) -> None:
        """The record in every model's folder, which may leave this one: of that model alone."""
        best = (self.record["best"] or {}).get("students", {})
        for models in (self.record["after"], best):
            for name, one in models.items():
                if one["folder"] is not None:
                    own = {when: {name: self.record[when][name]} for when in ("before", "after")}
                    write_json(
                        Path(one["folder"]) / self.request.record_file.name, self.record | own
                    )

    def _best(self, steps: int) -> dict[str, Any] | None:
        """The students of the checkpoint with the lowest held-out loss, where it is not the last;
        None where no loss was taken on the way."""
        step = restore_best(self.learners, self.checkpoints, self.trainer.ranks)
        if step is None:
            return None
        students = {
            one.id: {
                "folder": self._save(one, "best"),
                "heldout": self.trainer.evaluate(one.parts).as_dict(),
            }
            for one in self.learners
            if one.failure is None and step < steps
        }
        return {"step": step, "students": students}

    def _about_teacher(self) -> dict[str, Any] | None:
        """Which one, its size, and its own held-out loss where it runs here."""
        name = self.request.teacher
        if name is None:
            return None
        heldout = None
        if isinstance(self.teacher, OnlineTeacher):
            heldout = self.trainer.evaluate(self.teacher.parts).as_dict()
        return {
            # it reads all weights, and the first process alone writes
            "hash": model_hash(name) if self.trainer.ranks.is_first else None,
            **_sizes(empty_model(read_config(name))),
            "heldout": heldout,
        }

    def _cut_from(self, student: str) -> str | None:
        """The hash of the model that a student was cut out of."""
        folder = local_folder(self.sources[student]) if student in self.sources else None
        if folder is None or not (folder / PROVENANCE).is_file():
            return None
        return str(read_json(folder / PROVENANCE)["teacher_hash"])

    def _save(self, learner: Learner, name: str) -> str:
        folder = self.request.out / name / learner.id
        self.trainer.save(learner, folder)
        if self.trainer.ranks.is_first and learner.id in self.sources:
            # where it comes from, and on what terms, goes with it
            source = local_folder(self.sources[learner.id])
            copy_companions(source, folder, (*RECORDS, *LICENCES))
        return str(folder)

    def _token_flops(self) -> int:
        students = sum(training_flops(count_parameters(one.model)[1], 1) for one in self.learners)
        # who learns from the text alone has no use for the teacher's passes
        if isinstance(self.teacher, OnlineTeacher) and self.learners[0].alpha > 0:
            return students + forward_flops(self.teacher.parameters, 1)
        return students

    def _record(self, **values: Any) -> None:
        self.record |= values
        if self.trainer.ranks.is_first:
            write_json(self.request.record_file, self.record)


def _teacher(request: Training, trainer: Trainer) -> TeacherSource | None:
    """UserError for a cache of another teacher, text or loss, and as `Trainer.teacher`."""
    if request.teacher is None or request.cache is None:
        return None if request.teacher is None else trainer.teacher(request.teacher)
    training = trainer.training
    cached = CachedTeacher(
        request.cache,
        trainer.text,
        document_mask=training.document_mask,
        teacher_hash=model_hash(request.teacher),
    )
    cached.check(training.temperature, training.divergence)
    return cached


def _new_model(shape: Shape, text: Text, seed: int) -> PreTrainedModel:
    model = build_model(shape, seed=seed)
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(text.tokenizer, name))
    return model


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    """Of what the record says; by part, as `records.Parameters`, is None for an architecture that
    is not known so well."""
    non_embedding, total = count_parameters(model)
    by_part = None
    with suppress(UserError):
        by_part = shape_of(model.config).parameters().as_dict()
    return {"parameters": total, "non_embedding": non_embedding, "parameters_by_part": by_part}
