"""Commands for the single stages: corpus, cache, score, prune, distill, sample."""

import signal
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from capgap.cli.app import (
    FAILED,
    Corpora,
    Json,
    Quiet,
    Track,
    add_stage,
    app,
    corpora,
    exit_with,
    print_json,
    quieten_transformers,
    run_stoppable,
    stopped,
)
from capgap.errors import UserError
from capgap.machine import started
from capgap.stages.score import Score

if TYPE_CHECKING:
    from capgap.stages.distill import DistillRequest
    from capgap.stages.prune import Prefer


@app.command()
def corpus(
    source: Annotated[
        str,
        typer.Argument(help="stdlib, pydoc, a file, a folder, a glob or a Hugging Face dataset."),
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
    begin_windows: Annotated[
        bool,
        typer.Option(
            "--begin-windows", help="Every window begins with the tokenizer's own first token."
        ),
    ] = False,
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
        begin_windows=begin_windows,
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
        print_json(found)
    else:
        display.say(_what_was_read(made.manifest))
        print(f"{made.train_tokens:,} training tokens, vocabulary {made.vocabulary}, in {out}")


def _what_was_read(manifest: dict[str, Any]) -> str:
    """Documents, files, what was left out, and how much is held out."""
    from capgap.corpus.sources import describe_left_out

    source, heldout, train = (manifest[name] for name in ("source", "heldout", "train"))
    line = f"{manifest['documents']['read']:,} documents"
    files = source.get("files", [])
    if files:
        endings = Counter(f"*{Path(one['path']).suffix}" for one in files)
        kinds = ", ".join(f"{count:,} {ending}" for ending, count in sorted(endings.items()))
        line += f" of {len(files):,} files ({kinds})"
    if source.get("left_out"):
        line += f"; left out: {describe_left_out(source['left_out'])}"
    share = heldout["bytes"] / max(1, heldout["bytes"] + train["bytes"])
    return f"{line}; held out: {heldout['documents']:,} documents, {share:.1%} of the text"


@app.command()
def cache(
    teacher: Annotated[str, typer.Argument(help="A Hugging Face folder or name.")],
    corpus: Annotated[
        list[str], typer.Argument(help="What `capgap corpus` prepared; several for a mixture.")
    ],
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
    dtype: Annotated[str, typer.Option(help="The teacher's: auto, stored, fp32 or bf16.")] = "auto",
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

    from capgap.corpus.given import unweighted
    from capgap.stages.cache import CacheRequest, parse_part, run_cache
    from capgap.sweep.progress import make_lines

    quieten_transformers()
    request = CacheRequest(
        teacher,
        unweighted(corpus),
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
        stopped(out, signal.SIGINT)
    except SystemExit:
        stopped(out, signal.SIGTERM)
    if json_:
        print_json(found)
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


add_stage(Score)


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
        int | None,
        typer.Option(help="Hidden and FFN width are multiples of it: 8, or 128 from 500M on."),
    ] = None,
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

    quieten_transformers()
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
            exit_with("stopped; nothing was written", 128 + signal.SIGINT)
        except SystemExit:
            exit_with("stopped; nothing was written", 128 + signal.SIGTERM)
    if json_:
        print_json(found)
    else:
        print_cut(found, Console(highlight=False))


@app.command()
def distill(
    teacher: Annotated[str, typer.Argument(help="A Hugging Face folder or name.")],
    students: Annotated[list[str], typer.Argument(help="One or several, fed by one pass.")],
    corpus: Corpora,
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
    track: Track = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="training.alpha=1, run.device=cpu."),
    ] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Let students learn from a teacher; the same command continues one that was stopped."""

    from capgap.config import stage_settings
    from capgap.sizes import parse_count
    from capgap.stages.distill import DistillRequest

    request = DistillRequest(
        teacher,
        tuple(students),
        corpora(corpus),
        out,
        parse_count(tokens),
        window=window,
        cache=cache_,
        learning_rate=learning_rate,
        seed=seed,
        heldout_steps=heldout_steps,
        settings=stage_settings(set_ or []),
        track=tuple(track or ()),
    )
    train_models(request, quiet=quiet, json_=json_)


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
    from capgap.evaluate.sample import check_sampling, sample_text
    from capgap.models.build import load_model

    check_sampling(temperature=temperature, top_p=top_p, seed=seed)
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


def train_models(request: "DistillRequest", *, quiet: bool, json_: bool) -> None:
    """What `train` and `distill` do with what they are asked for."""
    from capgap.stages.distill import run_distill

    found = run_stoppable(run_distill, request, out=request.out, quiet=quiet)
    if started()[0]:
        return
    if json_:
        print_json(found)
    else:
        _print_students(found)
    if all(student["failure"] for student in found["after"].values()):
        exit_with("no model was finished", FAILED)


def _print_students(found: dict[str, Any]) -> None:
    for name, student in found["after"].items():
        before = found["before"][name]["loss"]
        if student["failure"]:
            step = student["failure"].get("step")
            where = "" if step is None else f" at step {step}"
            print(f"{name}: failed{where}, {student['failure']['message']}")
            continue
        after = student["heldout"]["loss"]
        print(f"{name}: held-out loss {before:.4f} -> {after:.4f}, {student['folder']}")
        for source, one in student["heldout"].get("sources", {}).items():
            began = found["before"][name]["sources"][source]["loss"]
            print(f"    {source} ({one['share']:.0%}): {began:.4f} -> {one['loss']:.4f}")
    for name, student in (found["best"] or {"students": {}})["students"].items():
        loss, step = student["heldout"]["loss"], found["best"]["step"]
        print(f"{name}: held-out loss {loss:.4f} at step {step}, {student['folder']}")
