"""What this machine has: device, cores, memory, versions; limits of what a stranger's file makes it
do; and GPUs by name, as their makers' data sheets say. Imports no torch before it is needed."""

import json
import os
import platform
import re
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from capgap import __version__
from capgap.errors import UserError

# The share of a data sheet's peak that training reaches, where nothing else is stated: an H200
# reached 0.26 to 0.35 (docs/benchmarks.md)
UTILISATION = 0.3
# Open in a process besides those that are asked for
FILES_IN_USE = 500
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
# What torchrun tells its processes, all of it
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Gpu(NamedTuple):
    """flops: dense 16-bit floating-point operations a second; memory in bytes, a GB as 10^9: what
    the chip has above that goes to the driver and to torch's own context."""

    flops: float
    memory: int
    has_bf16: bool = True


# those of consumers sum in 32 bits at half the rate that they are sold by
GPUS = {
    "T4": Gpu(65e12, 16 * 10**9, has_bf16=False),
    "V100": Gpu(125e12, 32 * 10**9, has_bf16=False),
    "RTX3090": Gpu(71e12, 24 * 10**9),
    "RTX4080": Gpu(97.5e12, 16 * 10**9),
    "RTX4090": Gpu(165e12, 24 * 10**9),
    "RTX5080": Gpu(112.6e12, 16 * 10**9),
    "RTX5090": Gpu(209.5e12, 32 * 10**9),
    "A10": Gpu(125e12, 24 * 10**9),
    "L4": Gpu(121e12, 24 * 10**9),
    "L40S": Gpu(362e12, 48 * 10**9),
    "A100": Gpu(312e12, 80 * 10**9),
    "H100": Gpu(989e12, 80 * 10**9),
    "H200": Gpu(989e12, 141 * 10**9),
    "B200": Gpu(2250e12, 180 * 10**9),
}


def parse_gpus(text: str, *, where: str = "`gpus`") -> tuple[int, str]:
    """ "16xA100" or "RTX 4090" as a number and a kind; UserError for anything else."""
    plain = re.sub(r"[\s-]", "", text)
    match = re.fullmatch(r"(?:(\d+)x)?(?:RTX)?(\w+)", plain, re.IGNORECASE)
    number, kind = (int(match[1] or 1), match[2].upper()) if match else (0, "")
    kind = kind if kind in GPUS else f"RTX{kind}"
    if number < 1 or kind not in GPUS:
        raise UserError(f"{where} {text!r}: give a number and one of {', '.join(GPUS)}: 8xA100")
    return number, kind


def hours(flops: float, gpus: tuple[int, str], utilisation: float = UTILISATION) -> float:
    """Hours that `flops` take on the GPUs at `utilisation` of their peak."""
    number, kind = gpus
    return flops / (number * GPUS[kind].flops * utilisation) / 3600


def resolve_device(asked: str) -> str:
    """`auto` is the GPU where there is one; `cuda` is every process's own under torchrun.

    UserError for a device that is not there or of another kind (an Apple GPU), and for one GPU for
    several processes.
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
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"device {asked!r}: nothing was ever tried on {device.type}: use cpu or cuda"
        )
    if device.type == "cpu":
        return str(device)
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    elif started()[1] > 1:
        raise UserError(f"device {asked!r} for {started()[1]} processes: use cuda or auto")
    if device.index >= torch.cuda.device_count():
        raise UserError(f"device {str(device)!r}, but there are {torch.cuda.device_count()} GPUs")
    return str(device)


def visible_gpus(asked: str) -> tuple[str, ...]:
    """All GPUs that the device `auto` or `cuda` means, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if asked not in ("auto", "cuda") or not torch.cuda.is_available():
        return ()
    named = os.environ.get(VISIBLE_GPUS)
    count = torch.cuda.device_count()
    return tuple(named.split(",") if named else map(str, range(count)))[:count]


def gpu_memory(index: int) -> int:
    """Bytes of a visible GPU."""
    import torch

    return int(torch.cuda.get_device_properties(index).total_memory)


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

    libraries = {one.__name__: one.__version__ for one in (torch, transformers, tokenizers)}
    return {"capgap": __version__, "python": platform.python_version()} | libraries


def install_command(extra: str) -> str:
    """How an extra's packages are installed from where capgap came: on an index its name may be
    somebody else's."""
    origin = json.loads(distribution("capgap").read_text("direct_url.json") or "{}")
    place = unquote(origin.get("url", "")).removeprefix("file://")
    if "vcs_info" in origin:
        return f"pip install 'capgap[{extra}] @ {origin['vcs_info']['vcs']}+{place}'"
    return f"pip install '{place or 'capgap'}[{extra}]'"


def machine(device: str, threads: int | None) -> dict[str, Any]:
    """What a record says of the machine."""
    import torch

    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.*\S)", info.read_text() if info.exists() else "", re.M)
    described: dict[str, Any] = {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
    }
    if device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def free_memory() -> int:
    """Bytes that this machine, or the container that this runs in, can still give; all that the
    machine has where it does not tell."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    amounts_file = Path("/proc/meminfo")
    if amounts_file.is_file():
        amounts = dict(line.split(":") for line in amounts_file.read_text().splitlines())
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


@contextmanager
def limited(what: str, *, seconds: float, memory: int) -> Iterator[None]:
    """UserError, beginning with `what`, for work within that takes longer, or more bytes than
    `memory` on top of what this process has.

    In the main thread, where signals arrive, and on Linux, which counts memory; elsewhere nothing
    is limited.
    """
    status = Path("/proc/self/statm")
    if threading.current_thread() is not threading.main_thread() or not status.is_file():
        yield
        return
    taken = int(status.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = min(one for one in (taken + memory, soft, hard) if one != resource.RLIM_INFINITY)

    def late(*_: object) -> None:
        raise UserError(f"{what} takes more than {seconds:g} s: it may have no end")

    before = signal.signal(signal.SIGALRM, late)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        # again and again, since what a signal raises may be swallowed where it arrives
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
        yield
    except MemoryError:
        raise UserError(f"{what} takes more than {memory // 10**6} MB of memory") from None
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def allow_open_files(number: int) -> None:
    """So many more than usual, as far as the system lets this process have them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = number + FILES_IN_USE
    if soft != resource.RLIM_INFINITY and soft < least:
        most = least if hard == resource.RLIM_INFINITY else min(least, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
