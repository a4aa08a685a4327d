"""Students learn from the distribution of a teacher, which runs beside them or is cached.

This file has what recipes and costs know of it, without torch: the divergences' names, how many
tokens the loss takes at once, of how many rows its heads are, and how many bytes a cache keeps of a
token.
"""

from dataclasses import dataclass
from typing import Literal

# `capgap.distill.divergences.Divergence` says what they are
DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation"]
# Words x tokens of a chunk, and its tokens: matrix products of fewer rows are slower, and what is
# done once a chunk is done less often; by measurement on CPUs (docs/benchmarks.md)
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}
CHUNK_ROWS = {"cpu": (128, 512), "cuda": (128, 2**20)}
# Words x tokens of a block
BLOCK_ELEMENTS = 2**19
# A GPU's matrix units take whole tiles: with 50,257 or 151,665 words no row of logits would begin
# where one does
HEAD_MULTIPLE = 64
# Behind the records of every window of a cache
CHECKSUM_BYTES = 4


def padded_rows(vocabulary: int) -> int:
    """Rows of a head that is filled up to whole tiles."""
    return -(-vocabulary // HEAD_MULTIPLE) * HEAD_MULTIPLE


def chunk_rows(device: str, vocabulary: int) -> int:
    """Tokens whose logits exist at once, on a type of device."""
    kind = device if device in CHUNK_ELEMENTS else "cuda"
    least, most = CHUNK_ROWS[kind]
    rows = min(max(least, CHUNK_ELEMENTS[kind] // vocabulary), most)
    # a GPU's products come in tiles of so many
    return rows if kind == "cpu" else rows // least * least


def block_rows(device: str, vocabulary: int, rows: int) -> int:
    """Tokens of a block: on a GPU all of a chunk."""
    return rows if device != "cpu" else min(rows, max(1, BLOCK_ELEMENTS // vocabulary))


@dataclass(frozen=True)
class TokenRecord:
    """What a cache keeps of a token (`capgap.distill.cache`); ValueError for what cannot be."""

    vocabulary: int
    top_k: int = 12
    samples: int = 16
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 0 or self.samples < 0 or self.top_k + self.samples == 0:
            raise ValueError(f"nothing to keep: top-k {self.top_k}, samples {self.samples}")
        if self.top_k >= self.vocabulary:
            raise ValueError(f"top-k {self.top_k} is not less than {self.vocabulary} words")
        if self.vocabulary > 1 << 24:
            raise ValueError(f"{self.vocabulary} words are more than 3 bytes can name")
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} is not above 0")

    @property
    def slots(self) -> int:
        """Words of a token."""
        return self.top_k + self.samples

    @property
    def word_bytes(self) -> int:
        return 2 if self.vocabulary <= 1 << 16 else 3

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's record."""
        floats = self.top_k + (3 if self.temperature == 1.0 else 4)
        return self.slots * self.word_bytes + 2 * floats
