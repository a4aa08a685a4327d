"""Numbers as a reader wants them: rounded to what is known, with their interval and unit."""

import math
from collections.abc import Callable, Iterable, Sequence

from capgap.sizes import format_count

Interval = Sequence[float | None]  # an end that is None is open
# typographic signs, escaped so that no reader takes them for letters
NOTHING, MINUS, TIMES = "\u2013", "\u2212", "\u00d7"


def size(value: float | None) -> str:
    """A number of parameters or tokens with three digits: "3.02B"."""
    return NOTHING if value is None else format_count(value)


def size_with_interval(value: float | None, interval: Interval | None) -> str:
    """A fitted size: "96k (72k to 130k)"; with an open end "at most 130k" or "at least 72k"."""
    # two digits, since its interval is never narrower than that
    return _told(value, interval, lambda number: format_count(float(f"{number:.2g}")))


def with_interval(value: float | None, interval: Interval | None) -> str:
    """A ratio or slope rounded to what its interval allows: "1.9 (1.5 to 2.4)", "at least 2.1"."""
    low, high = interval or (None, None)
    known = [abs(end) for end in (value, low, high) if end is not None]
    width = max(known, default=1.0) / 2 if low is None or high is None else high - low
    decimals = -math.floor(math.log10(width)) if width else 2
    decimals = min(3, max(decimals, 1 if known and min(known) < 10 else 0))
    return _told(value, interval, lambda number: f"{number:.{decimals}f}")


def _told(value: float | None, interval: Interval | None, write: Callable[[float], str]) -> str:
    low, high = interval or (None, None)
    if value is None:
        return NOTHING
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
    sign = "+" if value is not None and value >= 0 else ""
    return sign + loss(value, stderr).replace("-", MINUS)


def share(value: float | None) -> str:
    """A fraction as percents."""
    return NOTHING if value is None else f"{100 * value:.1f}%"


def ranges(runs: Iterable[tuple[float, float]]) -> str:
    """First and last sizes of runs: "60k or 200k to 480k"."""
    return " or ".join(" to ".join(dict.fromkeys(map(format_count, run))) for run in runs)


def span(values: Sequence[float], digits: int = 3) -> str:
    """The smallest and the largest number, or one where they are written alike."""
    # no negative zero
    ends = (f"{round(end, digits) + 0.0:.{digits}f}" for end in (min(values), max(values)))
    return " to ".join(dict.fromkeys(ends))


def sizes(values: Iterable[float]) -> str:
    """ "30k, 40k and 54k"."""
    return listed([format_count(value) for value in values])


def listed(names: Sequence[str]) -> str:
    """ "30k, 40k and 54k"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def moment(iso: str | None) -> str:
    """An ISO time to the minute: "2026-01-02 03:04 UTC"."""
    zone = " UTC" if iso and iso.endswith(("+00:00", "Z")) else ""
    return iso[:16].replace("T", " ") + zone if iso else NOTHING


def duration(seconds: float | None) -> str:
    """Seconds as "12 s", "3 min 20 s" or "1 h 12 min"."""
    if seconds is None:
        return NOTHING
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def power(value: float) -> str:
    """1.2e15 -> "1.2x10^15", with real superscripts."""
    mantissa, exponent = f"{value:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    mantissa = mantissa.removesuffix(".0")
    return f"10{raised}" if mantissa == "1" else f"{mantissa}{TIMES}10{raised}"
