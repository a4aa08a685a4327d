"""The stage `distill`: students learn from one teacher, or from what a cache keeps of it."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capgap.config import StageSettings
from capgap.corpus.tokens import Corpus
from capgap.errors import UserError
from capgap.stages.inputs import check_model, open_corpus

if TYPE_CHECKING:
    from capgap.distill.teacher import TeacherSource
    from capgap.train.loop import LoopSettings, Progress

RECORD = "distill.json"
METRICS = "metrics.jsonl"
SAID_EVERY = 10.0  # seconds
DATA_SEED = 2_000_003


@dataclass(frozen=True)
class DistillRequest:
    """Who learns from whom, on which tokens, and how. `learning_rate` None is the rule per size."""

    teacher: str
    students: tuple[str, ...]
    corpus: Path
    out: Path
    tokens: int
    window: int = 512
    cache: Path | None = None
    learning_rate: float | None = None
    seed: int = 0
    settings: StageSettings = field(default_factory=StageSettings)

    def names(self) -> list[str]:
        """The students' names in the output folder."""
        names = [Path(student).name for student in self.students]
        if len(set(names)) < len(names):
            raise UserError(f"two students have one name among {', '.join(names)}: rename a folder")
        return names

    def asked(self) -> dict[str, Any]:
        """What a run in the same folder must agree on to be continued."""
        return {
            "teacher": self.teacher,
            "students": list(self.students),
            "tokens": self.tokens,
            "window": self.window,
            "cache": None if self.cache is None else str(self.cache),
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "training": self.settings.training.model_dump(mode="json"),
        }


