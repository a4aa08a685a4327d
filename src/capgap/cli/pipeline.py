"""The command that runs a whole recipe."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capgap.cli.app import (
    Json,
    Override,
    Quiet,
    app,
    exit_with,
    print_json,
    quieten_transformers,
    stopped,
)
from capgap.errors import UserError

if TYPE_CHECKING:
    from capgap.pipeline.state import Decision


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a shipped recipe's name.")],
    out: Annotated[Path | None, typer.Option(help="Output folder; runs/NAME if none.")] = None,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="STEP", help="This step and all later anew.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="STEP", help="Stop when this step is done.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", metavar="", help="Tell each step, why it would run, and its command."
        ),
    ] = False,
    set_: Override = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Run all stages of a recipe, from the teacher to a student that answers."""
    from rich.console import Console

    from capgap.config import find_recipe, load_any_recipe
    from capgap.pipeline.recipe import RunRecipe
    from capgap.pipeline.runner import StepFailed, plan_pipeline, run_pipeline
    from capgap.stopping import Stopped
    from capgap.sweep.progress import make_lines

    loaded = load_any_recipe(find_recipe(recipe), set_ or [])
    if not isinstance(loaded, RunRecipe):
        raise UserError(f"{recipe} is the recipe of a sweep, not of a run: see `capgap sweep`")
    folder = out or Path("runs") / loaded.name
    if dry_run:
        decisions = plan_pipeline(loaded, folder, again_from=from_, until=until)
        if json_:
            print_json({"name": loaded.name, "steps": [_described(one) for one in decisions]})
        else:
            _print_plan(decisions)
        return
    quieten_transformers()
    say = make_lines(Console(stderr=True), quiet=quiet)
    try:
        found = run_pipeline(loaded, folder, again_from=from_, until=until, quiet=quiet, say=say)
    except Stopped as ended:
        stopped(folder, ended.number)
    except StepFailed as failed:
        exit_with(f"{failed}; what is done is kept in {folder}", failed.code)
    if json_:
        print_json(found)
    else:
        _print_results(found, folder)


def _described(decision: "Decision") -> dict[str, Any]:
    return {
        "step": decision.step.name,
        "state": decision.state,
        "why": decision.why or None,
        "command": ["capgap", *decision.step.stage.command()],
    }


def _print_plan(decisions: "list[Decision]") -> None:
    for number, one in enumerate(decisions, 1):
        state = {"done": "done", "continue": "would go on", "run": "would run"}[one.state]
        why = f" ({one.why})" if one.why else ""
        print(f"{number}. {one.step.name}: {state}{why}")
        print(f"   capgap {shlex.join(one.step.stage.command())}")


def _print_results(found: dict[str, Any], folder: Path) -> None:
    width = max(len(name) for name in found["steps"])
    for name, step in found["steps"].items():
        print(f"{name:{width}}  {step.get('result') or step['status']}")
    print(f"run: {folder}")
