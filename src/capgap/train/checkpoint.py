"""Checkpoints of a training run: a folder for each, written aside and renamed, with checksums.

    FOLDER/step-0000001200/training.safetensors   weights and moments; step and state in its header
    FOLDER/step-0000001200/manifest.json          bytes and sha256 of every other file, written last

Batches are a pure function of (seed, step), so the weights, the optimizer's moments and the step
are the whole state. No pickle: tensors in safetensors, the rest as JSON.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TENSORS = "training.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> None:
    """Adds a checkpoint to the folder, then deletes all but the last `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"step-{checkpoint.step:010d}"
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    partial = folder / f".{place.name}"
    partial.mkdir()
    metadata = {"step": str(checkpoint.step), "state": json.dumps(checkpoint.state)}
    try:
        save_file(checkpoint.tensors, partial / TENSORS, metadata=metadata)
        _sync(partial / TENSORS)
        (partial / MANIFEST).write_text(json.dumps({"schema": 1, "files": _checksums(partial)}))
        _sync(partial / MANIFEST)
        if place.exists():  # a damaged one, whose steps were taken again
            shutil.rmtree(place)
        partial.rename(place)
    finally:
        # half a checkpoint must not go on filling a full disk
        shutil.rmtree(partial, ignore_errors=True)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The last whole checkpoint of the folder, None when there is none.

    A truncated or changed one is passed over with a warning, and the one before it is taken.
    """
    for place in sorted(folder.glob("step-*"), reverse=True):
        problem = _damage(place)
        if problem is None:
            with safe_open(place / TENSORS, framework="pt") as opened:
                metadata = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return Checkpoint(int(metadata["step"]), tensors, json.loads(metadata["state"]))
        logger.warning("checkpoint %s is damaged (%s): going on from before it", place, problem)
    return None


def _sync(path: Path) -> None:
    with path.open("rb") as written:
        os.fsync(written.fileno())


def _checksums(place: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(place.iterdir()):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        found[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def _damage(place: Path) -> str | None:
    """What differs from the manifest, or None."""
    try:
        expected = json.loads((place / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"no readable {MANIFEST}"
    found = _checksums(place)
    for name, entry in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name]["bytes"] != entry["bytes"]:
            return f"{name} has {found[name]['bytes']} of {entry['bytes']} bytes"
        if found[name] != entry:
            return f"{name} has another sha256"
    return None


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, prefix: str
) -> dict[str, Tensor]:
    """Weights and moments by parameter name; tied parameters appear once."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"{prefix}/weight/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{prefix}/{key}/{name}"] = value
    return tensors


def restore_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    prefix: str,
) -> None:
    """The reverse of `training_tensors`, in place."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, kind, name = key.split("/", 2)
        if owner == prefix:
            by_parameter.setdefault(name, {})[kind] = tensor
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            state = by_parameter[name]
            parameter.copy_(state.pop("weight"))
            if state:
                optimizer.state[parameter] = {
                    key: value.to(parameter.device) for key, value in state.items()
                }
