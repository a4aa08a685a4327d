"""The learning rate `auto`: a rule per size, with its evidence in docs/results. No torch."""

# The peak rate of a model of one million non-embedding parameters at batches of a few thousand
# tokens, and how it falls with size: fitted to the sweeps in docs/results/learning-rates.md.
RATE_AT_1M = 4e-3
EXPONENT = -0.25


def auto_learning_rate(non_embedding: int) -> float:
    """Peak AdamW learning rate for a model of that many non-embedding parameters."""
    return float(f"{RATE_AT_1M * (non_embedding / 1e6) ** EXPONENT:.3g}")
