"""Sizes of models: "3B" and numbers, parameters by part, and floating-point operations."""

import re
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation

from capgap.errors import UserError

MOST = 10**18  # nothing that is counted here is more
# Teachers of a ladder read so many tokens for each parameter of the largest, if nobody says more
LADDER_TOKENS = 10
_SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_count(value: str | int | float) -> int:
    """Read a count such as "3B", "1.5M", "300k", "1_000", 123 or 1e6 as a plain integer.

    The suffixes k, M, B and T stand for 10^3, 10^6, 10^9 and 10^12, in either case.
    Raises UserError if the value is no positive whole number.
    """
    mistake = UserError(
        f"{value!r} is no count: give a positive whole number, plain or like 300k, 1.5M, 3B"
    )
    if isinstance(value, bool):
        raise mistake
    text = str(value).strip().replace("_", "").replace(",", "")
    factor = _SUFFIXES.get(text[-1:].lower(), 1)
    try:
        # Decimal, not float: 1.1M must be exactly 1100000
        count = Decimal(text[:-1].strip() if factor > 1 else text) * factor
    except InvalidOperation:
        raise mistake from None
    if not count.is_finite() or not 0 < count <= MOST or count != count.to_integral_value():
        raise mistake
    return int(count)


def parse_size(value: str | int) -> tuple[int, bool]:
    """Read a model's size: "3B" without its embeddings, "3.2B total" with them.

    Returns the parameters, and whether they are all of them. UserError as `parse_count`.
    """
    text = str(value).strip()
    plain = text.removesuffix("total").strip()
    return parse_count(plain), plain != text


def parse_bytes(value: str | int) -> int:
    """Read bytes such as "5GB", "500 MB", "64kB" or 4096; a kB is 10^3 bytes.

    Raises UserError if the value is no positive whole number of them.
    """
    found = re.fullmatch(r"([\d._]+)\s*([kKMGT]?)B?", str(value).strip())
    try:
        if found is None:
            raise UserError("")
        # B, the letter of 10^9 in counts of parameters, is G in bytes
        return parse_count(found[1] + found[2].replace("G", "B"))
    except UserError:
        raise UserError(f"{value!r} is no amount of bytes: give one like 5GB or 500MB") from None


def format_percent(share: float) -> str:
    """A share in percent, below ten of them to one digit: 25%, 1%, 0.3%."""
    if share >= 0.1:
        return f"{share:.0%}"
    return "less than 0.01%" if share < 1e-4 else f"{100 * share:.1g}%"


def format_count(count: int | float) -> str:
    """Write a count with three significant digits: 3.02e9 -> "3.02B", 50123 -> "50.1k"."""
    rounded = float(f"{count:.3g}")
    for suffix, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(rounded) >= factor:
            return f"{rounded / factor:.3g}{suffix}"
    return f"{rounded:g}"


def format_bytes(count: int | float) -> str:
    """Write bytes with three significant digits: 2.36e6 -> "2.36 MB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def clock_time(seconds: float | None) -> str:
    """Minutes and seconds, "7:05"; hours before them where there are some."""
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a language model by part.

    `embedding` holds the token table and, where the model has one, the table of positions.
    `head` is the output projection: 0 where it is tied to the token table.
    """

    embedding: int
    attention: int
    ffn: int
    norms: int
    head: int

    @property
    def non_embedding(self) -> int:
        """The size a model is named by: attention, FFN and norms."""
        return self.attention + self.ffn + self.norms

    @property
    def total(self) -> int:
        """Every stored parameter; a tied head is stored once, in the embedding."""
        return self.embedding + self.non_embedding + self.head

    def as_dict(self) -> dict[str, int]:
        """The five parts with `non_embedding` and `total`."""
        return {**asdict(self), "non_embedding": self.non_embedding, "total": self.total}


def training_flops(total: int, tokens: int) -> int:
    """Floating-point operations to train `total` parameters on `tokens`: 6 each (2001.08361)."""
    return 6 * total * tokens


def forward_flops(total: int, tokens: int) -> int:
    """Floating-point operations of a forward pass: 2 per parameter and token (2001.08361)."""
    return 2 * total * tokens
