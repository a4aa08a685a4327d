"""The command that evaluates a model, and its answer for a person."""

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from capgap.cli.app import (
    FAILED,
    Json,
    Quiet,
    TrustCode,
    app,
    exit_with,
    print_json,
    quieten_transformers,
)
from capgap.errors import UserError
from capgap.evaluate.sets import SIX


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or name.")],
    tasks: Annotated[
        str,
        typer.Option(help="Sets parted by commas; also bbh_cot, blimp, lambada, piqa, heldout."),
    ] = ",".join(SIX),
    data: Annotated[
        Path | None, typer.Option(help="Folder with local copies of sets, before the Hub.")
    ] = None,
    corpus: Annotated[
        list[Path] | None, typer.Option(help="For heldout: what `capgap corpus` prepared.")
    ] = None,
    shots: Annotated[
        list[str] | None, typer.Option(metavar="SET=NUMBER", help="Other than the set's own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only so many questions of every part of a set.")
    ] = None,
    window: Annotated[int, typer.Option(help="For heldout: tokens of a row.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Prompts that the model reads at once.")] = 8,
    dtype: Annotated[str, typer.Option(help="The model's: stored, fp32 or bf16.")] = "stored",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run programs the model writes, for humaneval.")
    ] = False,
    trust_remote_code: TrustCode = False,
    out: Annotated[Path, typer.Option(help="The record as JSON.")] = Path("evaluate.json"),
    samples: Annotated[
        Path | None, typer.Option(help="Every prompt and answer, as lines of JSON.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the model beside published ones: .png or .svg.")
    ] = None,
    flops: Annotated[
        str | None, typer.Option(help="That the model took, such as 4e21, for --figure.")
    ] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Evaluate a model: benchmarks with their published shots, and held-out loss; the same command
    goes on with what is missing."""
    from rich.console import Console

    from capgap.evaluate.scores import known_flops, parse_flops
    from capgap.evaluate.sets import parse_shots, parse_tasks
    from capgap.stages.evaluate import EvaluateRequest, run_evaluate
    from capgap.sweep.progress import make_lines

    took = None if flops is None else parse_flops(flops)
    if figure is None and flops is not None:
        raise UserError("--flops is of use with --figure alone")
    if figure is not None:
        from capgap.report.draw import check_picture

        check_picture(figure)
        took = took or known_flops(model)
        if took is None:
            raise UserError("--figure needs the FLOPs that the model took: give --flops 4e21")
    request = EvaluateRequest(
        model,
        parse_tasks(tasks),
        data=data,
        corpora=tuple(corpus or ()),
        shots=parse_shots(shots or []),
        limit=limit,
        window=window,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        allow_code=allow_code,
        trust_remote_code=trust_remote_code,
        out=out,
        samples=samples,
    )
    quieten_transformers()
    try:
        found = run_evaluate(request, make_lines(Console(stderr=True), quiet=quiet))
    except KeyboardInterrupt:
        _stopped(out, signal.SIGINT)
    except SystemExit:
        _stopped(out, signal.SIGTERM)
    drawn = figure is not None and _draw(found, figure, took)
    if json_:
        print_json(found)
    else:
        print_scores(found, Console(highlight=False))
        print(f"record: {out}" + (f", picture: {figure}" if drawn else ""))
    if figure is not None and not drawn:
        exit_with(f"no picture: {_why_no_mean(found)}", FAILED)
    if not _measured(found):
        exit_with("nothing was measured", FAILED)


def print_scores(found: dict[str, Any], console: Any) -> None:
    """Tables of a record: the sets, held-out losses, and the six beside published models."""
    from rich.table import Table

    from capgap.evaluate.scores import beside_published
    from capgap.evaluate.sets import SETS

    measured = {name: one for name, one in found["tasks"].items() if not one["missing"]}
    if measured:
        table = _table(Table, "set", ("score", "±", "shots", "questions", "cut prompts"))
        for name, one in measured.items():
            asked = f"{one['questions']:,}"
            if one["questions"] < one["of_questions"]:
                asked += f" of {one['of_questions']:,}"
            table.add_row(
                SETS[name].title,
                _percent(one["score"]),
                _percent(one["score_stderr"]),
                str(one["shots"]),
                asked,
                f"{one['cut_prompts']:,}" if one["cut_prompts"] else "",
            )
        console.print(table)
    for folder, one in (found["heldout"] or {}).items():
        if one["missing"]:
            print(f"held-out loss on {folder}: missing, {one['missing']}")
            continue
        loss = f"held-out loss on {folder}: {_with_error(one, 'loss')} nats a token, "
        print(f"{loss}{_with_error(one, 'bits_per_byte')} bits a byte")
    for name, one in found["tasks"].items():
        if one["missing"]:
            print(f"{name}: missing, {one['missing']}")
    beside = beside_published(found["tasks"])
    if beside is not None:
        console.print()
        table = _table(Table, "beside arXiv 2311.07052", beside["columns"])
        for place, (name, scores) in enumerate(beside["rows"]):
            # the others are published without an error
            errors = beside["errors"] if place == 0 else [None] * len(scores)
            pairs = zip(scores, errors, strict=True)
            table.add_row(
                name, *(f"{s:.2f}" + ("" if e is None else f" ± {e:.2f}") for s, e in pairs)
            )
        console.print(table)
    if found["mean_percent"] is not None:
        print(f"mean of the six: {found['mean_percent']:.2f}")
    elif measured and found["mean_missing"]:
        print(f"no mean of the six: {found['mean_missing']}")


def _table(kind: Any, first: str, names: Any) -> Any:
    table = kind(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _with_error(one: dict[str, Any], name: str) -> str:
    error = one[f"{name}_stderr"]
    return f"{one[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _measured(found: dict[str, Any]) -> bool:
    sets, heldout = found["tasks"].values(), (found["heldout"] or {}).values()
    return any(not one["missing"] for one in (*sets, *heldout))


def _why_no_mean(found: dict[str, Any]) -> str:
    return found["mean_missing"] or "none of the six benchmarks was asked for"


def _draw(found: dict[str, Any], figure: Path, flops: float | None) -> bool:
    """Whether there is a mean to draw."""
    if found["mean_percent"] is None or flops is None:
        return False
    from capgap.report.draw import write_picture
    from capgap.report.published_charts import OwnResult, benchmark_chart

    name = Path(found["model"]).name
    write_picture(benchmark_chart([OwnResult(name, flops, found["mean_percent"])]), figure)
    return True


def _stopped(out: Path, number: signal.Signals) -> None:
    exit_with(f"stopped; the same command goes on, what is measured is in {out}", 128 + number)
