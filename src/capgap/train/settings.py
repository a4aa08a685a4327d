"""What a recipe's [training] and [run] become for the loop, and on this machine."""

import os
import time
from dataclasses import fields

import torch

from capgap.corpus.text import Text
from capgap.distill.divergences import Divergence
from capgap.errors import UserError
from capgap.machine import resolve_device
from capgap.train.learning_rate import Schedule
from capgap.train.loop import LoopSettings
from capgap.train.recipe import RunSection, TrainingSection

# What `auto` becomes, for runs that are to compute alike on every machine
VARIABLE = "CAPGAP_AUTO_PRECISION"
# Matrices that the peak is measured with
PEAK_SIDE = {"cpu": 1024, "cuda": 8192}
PEAK_REPEATS = 6


def loop_settings(
    training: TrainingSection,
    run: RunSection,
    corpus: Text,
    *,
    data_seed: int,
    device: str,
    heldout_steps: int | None = None,
) -> LoopSettings:
    """Counts in tokens become counts in windows, tokens become their ids. UserError for a precision
    that the device lacks, and for an ignored token that is not one."""
    micro = training.micro_batch_tokens or training.batch_tokens
    words = corpus.tokenizer.get_vocab() if training.ignored_tokens else {}
    for token in training.ignored_tokens:
        if token not in words:
            raise UserError(
                f"training.ignored_tokens: {token!r} is no token of the corpus {corpus.directory}"
            )
    asked = vars(training) | vars(run)
    same = {one.name: asked[one.name] for one in fields(LoopSettings) if one.name in asked}
    changed = {
        "batch_windows": training.batch_tokens // corpus.window,
        "micro_batch_windows": micro // corpus.window,
        "data_seed": data_seed,
        "divergence": Divergence(training.divergence, training.divergence_mix),
        "schedule": Schedule(
            training.schedule,
            training.warmup_fraction,
            training.decay_fraction,
            training.final_rate,
        ),
        "ignored_labels": tuple(words[token] for token in training.ignored_tokens),
        "autocast_dtype": autocast_dtype(training.precision, device),
        "heldout_steps": heldout_steps,
    }
    return LoopSettings(**(same | changed))


def auto_precision(device: str) -> str:
    """What `auto` becomes on a device: CAPGAP_AUTO_PRECISION where it is set (UserError: neither
    fp32 nor bf16), else bf16 on a GPU that computes in it and on a CPU with AMX tiles. One that
    only has AVX-512 BF16 trains half as fast in bf16 as in fp32 (docs/benchmarks.md)."""
    forced = os.environ.get(VARIABLE)
    if forced in ("fp32", "bf16"):
        return forced
    if forced:
        raise UserError(f"{VARIABLE}={forced}: set it to fp32 or bf16, or not at all")
    if device.startswith("cuda"):
        return "bf16" if _gpu_has_bf16() else "fp32"
    # torch 2.11 has no public question for it
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("amx_bf16", False) else "fp32"


def autocast_dtype(asked: str, device: str) -> torch.dtype | None:
    """bf16 autocast, or None for fp32 throughout; `asked` is a training.precision (UserError on a
    GPU that has no bf16)."""
    if asked == "auto":
        asked = auto_precision(device)
    if asked == "fp32":
        return None
    if device.startswith("cuda") and not _gpu_has_bf16():
        gpu = f"the GPU of {os.uname().nodename} ({torch.cuda.get_device_name(device)})"
        raise UserError(f"training.precision = '{asked}', but {gpu} has no bf16: use fp32")
    return torch.bfloat16


def teacher_dtype(asked: str, precision: str, device: str) -> str:
    """What a teacher computes in on its device: stored, fp32 or bf16. `auto` is the students'
    `precision` on a GPU, where fp32 is several times slower, elsewhere what it is stored in."""
    if asked != "auto":
        return asked
    is_bf16 = device.startswith("cuda") and autocast_dtype(precision, device) is not None
    return "bf16" if is_bf16 else "stored"


def resolved_precision(training: TrainingSection, run: RunSection, device: str) -> dict[str, str]:
    """What `auto` becomes on this device in `precision` and `teacher_dtype`, which change the
    results: what has begun with them goes on with them, on another machine too."""
    precision = auto_precision(device) if training.precision == "auto" else training.precision
    if run.teacher_device != "same":
        device = resolve_device(run.teacher_device)
    teacher = teacher_dtype(training.teacher_dtype, training.precision, device)
    return {"precision": precision, "teacher_dtype": teacher}


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of the fastest of a few square products: what model FLOPs utilisation is a
    share of."""
    side = PEAK_SIDE.get(device.type, PEAK_SIDE["cuda"])
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(PEAK_REPEATS):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def _gpu_has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)
