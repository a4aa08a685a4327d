"""How fast this machine trains: measured on two small models, for the expected time of a plan."""

import statistics
import time
from dataclasses import replace

import torch

from capgap.distill.head import HeadInput
from capgap.distill.losses import column_loss
from capgap.models.build import build_model
from capgap.models.parts import Parts
from capgap.models.shape import Shape
from capgap.sweep.schedule import Speed
from capgap.train.learner import make_optimizer

# Larger models are not built for an estimate: their speed follows from the larger of the two.
LARGEST_PROBE = 3_000_000
REPEATS = 5


def measure_speed(
    small: Shape,
    large: Shape,
    *,
    batch_tokens: int,
    window: int,
    device: str,
    dtype: torch.dtype | None,
) -> Speed:
    """Distils each shape for a few steps of one batch; the median counts."""
    rates = []
    for shape in (small, large):
        seconds = _seconds_a_token(shape, max(1, batch_tokens // window), window, device, dtype)
        rates.append((6.0 * shape.parameters().total, seconds))
    (small_flops, small_seconds), (large_flops, large_seconds) = rates
    if large_flops <= small_flops * 1.2 or large_seconds <= small_seconds:
        return Speed(0.0, large_flops / large_seconds)
    per_flop = (large_seconds - small_seconds) / (large_flops - small_flops)
    overhead = max(0.0, small_seconds - small_flops * per_flop)
    return Speed(overhead, 1 / per_flop)


def _seconds_a_token(
    shape: Shape, rows: int, window: int, device: str, dtype: torch.dtype | None
) -> float:
    model = build_model(shape, seed=0).to(device)
    parts = Parts(model)
    optimizer = make_optimizer(model, weight_decay=0.1, decay_embeddings=False)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, shape.vocabulary, (rows, window + 1), generator=generator)
    windows = windows.to(device)
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
            student = HeadInput.of(parts, windows[:, :-1])
            # the soft term is a good part of a small model's step; the student is its own teacher
            teacher = replace(student, hidden=student.hidden.detach())
            result = column_loss(
                [student], windows[:, 1:].reshape(-1), alphas=[0.5], teacher=teacher
            )
        (result.students[0].loss / (rows * window)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / (rows * window)  # the first warms up