def run_distill(
    request: DistillRequest,
    *,
    say: Callable[[str], None] = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains the students and writes each as a Hugging Face folder; returns distill.json.

    Stopped or killed, the same call continues from the last checkpoint. UserError for the user's
    mistakes, before any work where they can be known; Interrupted when `should_stop` said so.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from capgap.evaluate.heldout import evaluate_heldout, heldout_set
    from capgap.machine import machine, resolve_device, versions
    from capgap.models.build import load_model, save_model
    from capgap.sizes import forward_flops, training_flops
    from capgap.train.learner import Learner
    from capgap.train.learning_rate import auto_learning_rate
    from capgap.train.loop import train

    transformers_logging.disable_progress_bar()
    device = resolve_device(request.settings.run.device)
    names = request.names()
    corpus = open_corpus(request.corpus, request.window)
    for name in (request.teacher, *request.students):
        check_model(name, corpus)
    settings = _settings(request, device)
    steps = request.tokens // request.settings.training.batch_tokens
    record = _begin(request, corpus)
    if record.get("finished"):
        return record
    heldout = heldout_set(corpus.heldout_documents(), corpus.window, corpus.vocabulary)
    teacher, teacher_parameters = _teacher(request, corpus, device)
    learners = []
    for name, path in zip(names, request.students, strict=True):
        model = load_model(path, dtype=torch.float32).to(device)
        size = _non_embedding(model)
        rate = request.learning_rate or auto_learning_rate(size, is_cut=True)
        learners.append(Learner(name, model, steps, rate, request.settings.training.alpha))
    if "before" not in record:
        record["before"] = {
            one.id: evaluate_heldout(one.model, heldout).as_dict() for one in learners
        }
        _write(request.out / RECORD, record)
    flops = sum(training_flops(_total(one.model), 1) for one in learners)
    flops += forward_flops(teacher_parameters, 1)
    with _Metrics(request, flops, _peak(settings, device), say) as metrics:
        train(
            learners,
            corpus,
            settings,
            teacher=teacher,
            checkpoint_folder=request.out / "checkpoints",
            should_stop=should_stop,
            on_step=metrics.add,
        )
    students = {}
    for one in learners:
        folder = request.out / "students" / one.id
        if one.failure is None:
            save_model(one.model, folder, corpus.tokenizer)
        students[one.id] = {
            "folder": None if one.failure else str(folder),
            "failure": one.failure,
            "parameters": _total(one.model),
            "non_embedding": _non_embedding(one.model),
            "learning_rate": one.learning_rate,
            "heldout": None if one.failure else evaluate_heldout(one.model, heldout).as_dict(),
            "curve": one.curve,
        }
    record |= {
        "finished": True,
        "steps": steps,
        "flops": flops * steps * request.settings.training.batch_tokens,
        "after": students,
        "versions": versions(),
        "machine": machine(device, None),
    }
    _write(request.out / RECORD, record)
    shutil.rmtree(request.out / "checkpoints", ignore_errors=True)
    return record


def _settings(request: DistillRequest, device: str) -> "LoopSettings":
    from capgap.train.settings import loop_settings

    window, training = request.window, request.settings.training
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
    return loop_settings(
        training,
        window=window,
        data_seed=DATA_SEED + request.seed,
        device=device,
        checkpoint_seconds=request.settings.run.checkpoint_seconds,
    )


def _begin(request: DistillRequest, corpus: Corpus) -> dict[str, Any]:
    """The record of this run, found or new; UserError where the folder holds something else."""
    asked = request.asked() | {"corpus_hash": corpus.corpus_hash}
    path = request.out / RECORD
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        for key, value in asked.items():
            if found["asked"].get(key) != value:
                raise UserError(
                    f"{request.out} holds a run with another {key} ({found['asked'].get(key)}, now "
                    f"{value}): choose another --out"
                )
        return found
    if request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
        raise UserError(f"{request.out} is no empty folder and no run: choose another --out")
    request.out.mkdir(parents=True, exist_ok=True)
    record = {"schema": 1, "finished": False, "asked": asked}
    _write(path, record)
    return record


def _teacher(request: DistillRequest, corpus: Corpus, device: str) -> "tuple[TeacherSource, int]":
    """The teacher, and the parameters that work while students learn: none where it is cached."""
    from capgap.distill.cache import CachedTeacher
    from capgap.distill.teacher import load_teacher
    from capgap.machine import resolve_device
    from capgap.models.identity import model_hash

    training, run = request.settings.training, request.settings.run
    if request.cache is not None:
        cached = CachedTeacher(
            request.cache,
            corpus,
            document_mask=training.document_mask,
            teacher_hash=model_hash(request.teacher),
        )
        cached.check(training.temperature, training.divergence)
        return cached, 0
    teacher = load_teacher(
        request.teacher,
        device if run.teacher_device == "same" else resolve_device(run.teacher_device),
        dtype=training.teacher_dtype,
        offload=run.teacher_offload,
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


def _write(path: Path, record: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(aside, path)


class _Metrics:
    """One JSON line a step, and now and then a line for people. A context manager.

    `flops` a token by 6 S + 2 T; `peak` FLOPs a second of the device.
    """

    def __init__(
        self, request: DistillRequest, flops: int, peak: float, say: Callable[[str], None]
    ) -> None:
        self.path = request.out / METRICS
        self.request = request
        self.flops = flops
        self.peak = peak
        self.say = say
        self.stream: Any = None
        self.said = time.monotonic()

    def __enter__(self) -> "_Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            self.stream.close()

    def add(self, progress: "Progress") -> None:
        if not progress.reports:
            return
        reports = {name: dict(vars(report)) for name, report in progress.reports.items()}
        first = next(iter(reports.values()))
        step, tokens = first["step"], first["tokens"]
        if self.stream is None:
            self._keep_before(step)
            self.stream = self.path.open("a", buffering=1)
        rate = None if progress.seconds is None else tokens / progress.seconds
        for report in reports.values():
            del report["step"], report["tokens"]
        line = {
            "step": step,
            "tokens": (step + 1) * tokens,
            "tokens_per_second": rate,
            "utilisation": None if rate is None else rate * self.flops / self.peak,
            "students": reports,
        }
        self.stream.write(json.dumps(line) + "\n")
        if time.monotonic() - self.said < SAID_EVERY:
            return
        self.said = time.monotonic()
        losses = ", ".join(
            f"{name}: CE {report['ce']:.3f}"
            + ("" if report["kl"] is None else f" KL {report['kl']:.3f}")
            for name, report in reports.items()
        )
        speed = (
            "" if rate is None else f", {rate:,.0f} tokens/s ({line['utilisation']:.0%} of peak)"
        )
        self.say(f"{line['tokens'] / self.request.tokens:.0%}{speed}; {losses}")

    def _keep_before(self, step: int) -> None:
        """A run that goes on from a checkpoint takes some steps again."""
        if not self.path.exists():
            return
        kept = []
        for text in self.path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                break  # cut off by a kill
            if line["step"] >= step:
                break
            kept.append(text + "\n")
        self.path.write_text("".join(kept))
