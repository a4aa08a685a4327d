"""What was wrong by counting and has been mended, each as it measures now."""

import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from capgap.distill.teacher import Batch, OnlineTeacher
from capgap.models.build import build_model
from capgap.models.shape import ladder_shape
from capgap.sweep.stages import Sweep
from capgap.train.checkpoint import Checkpoint, CheckpointWriter, training_tensors
from capgap.train.learner import Learner, make_optimizer
from capgap.train.loop import LoopSettings, Progress, train
from capgap.train.metrics import StageClock
from capgap.train.settings import autocast_dtype, teacher_dtype
from card import Place
from card.limits import best_seconds, toy_compiler, wait
from card.steps import SHAPES, Work, random_corpus, shrunk
from peers.measure import make_model

# What CUDA's debug mode says of every time that its host waits
SYNCHRONIZED = "called a synchronizing CUDA operation"


def teacher_dtypes(place: Place) -> dict[str, Any]:
    """A pass of a 0.5B teacher whose weights are stored in fp32."""
    work = Work((SHAPES["0.5b"],), SHAPES["0.5b"])
    work = shrunk(work) if place.is_toy else work
    rows = 2 if place.is_toy else 8
    windows = torch.zeros(rows, work.window + 1, dtype=torch.int64, device=place.device)
    taken = teacher_dtype("auto", "auto", place.device)
    figures: dict[str, Any] = {"teacher_dtype auto": taken}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        teacher = OnlineTeacher(make_model(work.students[0], place.device, dtype, seed=0))
        batch = Batch(windows)
        call = partial(teacher.signal, batch, work.students[0].vocabulary)
        figures[f"{name}, ms"] = 1000 * best_seconds(place, call, repeats=4)
    figures["fp32 against bf16"] = figures["fp32, ms"] / figures["bf16, ms"]
    return figures


def checkpoints(place: Place) -> dict[str, Any]:
    """How long training waits, how long is written, and products beside the writing."""
    work = Work((replace(SHAPES["0.5b"], layers=4),), None)
    work = shrunk(work) if place.is_toy else work
    model = make_model(work.students[0], place.device, torch.float32, seed=0)
    optimizer = make_optimizer(model, weight_decay=0.1, decay_embeddings=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    tensors = training_tensors(model, optimizer, "student")
    figures: dict[str, Any] = {"GB": sum(one.nbytes for one in tensors.values()) / 1e9}
    side = 64 if place.is_toy else 8192
    product = torch.randn(side, side, device=place.device, dtype=torch.bfloat16)
    alone = best_seconds(place, lambda: product @ product)
    device = torch.device(place.device)
    with (
        tempfile.TemporaryDirectory() as folder,
        CheckpointWriter(Path(folder), keep=1, seconds=0.0, share=0.02, device=device) as writer,
    ):
        # the first one takes the host's memory
        for name in ("first", "second"):
            began = time.perf_counter()
            writer.save(Checkpoint(1, {}, {}), tensors)
            figures[f"{name}: training waits, s"] = time.perf_counter() - began
            beside = []
            while not writer.is_written():
                start = time.perf_counter()
                product @ product
                wait(place)
                beside.append(time.perf_counter() - start)
            if beside:
                mean = sum(beside) / len(beside)
                figures[f"{name}: a product beside it, against alone"] = mean / alone
                figures[f"{name}: the longest one, s"] = max(beside)
            writer.finish()
            figures[f"{name}: written after, s"] = time.perf_counter() - began
    return figures


def compiled(place: Place) -> dict[str, Any]:
    """Versions of the layers that torch made, and whether it gave any up."""
    from torch._dynamo.utils import counters

    sizes = (8_000, 9_000) if place.is_toy else range(8_000_000, 24_000_000, 4_000_000)
    shapes = [ladder_shape("llama", size, vocabulary=1024, positions=256) for size in sizes]
    above = ladder_shape("llama", 2 * sizes[-1], vocabulary=1024, positions=256)
    work = Work(tuple(shapes), above, window=32 if place.is_toy else 256)
    work = replace(work, tokens=6 * work.window)
    precision = autocast_dtype("auto", place.device)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), toy_compiler(place):
        warnings.simplefilter("ignore")
        corpus = random_corpus(Path(folder) / "corpus", work, 8)
        for asked in ("off", "on"):
            moments: list[float] = []

            def on_step(progress: Progress, moments: list[float] = moments) -> None:
                wait(place)
                moments.append(time.perf_counter())

            learners = [
                Learner(str(number), build_model(shape, seed=number).to(place.device), 8, 1e-4, 0.5)
                for number, shape in enumerate(shapes)
            ]
            teacher = OnlineTeacher(build_model(above, seed=9).to(place.device))
            settings = LoopSettings(6, 4, 0, autocast_dtype=precision, compile=asked)
            counters.clear()
            with mock.patch("capgap.train.compiling.missing", return_value=None):
                train(learners, corpus, settings, teacher=teacher, on_step=on_step)
            seconds = (moments[-1] - moments[2]) / (len(moments) - 3)
            figures[f"compile {asked}: tokens/s"] = work.tokens * len(shapes) / seconds
    figures["versions of the layers"] = counters["stats"]["unique_graphs"]
    figures["versions needed"] = 2 * (len(shapes) + 1)
    figures["given up"] = sum(
        count for reason, count in counters["unimplemented"].items() if "recompile_limit" in reason
    )
    return figures


