"""What came out of a step, in a few words: read from the record that its command wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from capgap.pipeline.steps import Step
from capgap.sizes import format_count


def result_of(step: Step) -> str:
    """One phrase for a person; empty where the step's record says nothing to tell."""
    tell = _TELLERS.get(step.command)
    if tell is None or step.record is None or not step.record.exists():
        return ""
    return tell(json.loads(step.record.read_text(encoding="utf-8")))


def _corpus(found: dict[str, Any]) -> str:
    return f"{format_count(found['train']['tokens'])} tokens, vocabulary {found['vocabulary']:,}"


def _trained(found: dict[str, Any]) -> str:
    told = []
    for name, after in found["after"].items():
        if after["heldout"] is None:
            told.append("failed")
            continue
        before = (found.get("before") or {}).get(name)
        start = "" if before is None else f"{before['loss']:.3f} -> "
        told.append(f"held-out loss {start}{after['heldout']['loss']:.3f}")
    return "; ".join(told)


def _adapted(found: dict[str, Any]) -> str:
    told = []
    for name, losses in found["heldout"].items():
        bits = [one["bits_per_byte"] for one in losses.values() if one]
        if bits:
            told.append(f"{name} text {bits[0]:.3f} -> {bits[-1]:.3f} bits per byte")
    return "; ".join(told)


def _cut(found: dict[str, Any]) -> str:
    counts = found["parameters"]
    return f"{format_count(counts['non_embedding'])} non-embedding parameters"


def _evaluated(found: dict[str, Any]) -> str:
    told = [
        f"held-out loss on {Path(name).name} "
        + ("missing" if one["loss"] is None else f"{one['loss']:.3f}")
        for name, one in (found["heldout"] or {}).items()
    ]
    told += [
        f"{name} missing" if one["score"] is None else f"{name} {one['score']:.3f}"
        for name, one in found["tasks"].items()
    ]
    return ", ".join(told)


def _tuned(found: dict[str, Any]) -> str:
    if not found.get("before"):
        return ""
    return f"held-out loss {found['before']['loss']:.3f} -> {found['after']['loss']:.3f}"


_TELLERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "corpus": _corpus,
    "train": _trained,
    "distill": _trained,
    "adapt": _adapted,
    "prune": _cut,
    "evaluate": _evaluated,
    "instruct": _tuned,
    "prefer": _tuned,
}
