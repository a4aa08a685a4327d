"""The commands: each parses, calls one library function, and prints where the result lies.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

import errno
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from capgap import __version__
from capgap.errors import UserError, is_disk_full

USER_ERROR = 2
FAILED = 1
# What the machine refuses, and only its user can mend
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Measure the law of capacity gap, pick the teacher, and distil the student.",
)

Out = Annotated[Path, typer.Option(help="Output folder.", show_default=True)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Override = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Change a value of the recipe."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print every cell, its cost and the time; run nothing.")
]


def main() -> None:
    """Runs the command line; a user's mistake is one line and exit code 2."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except UserError as error:
        _exit(str(error), USER_ERROR)
    except OSError as error:
        if is_disk_full(error):
            _exit("no disk space left: free some and run the same command again", USER_ERROR)
        if error.errno in REFUSALS:
            _exit(f"{error.filename}: {error.strerror}", USER_ERROR)
        raise


def _exit(line: str, code: int) -> NoReturn:
    print(f"capgap: {line}", file=sys.stderr)
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


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
        _print_json(found)
    else:
        for sentence in found["verdict"]:
            print(sentence)
        print(f"report: {found['report']}")


@app.command()
def corpus(
    source: Annotated[
        str, typer.Argument(help="stdlib, a file, a folder, a glob or a Hugging Face dataset.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for tokenizer, token shards and manifest.")],
    vocabulary: Annotated[str, typer.Option(help="Tokens of the tokenizer to train.")] = "2048",
    tokenizer: Annotated[
        str | None, typer.Option(help="Take this tokenizer (folder or name) instead.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    separator: Annotated[
        str, typer.Option(help="Line that ends a document in a text file.")
    ] = "<|endoftext|>",
    heldout_source: Annotated[str | None, typer.Option(help="Text to hold out.")] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Turn text into token shards with a manifest; unchanged text is not read twice."""
    from rich.console import Console

    from capgap.corpus.prepare import prepare_corpus
    from capgap.sizes import parse_count
    from capgap.sweep.progress import CorpusProgress, make_display

    display = make_display(Console(stderr=True), quiet=quiet)
    made = prepare_corpus(
        source,
        out,
        vocabulary=parse_count(vocabulary),
        tokenizer=tokenizer,
        text_column=text_column,
        separator=separator,
        heldout_source=heldout_source,
        progress=CorpusProgress(display.say),
    )
    found = {
        "folder": str(made.directory),
        "train_tokens": made.train_tokens,
        "vocabulary": made.vocabulary,
        "corpus_hash": made.corpus_hash,
        "tokenizer_hash": made.token_hash,
        "manifest": str(made.directory / "manifest.json"),
    }
    if json_:
        _print_json(found)
    else:
        print(f"{made.train_tokens:,} training tokens, vocabulary {made.vocabulary}, in {out}")


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
    from capgap.corpus.tokenizer import load_tokenizer
    from capgap.evaluate.sample import check_sampling, sample_text
    from capgap.models.build import load_model

    check_sampling(temperature=temperature, top_p=top_p, seed=seed)
    _quieten_transformers()
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
        _print_json({"model": model, "prompt": text, "text": written})
    else:
        print(text + written)


def _sweep(
    name: str, out: Path | None, overrides: list[str], *, dry_run: bool, quiet: bool, as_json: bool
) -> None:
    from rich.console import Console

    from capgap.config import find_recipe, load_recipe

    recipe = load_recipe(find_recipe(name), overrides)
    console = Console(stderr=True)
    if dry_run:
        _dry_run(recipe, as_json=as_json)
        return
    from capgap.sweep.progress import make_display
    from capgap.sweep.runner import run_sweep
    from capgap.sweep.schedule import WorkerDied
    from capgap.sweep.summary import print_summary

    _quieten_transformers()
    folder = out or Path("runs") / recipe.name
    try:
        result = run_sweep(recipe, folder, make_display(console, quiet=quiet))
    except KeyboardInterrupt:
        _stopped(folder, signal.SIGINT)
    except SystemExit:
        _stopped(folder, signal.SIGTERM)
    except WorkerDied as error:
        _exit(str(error), FAILED)
    if as_json:
        _print_json(result.as_dict())
    else:
        print_summary(result, Console())
    if result.best is None:
        _exit("no cell of the sweep was finished; see the report", FAILED)


def _dry_run(recipe: Any, *, as_json: bool) -> None:
    from rich.console import Console

    from capgap.sweep.preview import preview, print_preview

    _quieten_transformers()
    found = preview(recipe)
    if as_json:
        _print_json(found)
    else:
        print_preview(found, Console())


def _stopped(folder: Path, number: signal.Signals) -> NoReturn:
    _exit(f"stopped; what is done is kept in {folder}, the same command continues", 128 + number)


def _quieten_transformers() -> None:
    """Its progress bars and hints would break into our own output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))
