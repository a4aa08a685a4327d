"""Training steps through `capgap.train.loop.train`, random weights on random tokens."""

import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Literal

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from capgap.config import find_recipe, load_recipe
from capgap.corpus.text import Text
from capgap.corpus.tokens import Corpus
from capgap.distill.cache import CachedTeacher, CacheFormat, CacheIdentity, CacheWriter, write_cache
from capgap.distill.teacher import OnlineTeacher, TeacherSource
from capgap.machine import GPUS
from capgap.models.shape import Shape, ladder_shape
from capgap.sweep.plan import make_plan
from capgap.train.learner import Learner
from capgap.train.loop import LoopSettings, Progress, train
from capgap.train.memory import LoopMemory
from capgap.train.settings import autocast_dtype, matrix_peak
from card import DoesNotFit, Place
from card.limits import toy_compiler, wait
from distillation import write_corpus
from peers.cases import Case
from peers.measure import make_model, measure_steps
from peers.watch import MemoryMeter

# That warm up, are timed, and are profiled; of small models' short steps more
STEPS, SHORT_STEPS = (3, 5, 2), (20, 100, 5)
SHORT = 1e13
# Columns that share the card
TOGETHER = (1, 2, 4, 8, 16)
# of the card's memory, by the plan's figure
ROOM = 0.9
VOCABULARY = 128_256
KERNELS = 10


def llama(hidden: int, layers: int, heads: int, kv_heads: int, head_size: int, ffn: int) -> Shape:
    sizes = (hidden, layers, heads, kv_heads, head_size, ffn)
    return Shape("llama", *sizes, VOCABULARY, 8192, tied=True)


# Llama 3's shapes, and one of half a billion in their proportions
SHAPES = {
    "0.5b": llama(1024, 20, 16, 8, 64, 4096),
    "1b": llama(2048, 16, 32, 8, 64, 8192),
    "3b": llama(3072, 28, 24, 8, 128, 8192),
    "8b": replace(llama(4096, 32, 32, 8, 128, 14336), tied=False),
}


@dataclass(frozen=True)
class Work:
    """A training: every step is one micro-batch.

    tokens: of a step; None is as many windows as fit by the plan's figure.
    """

    students: tuple[Shape, ...]
    teacher: Shape | None
    window: int = 2048
    tokens: int | None = None
    is_cached: bool = False
    activation_checkpointing: bool = False
    compile: Literal["on", "off"] = "off"

    def planned(self, device: str, autocast: bool) -> int:
        """Bytes at the peak, as `capgap plan` tells them."""
        assert self.tokens is not None
        loop = LoopMemory(
            students=self.students,
            teacher=None if self.is_cached else self.teacher,
            window=self.window,
            micro_batch_tokens=self.tokens,
            autocast=autocast,
            teacher_bytes=2 if autocast else 4,
            activation_checkpointing=self.activation_checkpointing,
            device=torch.device(device).type,
        )
        return sum(loop.peak()[1].values())

    @property
    def token_flops(self) -> int:
        """6 S + 2 T, S and T with the head; a cached teacher costs none."""
        own = sum(6 * one.parameters().total for one in self.students)
        if self.teacher is None or self.is_cached:
            return own
        return own + 2 * self.teacher.parameters().total


