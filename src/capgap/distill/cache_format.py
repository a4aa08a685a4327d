"""What a cache keeps of every token, and its bytes.

A token's record, little-endian, in this order:

    words          (top_k + samples) x 2 or 3 bytes   token ids, the top_k first, likeliest first
    shares         top_k x float16                    log-probability of each of the top_k
    rest           float16                            log-probability of all other words together
    label loss     float16                            the teacher's cross-entropy, nats
    entropy        float16                            the teacher's, nats
    soft entropy   float16                            only at a temperature other than 1

Probabilities are at the cache's temperature, label loss and entropy at temperature 1. Without
samples the rest is one bucket. With them it is drawn: each sample stands for rest / samples.
"""

import numpy as np
import torch
from torch import Tensor, nn

from capgap.distill.cache_size import TokenRecord
from capgap.distill.chunking import chunk_rows
from capgap.distill.head import HeadInput, chunks, softmax_
from capgap.distill.sparse import SparseSignal

# The smallest log-probability told; exp of it is 0 in float32
SMALLEST = -1e4
DRAW_BLOCK = 64


class CacheFormat(TokenRecord):
    """How a token is kept."""

    def encode(self, source: HeadInput, targets: Tensor, places: Tensor) -> Tensor:
        """Records of a teacher's tokens, uint8 [tokens, token_bytes] on the CPU.

        targets int64 [tokens]; places [tokens] in [0, 1) decide what is drawn.
        """
        head = source.ready()
        records = []
        for rows in chunks(len(targets), chunk_rows(targets.device.type, self.vocabulary)):
            logits = head.logits_(head.product(rows))
            records.append(self._encode(logits, targets[rows], places[rows]))
        return torch.cat(records)

    def _encode(self, logits: Tensor, targets: Tensor, places: Tensor) -> Tensor:
        """Overwrites `logits`."""
        probabilities = torch.empty_like(logits)
        log_total = softmax_(logits, probabilities)
        label_loss = log_total - logits.gather(1, targets.unsqueeze(1))
        entropy = log_total - _expected(probabilities, logits)
        soft_entropy = entropy
        if self.temperature != 1.0:
            log_total = softmax_(logits.div_(self.temperature), probabilities)
            soft_entropy = log_total - _expected(probabilities, logits)
        # less what only fills up the head
        probabilities = probabilities[:, : self.vocabulary]
        best, words = probabilities.topk(self.top_k, dim=-1)
        others = probabilities.scatter(1, words, 0.0)
        rest = others.sum(-1, keepdim=True)
        if self.samples:
            words = torch.cat([words, _draw(others, places, self.samples)], dim=1)
        floats = [best.log(), rest.log(), label_loss, entropy]
        if self.temperature != 1.0:
            floats.append(soft_entropy)
        told = torch.cat(floats, dim=1).clamp(min=SMALLEST).to(torch.float16).cpu()
        return torch.cat([self._word_records(words.cpu()), told.view(torch.uint8)], dim=1)

    def _word_records(self, words: Tensor) -> Tensor:
        """The lowest bytes of int64 words, uint8 [tokens, slots x word_bytes]."""
        little = np.ascontiguousarray(words.numpy().astype("<i8")).view(np.uint8)
        little = little.reshape(*words.shape, 8)[..., : self.word_bytes]
        return torch.from_numpy(np.ascontiguousarray(little).reshape(len(words), -1))

    def decode(self, records: Tensor) -> SparseSignal:
        """uint8 [..., token_bytes] to the signal of these tokens, on their device."""
        records = records.reshape(-1, self.token_bytes)
        end = self.slots * self.word_bytes
        parts = records[:, :end].reshape(len(records), self.slots, self.word_bytes)
        words = torch.zeros(parts.shape[:2], dtype=torch.int64, device=records.device)
        for place in range(self.word_bytes):
            words += parts[..., place].long() << (8 * place)
        floats = records[:, end:].contiguous().view(torch.float16).float()
        # rounded on the way to float16: what is told adds up to 1 again
        shares = floats[:, : self.top_k + 1].exp()
        shares = shares / shares.sum(-1, keepdim=True)
        tail: Tensor | None = shares[:, self.top_k :]
        shares = shares[:, : self.top_k]
        if self.samples:
            assert tail is not None
            drawn = (tail / self.samples).expand(-1, self.samples)
            shares, tail = torch.cat([shares, drawn], dim=1), None
        label_loss, entropy, *more = floats[:, self.top_k + 1 :].split(1, dim=1)
        return SparseSignal(
            words=words,
            shares=shares,
            tail=tail,
            label_loss=label_loss,
            entropy=entropy,
            soft_entropy=more[0] if more else entropy,
            temperature=self.temperature,
            vocabulary=self.vocabulary,
            knows_best=self.top_k > 0,
        )


def _draw(weights: Tensor, places: Tensor, samples: int) -> Tensor:
    """Words [rows, samples] drawn from weights [rows, vocabulary]: systematic sampling.

    The weights laid end to end are cut at `samples` points of equal distance, with one random
    beginning a row (places [rows]). Every word is expected in proportion to its weight, and a
    row's samples differ less from that than independent ones. Blocks of words are searched first,
    then those that were hit: summing all weights up in order would take most of the time.
    """
    rows, vocabulary = weights.shape
    blocks = nn.functional.pad(weights, (0, -vocabulary % DRAW_BLOCK)).view(rows, -1, DRAW_BLOCK)
    sums = blocks.sum(-1).double()
    edges = sums.cumsum(-1)
    steps = torch.arange(samples, device=weights.device, dtype=torch.float64)
    points = (places.double().unsqueeze(1) + steps) / samples * edges[:, -1:]
    hit = torch.searchsorted(edges, points, right=True).clamp_max(sums.shape[1] - 1)
    into = (points - edges.gather(1, hit)) / sums.gather(1, hit) + 1
    inside = blocks.gather(1, hit.unsqueeze(-1).expand(-1, -1, DRAW_BLOCK)).double().cumsum(-1)
    # below the block's end, so that no word of weight 0 is drawn; nan where there is no weight
    target = into.nan_to_num(0.0).clamp(0.0, 1 - 1e-12).unsqueeze(-1) * inside[..., -1:]
    word = torch.searchsorted(inside, target, right=True).squeeze(-1)
    return (hit * DRAW_BLOCK + word).clamp_max(vocabulary - 1)


def _expected(probabilities: Tensor, values: Tensor) -> Tensor:
    return torch.linalg.vecdot(probabilities, values).unsqueeze(-1)
