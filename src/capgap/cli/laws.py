"""Commands that need no model: advice from laws, and what a recipe would take."""

from pathlib import Path
from typing import Annotated

import typer

from capgap.cli.app import Json, Override, app, print_json


@app.command()
def recommend(
    student: Annotated[str, typer.Option(help="Its non-embedding parameters, such as 3B.")],
    tokens: Annotated[str, typer.Option(help="What it will be distilled on, such as 126B.")],
    family: Annotated[
        str | None, typer.Option(help="Choose among its members: llama2, qwen2.5, pythia, ...")
    ] = None,
    teachers: Annotated[
        str | None,
        typer.Option(help="Choose among these: names, folders or sizes, parted by commas."),
    ] = None,
    law: Annotated[Path | None, typer.Option(help="The law.json of a sweep of your own.")] = None,
    gpus: Annotated[str | None, typer.Option(help="For the time: 16xA100.")] = None,
    json_: Json = False,
) -> None:
    """Which teacher to take for a student of this size and these tokens."""
    from rich.console import Console

    from capgap.hardware import parse_gpus
    from capgap.law.recommend import candidates_of, own_rule, print_advice
    from capgap.law.recommend import recommend as advise
    from capgap.sizes import parse_count

    size = parse_count(student)
    found = advise(
        size,
        parse_count(tokens),
        candidates_of(family, [] if teachers is None else teachers.split(",")),
        own=None if law is None else own_rule(law, size),
        gpus=None if gpus is None else parse_gpus(gpus),
    )
    if json_:
        print_json(found)
    else:
        print_advice(found, Console(highlight=False))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a shipped recipe's name.")],
    gpus: Annotated[
        str | None, typer.Option(help="For time and what fits: 16xA100; else the recipe's own.")
    ] = None,
    utilisation: Annotated[
        float | None, typer.Option(help="Share of the GPUs' peak that is reached, such as 0.4.")
    ] = None,
    set_: Override = None,
    json_: Json = False,
) -> None:
    """What a run or a sweep would take: parameters, steps, FLOPs, memory, time and disk."""
    from rich.console import Console

    from capgap.config import find_recipe, load_any_recipe
    from capgap.cost.estimate import estimate, print_estimate

    loaded = load_any_recipe(find_recipe(recipe), set_ or [])
    found = estimate(loaded, gpus=gpus, utilisation=utilisation)
    if json_:
        print_json(found)
    else:
        print_estimate(found, Console(highlight=False))