def work_of(place: Place, name: str) -> Work:
    one, half, three, eight = (SHAPES[size] for size in ("1b", "0.5b", "3b", "8b"))
    if name.startswith("quickstart"):
        recipe = load_recipe(find_recipe("quickstart"))
        plan = make_plan(recipe)
        teacher = max(plan.teachers, key=lambda found: found.size)
        column = next(found for found in plan.columns if found.teacher == teacher)
        students = tuple(cell.shape for cell in column.cells)
        shared = {"window": recipe.corpus.window, "tokens": recipe.training.batch_tokens}
        work = Work(students, teacher.shape, **shared)
        if name == "quickstart-teacher":
            work = Work((teacher.shape,), None, **shared)
        return shrunk(work) if place.is_toy else work
    if name.startswith("column-"):
        size = {"column-1m": 1_000_000, "column-10m": 10_000_000}[name]
        small, large = (
            ladder_shape("llama", count, vocabulary=4096, positions=256)
            for count in (size, size * 5 // 2)
        )
        work = Work((small,) * 3, large, window=256, tokens=8192 if place.is_gpu else 1024)
        return shrunk(work) if place.is_toy else work
    work = {
        "1b-of-1b": Work((one,), one),
        "1b-of-3b": Work((one,), three),
        "column": Work((half,) * 3, three),
        "cached": Work((one,), three, is_cached=True),
        "compiled": Work((one,), one, compile="on"),
        "compiled-column": Work((half,) * 3, three, compile="on"),
        "3b-of-8b": Work((three,), eight, tokens=8192, activation_checkpointing=True),
    }[name]
    return shrunk(work) if place.is_toy else work


def shrunk(work: Work) -> Work:
    def small(shape: Shape) -> Shape:
        return replace(
            shape,
            hidden=32,
            layers=2,
            heads=2,
            kv_heads=1,
            head_size=16,
            ffn=64,
            vocabulary=1003,
        )

    students = tuple(small(one) for one in work.students)
    teacher = None if work.teacher is None else small(work.teacher)
    return replace(work, students=students, teacher=teacher, window=32, tokens=64)


def fitted(work: Work, place: Place, autocast: bool) -> Work:
    """With as many windows as fit; layers are computed again only where nothing fits otherwise.

    DoesNotFit where not even the smallest does.
    """
    if place.is_gpu:
        memory = torch.cuda.get_device_properties(place.device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    sizes = (
        [count * work.window for count in (8, 4, 2, 1)] if work.tokens is None else [work.tokens]
    )
    tried = [
        replace(work, tokens=tokens, activation_checkpointing=again)
        for again in dict.fromkeys((work.activation_checkpointing, True))
        for tokens in sizes
    ]
    for one in tried:
        if one.planned(place.device, autocast) < ROOM * memory:
            return one
    least = tried[-1].planned(place.device, autocast)
    raise DoesNotFit(f"needs {least / 1e9:.1f} GB, and there are {memory / 1e9:.1f}")


def training(place: Place, name: str) -> dict[str, Any]:
    """Figures of a work by its name."""
    precision = autocast_dtype("auto", place.device)
    work = fitted(work_of(place, name), place, precision is not None)
    return train_work(place, work, precision)


def steps_of(place: Place, work: Work) -> tuple[int, int, int]:
    assert work.tokens is not None
    is_short = place.is_gpu and work.tokens * work.token_flops < SHORT
    return (1, 1, 1) if place.is_toy else SHORT_STEPS if is_short else STEPS


def together(place: Place, name: str) -> dict[str, Any]:
    """Tokens/s of all students of several columns at once, each in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["card.steps"])
    figures: dict[str, Any] = {}
    for count in TOGETHER[1:2] if place.is_toy else TOGETHER:
        barrier, told = context.Barrier(count, timeout=60), context.SimpleQueue()
        given = (place, name, barrier, told)
        processes = [context.Process(target=beside, args=given) for _ in range(count)]
        for process in processes:
            process.start()
        figures[f"{count} at once, tokens/s"] = sum(told.get() for _ in processes)
        for process in processes:
            process.join()
    return figures


def beside(place: Place, name: str, barrier: Barrier, told: SimpleQueue) -> None:
    """One of them: all begin together, and go on until the last is done."""
    if place.is_toy:
        torch.set_num_threads(1)
    try:
        work = work_of(place, name)
        figures = train_work(place, work, autocast_dtype("auto", place.device), barrier.wait)
        told.put(figures["tokens/s"])
    except BaseException:
        # the others would wait for it
        barrier.abort()
        told.put(math.nan)
        raise


def train_work(
    place: Place,
    work: Work,
    precision: torch.dtype | None,
    begin: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Steps that warm up, are timed, and are profiled; tokens are those of all students.

    begin: is called before and after what is timed.
    """
    assert work.tokens is not None
    warmup, timed, profiled_steps = steps_of(place, work)
    steps = warmup + timed + profiled_steps
    low = precision or torch.float32
    peak = matrix_peak(torch.device(place.device), low)
    moments: list[float] = []
    kind = ProfilerActivity.CUDA if place.is_gpu else ProfilerActivity.CPU
    profiler = profile(activities=[kind])

    def on_step(progress: Progress) -> None:
        if progress.step in (warmup, warmup + timed):
            wait(place)
            begin()
            moments.append(time.perf_counter())
        if progress.step == warmup + timed:
            profiler.start()

    with tempfile.TemporaryDirectory() as folder:
        corpus = random_corpus(Path(folder) / "corpus", work, steps)
        meter = MemoryMeter(place.device)
        teacher = teacher_of(place, work, corpus, low, Path(folder) / "cache")
        if work.is_cached:
            meter.begin()
        alpha = 0.0 if teacher is None else 0.5
        learners = [
            Learner(
                str(number),
                make_model(shape, place.device, torch.float32, seed=2 + number),
                steps,
                1e-4,
                alpha,
            )
            for number, shape in enumerate(work.students)
        ]
        rows = work.tokens // work.window
        settings = LoopSettings(
            rows,
            rows,
            data_seed=0,
            activation_checkpointing=work.activation_checkpointing,
            autocast_dtype=precision,
            compile=work.compile,
        )
        with toy_compiler(place):
            train(learners, corpus, settings, teacher=teacher, on_step=on_step)
        wait(place)
        profiler.stop()
        held = meter.peak() - meter.held
    per_second = timed * work.tokens / (moments[1] - moments[0])
    reached = per_second * work.token_flops
    figures = {
        "tokens/s": per_second * len(work.students),
        "tokens of a step": work.tokens,
        "activation checkpointing": work.activation_checkpointing,
        "precision": str(low).removeprefix("torch."),
        "share of the measured peak": reached / peak,
        "measured peak, TFLOP/s": peak / 1e12,
        "share of the data sheet": share_of_sheet(place, reached),
        "memory, GB": held / 1e9,
        "planned memory, GB": work.planned(place.device, precision is not None) / 1e9,
        "loss": learners[0].curve["ce"][-1],
    }
    return figures | profiled(profiler, place, profiled_steps)


def share_of_sheet(place: Place, flops: float) -> float | None:
    """Of what the maker's data sheet gives a card of that name; None for others."""
    if not place.is_gpu:
        return None
    name = torch.cuda.get_device_name(place.device)
    return next((flops / gpu.flops for kind, gpu in GPUS.items() if kind in name), None)


def random_corpus(folder: Path, work: Work, steps: int) -> Text:
    assert work.tokens is not None
    write_corpus(folder, work.students[0].vocabulary, steps * work.tokens + 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    return Text.of([Corpus(folder, manifest, work.window)])


def teacher_of(
    place: Place, work: Work, corpus: Text, dtype: torch.dtype, folder: Path
) -> TeacherSource | None:
    if work.teacher is None:
        return None
    teacher = OnlineTeacher(make_model(work.teacher, place.device, dtype, seed=1))
    if not work.is_cached:
        return teacher
    identity = CacheIdentity.of("teacher", "", teacher.dtype, corpus, document_mask=False)
    writer = CacheWriter(folder, identity, CacheFormat(work.teacher.vocabulary))
    write_cache(writer, teacher, corpus, device=torch.device(place.device), batch_windows=2)
    del teacher
    if place.is_gpu:
        torch.cuda.empty_cache()
    return CachedTeacher(folder, corpus)


def profiled(profiler: profile, place: Place, steps: int) -> dict[str, Any]:
    """The longest kernels of a step (on a CPU operators), and how long the card had none."""
    averages = profiler.key_averages()
    taken = {
        event.key: (event.self_device_time_total if place.is_gpu else event.self_cpu_time_total)
        for event in averages
    }
    total = sum(taken.values()) or 1.0
    longest = sorted(taken, key=lambda name: -taken[name])[:KERNELS]
    figures: dict[str, Any] = {
        "longest kernels": [
            {
                "name": name[:120],
                "ms a step": taken[name] / 1000 / steps,
                "share": taken[name] / total,
            }
            for name in longest
        ]
    }
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )
    figures["waiting for the host"] = idle_share(spans)
    return figures


def idle_share(spans: Sequence[tuple[float, float]]) -> float | None:
    """Of the time from the first span to the last that lies in none; spans by their beginning."""
    if not spans:
        return None
    gaps, last = 0.0, spans[0][1]
    for start, end in spans[1:]:
        gaps += max(0.0, start - last)
        last = max(last, end)
    return gaps / (last - spans[0][0])


def peer(place: Place, engine: str) -> dict[str, Any]:
    """What `training` measures of 1b-of-1b, by another's loop."""
    precision = autocast_dtype("auto", place.device)
    work = fitted(work_of(place, "1b-of-1b"), place, precision is not None)
    assert work.tokens is not None
    assert work.teacher is not None
    rows = work.tokens // work.window
    if place.is_gpu:
        # full logits of all tokens want several times the memory
        rows = min(rows, 4)
    case = Case(
        work.students[0],
        work.teacher,
        work.window,
        rows,
        "fp32" if precision is None else "bf16",
        place.device,
        1,
        1.0,
    )
    warmup, timed, _ = steps_of(place, work)
    with tempfile.TemporaryDirectory() as folder:
        random_corpus(Path(folder) / "corpus", replace(work, tokens=case.tokens), warmup + timed)
        found = measure_steps(
            engine, case, Path(folder) / "corpus", steps=timed, warmup=warmup, compile="off"
        )
    seconds = sum(found["seconds"]["wall"])
    per_second = timed * case.tokens / seconds
    reached = per_second * work.token_flops
    peak = matrix_peak(torch.device(place.device), precision or torch.float32)
    figures = {
        "tokens/s": per_second,
        "tokens of a step": case.tokens,
        "share of the measured peak": reached / peak,
        "share of the data sheet": share_of_sheet(place, reached),
        "memory, GB": found["peak_bytes"] / 1e9,
        "loss": found["checked"][0],
    }
    if engine.startswith("trl"):
        from peers.trl_engines import takes_liger

        figures["with Liger's kernels"] = takes_liger(case)
    return figures
