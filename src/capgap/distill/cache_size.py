"""How many bytes a cache keeps of a token. Imports no torch."""

from dataclasses import dataclass

# Behind the records of every window
CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class TokenRecord:
    """What is kept of a token (`capgap.distill.cache_format`); ValueError for what cannot be."""

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
        return self.slots * self.word_bytes + 2 * self._floats

    @property
    def _floats(self) -> int:
        return self.top_k + (3 if self.temperature == 1.0 else 4)
