"""What is compared: engines, and the shapes, data and settings they share. Imports no torch."""

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any

from capgap.models.shape import Shape, ladder_shape
from capgap.sizes import format_count, parse_count

LEARNING_RATE = 1e-3
BETA2 = 0.95
WEIGHT_DECAY = 0.1
CLIP = 1.0
COLUMN_STUDENTS = 5


@dataclass(frozen=True)
class Engine:
    """Something that is measured.

    students: trained at once. package: what has to be installed for it. has_hard_loss: whether
    labels can take part in its loss. is_exact: whether its loss is that of the others, and not an
    estimate.
    """

    title: str
    students: int = 1
    package: str = "capgap"
    has_hard_loss: bool = True
    is_exact: bool = True

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


STEP_ENGINES = {
    "ours": Engine("capgap"),
    "ours-cached": Engine("capgap, cached teacher", is_exact=False),
    "ours-column": Engine(f"capgap, {COLUMN_STUDENTS} students", students=COLUMN_STUDENTS),
    "plain": Engine("plain loop, full logits"),
    "liger": Engine("plain loop, Liger's loss", package="liger_kernel"),
    "trl-gkd": Engine("TRL GKDTrainer", package="trl", has_hard_loss=False),
    "trl-distillation": Engine(
        "TRL DistillationTrainer, off-policy", package="trl", has_hard_loss=False
    ),
}
LOSS_ENGINES = {
    "ours": Engine("capgap"),
    "compiled": Engine("capgap, compiled"),
    "plain": Engine("full logits"),
    "liger": Engine("Liger's chunked JSD", package="liger_kernel"),
    "trl": Engine("TRL's chunked divergence", package="trl", has_hard_loss=False),
}
# Everything is told as a ratio to these
BASE = {"step": "trl-gkd", "loss": "liger"}


@dataclass(frozen=True)
class Case:
    """Two shapes and the work of a step; every engine of a case does the same.

    precision: "fp32", or "bf16" for autocast of a student with weights in fp32 and a teacher whose
    weights are bf16. A batch is one micro-batch. alpha: share of the soft loss.
    """

    student: Shape
    teacher: Shape
    window: int
    batch_windows: int
    precision: str
    device: str
    threads: int
    alpha: float

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.window * self.batch_windows

    @property
    def name(self) -> str:
        student, teacher = (
            shape.parameters().non_embedding for shape in (self.student, self.teacher)
        )
        return (
            f"{format_count(student)} of {format_count(teacher)}, "
            f"{self.student.vocabulary:,} words, {self.precision}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Case":
        shapes = {name: Shape(**data[name]) for name in ("student", "teacher")}
        return cls(**(data | shapes))


def cpu_cases(
    *,
    students: list[str],
    ratios: list[float],
    vocabularies: dict[int, str],
    window: int,
    batch_windows: int,
    threads: int,
    alpha: float,
) -> list[Case]:
    """Ladder students by non-embedding size, teachers that many times larger.

    vocabularies: size to precision.
    """

    def shape(size: float, vocabulary: int) -> Shape:
        return ladder_shape("llama", round(size), vocabulary=vocabulary, positions=window)

    return [
        Case(
            shape(parse_count(student), vocabulary),
            shape(parse_count(student) * ratio, vocabulary),
            window,
            batch_windows,
            precision,
            "cpu",
            threads,
            alpha,
        )
        for vocabulary, precision in vocabularies.items()
        for student in students
        for ratio in ratios
    ]
