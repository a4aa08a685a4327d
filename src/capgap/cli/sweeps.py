"""Commands that run a whole grid: quickstart, sweep, report."""

import signal
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

    if started()[1] > 1:
        raise UserError("a sweep starts processes of its own: run it without torchrun")
    recipe = load_recipe(find_recipe(name), overrides)
    console = Console(stderr=True)
    if dry_run:
        _dry_run(recipe, as_json=as_json)
        return
    from capgap.sweep.progress import make_display
    from capgap.sweep.runner import run_sweep
    from capgap.sweep.schedule import WorkerDied
    from capgap.sweep.summary import print_summary

    quieten_transformers()
    folder = out or Path("runs") / recipe.name
    try:
        result = run_sweep(recipe, folder, make_display(console, quiet=quiet))
    except KeyboardInterrupt:
        stopped(folder, signal.SIGINT)
    except SystemExit:
        stopped(folder, signal.SIGTERM)
    except WorkerDied as error:
        exit_with(str(error), FAILED)
    if as_json:
        print_json(result.as_dict())
    else:
        print_summary(result, Console())
    if result.best is None:
        exit_with("no cell of the sweep was finished; see the report", FAILED)


def _dry_run(recipe: Any, *, as_json: bool) -> None:
    from rich.console import Console

    from capgap.sweep.preview import preview, print_preview

    quieten_transformers()
    found = preview(recipe)
    if as_json:
        print_json(found)
    else:
        print_preview(found, Console())