def waits(place: Place) -> dict[str, Any]:
    """What CUDA says of its host within steps; stages of the clock beside the wall's time."""
    work = Work((SHAPES["0.5b"],), SHAPES["1b"], tokens=8192)
    work = shrunk(work) if place.is_toy else work
    assert work.teacher is not None
    steps = 8
    clock = StageClock(place.device)
    moments: list[float] = []

    def on_step(progress: Progress) -> None:
        if not place.is_gpu:
            return
        if progress.step == 3:
            torch.cuda.set_sync_debug_mode("warn")
        elif progress.step == steps - 1:
            torch.cuda.set_sync_debug_mode("default")

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        corpus = random_corpus(Path(folder) / "corpus", work, steps)
        model = make_model(work.students[0], place.device, torch.float32, seed=0)
        precision = autocast_dtype("auto", place.device)
        dtype = precision or torch.float32
        teacher = OnlineTeacher(make_model(work.teacher, place.device, dtype, seed=1))
        rows = work.tokens // work.window
        settings = LoopSettings(rows, rows, 0, autocast_dtype=precision)
        wait(place)
        moments.append(time.perf_counter())
        learner = Learner("student", model, steps, 1e-4, 0.5)
        train([learner], corpus, settings, teacher=teacher, clock=clock, on_step=on_step)
        stages = clock.seconds
        moments.append(time.perf_counter())
    told = [str(one.message) for one in seen if SYNCHRONIZED in str(one.message)]
    figures: dict[str, Any] = {"waits a step": len(told) / (steps - 4), "where": told[:5]}
    figures |= {f"{name}, s": seconds for name, seconds in stages.items()}
    figures["stages of the wall's time"] = sum(stages.values()) / (moments[1] - moments[0])
    return figures


SWEEP = """
name = "sharing"
scoring_tokens = 512
baselines = "best"
[corpus]
source = "{source}"
vocabulary = {vocabulary}
heldout_tokens = 5000
[teachers]
sizes = {teachers}
tokens = {tokens}
[students]
sizes = {students}
tokens = [{budget}]
[training]
batch_tokens = {batch}
[run]
device = "{device}"
workers = {workers}
"""
# each long enough to be measured alone, and then beside one that loads for ten seconds
SMALL = {"source": "stdlib", "vocabulary": 2048, "teachers": ["1M", "1.5M", "2.2M"]}
SMALL |= {"students": ["600k"], "tokens": 9_000_000, "budget": 500_000, "batch": 8192}
TOY = {"source": "pydoc", "vocabulary": 300, "teachers": ["14k", "20k"]}
TOY |= {"students": ["8k"], "tokens": 12_800, "budget": 12_800, "batch": 256}


def sharing(place: Place) -> dict[str, Any]:
    """A sweep of small models one after the other, and with as many at once as it finds best."""
    # shorter than a user's, whose tasks are longer
    settle = mock.patch("capgap.sweep.sharing.SETTLE_SECONDS", 4.0)
    measure = mock.patch("capgap.sweep.sharing.MEASURE_SECONDS", 4.0)
    report = mock.patch("capgap.sweep.runner.write_report", lambda out: out / "report.html")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, settle, measure, report:
        for name in ("one at a time", "as many as are best"):
            # of a CPU all cores at once, each with a thread
            workers = "1" if name == "one at a time" and place.is_gpu else '"auto"'
            is_small = place.is_gpu and not place.is_toy
            asked = (SMALL if is_small else TOY) | {"workers": workers}
            text = SWEEP.format(**asked, device=place.device.partition(":")[0])
            recipe = Path(folder, f"{name}.toml")
            recipe.write_text(text.replace("'", '"'))
            said: list[str] = []
            told = Sweep(recipe=str(recipe), out=recipe.with_suffix("")).run(say=said.append)
            figures[f"{name}, s"] = told["wall_seconds"]
            decided = [one for one in said if "times the work" in one]
    figures["times as fast"] = figures["one at a time, s"] / figures["as many as are best, s"]
    return figures | {"decided": "; ".join(decided)}
