"""The learning rate: the rule `auto` for its peak, and its course over a run. No torch."""

import math
from dataclasses import dataclass
from typing import Literal

# A power law through the best rates of 30k to 640k models at batches of 1,024 tokens, and what
# students that start from a teacher's weights want of it: docs/results/learning-rates.md.
RATE_AT_1M = 4.5e-3
EXPONENT = -0.45
CUT_SHARE = 0.5
# Above the sizes that the rule was read off it is not known, and falls below what published runs
# took: 1e-4 to 3e-4 for students of 1B to 8B that were cut and distilled (arXiv 2407.14679,
# 2311.07052), 3e-4 for models of 1B to 7B from scratch (arXiv 2302.13971). It goes no lower.
LOWEST, LOWEST_CUT = 3e-4, 1e-4


def auto_learning_rate(non_embedding: int, *, is_cut: bool = False) -> float:
    """Peak AdamW learning rate, `auto`, for a model of that many non-embedding parameters.

    `is_cut` is for students that start from weights cut out of a teacher. Measured up to 640k
    parameters, extrapolated above, and no lower than what published runs of billions took.
    """
    rate = RATE_AT_1M * (non_embedding / 1e6) ** EXPONENT
    share, lowest = (CUT_SHARE, LOWEST_CUT) if is_cut else (1.0, LOWEST)
    return float(f"{max(rate * share, lowest):.3g}")


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run, as a share of its peak.

    After a linear warm-up over `warmup_fraction` of the steps: `cosine` falls to `final_rate` at
    the end; `wsd` (arXiv 2404.06395) stays at the peak, and falls in a straight line over the last
    `decay_fraction` of the steps.
    """

    kind: Literal["cosine", "wsd"] = "cosine"
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.2
    final_rate: float = 0.0

    def share(self, step: int, steps: int) -> float:
        """The share at a step, counted from 0. The warm-up's last step and the first after it are
        at the peak; the last step is just above the end of the fall."""
        warmup = max(1, round(steps * self.warmup_fraction))
        if step < warmup:
            return (step + 1) / warmup
        if self.kind == "cosine":
            progress = (step - warmup) / max(1, steps - warmup)
            left = 0.5 * (1 + math.cos(math.pi * progress))
        else:
            left = min(1.0, (steps - step) / max(1, round(steps * self.decay_fraction)))
        return self.final_rate + (1 - self.final_rate) * left


COSINE = Schedule()
