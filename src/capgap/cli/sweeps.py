"""Commands that run a grid, whole or in part: quickstart, sweep, search, report, column."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capgap.cli.app import (
    FAILED,
    DryRun,
    Json,
    Out,
    Override,
    Quiet,
    add_stage,
    app,
    exit_with,
    print_json,
    quieten_transformers,
    stopped,
)
from capgap.errors import UserError
from capgap.machine import started
from capgap.sweep.column import Column

if TYPE_CHECKING:
    from capgap.config import Recipe
    from capgap.sweep.progress import Display


RecipeName = Annotated[str, typer.Argument(help="A recipe file, or a shipped recipe's name.")]


@app.command()
def quickstart(
    out: Out = Path("runs/quickstart"),
    dry_run: DryRun = False,
    set_: Override = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """From which teacher should I distil? An answer from real text in minutes, no download."""
    sweep("quickstart", out, dry_run=dry_run, set_=set_, quiet=quiet, json_=json_)


@app.command()
def sweep(
    recipe: RecipeName,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; runs/NAME if none is given.")
    ] = None,
    dry_run: DryRun = False,
    set_: Override = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Run a grid of teachers and students; the same command continues one that was stopped."""
    from rich.console import Console

    loaded = _loaded("sweep", recipe, set_)
    if dry_run:
        from capgap.sweep.preview import preview, print_preview

        expected = preview(loaded)
        print_json(expected) if json_ else print_preview(expected, Console())
        return
    from capgap.sweep.runner import run_sweep
    from capgap.sweep.summary import print_summary

    folder = out or Path("runs") / loaded.name
    with _display(folder, quiet=quiet) as display:
        result = run_sweep(loaded, folder, display)
    print_json(result.as_dict()) if json_ else print_summary(result, Console())
    if result.best is None:
        exit_with("no cell of the sweep was finished; see the report", FAILED)


@app.command()
def search(
    recipe: RecipeName,
    budget: Annotated[
        float, typer.Option(help="Share of the full grid's FLOPs that may be spent.")
    ] = 0.35,
    rungs: Annotated[
        int, typer.Option(help="Token budgets to run on, each a third of the next.")
    ] = 3,
    tolerance: Annotated[
        float, typer.Option(help="Share of the loss within which a teacher is as good as the best.")
    ] = 0.0025,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; runs/NAME-search if none is given.")
    ] = None,
    dry_run: DryRun = False,
    set_: Override = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Find every student's best teacher for a share of what the whole grid would cost."""
    from rich.console import Console

    from capgap.sweep.search_grid import Settings

    settings = Settings(budget=budget, tolerance=tolerance)
    loaded = _loaded("search", recipe, set_)
    from capgap.sweep.search import Search, print_expected, print_search, run_search

    if dry_run:
        expected = Search(loaded, settings, rungs=rungs).expected()
        print_json(expected) if json_ else print_expected(expected, Console())
        return
    folder = out or Path("runs") / f"{loaded.name}-search"
    with _display(folder, quiet=quiet) as display:
        result = run_search(loaded, folder, display, settings, rungs=rungs)
    print_json(result.as_dict()) if json_ else print_search(result, Console())
    if result.sweep.best is None:
        exit_with("no cell of the search was finished; see the report", FAILED)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(help="The output folder of a sweep or of distillations.")
    ],
    json_: Json = False,
) -> None:
    """Fit the law and draw the report again from the records of a sweep, finished or not."""
    from capgap.sweep.summary import refresh

    found = refresh(folder)
    if json_:
        print_json(found)
    else:
        for sentence in found["verdict"]:
            print(sentence)
        print(f"report: {found['report']}")


add_stage(Column)


def _loaded(command: str, name: str, overrides: list[str] | None) -> "Recipe":
    from capgap.config import find_recipe, load_recipe

    if started()[1] > 1:
        raise UserError(f"a {command} starts processes of its own: run it without torchrun")
    recipe = load_recipe(find_recipe(name), overrides or [])
    quieten_transformers()
    return recipe


@contextmanager
def _display(folder: Path, *, quiet: bool) -> "Iterator[Display]":
    """Where progress goes. Ctrl-C, SIGTERM and a worker that died end the command with one line."""
    from rich.console import Console

    from capgap.sweep.progress import make_display
    from capgap.sweep.schedule import WorkerDied

    try:
        yield make_display(Console(stderr=True), quiet=quiet)
    except KeyboardInterrupt:
        stopped(folder, signal.SIGINT)
    except SystemExit:
        stopped(folder, signal.SIGTERM)
    except WorkerDied as error:
        exit_with(str(error), FAILED)
