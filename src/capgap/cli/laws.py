"""Commands that need no model: advice from laws."""

from pathlib import Path
from typing import Annotated

import typer

from capgap.cli.app import Json, app, print_json


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
    figure: Annotated[
        Path | None, typer.Option(help="Draw the advice into this file, .png or .svg.")
    ] = None,
    json_: Json = False,
) -> None:
    """Which teacher to take for a student of this size and these tokens."""
    from rich.console import Console

    from capgap.law.recommend import candidates_of, own_rule, parse_gpus, print_advice
    from capgap.law.recommend import recommend as advise
    from capgap.sizes import parse_count

    if figure is not None:
        from capgap.report.static import check_picture

        check_picture(figure)
    size = parse_count(student)
    found = advise(
        size,
        parse_count(tokens),
        candidates_of(family, [] if teachers is None else teachers.split(",")),
        own=None if law is None else own_rule(law, size),
        gpus=None if gpus is None else parse_gpus(gpus),
    )
    if figure is not None:
        from capgap.report.advice_charts import draw_advice

        draw_advice(found, figure)
    if json_:
        print_json(found)
    else:
        print_advice(found, Console(highlight=False))
