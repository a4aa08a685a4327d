"""The text that units are scored on: windows of a corpus in an order of their own."""

import torch
from torch import Tensor

from capgap.corpus.text import Text

_ORDER_SEED = 3_000_017


def scoring_batches(
    corpus: Text, tokens: int, *, batch_windows: int = 8, seed: int = 0
) -> list[Tensor]:
    """Batches [batch_windows, window + 1] of about `tokens` in all, or of the whole corpus where it
    has fewer; the last one may be smaller.

    Small batches: |gradient| is meaned over batches, so many small ones say more than few large
    ones.
    """
    rows = min(max(1, tokens // corpus.window), corpus.windows)
    indices = corpus.batch(seed=_ORDER_SEED + seed, step=0, batch_windows=rows)
    return list(torch.from_numpy(corpus.train.windows_at(indices)).split(batch_windows))
