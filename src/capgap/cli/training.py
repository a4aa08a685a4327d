"""Commands that train without a teacher: train, adapt."""

from pathlib import Path
from typing import Annotated

import typer

from capgap.cli.app import Corpora, Json, Quiet, Set, app
from capgap.cli.stages import train_models


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
    set_: Set = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Train models on text, without a teacher; the same command continues one that was stopped."""
    from capgap.config import stage_settings
    from capgap.corpus.mixture import parse_mixture
    from capgap.sizes import parse_count
    from capgap.stages.distill import DistillRequest

    request = DistillRequest(
        None,
        tuple(models or ()),
        parse_mixture(corpus),
        out,
        parse_count(tokens),
        window=window,
        learning_rate=learning_rate,
        seed=seed,
        heldout_steps=heldout_steps,
        size=None if size is None else parse_count(size),
        architecture=architecture,
        settings=stage_settings(set_ or []),
    )
    train_models(request, quiet=quiet, json_=json_)
