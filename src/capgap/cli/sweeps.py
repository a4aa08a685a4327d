"""Commands that run a grid, whole or in part: quickstart, sweep, search, report."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from capgap.cli.app import (
    FAILED,
    DryRun,
    Json,
    Out,
    Override,
    Quiet,
    app,
    exit_with,
    print_json,
    quieten_transformers,
    stopped,
)
from capgap.errors import UserError
from capgap.machine import started


@app.command()
def quickstart(
    out: Out = Path("runs/quickstart"),
    dry_run: DryRun = False,
    set_: Override = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """From which teacher should I distil? An answer from real text in minutes, no download."""
    _sweep("quickstart", out, set_ or [], dry_run=dry_run, quiet=quiet, as_json=json_)


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a shipped recipe's name.")],
    out: Annotated[
        Path | None, typer.Option(help="Output folder; runs/NAME if none is given.")
    ] = None,
    dry_run: DryRun = False,
    set_: Override = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Run a grid of teachers and students; the same command continues one that was stopped."""
    _sweep(recipe, out, set_ or [], dry_run=dry_run, quiet=quiet, as_json=json_)


@app.command()
def search(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a shipped recipe's name.")],
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

    from capgap.config import find_recipe, load_recipe
    from capgap.sweep.search_grid import Settings

    _refuse_torchrun("search")
    settings = Settings(budget=budget, tolerance=tolerance)
    loaded = load_recipe(find_recipe(recipe), set_ or [])
    quieten_transformers()
    if dry_run:
        from capgap.sweep.search import Search, print_expected

        expected = Search(loaded, settings, rungs=rungs).expected()
        if json_:
            print_json(expected)
        else:
            print_expected(expected, Console())
        return
    from capgap.sweep.progress import make_display
    from capgap.sweep.search import print_search, run_search

    folder = out or Path("runs") / f"{loaded.name}-search"
    display = make_display(Console(stderr=True), quiet=quiet)
    with _told_when_stopped(folder):
        result = run_search(loaded, folder, display, settings, rungs=rungs)
    if json_:
        print_json(result.as_dict())
    else:
        print_search(result, Console())
    if result.sweep.best is None:
        exit_with("no cell of the search was finished; see the report", FAILED)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The output folder of a sweep.")],
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


def _sweep(
    name: str, out: Path | None, overrides: list[str], *, dry_run: bool, quiet: bool, as_json: bool
) -> None:
    from rich.console import Console

    from capgap.config import find_recipe, load_recipe

    _refuse_torchrun("sweep")
    recipe = load_recipe(find_recipe(name), overrides)
    console = Console(stderr=True)
    if dry_run:
        _dry_run(recipe, as_json=as_json)
        return
    from capgap.sweep.progress import make_display
    from capgap.sweep.runner import run_sweep
    from capgap.sweep.summary import print_summary

    quieten_transformers()
    folder = out or Path("runs") / recipe.name
    with _told_when_stopped(folder):
        result = run_sweep(recipe, folder, make_display(console, quiet=quiet))
    if as_json:
        print_json(result.as_dict())
    else:
        print_summary(result, Console())
    if result.best is None:
        exit_with("no cell of the sweep was finished; see the report", FAILED)


def _refuse_torchrun(what: str) -> None:
    if started()[1] > 1:
        raise UserError(f"a {what} starts processes of its own: run it without torchrun")


@contextmanager
def _told_when_stopped(folder: Path) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a worker that died end the command with one line."""
    from capgap.sweep.schedule import WorkerDied

    try:
        yield
    except KeyboardInterrupt:
        stopped(folder, signal.SIGINT)
    except SystemExit:
        stopped(folder, signal.SIGTERM)
    except WorkerDied as error:
        exit_with(str(error), FAILED)


def _dry_run(recipe: Any, *, as_json: bool) -> None:
    from rich.console import Console

    from capgap.sweep.preview import preview, print_preview

    quieten_transformers()
    found = preview(recipe)
    if as_json:
        print_json(found)
    else:
        print_preview(found, Console())
