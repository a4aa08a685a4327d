"""The soft term from what a cache keeps of a teacher's distribution: a few words a token.

Either the likeliest words exactly, and all others as one bucket: a divergence over k + 1 buckets,
never above the whole one and 0 where the student's buckets equal the teacher's. Or words drawn so
that every word's expected share is its probability (arXiv 2503.16870): the gradient of the forward
KL is then unbiased, whatever was drawn.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from capgap.distill.divergences import Divergence


@dataclass(frozen=True)
class SparseSignal:
    """A teacher's distribution by a few of its words, at the temperature it was kept for.

    words int64 [tokens, slots], the likeliest first where `knows_best`; shares [tokens, slots] of
    the probability; tail [tokens, 1] the probability of all other words, None where the words
    were drawn: their shares sum to 1 and a word may come twice. label_loss and entropy [tokens, 1]
    at temperature 1, soft_entropy [tokens, 1] at `temperature`; nats.
    """

    words: Tensor
    shares: Tensor
    tail: Tensor | None
    label_loss: Tensor
    entropy: Tensor
    soft_entropy: Tensor
    temperature: float
    vocabulary: int
    knows_best: bool

    def to(self, dtype: torch.dtype) -> "SparseSignal":
        """With floats of the dtype that the loss computes in."""
        return replace(
            self,
            shares=self.shares.to(dtype),
            tail=None if self.tail is None else self.tail.to(dtype),
            label_loss=self.label_loss.to(dtype),
            entropy=self.entropy.to(dtype),
            soft_entropy=self.soft_entropy.to(dtype),
        )

    def rows(self, rows: slice) -> "SparseSignal":
        """Those tokens alone."""
        return replace(
            self,
            words=self.words[rows],
            shares=self.shares[rows],
            tail=None if self.tail is None else self.tail[rows],
            label_loss=self.label_loss[rows],
            entropy=self.entropy[rows],
            soft_entropy=self.soft_entropy[rows],
        )


@dataclass(frozen=True)
class SoftTerm:
    """The soft term of some tokens, its gradient by the soft logits left in parts.

    value, kl [rows, 1]; the gradient is `scale` [rows, 1] x the student's probabilities, with
    `change` added: at the signal's words [rows, slots], or at all words [rows, vocabulary]; None
    stands for the teacher's probabilities, taken off.
    """

    value: Tensor
    kl: Tensor
    scale: Tensor | float
    change: Tensor | None


def sparse_term(
    logits: Tensor,
    probabilities: Tensor,
    log_total: Tensor,
    signal: SparseSignal,
    divergence: Divergence,
) -> SoftTerm:
    """logits, probabilities [rows, vocabulary] and log_total [rows, 1] as softmax_ leaves them, at
    the signal's temperature."""
    at_words = logits.gather(1, signal.words)
    if signal.tail is None:
        # drawn words estimate the cross-entropy; the teacher's entropy is known
        kl = (signal.shares * (log_total - at_words)).sum(-1, keepdim=True) - signal.soft_entropy
        return SoftTerm(kl, kl, 1.0, -signal.shares)
    # the tail is summed by itself: 1 less the words' probabilities would cancel
    words = probabilities.gather(1, signal.words)
    tail = probabilities.scatter_(1, signal.words, 0.0).sum(-1, keepdim=True)
    probabilities.scatter_(1, signal.words, words)
    smallest = torch.finfo(tail.dtype).tiny
    tail = tail.clamp_min(smallest)
    log_q = torch.cat([at_words - log_total, tail.log()], dim=1)
    log_p = torch.cat([signal.shares, signal.tail], dim=1).clamp_min(smallest).log()
    value, gradient = divergence.value_and_gradient(log_p, log_q)
    kl = value
    if divergence.name != "forward_kl":
        kl = torch.linalg.vecdot(log_p.exp(), log_p - log_q).unsqueeze(1)
    # the tail's gradient goes to its words by their part of it
    scale = gradient[:, -1:] / tail
    return SoftTerm(value, kl, scale, gradient[:, :-1] - scale * words)
