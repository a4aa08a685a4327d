"""A synthetic output folder of a sweep, plausible enough to look at, for the report's tests.

Losses follow a formula with a known best teacher, so that a test knows what a figure must show.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgap.artifact import write_json
from capgap.law.data import cells_of
from capgap.law.fit import fit
from capgap.records import read_records, record_from_dict, write_record
from capgap.report.draw import spec_of

TEACHERS = (60_000, 100_000, 160_000, 250_000, 400_000, 640_000)
STUDENTS = (40_000, 70_000, 120_000)
EMBEDDING = 131_072
BEST_RATIO = 2.2
SIGMA = 0.012
DIFFICULTY = [0.3 * math.sin(5.0 * number) for number in range(40)]


@dataclass(frozen=True)
class Plan:
    """What to write; `baselines` is "all", "ends" (first and last teacher) or "none"."""

    teachers: Sequence[int] = TEACHERS
    students: Sequence[int] = STUDENTS
    architectures: Sequence[str] = ("llama",)
    inits: Sequence[str] = ("pruned",)
    tokens: Sequence[int] = (400_000,)
    seeds: Sequence[int] = (0,)
    baselines: str = "all"
    failed: Sequence[str] = ()
    missing: Sequence[str] = ()
    finished: bool = True
    law: bool = True
    samples: bool = True


def teacher_loss(size: int) -> float:
    return 2.55 + 2.4 * (size / 10_000) ** -0.35


def student_loss(size: int, teacher: int, tokens: int, init: str) -> float:
    """Lowest at a teacher of BEST_RATIO times the student."""
    away = math.log(teacher / (BEST_RATIO * size))
    start = {"pruned": 0.0, "fixed": 0.12, "scratch": 0.3, "chain": 0.05}[init]
    return 2.75 + 2.3 * (size / 10_000) ** -0.3 + 0.05 * away**2 + start - tokens / 8e6


def baseline_loss(size: int, tokens: int, init: str) -> float:
    return student_loss(size, round(BEST_RATIO * size), tokens, init) + 0.045


def _parameters(size: int) -> dict[str, int]:
    attention, norms = size // 3, 500
    ffn = size - attention - norms
    parts = {"embedding": EMBEDDING, "attention": attention, "ffn": ffn, "norms": norms, "head": 0}
    return {**parts, "non_embedding": size, "total": size + EMBEDDING}


def _curve(loss: float, steps: int, kl: float | None, rng: random.Random) -> dict[str, Any]:
    logged = list(range(5, steps + 1, 5))
    decay = [math.exp(-6 * step / steps) for step in logged]
    curve: dict[str, Any] = {
        "step": logged,
        "tokens": [2048 * step for step in logged],
        "ce": [loss + 4 * d + rng.gauss(0, 0.08) for d in decay],
        "gradient_norm": [0.5 + d for d in decay],
        "learning_rate": [0.004 * (1 - step / steps) for step in logged],
    }
    if kl is not None:
        curve["kl"] = [kl + 2.5 * d + rng.gauss(0, 0.02) for d in decay]
        curve["agreement"] = [0.62 - 0.3 * kl - 0.5 * d + rng.gauss(0, 0.01) for d in decay]
    return curve


def _record(kind: str, name: str, loss: float, **values: Any) -> dict[str, Any]:
    rng = random.Random(name)
    tokens, steps = values["tokens"], values["tokens"] // 2048
    documents = [
        # the same documents are hard for every model; what is left differs a little
        loss + hard + rng.gauss(0, 0.01)
        for hard in DIFFICULTY
    ]
    noisy = sum(documents) / len(documents)
    base = {
        "schema": 1,
        "kind": kind,
        "id": name,
        "status": "done",
        "shape": {"architecture": values["architecture"], "hidden": 64, "layers": 4},
        "steps": steps,
        "batch_tokens": 2048,
        "learning_rate": 0.004,
        "alpha": 0.5 if kind == "cell" else 0.0,
        "temperature": 1.0,
        "recipe_hash": "f3a9",
        "corpus_hash": "77b1",
        "flops": {"student": 6 * values["parameters"]["total"] * tokens, "evaluation": 10**10},
        "heldout": {
            "loss": noisy,
            "loss_stderr": SIGMA,
            "bits_per_byte": noisy / math.log(2) / 2.4,
            "bits_per_byte_stderr": 0.005,
            "tokens": 100 * len(documents),
            "bytes": 240 * len(documents),
            "document_losses": [100 * document for document in documents],
            "document_tokens": [100] * len(documents),
        },
        "curve": _curve(loss, steps, 0.1 + loss / 15 if kind == "cell" else None, rng),
        "wall_seconds": 4e-11 * 6 * values["parameters"]["total"] * tokens + 1,
        "versions": {"capgap": "0.1.0", "torch": "2.13.0"},
        "machine": {"cpu": "a CPU", "cores": 2, "threads": 2, "device": "cpu"},
        "started": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T03:04:25+00:00",
    }
    return {**base, **values}


def _fail(record: dict[str, Any]) -> None:
    record["status"] = "failed"
    record["heldout"] = None
    record["failure"] = {"message": "the loss is not finite", "step": 12, "windows": [3, 77]}


def _records(plan: Plan) -> list[dict[str, Any]]:
    records = []
    for architecture in plan.architectures:
        for seed in plan.seeds:
            for teacher in plan.teachers:
                name = f"{architecture}-t{teacher // 1000}k-seed{seed}"
                size = {"teacher_size": teacher, "parameters": _parameters(teacher)}
                common = {"architecture": architecture, "seed": seed, "tokens": 800_000}
                records.append(_record("teacher", name, teacher_loss(teacher), **common, **size))
            for tokens in plan.tokens:
                for init in plan.inits:
                    for student in plan.students:
                        records += _row(plan, architecture, init, tokens, student, seed)
    return [record for record in records if record["id"] not in plan.missing]


def _row(
    plan: Plan, architecture: str, init: str, tokens: int, student: int, seed: int
) -> list[dict[str, Any]]:
    common: dict[str, Any] = {
        "architecture": architecture,
        "seed": seed,
        "init": init,
        "tokens": tokens,
        "student_size": student,
        "parameters": _parameters(student + 123),
    }
    teachers = [teacher for teacher in plan.teachers if teacher > student]
    baseline = baseline_loss(student, tokens, init)
    rows = []
    for teacher in teachers:
        tail = f"{init}-{tokens // 1000}k-seed{seed}"
        name = f"{architecture}-s{student // 1000}k-t{teacher // 1000}k-{tail}"
        above = {
            "teacher_size": teacher,
            "teacher": f"{architecture}-t{teacher // 1000}k-seed{seed}",
            "teacher_parameters": _parameters(teacher),
        }
        cell = _record(
            "cell", name, student_loss(student, teacher, tokens, init), **common, **above
        )
        total = _parameters(teacher)["total"]
        cell["flops"]["teacher_training"] = 6 * total * 800_000
        cell["flops"]["teacher_forward"] = 2 * total * tokens
        if init == "pruned":
            cell["after_cut"] = {"loss": cell["heldout"]["loss"] + 2, "loss_stderr": 0.03}
        if name in plan.failed:
            _fail(cell)
        rows.append(cell)
        ends = (teachers[0], teachers[-1])
        wanted = plan.baselines == "all" or (plan.baselines == "ends" and teacher in ends)
        if wanted and init == "pruned":
            rows.append(_record("baseline", f"{name}-ce", baseline, **common, **above))
    if init != "pruned" and plan.baselines != "none":
        name = f"{architecture}-s{student // 1000}k-{init}-{tokens // 1000}k-seed{seed}-ce"
        rows.append(_record("baseline", name, baseline, **common))
    return rows


def write_output(folder: Path, plan: Plan | None = None) -> Path:
    """Write the output folder of a pretended sweep into `folder` and return it."""
    plan = plan or Plan()
    records = _records(plan)
    for record in records:
        write_record(folder / "records" / record["id"], record_from_dict(record))
    sweep = {
        "recipe": {"name": "synthetic", "students": {"sizes": list(plan.students)}},
        "recipe_hash": "f3a9",
        "corpus": {
            "source": "stdlib",
            "documents": 1234,
            "files": ["a.py"] * 40,
            "sha256": "9f" * 32,
        },
        "machine": {"cpu": "a CPU", "cores": 2, "threads": 2, "device": "cpu"},
        "versions": {"capgap": "0.1.0", "python": "3.11.2", "torch": "2.13.0"},
        "stages": {"teacher_training": 120.0, "distillation": 260.0, "baselines": 90.0, "law": 2.0},
        "wall_seconds": 480.0 if plan.finished else None,
        "started": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T03:12:05+00:00" if plan.finished else None,
        "best": None,
    }
    if plan.samples:
        best = next(record for record in records if record["kind"] == "cell")
        sweep["best"] = {"cell": best["id"], "teacher": best["teacher"]}
        beginning = "def read_all(path):\n"
        write_json(
            folder / "samples.json",
            {
                "prompt": beginning,
                "texts": [
                    {
                        "who": who,
                        "id": best[name],
                        "prompt": beginning,
                        "text": '    """Read <b>it</b>."""\n    return [x for x in path if x & 1]'
                        "\n</script><script>window.broken = true</script>\n",
                    }
                    for who, name in (("student", "id"), ("teacher", "teacher"))
                ],
            },
        )
    write_json(folder / "sweep.json", sweep)
    if plan.law:
        law = fit(cells_of(read_records(folder)), draws=200)
        write_json(folder / "law.json", law.as_dict())
    return folder


def rows_of(picture: Any, mark: str) -> list[dict[str, Any]]:
    """The rows of all marks of a kind in a picture, each with the style of its layer."""
    spec = spec_of(picture)
    return [
        {"style": layer["mark"], **row}
        for layer in spec["layer"]
        if layer["mark"]["type"] == mark
        for row in spec["datasets"][layer["data"]["name"]]
    ]
