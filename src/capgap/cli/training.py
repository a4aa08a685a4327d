"""Commands that train without a teacher: train, adapt."""

from pathlib import Path
from typing import Annotated, Any

import typer

from capgap.cli.app import (
    Corpora,
    Json,
    Quiet,
    Set,
    Track,
    app,
    corpora,
    print_json,
    run_stoppable,
)
from capgap.cli.stages import train_models
from capgap.machine import started


@app.command()
def train(
    corpus: Corpora,
    tokens: Annotated[str, typer.Option(help="Training tokens, such as 10M.")],
    out: Annotated[Path, typer.Option(help="Folder for models, metrics and record.")],
    models: Annotated[
        list[str] | None, typer.Argument(help="Hugging Face folders or names to train on.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Non-embedding parameters of a new model, such as 300k."),
    ] = None,
    architecture: Annotated[str, typer.Option(help="Of the new model.")] = "llama",
    window: Annotated[int, typer.Option(help="Tokens of a training window.")] = 512,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate of all models; a rule per size if none.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Decides the order of the windows, and new weights.")
    ] = 0,
    heldout_steps: Annotated[
        int | None,
        typer.Option(help="Held-out loss every so many steps; the best checkpoint is kept."),
    ] = None,
    track: Track = None,
    set_: Set = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Train models on text, without a teacher; the same command continues one that was stopped."""
    from capgap.config import stage_settings
    from capgap.sizes import parse_count
    from capgap.stages.distill import DistillRequest

    request = DistillRequest(
        None,
        tuple(models or ()),
        corpora(corpus),
        out,
        parse_count(tokens),
        window=window,
        learning_rate=learning_rate,
        seed=seed,
        heldout_steps=heldout_steps,
        size=None if size is None else parse_count(size),
        architecture=architecture,
        settings=stage_settings(set_ or []),
        track=tuple(track or ()),
    )
    train_models(request, quiet=quiet, json_=json_)


@app.command()
def adapt(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or name.")],
    new: Annotated[
        str, typer.Option(metavar="SOURCE", help="Text to learn: as for `capgap corpus`.")
    ],
    pieces: Annotated[str, typer.Option(help="New tokens, such as 16k.")],
    tokens: Annotated[str, typer.Option(help="Training tokens, such as 10M; 0 only extends.")],
    out: Annotated[Path, typer.Option(help="Folder for the model, corpora and record.")],
    old: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Text like what the model knows.")
    ] = None,
    new_share: Annotated[
        float | None, typer.Option(help="Of the training tokens; half beside old text.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of a training window.")] = 512,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate; a rule per size if none.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the order of the windows.")] = 0,
    track: Track = None,
    set_: Set = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Teach a model another language or a code base, with new tokens for it."""

    from capgap.config import stage_settings
    from capgap.sizes import parse_count
    from capgap.stages.adapt import AdaptRequest, run_adapt

    request = AdaptRequest(
        model,
        new,
        out,
        parse_count(pieces),
        0 if tokens.strip() == "0" else parse_count(tokens),
        old=old,
        new_share=new_share,
        window=window,
        learning_rate=learning_rate,
        seed=seed,
        settings=stage_settings(set_ or []),
        track=tuple(track or ()),
    )
    found = run_stoppable(run_adapt, request, out=out, quiet=quiet)
    if started()[0]:
        return
    if json_:
        print_json(found)
    else:
        _print_adapted(found)


def _print_adapted(found: dict[str, Any]) -> None:
    tokenizer = found["tokenizer"]
    print(
        f"{tokenizer['pieces']:,} new tokens, {tokenizer['words']:,} in all, {tokenizer['rows']:,} "
        f"rows; {found['folder']}"
    )
    for name, told in found["fertility"].items():
        before, after = (told[when]["tokens_per_byte"] for when in ("before", "after"))
        print(
            f"{name} text: {before:.3f} -> {after:.3f} tokens per byte, {told['joined_share']:.1%} "
            "of the tokens joined"
        )
    for name, losses in found["heldout"].items():
        bits = " -> ".join(
            f"{one['bits_per_byte']:.4f} ({when})" for when, one in losses.items() if one
        )
        print(f"{name} text, bits per byte: {bits}")
