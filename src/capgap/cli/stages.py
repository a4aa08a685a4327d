"""The commands of the single stages, and `sample`."""

from pathlib import Path
from typing import Annotated

import typer

from capgap.cli.app import Json, add_stage, app, print_json, quieten_transformers
from capgap.errors import UserError
from capgap.stages.adapt import Adapt
from capgap.stages.cache import Cache
from capgap.stages.corpus import Prepare
from capgap.stages.distill import Distill, Train
from capgap.stages.prune import Prune
from capgap.stages.score import Score

# in the order of --help
for stage in (Prepare, Cache, Score, Prune, Distill, Train, Adapt):
    add_stage(stage)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or name.")],
    text: Annotated[str, typer.Argument(help="The beginning to continue.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 80,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Share of probability to draw from.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    json_: Json = False,
) -> None:
    """Let a model continue a text."""
    if Path(model, "sweep.json").exists():
        raise UserError(f"{model} is the folder of a sweep: its best student is in {model}/student")
    from capgap.corpus.tokenizer import check_text, load_tokenizer
    from capgap.evaluate.sample import Sampling, sample_text
    from capgap.models.build import load_model

    Sampling(temperature, top_p, seed=seed)
    check_text(text, "the text")
    quieten_transformers()
    # first, because it tells a missing network or a wrong name at once
    tokenizer = load_tokenizer(model)
    written = sample_text(
        load_model(model).eval(),
        tokenizer,
        text,
        max_new_tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    if json_:
        print_json({"model": model, "prompt": text, "text": written})
    else:
        print(text + written)
