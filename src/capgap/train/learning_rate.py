"""The learning rate `auto`: a rule per size. No torch."""

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
    """Peak AdamW learning rate for a model of that many non-embedding parameters.

    `is_cut` is for students that start from weights cut out of a teacher. Measured up to 640k
    parameters, extrapolated above, and no lower than what published runs of billions took.
    """
    rate = RATE_AT_1M * (non_embedding / 1e6) ** EXPONENT
    share, lowest = (CUT_SHARE, LOWEST_CUT) if is_cut else (1.0, LOWEST)
    return float(f"{max(rate * share, lowest):.3g}")
