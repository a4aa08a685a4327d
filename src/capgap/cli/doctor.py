"""What this installation has and would use, to read and to paste into a report of a fault."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from capgap.cli.app import Answer
from capgap.errors import UserError
from capgap.machine import free_memory, machine, resolve_device, usable_cores
from capgap.sizes import format_bytes

# Programs that some commands call, and what for
PROGRAMS = {"g++": "compiled layers", "bwrap": "programs that a model wrote"}
# Variables that change what happens; of the last ones only whether they are set is told
VARIABLES = ("HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
SECRETS = ("HF_TOKEN", "WANDB_API_KEY")


class Doctor(Answer):
    """Tell versions, device, extras and disk, and what would be used; paste it into a report."""

    def run(self, **_: Any) -> dict[str, Any]:
        """UserError only where not even torch can be loaded."""
        packages, extras = _requirements()
        try:
            import torch
        except ImportError as error:
            raise UserError(f"torch cannot be loaded ({error}): install capgap again") from None
        from huggingface_hub import get_token
        from huggingface_hub.constants import HF_HUB_CACHE

        from capgap.train.compiling import missing
        from capgap.train.settings import auto_precision

        device = resolve_device("auto")
        versions = {name: _version(name) for name in packages}
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        lacks = missing(torch.device(device))
        places = {"output": Path.cwd(), "hub cache": Path(HF_HUB_CACHE)}
        return {
            "versions": {"capgap": _version("capgap"), "python": platform.python_version()}
            | versions,
            "extras": {
                name: [one for one in needed if _version(one) is None]
                for name, needed in extras.items()
            },
            "programs": {name: shutil.which(name) for name in PROGRAMS},
            "machine": machine(device, None) | {"memory_free": free_memory()},
            "gpus": [{"name": gpu.name, "memory": gpu.total_memory} for gpu in gpus],
            "used": {
                "device": device,
                "cuda": torch.version.cuda,
                "precision": auto_precision(device),
                "compile": f"no, {lacks} is missing" if lacks else "where it pays",
                "workers of a sweep": usable_cores() if device == "cpu" else 1,
            },
            "disk": {
                name: {"folder": str(folder), "free": shutil.disk_usage(_there(folder)).free}
                for name, folder in places.items()
            },
            "environment": {name: os.environ.get(name) for name in VARIABLES}
            | {name: "set" if os.environ.get(name) else None for name in SECRETS}
            | {"logged in to the hub": bool(get_token())},
        }

    def told(self, found: dict[str, Any]) -> str:
        described = found["machine"]
        memory = format_bytes(described["memory_free"])
        lines = [
            f"{described['system']}, {described['cpu']}, {described['cores']} cores, {memory} free",
            *(f"{gpu['name']}, {format_bytes(gpu['memory'])}" for gpu in found["gpus"]),
            "versions: " + ", ".join(f"{n} {v or 'MISSING'}" for n, v in found["versions"].items()),
        ]
        for name, lacks in found["extras"].items():
            lines.append(f"extra {name}: " + (f"lacks {', '.join(lacks)}" if lacks else "there"))
        for name, place in found["programs"].items():
            lines.append(f"{name} ({PROGRAMS[name]}): {place or 'not there'}")
        lines += [f"{name}: {value}" for name, value in found["used"].items() if value is not None]
        for name, place in found["disk"].items():
            lines.append(f"{name}: {place['folder']}, {format_bytes(place['free'])} free")
        set_here = {name: value for name, value in found["environment"].items() if value}
        return "\n".join([*lines, *(f"{name}: {value}" for name, value in set_here.items())])


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """Names of the packages that capgap needs, and of those of each extra."""
    from packaging.requirements import Requirement

    needed: list[str] = []
    extras: dict[str, list[str]] = {}
    for text in requires("capgap") or []:
        one = Requirement(text)
        extra = str(one.marker or "").rpartition('extra == "')[2].rstrip('"')
        if extra in ("dev", "bench"):
            continue
        extras.setdefault(extra, []).append(one.name) if extra else needed.append(one.name)
    return needed, extras


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _there(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(one for one in (folder, *folder.absolute().parents) if one.exists())
