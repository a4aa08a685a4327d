"""Scores of units on disk: safetensors with where they come from."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from capgap.artifact import file_written
from capgap.errors import UserError
from capgap.prune.importance import UNITS, Importance, ScoringState

# 2: activations by norm; a scoring begun before has sums of another shape
SCHEMA = 2


def save_importance(path: Path, importance: Importance) -> None:
    """Writes a safetensors file in one step, with the provenance of the scores in its metadata;
    `load_importance` reads it."""
    tensors = {name: getattr(importance, name) for name in UNITS}
    facts = {"tokens": importance.tokens, "flops": importance.flops}
    _save(path, tensors, {"schema": SCHEMA, **facts, "provenance": importance.provenance})


def load_importance(path: Path) -> Importance:
    """What `save_importance` wrote; UserError where there is none or it is no such file."""
    tensors, facts = _load(path)
    if set(tensors) != set(UNITS) or facts.get("schema") != SCHEMA:
        raise UserError(f"{path} holds no scores of units of this version: make it anew")
    return Importance(
        **tensors,
        tokens=facts["tokens"],
        flops=facts["flops"],
        provenance=facts["provenance"],
    )


def save_state(path: Path, state: ScoringState, provenance: dict[str, Any]) -> None:
    """A scoring that is not finished, in one step."""
    tensors = {
        f"{method}.{name}": sums[name].cpu()
        for method, sums in state.sums.items()
        for name in UNITS
    }
    counts = {"batches": state.batches, "tokens": state.tokens}
    _save(path, tensors, {"schema": SCHEMA, **counts, "provenance": provenance})


def load_state(path: Path, provenance: dict[str, Any], device: torch.device) -> ScoringState | None:
    """The scoring to go on from; None where there is none, or one of something else."""
    if not path.exists():
        return None
    tensors, facts = _load(path)
    if facts.get("schema") != SCHEMA or facts["provenance"] != provenance:
        return None
    state = ScoringState(batches=facts["batches"], tokens=facts["tokens"])
    for key, tensor in tensors.items():
        method, _, name = key.partition(".")
        state.sums.setdefault(method, {})[name] = tensor.to(device)
    return state


def _save(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    text = json.dumps(facts, sort_keys=True)
    with file_written(path) as aside:
        save_file(tensors, aside, metadata={"capgap": text, "sha256": _hash(tensors, text)})


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"no file of scores {path}: make one with `capgap score`")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            # copies: what is mapped would keep the file open
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        text = metadata.get("capgap", "{}")
        facts = json.loads(text)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is no file of scores ({error}): make it anew") from None
    if metadata.get("sha256", "") not in ("", _hash(tensors, text)):
        raise UserError(f"{path} is damaged (another sha256 than when it was written): delete it")
    return tensors, facts


def _hash(tensors: dict[str, torch.Tensor], facts: str) -> str:
    whole = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        whole.update(name.encode() + tensors[name].contiguous().cpu().numpy().tobytes())
    return whole.hexdigest()
