"""The learning rate `auto`: a rule per size. No torch."""

# A power law through the best rates of 30k to 640k models at batches of 1,024 tokens, and what
# students that start from a teacher's weights want of it: docs/results/learning-rates.md.
RATE_AT_1M = 4.5e-3
EXPONENT = -0.45
CUT_SHARE = 0.5


def auto_learning_rate(non_embedding: int, *, is_cut: bool = False) -> float:
    """Peak AdamW learning rate for a model of that many non-embedding parameters.

    `is_cut` is for students that start from weights cut out of a teacher.
    """
    rate = RATE_AT_1M * (non_embedding / 1e6) ** EXPONENT
    return float(f"{rate * (CUT_SHARE if is_cut else 1):.3g}")
