"""What is published of the capacity gap, as data to set beside what is measured."""

from dataclasses import dataclass

from capgap.law.surface import DistillationSurface, SupervisedSurface


@dataclass(frozen=True)
class PublishedLine:
    """T* = slope S + intercept; the intercept in plain parameters."""

    name: str
    slope: float
    intercept: float

    def optimal_teacher(self, student_parameters: float) -> float:
        """Teacher size in parameters; may be negative far below the line's own range."""
        return self.slope * student_parameters + self.intercept


PUBLISHED_LINE = PublishedLine("Zhang et al., arXiv 2311.07052", 2.498, -11_498_000.0)

# T/S of the cells beside the best one, cut at 50% and 70%: what the line's grid can resolve
PUBLISHED_RESOLUTION = (2.0, 1 / 0.3)
# its teachers, in parameters
PUBLISHED_TEACHERS = (70e6, 2.8e9)

# Busbridge et al., arXiv 2502.08606: models of 143M to 12.6B parameters, about 1% error
PUBLISHED_SURFACE = DistillationSurface(
    supervised=SupervisedSurface(E=1.220, A=3355, B=18186, alpha=0.408, beta=0.431, gamma=0.452),
    A=2243,
    B=24181,
    alpha=0.321,
    beta=0.637,
    gamma=0.764,
    c0=2.549,
    c1=522.6,
    f1=0.090,
    d1=1.315,
)
