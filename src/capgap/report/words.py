"""Numbers as a reader wants them: rounded to what is known, with their interval and unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from capgap.sizes import format_count

# an end that is None is open
Interval = Sequence[float | None]

# typographic signs, escaped so that no reader takes them for letters
NOTHING = "\u2013"
MINUS = "\u2212"
TIMES = "\u00d7"


def size(value: float | None) -> str:
    """A number of parameters or tokens with three digits: "3.02B"."""
    return NOTHING if value is None else format_count(value)


def rough_size(value: float) -> str:
    """A fitted size: two digits, since its interval is never narrower than that."""
    return format_count(float(f"{value:.2g}"))


def size_with_interval(value: float | None, interval: Interval | None) -> str:
    """A fitted size: "96k (72k to 130k)"; with an open end "at most 130k" or "at least 72k"."""
    if value is None:
        return NOTHING
    return _interval_text(value, interval, rough_size)


def with_interval(value: float | None, interval: Interval | None) -> str:
    """A ratio or slope rounded to what its interval allows: "1.9 (1.5 to 2.4)", "at least 2.1"."""
    if value is None:
        return NOTHING
    low, high = interval or (None, None)
    width = value / 2 if low is None or high is None else high - low
    decimals = -math.floor(math.log10(abs(width))) if width else 2
    smallest = min(abs(end) for end in (value, low, high) if end is not None)
    decimals = min(3, max(decimals, 1 if smallest < 10 else 0))
    return _interval_text(value, interval, lambda number: f"{number:.{decimals}f}")


def between(value: float, interval: Interval | None) -> str:
    """A size of the grid with its neighbours: "160k (100k to 250k)", "60k (up to 100k)"."""
    low, high = interval or (None, None)
    if low is not None and high is not None:
        return f"{size(value)} ({size(low)} to {size(high)})"
    if high is not None:
        return f"{size(value)} (up to {size(high)})"
    return size(value) if low is None else f"{size(value)} (from {size(low)})"


def _interval_text(value: float, interval: Interval | None, write: Callable[[float], str]) -> str:
    low, high = interval or (None, None)
    if low is not None and high is not None:
        return f"{write(value)} ({write(low)} to {write(high)})"
    if high is not None:
        return f"at most {write(high)}"
    return write(value) if low is None else f"at least {write(low)}"


def loss(value: float | None, stderr: float | None = None) -> str:
    """Nats per token: "3.104 ± 0.012"."""
    if value is None:
        return NOTHING
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def gain(value: float | None, stderr: float | None = None) -> str:
    """A difference of losses with its sign: "+0.031 ± 0.004"."""
    if value is None:
        return NOTHING
    text = f"{value:+.3f}".replace("-", MINUS)
    return text if stderr is None else f"{text} ± {stderr:.3f}"


def share(value: float | None) -> str:
    """A fraction as percents."""
    return NOTHING if value is None else f"{100 * value:.1f}%"


def percent(value: float) -> str:
    """A change in percent with its sign: "+20%", "0%"."""
    return f"{value:+g}%".replace("-", MINUS) if value else "0%"


def moment(iso: str | None) -> str:
    """An ISO time to the minute: "2026-01-02 03:04 UTC"."""
    if not iso:
        return NOTHING
    zone = " UTC" if iso.endswith(("+00:00", "Z")) else ""
    return iso[:16].replace("T", " ") + zone


def duration(seconds: float | None) -> str:
    """Seconds as "12 s", "3 min 20 s" or "1 h 12 min"."""
    if seconds is None:
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def power(value: float) -> str:
    """1.2e15 -> "1.2x10^15", with real superscripts."""
    mantissa, exponent = f"{value:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    mantissa = mantissa.removesuffix(".0")
    return f"10{raised}" if mantissa == "1" else f"{mantissa}{TIMES}10{raised}"
