"""torch.compile for the layers of models and the loss, where it is measured to pay.

Compiling fuses what lies between the matrix products; it takes half a minute and more,
and what it gains depends on machine and sizes, so a long run tries both ways at its beginning.
"""

import importlib.util
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capgap.artifact import read_json, write_json
from capgap.errors import UserError
from capgap.models.parallel import Ranks
from capgap.models.parts import Parts

# A run that is expected to take less is not worth a trial
WORTHWHILE_SECONDS = 600.0
# What a compiled step may take of a plain one
LEAST_GAIN = 0.97
REPEATS = 3
DECISION = "compiled.json"


def settle(
    asked: str,
    models: Sequence[Parts],
    trial: Callable[[bool], None],
    *,
    shapes: Collection[tuple[int, int]],
    trials_left: int,
    folder: Path | None,
    device: torch.device,
    ranks: Ranks,
) -> bool:
    """Leaves the models' layers compiled or not: `on`, `off`, or `auto`, by measurement; returns
    whether they are.

    trial: a piece of the work that changes nothing, told whether layers are compiled; trials_left:
    how many the run has before it; shapes: (rows, tokens) of its micro-batches. The decision is
    kept in the folder, so that a run that continues computes as it began. Raises UserError where
    compiling is asked for, and what it needs is not there.
    """
    decision = None if folder is None else folder / DECISION
    if asked == "auto" and decision is not None and decision.exists():
        asked = "on" if read_json(decision)["compiled"] else "off"
    lacks = missing(device)
    if asked == "on" and lacks is not None:
        raise UserError(
            f"compiled layers (run.compile) need {lacks}: install it, or begin with 'off'"
        )
    if asked == "on":
        compile_layers(models, shapes)
    if asked != "auto":
        return asked == "on"
    pays = False
    if lacks is None and ranks.told(_seconds(trial, False) * trials_left > WORTHWHILE_SECONDS):
        plain = min(_seconds(trial, False) for _ in range(REPEATS))
        compile_layers(models, shapes)
        trial(True)
        compiled = min(_seconds(trial, True) for _ in range(REPEATS))
        pays = ranks.told(compiled < LEAST_GAIN * plain)
        if not pays:
            undo(models)
    if decision is not None and ranks.is_first:
        write_json(decision, {"compiled": pays})
    return pays


def compile_layers(models: Sequence[Parts], shapes: Collection[tuple[int, int]]) -> None:
    """Compiles the layers for hidden states of these (rows, tokens); others they take as before.

    Layers of all models are one piece of code to torch, which gives up in silence after a few
    versions of it: its limit is raised by those that there will be. Every model has one for every
    shape, with and without gradients, and with and without a document mask.
    """
    from torch._dynamo import config

    config.recompile_limit += 4 * len(models) * len(shapes)
    config.accumulated_recompile_limit += 4 * len(models) * len(shapes)
    for parts in models:
        for layer in parts.layers:
            layer.forward = _by_shape(layer.forward, shapes)


def undo(models: Sequence[Parts]) -> None:
    for parts in models:
        for layer in parts.layers:
            del layer.forward


def _by_shape(plain: Callable[..., Any], shapes: Collection[tuple[int, int]]) -> Callable[..., Any]:
    compiled = torch.compile(plain, dynamic=False)

    def forward(hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        """hidden [rows, tokens, width]"""
        call = compiled if hidden.shape[:2] in shapes else plain
        return call(hidden, *arguments, **options)

    return forward


def missing(device: torch.device) -> str | None:
    """What torch.compile would ask for in vain."""
    # triton compiles its launchers in C
    variable, usual = ("CXX", "g++") if device.type == "cpu" else ("CC", "gcc")
    compiler = os.environ.get(variable, usual)
    if shutil.which(compiler) is None:
        return f"the compiler {compiler}"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the headers of Python (Python.h)"
    if device.type != "cpu" and importlib.util.find_spec("triton") is None:
        return "triton"
    return None


def _seconds(trial: Callable[[bool], None], compiled: bool) -> float:
    start = time.perf_counter()
    trial(compiled)
    return time.perf_counter() - start
