"""What this machine has: device, cores, versions of what runs."""

import os
import platform
from pathlib import Path
from typing import Any

from capgap import __version__
from capgap.errors import UserError


def resolve_device(asked: str) -> str:
    """`auto` is the GPU where there is one; `cuda` is every process's own under torchrun.

    UserError for a device that is not there, and for one GPU for several processes.
    """
    import torch

    available = torch.cuda.is_available()
    if asked == "auto":
        asked = "cuda" if available else "cpu"
    if asked.startswith("cuda") and not available:
        raise UserError(f"device {asked!r}, but torch finds no CUDA device: use cpu or auto")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise UserError(f"{asked!r} is no device: use auto, cpu or cuda") from None
    if device.type != "cuda":
        return str(device)
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    elif started()[1] > 1:
        raise UserError(f"device {asked!r} for {started()[1]} processes: use cuda or auto")
    if device.index >= torch.cuda.device_count():
        raise UserError(f"device {str(device)!r}, but there are {torch.cuda.device_count()} GPUs")
    return str(device)


# What torchrun tells its processes, all of it
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def started() -> tuple[int, int]:
    """(rank, world) as torchrun tells them; (0, 1) without it. A cluster may leave some of these
    variables in the environment for reasons of its own: they count together or not at all.
    """
    if not all(os.environ.get(name) for name in TORCHRUN):
        return 0, 1
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        rank, world = -1, 0
    if not 0 <= rank < world:
        raise UserError(
            f"RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']} in the "
            "environment do not fit: start several processes with torchrun, or unset both"
        )
    return rank, world


def forget_leftovers() -> None:
    """Takes what torchrun would tell out of the environment where it did not start this process:
    the libraries below would wait for others."""
    if started() == (0, 1):
        for name in TORCHRUN:
            os.environ.pop(name, None)


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


def free_memory() -> int:
    """Bytes that this machine, or the container that this runs in, can still give; all that the
    machine has where it does not tell."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    told = Path("/proc/meminfo")
    if told.is_file():
        amounts = dict(line.split(":") for line in told.read_text().splitlines())
        free.append(int(amounts["MemAvailable"].split()[0]) * 1024)
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, taken = (Path(folder, name).read_text().strip() for name in (limit, used))
        except OSError:
            continue
        if most != "max":
            free.append(int(most) - int(taken))
    return max(0, min(free))
