"""The advice of `capgap recommend` for a person."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from capgap.sizes import format_count, format_percent


def print_advice(found: dict[str, Any], console: Console) -> None:
    """Tables of what was found (docs/cli.md has the keys), then what they rest on in words."""
    rows = found["recommendations"]
    _print_whole(_ranking(found), console)
    if found["measure"] is not None:
        console.print()
        _print_whole(_measurements(rows), console)
        console.print(_measured_on(found["measure"]))
    cautions: dict[str, list[str]] = {}
    for row in rows:
        for caution in row["cautions"]:
            cautions.setdefault(caution, []).append(row["teacher"])
    told = [f"{', '.join(names)}: {caution}" for caution, names in cautions.items()]
    for line in ["", *told, *([""] if told else []), *_sources(found), "", found["verdict"]]:
        # a folder's name may look like markup
        console.print(Text(line))


def _ranking(found: dict[str, Any]) -> Table:
    rows = found["recommendations"]
    timed = rows[0]["hours"] is not None
    names = ("size", "T/S", "expected loss", "FLOPs", *(["hours"] if timed else []))
    table = _table(names)
    table.add_column("", no_wrap=True)
    for row in rows:
        marks = []
        if row["teacher"] == found["linear_law"]["nearest"]:
            marks.append("linear law")
        if row["teacher"] == found["surface"]["nearest"]:
            marks.append("lowest on the surface")
        half = (row["interval"][1] - row["interval"][0]) / 2
        table.add_row(
            Text(row["teacher"]),
            format_count(row["non_embedding"]),
            f"{row['ratio']:.2f}",
            f"{row['expected_loss']:.3f} ± {half:.3f}",
            f"{row['flops_total']:.2e}",
            *([f"{row['hours']:,.0f}"] if timed else []),
            "; ".join(marks),
        )
    return table


def _measurements(rows: list[dict[str, Any]]) -> Table:
    table = _table(
        (
            "nats/byte",
            "above the best",
            "nats/token",
            "entropy",
            "loss - entropy",
            "calibration error",
        )
    )
    for row in rows:
        one = row["measured"]
        is_best = one["above_lowest"] == 0
        table.add_row(
            Text(row["teacher"]),
            _with_error(one["nats_per_byte"], one["nats_per_byte_stderr"]),
            "" if is_best else _with_error(one["above_lowest"], one["above_lowest_stderr"]),
            f"{one['nats_per_token']:.3f}",
            f"{one['entropy']:.3f}",
            f"{one['overconfidence']:+.3f}",
            f"{one['calibration_error']:.1%}",
        )
    return table


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


def _measured_on(measure: dict[str, Any]) -> Text:
    kind = "documents" if measure["documents"] > 1 else "document, so no noise is known,"
    return Text(
        f"on {measure['documents']} {kind} of {measure['corpus']}, {measure['bytes']:,} bytes, in "
        f"windows of {measure['window']} tokens; ± is a standard error over documents"
    )


def _sources(found: dict[str, Any]) -> list[str]:
    line = found["linear_law"]
    low, high = (format_count(size) for size in line["interval"])
    surface = found["surface"]
    losses = f"losses on its text, to {format_percent(surface['error'])}"
    if surface["anchor"] is not None:
        losses += (
            f", with the teachers' own losses on yours, scaled so that {surface['anchor']} has "
            "what the surface gives it"
        )
    return [
        f"linear law ({line['source']}): T* = {format_count(line['teacher'])}, between {low} and "
        f"{high}" + (f"; {line['caution']}" if line["caution"] else ""),
        f"surface ({surface['source']}): {losses}; without a teacher "
        f"{surface['loss_without_teacher']:.3f}"
        + (f"; {surface['caution']}" if surface["caution"] else ""),
        *(
            f"besides, {other['name']} ({other['source']}), to {format_percent(other['error'])}"
            + (f"; {other['caution']}" if other["caution"] else "")
            for other in found["other_surfaces"]
        ),
    ]
