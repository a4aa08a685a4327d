"""Which precision trains fastest here without harm."""

import os

import torch

from capgap.errors import UserError
from capgap.machine import resolve_device
from capgap.train.recipe import RunSection, TrainingSection

# What `auto` becomes, for runs that are to compute alike on every machine
VARIABLE = "CAPGAP_AUTO_PRECISION"


def auto_precision(device: str) -> str:
    """What `auto` becomes on a device: the environment's CAPGAP_AUTO_PRECISION where it is set.

    Otherwise bf16 on a GPU that computes in it and on a CPU with AMX tiles. A CPU that only has
    AVX-512 BF16 trains about half as fast in bf16 as in fp32 (docs/benchmarks.md). UserError for a
    variable that is neither.
    """
    forced = os.environ.get(VARIABLE)
    if forced in ("fp32", "bf16"):
        return forced
    if forced:
        raise UserError(f"{VARIABLE}={forced}: set it to fp32 or bf16, or not at all")
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # torch 2.11 has no public question for it
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("amx_bf16", False) else "fp32"


def autocast_dtype(asked: str, device: str) -> torch.dtype | None:
    """bf16 autocast, or None for fp32 throughout; `asked` is auto, fp32 or bf16.

    UserError for bf16 on a GPU that has none.
    """
    if asked == "auto":
        asked = auto_precision(device)
    if asked == "fp32":
        return None
    if device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("training.precision = 'bf16', but this GPU has no bf16: use fp32")
    return torch.bfloat16


def teacher_dtype(asked: str, precision: str, device: str) -> str:
    """What a teacher computes in on its device: stored, fp32 or bf16.

    `auto` is the students' precision on a GPU, where fp32 is several times slower, and elsewhere
    what its weights are stored in. precision: the students', as `autocast_dtype` takes it.
    """
    if asked != "auto":
        return asked
    is_bf16 = device.startswith("cuda") and autocast_dtype(precision, device) is not None
    return "bf16" if is_bf16 else "stored"


def resolved_precision(training: TrainingSection, run: RunSection, device: str) -> dict[str, str]:
    """What `auto` becomes on this device in `precision` and `teacher_dtype`, which change the
    results: what has begun with them goes on with them, on another machine too."""
    precision = "fp32" if autocast_dtype(training.precision, device) is None else "bf16"
    place = device if run.teacher_device == "same" else resolve_device(run.teacher_device)
    taught = teacher_dtype(training.teacher_dtype, training.precision, place)
    return {"precision": precision, "teacher_dtype": taught}
