"""Records of sweeps that never ran: a known loss surface with known noise, for the law's tests."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from capgap.records import RunRecord, record_from_dict


def parameters(non_embedding: int) -> dict[str, int]:
    """Parts that add up to a given non-embedding size."""
    attention = non_embedding // 3
    return {
        "embedding": 1000,
        "attention": attention,
        "ffn": non_embedding - attention,
        "norms": 0,
        "head": 0,
        "non_embedding": non_embedding,
        "total": non_embedding + 1000,
    }


def run(
    kind: str,
    identity: str,
    *,
    size: int,
    seed: int,
    document_losses: Any,
    document_tokens: Any,
    **changes: Any,
) -> dict[str, Any]:
    """A finished run as plain values; `document_losses` in nats per token of each document."""
    nats = np.asarray(document_losses) * np.asarray(document_tokens)
    loss = float(nats.sum() / np.sum(document_tokens))
    return {
        "schema": 1,
        "kind": kind,
        "id": identity,
        "status": "done",
        "failure": None,
        "architecture": "llama",
        "seed": seed,
        "init": None,
        "student_size": None,
        "teacher_size": None,
        "teacher": None,
        "parameters": parameters(size),
        "teacher_parameters": None,
        "shape": {"architecture": "llama", "hidden": 32},
        "tokens": 400_000,
        "steps": 195,
        "batch_tokens": 2048,
        "learning_rate": 0.004 * (100_000 / size) ** 0.3,
        "alpha": 0.5 if kind == "cell" else 0.0,
        "temperature": 1.0,
        "recipe_hash": "r",
        "corpus_hash": "c",
        "flops": {"student": 100, "evaluation": 10},
        "heldout": {
            "loss": loss,
            "loss_stderr": 0.02,
            "bits_per_byte": loss / 2,
            "bits_per_byte_stderr": 0.01,
            "tokens": int(np.sum(document_tokens)),
            "bytes": 3 * int(np.sum(document_tokens)),
            "document_losses": nats.tolist(),
            "document_tokens": np.asarray(document_tokens).tolist(),
        },
        "after_cut": None,
        "curve": {"step": [1, 2], "kl": [0.9, 0.5], "agreement": [0.1, 0.4]},
        "wall_seconds": 1.5,
        "versions": {"capgap": "0"},
        "machine": {"cpu": "x"},
        "started": "2026-01-01T00:00:00",
        "finished": "2026-01-01T00:01:00",
    } | changes


def parabola(x: float) -> float:
    """Of ln(T / best): 0 at the best, curvature 2."""
    return x**2


def skew(x: float) -> float:
    """The same curvature and minimum, steeper for teachers that are too small."""
    return 2 * (np.exp(-x) + 2 * np.exp(x / 2) - 3) / 1.5


def sweep(
    students: Sequence[int],
    teachers_of: Callable[[int], Sequence[int]],
    best_of: Callable[[int], float],
    *,
    seeds: int = 2,
    curvature: float = 0.05,
    shape: Callable[[float], float] = parabola,
    seed_noise: float = 0.0,
    document_noise: float = 0.0,
    documents: int = 40,
    init: str = "fixed",
    gain: float | None = 0.03,
    with_teachers: bool = True,
    number: int = 0,
) -> list[RunRecord]:
    """Cells, baselines and teachers of loss = 3 + curvature shape(ln T - ln best) + noise.

    Every document has its own difficulty, the same for all runs; `document_noise` is what a
    document makes of one teacher's student, `seed_noise` a run's own luck. A seed also shifts all
    runs by an amount that no comparison may see.
    """
    rng = np.random.default_rng(number)
    tokens = rng.integers(200, 800, documents)
    difficulty = 0.5 * rng.standard_normal(documents)
    seed_shift = 0.2 * rng.standard_normal(seeds)
    records: dict[str, dict[str, Any]] = {}

    def add(*arguments: Any, **values: Any) -> None:
        values["document_losses"] = values["document_losses"] + difficulty
        record = run(*arguments, document_tokens=tokens, **values)
        records[record["id"]] = record

    for student in students:
        for teacher in teachers_of(student):
            smooth = 3 + curvature * shape(np.log(teacher) - np.log(best_of(student)))
            by_document = document_noise * rng.standard_normal(documents)
            for seed in range(seeds):
                above = f"t{teacher}-seed{seed}"
                if with_teachers:
                    add(
                        "teacher",
                        above,
                        size=teacher,
                        seed=seed,
                        teacher_size=teacher,
                        document_losses=4 - 0.1 * np.log(teacher) * np.ones(documents),
                    )
                luck = seed_noise * rng.standard_normal() + seed_shift[seed]
                shared = {
                    "size": student,
                    "seed": seed,
                    "init": init,
                    "student_size": student,
                }
                add(
                    "cell",
                    f"s{student}-t{teacher}-{init}-seed{seed}",
                    **shared,
                    teacher_size=teacher,
                    teacher=above,
                    teacher_parameters=parameters(teacher),
                    document_losses=smooth + luck + by_document,
                )
                if gain is not None:
                    cut = {"teacher_size": teacher, "teacher": above} if init == "pruned" else {}
                    name = f"-t{teacher}" if cut else ""
                    add(
                        "baseline",
                        f"b{student}{name}-{init}-seed{seed}",
                        **shared,
                        **cut,
                        document_losses=np.full(documents, 3 + gain + seed_shift[seed]),
                    )
    return [record_from_dict(record) for record in records.values()]


def ladder(start: float, factor: float, number: int) -> list[int]:
    """Sizes in equal ratios."""
    return [round(start * factor**i) for i in range(number)]
