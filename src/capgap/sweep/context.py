"""What every process of a sweep knows: the recipe, the output folder and where things lie in it."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgap import __version__
from capgap.config import Recipe
from capgap.errors import UserError


@dataclass(frozen=True)
class Context:
    """Paths are functions of ids, so that a restart finds what is there."""

    recipe: Recipe
    out: Path
    device: str
    threads: int | None

    @property
    def corpus_folder(self) -> Path:
        return self.out / "corpus"

    def record_folder(self, run_id: str) -> Path:
        return self.out / "records" / run_id

    def teacher_folder(self, teacher_id: str) -> Path:
        return self.out / "teachers" / teacher_id

    def importance_file(self, teacher_id: str) -> Path:
        return self.out / "work" / "importance" / f"{teacher_id}.safetensors"

    def student_folder(self, cell_id: str) -> Path:
        return self.out / "work" / "students" / cell_id

    def checkpoint_folder(self, task_id: str) -> Path:
        return self.out / "work" / "checkpoints" / task_id

    def is_recorded(self, run_id: str) -> bool:
        return (self.record_folder(run_id) / "record.json").exists()


def resolve_device(asked: str) -> str:
    """`auto` is the GPU where there is one; UserError for a device that is not there."""
    import torch

    available = torch.cuda.is_available()
    if asked == "auto":
        return "cuda" if available else "cpu"
    if asked.startswith("cuda") and not available:
        raise UserError(f"run.device = {asked!r}, but torch finds no CUDA device: use cpu or auto")
    try:
        return str(torch.device(asked))
    except RuntimeError:
        raise UserError(f"run.device = {asked!r} is no device: use auto, cpu or cuda") from None


def resolve_workers(asked: int | str, device: str, *, most: int) -> tuple[int, int | None]:
    """(worker processes, torch threads of each); `most` tasks can run at once.

    Small models gain more from one thread a process on every core than from many threads in one.
    A GPU is given to a single worker.
    """
    if device != "cpu":
        return (1 if asked == "auto" else min(most, int(asked))), None
    cores = usable_cores()
    workers = min(most, cores if asked == "auto" else int(asked))
    return workers, max(1, cores // workers)


def usable_cores() -> int:
    """Cores this process may use: its affinity, and a container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.exists():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            return max(1, min(cores or 1, int(quota) // int(period)))
    return cores or 1


def versions() -> dict[str, str]:
    import tokenizers
    import torch
    import transformers

    return {
        "capgap": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def machine(device: str, threads: int | None) -> dict[str, Any]:
    import torch

    described: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
    }
    if device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
