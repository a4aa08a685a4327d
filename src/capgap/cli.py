"""The commands: each parses, calls one library function, and prints where the result lies.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

import errno
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from capgap import __version__
from capgap.errors import UserError, is_disk_full
from capgap.machine import started

if TYPE_CHECKING:
    from capgap.prune.methods import Depth, Method
    from capgap.stages.prune import Prefer

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
    if started()[1] == 1:
        _run()
        return
    code = FAILED
    try:
        _run()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    leave(code)


def leave(code: int) -> NoReturn:
    """Ends one of several processes without taking Python down piece by piece: gloo's threads may
    outlive what they use, and abort a run that has done its work."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run() -> None:
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except UserError as error:
        where = "" if error.rank in (None, 0) else f"rank {error.rank}: "
        # what all processes of torchrun meet alike, the first one tells
        told = error.rank is not None or started()[0] == 0
        _exit(f"{where}{error}" if told else "", USER_ERROR)
    except OSError as error:
        if is_disk_full(error):
            _exit("no disk space left: free some and run the same command again", USER_ERROR)
        if error.errno in REFUSALS:
            _exit(f"{error.filename}: {error.strerror}", USER_ERROR)
        raise


def _exit(line: str, code: int) -> NoReturn:
    if line:
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

    from capgap.law.recommend import candidates_of, own_rule, parse_gpus, print_advice
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
        _print_json(found)
    else:
        print_advice(found, Console(highlight=False))


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
def cache(
    teacher: Annotated[str, typer.Argument(help="A Hugging Face folder or name.")],
    corpus: Annotated[Path, typer.Argument(help="A corpus that `capgap corpus` prepared.")],
    out: Annotated[Path, typer.Option(help="Folder for the cache.")],
    window: Annotated[int, typer.Option(help="Tokens of a training window.")] = 512,
    top_k: Annotated[int, typer.Option(help="Likeliest words kept with their probability.")] = 12,
    samples: Annotated[
        int, typer.Option(help="Words drawn from the rest; 0 keeps the rest as one bucket.")
    ] = 16,
    temperature: Annotated[float, typer.Option(help="Of the probabilities kept.")] = 1.0,
    document_mask: Annotated[
        bool, typer.Option("--document-mask", help="No attention over document borders.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="The teacher's: stored, fp32 or bf16.")] = "stored",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    offload: Annotated[
        bool, typer.Option("--offload", help="Layers lie in host memory (needs accelerate).")
    ] = False,
    batch_windows: Annotated[int, typer.Option(help="Windows the teacher reads at once.")] = 8,
    part: Annotated[
        str | None, typer.Option(help="2/4: the second of four processes that share the work.")
    ] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Keep a teacher's signal on disk; the same command goes on with what is missing."""
    from rich.console import Console

    from capgap.stages.cache import CacheRequest, parse_part, run_cache
    from capgap.sweep.progress import make_lines

    _quieten_transformers()
    request = CacheRequest(
        teacher,
        corpus,
        out,
        window=window,
        top_k=top_k,
        samples=samples,
        temperature=temperature,
        document_mask=document_mask,
        dtype=dtype,
        device=device,
        offload=offload,
        batch_windows=batch_windows,
        part=None if part is None else parse_part(part),
    )
    try:
        found = run_cache(request, make_lines(Console(stderr=True), quiet=quiet))
    except KeyboardInterrupt:
        _stopped(out, signal.SIGINT)
    except SystemExit:
        _stopped(out, signal.SIGTERM)
    if json_:
        _print_json(found)
        return
    size = found["bytes"] / 1e6
    if found["complete"]:
        print(
            f"{found['tokens']:,} tokens at {found['token_bytes']} bytes each, {size:,.1f} MB, "
            f"in {out}"
        )
    else:
        missing, shards = found["missing_shards"], found["shards"]
        print(f"this part is written; other parts lack {missing} of {shards} shards in {out}")


@app.command()
def score(
    teacher: Annotated[str, typer.Argument(help="A Hugging Face folder or name.")],
    out: Annotated[Path, typer.Option(help="File for the scores (safetensors).")],
    corpus: Annotated[
        Path | None, typer.Option(help="A corpus that `capgap corpus` prepared.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="weights, first_order, activation, norm or random.")
    ] = "weights",
    depth: Annotated[
        str | None,
        typer.Option(help="For layers: first_order, influence or ends; none is as the method."),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Tokens to score on.")] = "32768",
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    batch_windows: Annotated[int, typer.Option(help="Windows read at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Decides the windows, and random scores.")] = 0,
    dtype: Annotated[str, typer.Option(help="The teacher's: stored, fp32 or bf16.")] = "stored",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Less memory, more time.")
    ] = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Measure how much every unit of a model matters, once for many cuts."""
    from rich.console import Console

    from capgap.sizes import parse_count
    from capgap.stages.score import ScoreRequest, run_score
    from capgap.sweep.progress import make_lines

    _quieten_transformers()
    request = ScoreRequest(
        teacher,
        out,
        corpus,
        method=cast("Method", method),
        depth=cast("Depth | None", depth),
        tokens=parse_count(tokens),
        window=window,
        batch_windows=batch_windows,
        seed=seed,
        dtype=dtype,
        device=device,
        activation_checkpointing=activation_checkpointing,
    )
    stopped = _StopFlag()
    from capgap.train.loop import Interrupted

    try:
        found = run_score(
            request,
            say=make_lines(Console(stderr=True), quiet=quiet),
            should_stop=lambda: stopped.signal is not None,
        )
    except (Interrupted, KeyboardInterrupt):
        _stopped(out, stopped.signal or signal.SIGINT)
    if json_:
        _print_json(found)
    else:
        read = f" on {found['tokens']:,} tokens" if found["tokens"] else ""
        print(f"{found['method']} scores of {teacher}{read}, in {out}")


@app.command()
def prune(
    teacher: Annotated[str, typer.Argument(help="A Hugging Face folder or name.")],
    out: Annotated[Path, typer.Option(help="Folder for the student; it must not exist.")],
    scores: Annotated[
        Path | None, typer.Option(help="What `capgap score` measured of the teacher.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of the non-embedding parameters, such as 0.4.")
    ] = None,
    params: Annotated[
        str | None, typer.Option(help="Non-embedding parameters, such as 3B.")
    ] = None,
    total_params: Annotated[str | None, typer.Option(help="All parameters, such as 3B.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="hidden=3072,heads=24,ffn=8192,layers=24: some of these, or all."),
    ] = None,
    multiple: Annotated[
        int, typer.Option(help="Hidden and FFN width are multiples of it; 64 or 128 for a GPU.")
    ] = 8,
    prefer: Annotated[
        str | None,
        typer.Option(help="Of shapes of one size: axes (for --keep), ladder (else) or score."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Shape, parameters, memory and time; read no weights.")
    ] = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Cut a student of an exact size out of a teacher."""
    from rich.console import Console

    from capgap.sizes import parse_count
    from capgap.stages.prune import PruneRequest, parse_sizes, plan_prune, print_cut, run_prune
    from capgap.sweep.progress import make_lines

    _quieten_transformers()
    request = PruneRequest(
        teacher,
        out,
        scores,
        keep=keep,
        params=None if params is None else parse_count(params),
        total_params=None if total_params is None else parse_count(total_params),
        sizes={} if shape is None else parse_sizes(shape),
        multiple=multiple,
        prefer=cast("Prefer | None", prefer),
    )
    if dry_run:
        found = plan_prune(request)
    else:
        try:
            found = run_prune(request, make_lines(Console(stderr=True), quiet=quiet))
        except KeyboardInterrupt:
            _exit("stopped; nothing was written", 128 + signal.SIGINT)
        except SystemExit:
            _exit("stopped; nothing was written", 128 + signal.SIGTERM)
    if json_:
        _print_json(found)
    else:
        print_cut(found, Console(highlight=False))


@app.command()
def distill(
    teacher: Annotated[str, typer.Argument(help="A Hugging Face folder or name.")],
    students: Annotated[list[str], typer.Argument(help="One or several, fed by one pass.")],
    corpus: Annotated[Path, typer.Option(help="A corpus that `capgap corpus` prepared.")],
    tokens: Annotated[str, typer.Option(help="Training tokens, such as 10M.")],
    out: Annotated[Path, typer.Option(help="Folder for students, metrics and record.")],
    window: Annotated[int, typer.Option(help="Tokens of a training window.")] = 512,
    cache_: Annotated[
        Path | None, typer.Option("--cache", help="What `capgap cache` kept of the teacher.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate of all students; a rule per size if none.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the order of the windows.")] = 0,
    heldout_steps: Annotated[
        int | None,
        typer.Option(help="Held-out loss every so many steps; the best checkpoint is kept."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="training.alpha=1, run.device=cpu."),
    ] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Let students learn from a teacher; the same command continues one that was stopped."""
    from rich.console import Console

    from capgap.config import stage_settings
    from capgap.sizes import parse_count
    from capgap.stages.distill import DistillRequest, run_distill
    from capgap.sweep.progress import make_lines

    _quieten_transformers()
    request = DistillRequest(
        teacher,
        tuple(students),
        corpus,
        out,
        parse_count(tokens),
        window=window,
        cache=cache_,
        learning_rate=learning_rate,
        seed=seed,
        heldout_steps=heldout_steps,
        settings=stage_settings(set_ or []),
    )
    stopped = _StopFlag()
    from capgap.train.loop import Interrupted

    try:
        found = run_distill(
            request,
            say=make_lines(Console(stderr=True), quiet=quiet),
            should_stop=lambda: stopped.signal is not None,
        )
    except (Interrupted, KeyboardInterrupt):
        _stopped(out, stopped.signal or signal.SIGINT)
    if started()[0]:
        return
    if json_:
        _print_json(found)
    else:
        _print_students(found)
    if all(student["failure"] for student in found["after"].values()):
        _exit("no student was finished", FAILED)


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


def _print_students(found: dict[str, Any]) -> None:
    for name, student in found["after"].items():
        before = found["before"][name]["loss"]
        if student["failure"]:
            step = student["failure"].get("step")
            where = "" if step is None else f" at step {step}"
            print(f"{name}: failed{where}, {student['failure']['message']}")
        else:
            after = student["heldout"]["loss"]
            print(f"{name}: held-out loss {before:.4f} -> {after:.4f}, {student['folder']}")
    for name, student in (found["best"] or {"students": {}})["students"].items():
        loss, step = student["heldout"]["loss"], found["best"]["step"]
        print(f"{name}: held-out loss {loss:.4f} at step {step}, {student['folder']}")


class _StopFlag:
    """Ctrl-C and SIGTERM wait until the state is saved; the second one does not."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


def _sweep(
    name: str, out: Path | None, overrides: list[str], *, dry_run: bool, quiet: bool, as_json: bool
) -> None:
    from rich.console import Console

    from capgap.config import find_recipe, load_recipe

    if started()[1] > 1:
        raise UserError("a sweep starts processes of its own: run it without torchrun")
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
    line = f"stopped; what is done is kept in {folder}, the same command continues"
    _exit("" if started()[0] else line, 128 + number)


def _quieten_transformers() -> None:
    """Its progress bars and hints would break into our own output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))
