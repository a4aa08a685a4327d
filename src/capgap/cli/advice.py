"""The advice of `capgap recommend` for a person."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from capgap.law.advise import Advice
from capgap.report.advice import advice_sentences
from capgap.sizes import format_count, format_percent

RANK_SURPRISAL = (
    "; rank-surprisal: of the student on what each teacher writes (arXiv 2601.14249), lower is "
    "said to be better: a prior from one forward pass, which does not rank here"
)


def print_advice(found: Advice, console: Console) -> None:
    """What to take, then tables of what was found (docs/cli.md has the keys)."""
    for sentence in advice_sentences(found):
        # a folder's name may look like markup
        console.print(Text(sentence))
    student = found.student
    console.print(
        f"\nA student of {format_count(student.non_embedding)} parameters without embeddings, "
        f"{format_count(student.total)} in all, on {format_count(found.tokens)} tokens:\n"
    )
    _print_whole(_ranking(found), console)
    if found.measure is not None:
        console.print()
        _print_whole(_measurements(found), console)
        console.print(_measured_on(found))
    cautions: dict[str, list[str]] = {}
    for row in found.recommendations:
        for caution in row.cautions:
            cautions.setdefault(caution, []).append(row.teacher)
    told = [f"{', '.join(names)}: {caution}" for caution, names in cautions.items()]
    surface = found.surface
    basis = (
        f"losses are of the text of {surface.source}, to {format_percent(surface.error)}; above "
        "the lowest: with the standard error of that difference"
    )
    for line in ["", *told, basis]:
        console.print(Text(line))


def _ranking(found: Advice) -> Table:
    timed = found.recommendations[0].hours is not None
    names = (
        *("size", "T/S", "read", "since", "expected loss", "above the lowest", "FLOPs"),
        *(["hours"] if timed else []),
    )
    table = _table(names)
    table.add_column("", no_wrap=True)
    for row in found.recommendations:
        marks = ["size of the line"] if row.in_line else []
        if row.teacher == found.surface.nearest:
            marks.append("lowest on the surface")
        if not row.is_larger:
            marks = ["no larger than the student"]
        above = f"{row.difference:.2%} ± {row.difference_stderr:.2%}"
        table.add_row(
            Text(row.teacher),
            format_count(row.non_embedding),
            f"{row.ratio:.2f}",
            "-" if row.teacher_tokens is None else format_count(row.teacher_tokens),
            row.year or "-",
            f"{row.expected_loss:.3f}",
            "" if row.difference == 0 else above,
            f"{row.flops_total:.2e}",
            *([] if row.hours is None else [f"{row.hours:,.0f}"]),
            "; ".join(marks),
        )
    for alone in found.without_teacher:
        table.add_row(
            alone.name,
            *("", "", format_count(alone.tokens), ""),
            f"{alone.expected_loss:.3f}",
            "",
            f"{alone.flops_total:.2e}",
            *([] if alone.hours is None else [f"{alone.hours:,.0f}"]),
            "",
        )
    return table


def _measurements(found: Advice) -> Table:
    table = _table(
        (
            "nats/byte",
            "above the best",
            "nats/token",
            "entropy",
            "loss - entropy",
            "calibration error",
            *(["rank-surprisal"] if _ratios(found) else []),
        )
    )
    for row in found.recommendations:
        one = row.measured
        assert one is not None
        table.add_row(
            Text(row.teacher),
            _with_error(one.nats_per_byte, one.nats_per_byte_stderr),
            "" if one.above_lowest == 0 else _with_error(one.above_lowest, one.above_lowest_stderr),
            f"{one.nats_per_token:.3f}",
            f"{one.entropy:.3f}",
            f"{one.overconfidence:+.3f}",
            f"{one.calibration_error:.1%}",
            *([] if one.rank_surprisal is None else [f"{one.rank_surprisal:.2f}"]),
        )
    return table


def _ratios(found: Advice) -> bool:
    return any(row.measured and row.measured.rank_surprisal for row in found.recommendations)


def _table(names: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("teacher", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _print_whole(table: Table, console: Console) -> None:
    """A narrower terminal breaks lines, which beats a table with its cells cut short."""
    width = console.width
    wanted = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.width = max(width, wanted)
    console.print(table)
    console.width = width


def _measured_on(found: Advice) -> Text:
    measure = found.measure
    assert measure is not None
    many = int(measure["documents"]) > 1
    kind = "documents" if many else "document, so no noise is known,"
    return Text(
        f"on {measure['documents']} {kind} of {measure['corpus']}, {measure['bytes']:,} bytes, in "
        f"windows of {measure['window']} tokens; ± is a standard error over documents"
        + (RANK_SURPRISAL if _ratios(found) else "")
    )
