"""What any recipe would take, as data and for a person: `capgap plan`."""

from typing import Any

from rich.console import Console
from rich.table import Table

from capgap.cost.memory import PARTS
from capgap.cost.run import plan_run
from capgap.cost.sweep import plan_sweep
from capgap.machine import check_utilisation
from capgap.pipeline.recipe import RunRecipe
from capgap.sizes import clock_time, format_bytes, format_count
from capgap.sweep.recipe import Recipe

COUNTS = ("embedding", "attention", "ffn", "norms", "head", "non_embedding", "total")


def estimate(
    recipe: Recipe | RunRecipe, *, gpus: str | None = None, utilisation: float | None = None
) -> dict[str, Any]:
    """What a recipe would take, before anything is spent (docs/cli.md has the keys).

    gpus: such as `16xA100`, for the time and what fits; utilisation: the share of their peak that
    is reached. UserError for what could not be run.
    """
    if utilisation is not None:
        check_utilisation(utilisation)
    if isinstance(recipe, RunRecipe):
        return plan_run(recipe, gpus=gpus, utilisation=utilisation)
    given = []
    if recipe.teachers.models:
        # looks at their tokenizers, and so loads transformers
        from capgap.sweep.given import given_teachers

        given = given_teachers(recipe)
    return plan_sweep(recipe, given, gpus=gpus, utilisation=utilisation)


def print_estimate(found: dict[str, Any], console: Console) -> None:
    """The same for a person."""
    if found["kind"] == "run":
        _print_run(found, console)
    else:
        _print_sweep(found, console)


def _print_run(found: dict[str, Any], console: Console) -> None:
    sides = [found["teacher_parameters"], found["student_parameters"]]
    table = _table("parameters", "teacher", "student")
    for part in COUNTS:
        table.add_row(part.replace("_", "-"), *(f"{side[part]:,}" for side in sides))
    console.print(f"{found['name']}: out of {found['teacher']}\n")
    console.print(table)
    _print_work(found, console)
    places = found["places"]
    names = ["one GPU" if one["gpus"] == 1 else f"each of {one['gpus']}" for one in places]
    if found["gpus"] is None:
        names = ["one process"]
    _print_memory([(one["memory"], one["memory_at_most"]) for one in places], names, console)
    for name, one in zip(names, places, strict=True):
        line = f"{name}: {one['memory_gb']:.1f} GB"
        if one["fits"] is not None:
            line += ", fits" if one["fits"] else ", does not fit"
            line += f"; {one['host_gb']:.1f} GB in the host's memory"
        if one["micro_batches"] > 1:
            line += (
                f"; {one['micro_batches']} micro-batches of {one['micro_batch_tokens']:,} tokens"
            )
        if one["hours"] is not None:
            line += f"; {one['hours']:,.0f} hours"
        console.print(line)
    if found["gpus"] is not None:
        console.print(f"time: {found['gpus']} at {found['utilisation']:.0%} of their peak")
    if found["advice"]:
        console.print("\nto make it fit:")
        for change in found["advice"]:
            verdict = "fits" if change["fits"] else "does not fit"
            console.print(f"  {change['change']}: {change['memory_gb']:.1f} GB, {verdict}")
    disk = found["disk"]
    console.print(
        f"\ndisk: checkpoints {format_bytes(disk['checkpoints'])} at most "
        f"({format_bytes(disk['checkpoint'])} each, at most {found['checkpoint_share']:.0%} of the "
        f"time), student {format_bytes(disk['student'])}, "
        f"teacher {format_bytes(disk['teacher'])}; a cache of the teacher would have "
        f"{format_bytes(disk['cache'])}"
    )


def _print_sweep(found: dict[str, Any], console: Console) -> None:
    console.print(
        f"{found['name']}: {found['teachers']} teachers, {found['cells']} cells, "
        f"{found['baselines']} baselines\nlargest teacher {format_count(found['teacher_params'])}, "
        f"largest student {format_count(found['student_params'])}, all parameters"
    )
    _print_work(found, console)
    names = ["one worker"]
    _print_memory([(found["memory"], found["memory_at_most"])], names, console)
    workers = found["workers"]
    line = f"{format_bytes(found['memory_gb'] * 1e9)} in the largest task, {found['memory_task']}"
    line += f"; {workers} worker{'s' if workers > 1 else ''}"
    if found["fits"] is not None:
        line += (
            "; fits"
            if found["fits"]
            else "; does not fit: take a smaller training.micro_batch_tokens"
        )
    console.print(line)
    if found["hours"] is not None:
        hours = found["hours"]
        told = f"{hours:,.0f} hours" if hours >= 10 else clock_time(hours * 3600)
        console.print(f"{told}: {found['gpus']} at {found['utilisation']:.0%} of their peak")
    else:
        console.print("time: name --gpus, or let `capgap sweep --dry-run` measure this machine")
    disk = ", ".join(f"{name} {format_bytes(size)}" for name, size in found["disk"].items())
    console.print(f"\ndisk: {disk}")


def _print_work(found: dict[str, Any], console: Console) -> None:
    console.print(
        f"\n{format_count(found['tokens'])} tokens, {found['steps']:,} steps of "
        f"{found['batch_tokens']:,} tokens in windows of {found['window']:,}"
    )
    parts = ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}" for name, value in found["flops"].items() if value
    )
    console.print(f"{found['flops_total']:.3g} FLOPs: {parts}\n")


def _print_memory(
    places: list[tuple[dict[str, int], dict[str, int]]], names: list[str], console: Console
) -> None:
    columns = [title for name in names for title in (name, "at most")]
    table = _table("memory at the peak, GB", *columns)
    for part in PARTS:
        values = [value for at_peak, at_most in places for value in (at_peak[part], at_most[part])]
        if any(values):
            table.add_row(part.replace("_", " "), *(f"{value / 1e9:.3f}" for value in values))
    console.print(table)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
