"""The loss alone: time, memory, kernels, and how right its gradient is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from capgap.distill import chunk_rows, padded_rows
from capgap.distill.head import HeadInput
from capgap.distill.losses import column_loss
from capgap.models.shape import Shape
from card import Place
from card.limits import best_seconds, toy_compiler
from peers.cases import LOSS_ENGINES, Case
from peers.losses import LOSSES, LossInput
from peers.watch import MemoryMeter

STUDENT_WIDTH, TEACHER_WIDTH = 2048, 4096
ROWS = 8192
OURS = ("ours", "compiled")


def case_of(place: Place, vocabulary: int) -> Case:
    """Heads of a 1B student and an 8B teacher; nothing else of the shapes is used."""
    small = 32 if place.is_toy else 1
    vocabulary = vocabulary // 500 if place.is_toy else vocabulary
    student, teacher = (
        Shape("llama", width // small, 1, 1, 1, 64, 64, vocabulary, 64, tied=True)
        for width in (STUDENT_WIDTH, TEACHER_WIDTH)
    )
    rows = 256 if place.is_toy else ROWS
    return Case(student, teacher, rows, 1, "bf16", place.device, 1, 1.0)


def once(source: LossInput, engine: Callable[[LossInput], Tensor]) -> None:
    source.hidden.grad = source.weight.grad = None
    engine(source).backward()


def loss_alone(place: Place, vocabulary: int) -> dict[str, Any]:
    """capgap, plain torch and Liger on the same numbers; what does not fit says so."""
    with toy_compiler(place):
        return _loss_alone(place, vocabulary)


def _loss_alone(place: Place, vocabulary: int) -> dict[str, Any]:
    case = case_of(place, vocabulary)
    figures: dict[str, Any] = {}
    for name in (*OURS, "plain", "liger"):
        about = LOSS_ENGINES[name]
        if not about.installed:
            figures[f"{about.title}, ms"] = f"{about.package} is not installed"
            continue
        source = LossInput.random(case)
        meter = MemoryMeter(place.device)
        try:
            seconds = best_seconds(place, lambda s=source, e=LOSSES[name]: once(s, e), repeats=5)
        # what another's code raises must not cost our own figures
        except Exception as error:
            if name in OURS:
                raise
            figures[f"{about.title}, ms"] = type(error).__name__
            continue
        figures[f"{about.title}, ms"] = 1000 * seconds
        figures[f"{about.title}, GB above its inputs"] = (meter.peak() - meter.held) / 1e9
        if name in OURS:
            rows = chunk_rows(torch.device(place.device).type, case.student.vocabulary)
            chunks = -(-case.tokens // rows)
            figures[f"{about.title}, kernels a chunk"] = kernels(place, source, name) / chunks
    return figures


def kernels(place: Place, source: LossInput, name: str) -> int:
    """Of a forward and a backward pass; on a CPU operators."""
    kind = ProfilerActivity.CUDA if place.is_gpu else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        once(source, LOSSES[name])
    if place.is_gpu:
        # launches are events as well
        return sum(event.device_type == DeviceType.CUDA for event in profiler.events())
    return len(profiler.events())


def vocabularies(place: Place) -> dict[str, Any]:
    """50,257 is GPT-2's, 151,665 Qwen2.5's."""
    figures: dict[str, Any] = {}
    for words in (50_257, 151_665):
        sources = [LossInput.random(case_of(place, count)) for count in (words, padded_rows(words))]
        own, whole = (
            best_seconds(place, lambda s=source: once(s, LOSSES["ours"]), repeats=5)
            for source in sources
        )
        figures[f"{words:,} words, ms"] = 1000 * own
        figures[f"{words:,} words, against {padded_rows(words):,}"] = own / whole
    return figures


def logits(place: Place) -> dict[str, Any]:
    """The largest relative error of the gradients by hidden states and head, at two distances."""
    vocabulary, width = (1003, 64) if place.is_toy else (32_003, 512)
    figures: dict[str, Any] = {}
    generator = torch.Generator(place.device).manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=generator, device=place.device)
    weight = (3 * weight / width**0.5).bfloat16()
    hidden = torch.randn(256, width, generator=generator, device=place.device).bfloat16()
    change = torch.randn(256, width, generator=generator, device=place.device)
    targets = torch.zeros(256, dtype=torch.int64, device=place.device)
    for distance in (0.02, 0.1):
        near = (hidden.float() + distance * change).bfloat16()
        found = []
        for wide, read in ((torch.float32, torch.bfloat16), (torch.float64, None)):
            leaves = [one.to(wide, copy=True).requires_grad_() for one in (hidden, weight)]
            above = [one if read else one.double() for one in (near, weight)]
            result = column_loss(
                [HeadInput(*leaves, dtype=read)],
                targets,
                alphas=[1.0],
                teacher=HeadInput(*above),
            ).students[0]
            result.loss.backward()
            found.append((result, [one.grad.double() for one in leaves]))
        (_, ours), (exact, reference) = found
        error = max(
            ((mine - its).norm() / its.norm()).item()
            for mine, its in zip(ours, reference, strict=True)
        )
        figures[f"error at a KL of {exact.kl.item() / 256:.2g}"] = error
    return figures
