"""What the card can do at the most: products, memory, the way to the host."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch

from card import Place

# rows, columns, inner: of training steps and of heads
PRODUCTS = ((8192, 8192, 8192), (16384, 8192, 8192), (8192, 16384, 4096), (16384, 16384, 16384))
REPEATS = 10


def wait(place: Place) -> None:
    """Until the device has done what it was given."""
    if place.is_gpu:
        torch.cuda.synchronize()


def toy_compiler(place: Place) -> AbstractContextManager[Any]:
    """torch's own way of trying: a toy does not wait for a compiler."""
    if not place.is_toy:
        return nullcontext()
    return mock.patch.object(torch, "compile", partial(torch.compile, backend="eager"))


def best_seconds(place: Place, work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Of single calls, after three that warm up."""
    found = []
    for _ in range(repeats + 3):
        wait(place)
        began = time.perf_counter()
        work()
        wait(place)
        found.append(time.perf_counter() - began)
    return min(found[3:])


def limits(place: Place) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    side = 128 if place.is_toy else 1
    best, shape = 0.0, ""
    for rows, columns, inner in PRODUCTS:
        rows, columns, inner = rows // side, columns // side, inner // side
        left = torch.randn(rows, inner, device=place.device, dtype=torch.bfloat16)
        right = torch.randn(inner, columns, device=place.device, dtype=torch.bfloat16)
        flops = 2 * rows * columns * inner / best_seconds(place, lambda a=left, b=right: a @ b)
        if flops > best:
            best, shape = flops, f"{rows} x {inner} by {inner} x {columns}"
    figures["bf16 product, TFLOP/s"] = best / 1e12
    figures["shape of the best product"] = shape
    count = 2**20 if place.is_toy else 2**30
    source = torch.empty(count, device=place.device)
    target = torch.empty_like(source)
    # read and written
    seconds = best_seconds(place, lambda: target.copy_(source))
    figures["memory, GB/s"] = 2 * 4 * count / seconds / 1e9
    host = torch.empty(count // 4, pin_memory=place.is_gpu)
    seconds = best_seconds(place, lambda: host.copy_(source[: count // 4]), repeats=4)
    figures["to the host's pinned memory, GB/s"] = count / seconds / 1e9
    return figures
