"""Checkpoints of a training run: one safetensors file, written aside and renamed.

Batches are a pure function of (seed, step), so the weights, the optimizer's moments and the step
are the whole state. No pickle: tensors in safetensors, the rest as JSON in its header.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Checkpoint:
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    metadata = {"step": str(checkpoint.step), "state": json.dumps(checkpoint.state)}
    try:
        save_file(checkpoint.tensors, aside, metadata=metadata)
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, path)
    finally:
        # half a file must not go on filling a full disk
        aside.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> Checkpoint | None:
    """None when there is no checkpoint: a rename is atomic, so one that is there is whole."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return Checkpoint(int(metadata["step"]), tensors, json.loads(metadata["state"]))


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
