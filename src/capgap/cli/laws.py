"""Commands about laws and costs: fit a law, advice from laws, what a recipe would take."""

from pathlib import Path
from typing import Annotated

import typer

from capgap.cli.app import Json, Override, Quiet, app, print_json, quieten_transformers
from capgap.errors import UserError


@app.command()
def fit(
    source: Annotated[
        Path,
        typer.Argument(help="A CSV of cells, or the output folder of a sweep or of distillations."),
    ],
    out: Annotated[Path, typer.Option(help="The law as JSON.")] = Path("law.json"),
    report: Annotated[
        Path | None, typer.Option(help="A page with the pictures, such as law.html.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of all intervals.")] = 0.9,
    independent_errors: Annotated[
        bool,
        typer.Option(
            "--independent-errors",
            metavar="",
            help="The table's loss_stderr is each cell's own noise.",
        ),
    ] = False,
    json_: Json = False,
) -> None:
    """Fit the law of capacity gap to a table of cells, or to the records of runs."""
    from capgap.law.fit import fit as fit_law
    from capgap.law.table import load_cells
    from capgap.records import write_json_atomically
    from capgap.report.sentences import sentences

    cells = load_cells(source, independent_errors=independent_errors)
    found = fit_law(cells, confidence=confidence)
    write_json_atomically(out, found.as_dict())
    page = None
    if report is not None:
        from capgap.report.page import write_law_report

        page = str(write_law_report(found, report, title=source.stem))
    answer = sentences(found)
    if json_:
        print_json({"law": str(out), "report": page, "verdict": answer})
        return
    for sentence in answer:
        print(sentence)
    for warning in found.warnings:
        print(f"warning, {warning.where}: {warning.message}")
    for row in found.excluded:
        print(f"not used: {row.id}, {row.reason}")
    print(f"law: {out}" + (f", report: {page}" if page else ""))


@app.command()
def recommend(
    student: Annotated[
        str, typer.Option(help="Its size: 3B without embeddings, 3.2B total, or a name.")
    ],
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
    student_model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="The student's weights, to read what teachers write."),
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
    from capgap.law.advise import recommend as advise
    from capgap.law.law import read_law
    from capgap.law.published import candidates_of, sources_of
    from capgap.report.advice import advice_sentences
    from capgap.sizes import parse_count

    beside = (measure_bytes, dtype, device, student_model)
    if measure is None and beside != ("256k", "stored", "auto", None):
        raise UserError(
            "--measure-bytes, --dtype, --device and --student-model are of use with --measure alone"
        )
    if figure is not None:
        from capgap.report.draw import check_picture

        check_picture(figure)
    own = None if law is None else read_law(law)
    candidates = candidates_of(family, [] if teachers is None else teachers.split(","))
    measurement = None
    # mistakes are told before models are read
    found = advise(student, tokens, candidates, law=own, gpus=gpus)
    if measure is not None:
        from capgap.stages.measure import MeasureRequest, run_measure
        from capgap.sweep.progress import make_lines

        quieten_transformers()
        measurement = run_measure(
            MeasureRequest(measure, parse_count(measure_bytes), dtype, device, student_model),
            sources_of(candidates),
            say=make_lines(Console(stderr=True), quiet=quiet),
        )
        found = advise(student, tokens, candidates, law=own, gpus=gpus, measurement=measurement)
    if figure is not None:
        from capgap.report.published_charts import draw_advice

        draw_advice(found, figure)
    if json_:
        print_json(found.model_dump(mode="json") | {"verdict": advice_sentences(found)})
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
