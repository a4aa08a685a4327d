"""Commands about laws and costs: fit a law, advice from laws, what a recipe would take."""

from pathlib import Path
from typing import Annotated

import typer

from capgap.cli.app import Json, Override, Quiet, app, print_json, quieten_transformers
from capgap.errors import UserError


@app.command()
def fit(
    source: Annotated[
        Path, typer.Argument(help="A CSV of cells, or the output folder of a sweep.")
    ],
    out: Annotated[Path, typer.Option(help="The law as JSON.")] = Path("law.json"),
    report: Annotated[
        Path | None, typer.Option(help="A page with the pictures, such as law.html.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of all intervals.")] = 0.9,
    independent_errors: Annotated[
        bool,
        typer.Option(
            "--independent-errors", help="The table's loss_stderr is each cell's own noise."
        ),
    ] = False,
    json_: Json = False,
) -> None:
    """Fit the law of capacity gap to a table of cells, or to the records of a sweep."""
    from capgap.law.csv_input import read_table
    from capgap.law.fit import fit_law, fit_table
    from capgap.law.validity import grouped_warnings
    from capgap.records import read_records, write_json_atomically

    if source.is_dir():
        if independent_errors:
            raise UserError("--independent-errors is for tables; records hold every document")
        found = fit_law(read_records(source), confidence=confidence)
    else:
        table = read_table(source, independent_errors=independent_errors)
        found = fit_table(table, confidence=confidence)
    write_json_atomically(out, found)
    page = None
    if report is not None:
        from capgap.report.page import write_law_report

        page = str(write_law_report(found, report, title=source.stem))
    if json_:
        print_json({"law": str(out), "report": page, "verdict": found["verdict"]})
        return
    for sentence in found["verdict"]:
        print(sentence)
    for message, where in grouped_warnings(found):
        print(f"warning, {where}: {message}")
    for row in found["excluded"]:
        print(f"not used: {row['id']}, {row['reason']}")
    print(f"law: {out}" + (f", report: {page}" if page else ""))


@app.command()
def recommend(
    student: Annotated[str, typer.Option(help="Its non-embedding parameters, such as 3B.")],
    tokens: Annotated[str, typer.Option(help="What it will be distilled on, such as 126B.")],
    family: Annotated[
        str | None, typer.Option(help="Choose among its members: llama2, qwen2.5, pythia, ...")
    ] = None,
    teachers: Annotated[
        str | None,
        typer.Option(
            help="Choose among these: names, folders, NAME=FOLDER or sizes, parted by commas."
        ),
    ] = None,
    law: Annotated[Path | None, typer.Option(help="The law.json of a sweep of your own.")] = None,
    gpus: Annotated[str | None, typer.Option(help="For the time: 16xA100.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the advice into this file, .png or .svg.")
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(metavar="CORPUS", help="Let the teachers read this text of yours."),
    ] = None,
    measure_bytes: Annotated[str, typer.Option(help="Bytes of it that they read.")] = "256k",
    dtype: Annotated[str, typer.Option(help="They read in: stored, fp32 or bf16.")] = "stored",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Which teacher to take for a student of this size and these tokens."""
    from rich.console import Console

    from capgap.cli.advice import print_advice
    from capgap.hardware import parse_gpus
    from capgap.law.recommend import candidates_of, sources_of
    from capgap.law.recommend import recommend as advise
    from capgap.law.rules import own_rule, read_law, surface_rules
    from capgap.sizes import parse_count

    if measure is None and (measure_bytes, dtype, device) != ("256k", "stored", "auto"):
        raise UserError("--measure-bytes, --dtype and --device are of use with --measure alone")
    if figure is not None:
        from capgap.report.static import check_picture

        check_picture(figure)
    size, read = parse_count(student), parse_count(tokens)
    own = None if law is None else read_law(law)
    rule = None if own is None else own_rule(own, size)
    surfaces = surface_rules(own, size, read)
    machines = None if gpus is None else parse_gpus(gpus)
    candidates = candidates_of(family, [] if teachers is None else teachers.split(","))
    measurement = None
    if measure is not None:
        from capgap.stages.measure import MeasureRequest, run_measure
        from capgap.sweep.progress import make_lines

        quieten_transformers()
        measurement = run_measure(
            MeasureRequest(measure, parse_count(measure_bytes), dtype, device),
            sources_of(candidates),
            say=make_lines(Console(stderr=True), quiet=quiet),
        )
    found = advise(
        size,
        read,
        candidates,
        own=rule,
        surfaces=surfaces,
        gpus=machines,
        measurement=measurement,
    )
    if figure is not None:
        from capgap.report.advice_charts import draw_advice

        draw_advice(found, figure, surface=surfaces[0])
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
