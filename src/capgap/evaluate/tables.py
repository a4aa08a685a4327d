"""What a person reads of the record of an evaluation."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from capgap.evaluate.scores import comparable
from capgap.evaluate.sets import SETS
from capgap.law.benchmarks import published_results


def record_text(record: dict[str, Any]) -> str:
    """The sets, held-out losses, what is missing, and the six beside published models."""
    tasks: dict[str, Any] = record["tasks"]
    measured = {name: one for name, one in tasks.items() if not one["missing"]}
    lines = [_sets(measured)] if measured else []
    lines += [_heldout(folder, one) for folder, one in (record["heldout"] or {}).items()]
    lines += [f"{name}: missing, {one['missing']}" for name, one in tasks.items() if one["missing"]]
    known = comparable(tasks)
    if known:
        lines += ["", _published({name: tasks[name] for name in known})]
    if record["mean_percent"] is not None:
        lines.append(f"mean of the six: {record['mean_percent']:.2f}")
    elif measured and record["mean_missing"]:
        lines.append(f"no mean of the six: {record['mean_missing']}")
    return "\n".join(lines)


def _sets(measured: dict[str, Any]) -> str:
    rows = []
    for name, one in measured.items():
        asked = f"{one['questions']:,}"
        if one["questions"] < one["of_questions"]:
            asked += f" of {one['of_questions']:,}"
        cut = f"{one['cut_prompts']:,}" if one["cut_prompts"] else ""
        shares = (
            "" if one[key] is None else f"{100 * one[key]:.2f}" for key in ("score", "score_stderr")
        )
        rows.append((SETS[name].title, *shares, str(one["shots"]), asked, cut))
    return _table(("set", "score", "±", "shots", "questions", "cut prompts"), rows)


def _heldout(folder: str, one: dict[str, Any]) -> str:
    if one["missing"]:
        return f"held-out loss on {folder}: missing, {one['missing']}"
    loss, bits = (
        _with_error(one[key], one[f"{key}_stderr"], 4) for key in ("loss", "bits_per_byte")
    )
    return f"held-out loss on {folder}: {loss} nats a token, {bits} bits a byte"


def _published(tasks: dict[str, Any]) -> str:
    """Published scores have no errors."""
    titles = [SETS[name].title for name in tasks]
    own = (_percent(one["score"], one["score_stderr"]) for one in tasks.values())
    rows = [("this model", *own)]
    rows += [
        (model.name, *(f"{model.scores[title]:.2f}" for title in titles))
        for model in published_results()
    ]
    return _table(("beside arXiv 2311.07052", *titles), rows)


def _percent(share: float, error: float | None) -> str:
    return _with_error(100 * share, None if error is None else 100 * error, 2)


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """As wide as the terminal lets it be."""
    table = Table(box=None, pad_edge=False)
    for index, title in enumerate(titles):
        table.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().removesuffix("\n")
