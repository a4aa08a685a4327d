"""Commands for models that answer: instruct, prefer, chat."""

import contextlib
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capgap.cli.app import (
    Json,
    Quiet,
    Track,
    TrustCode,
    app,
    print_json,
    quieten_transformers,
    run_stoppable,
)
from capgap.errors import UserError

if TYPE_CHECKING:
    from capgap.tune.chat import Chat
    from capgap.tune.settings import Lora

Data = Annotated[Path, typer.Option(help="Conversations, one a line (.jsonl).")]
Pairs = Annotated[Path, typer.Option(help="prompt, chosen, rejected, one a line (.jsonl).")]
TuneOut = Annotated[Path, typer.Option(help="Folder for model, metrics and record.")]
Window = Annotated[
    int | None,
    typer.Option(help="Tokens of the longest conversation; 4096, or all that the model reads."),
]
Batch = Annotated[int, typer.Option(help="Conversations a step.")]
MicroBatch = Annotated[int, typer.Option(help="Conversations at once.")]
Rate = Annotated[float, typer.Option(help="Peak rate; it falls as a cosine to 0.")]
Epochs = Annotated[int, typer.Option(help="Times that every conversation is read.")]
Warmup = Annotated[float, typer.Option(help="Share of the steps until the peak rate.")]
UseLora = Annotated[bool, typer.Option("--lora", help="Train adapters, merged at the end.")]
LoraRank = Annotated[int, typer.Option(help="Rank of the adapters.")]
LoraAlpha = Annotated[float, typer.Option(help="Their scale times the rank.")]
LoraDropout = Annotated[float, typer.Option(help="Dropout on their inputs.")]
LoraModules = Annotated[
    str | None, typer.Option(help="q_proj,v_proj: which linear layers; all if none.")
]
Heldout = Annotated[float, typer.Option(help="Share kept out of training and scored.")]
Template = Annotated[str, typer.Option(help="minichat, or the tokenizer's own.")]
System = Annotated[
    str, typer.Option(help="System prompt of conversations without one; goes into the template.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad lines out, and count them.")]
Checkpointing = Annotated[
    bool, typer.Option("--activation-checkpointing", help="Less memory, more time.")
]
Seed = Annotated[int, typer.Option(help="Decides order, adapters, noise and what is held out.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@app.command()
def instruct(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or name.")],
    data: Data,
    out: TuneOut,
    window: Window = None,
    batch: Batch = 256,
    micro_batch: MicroBatch = 4,
    learning_rate: Rate = 2e-5,
    epochs: Epochs = 3,
    warmup_fraction: Warmup = 0.1,
    neftune: Annotated[
        float | None, typer.Option(help="Noise on the embeddings, such as 5.")
    ] = None,
    lora: UseLora = False,
    lora_rank: LoraRank = 8,
    lora_alpha: LoraAlpha = 16,
    lora_dropout: LoraDropout = 0.05,
    lora_modules: LoraModules = None,
    heldout_fraction: Heldout = 0.05,
    template: Template = "minichat",
    system: System = "",
    skip_bad: SkipBad = False,
    activation_checkpointing: Checkpointing = False,
    seed: Seed = 0,
    device: Device = "auto",
    track: Track = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Teach a model to answer from conversations; the same command continues a stopped run."""
    from capgap.stages.instruct import InstructRequest, run_instruct

    request = InstructRequest(
        model,
        data,
        out,
        window=window,
        batch=batch,
        micro_batch=micro_batch,
        learning_rate=learning_rate,
        epochs=epochs,
        warmup_fraction=warmup_fraction,
        neftune=neftune,
        lora=_lora(lora, lora_rank, lora_alpha, lora_dropout, lora_modules),
        heldout_fraction=heldout_fraction,
        template=template,
        system=system,
        skip_bad=skip_bad,
        activation_checkpointing=activation_checkpointing,
        seed=seed,
        device=device,
        track=tuple(track or ()),
    )
    found = _run(run_instruct, request, quiet=quiet)
    if json_:
        print_json(found)
        return
    if found["before"] is not None:
        before, after = found["before"]["loss"], found["after"]["loss"]
        print(f"held-out loss of the answers {before:.4f} -> {after:.4f} nats a token")
    print(f"{found['data']['training']:,} conversations, {found['steps']:,} steps, {_place(found)}")


@app.command()
def prefer(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or name.")],
    data: Pairs,
    out: TuneOut,
    window: Window = None,
    batch: Batch = 32,
    micro_batch: MicroBatch = 4,
    learning_rate: Rate = 5e-7,
    epochs: Epochs = 1,
    warmup_fraction: Warmup = 0.1,
    beta: Annotated[float, typer.Option(help="How strongly the first model holds.")] = 0.1,
    lora: UseLora = False,
    lora_rank: LoraRank = 8,
    lora_alpha: LoraAlpha = 16,
    lora_modules: LoraModules = None,
    heldout_fraction: Heldout = 0.05,
    template: Template = "own",
    system: System = "",
    skip_bad: SkipBad = False,
    activation_checkpointing: Checkpointing = False,
    seed: Seed = 0,
    device: Device = "auto",
    track: Track = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Make the better of two answers likelier (DPO); the same command continues a stopped run."""
    from capgap.stages.prefer import PreferRequest, run_prefer

    request = PreferRequest(
        model,
        data,
        out,
        window=window,
        batch=batch,
        micro_batch=micro_batch,
        learning_rate=learning_rate,
        epochs=epochs,
        warmup_fraction=warmup_fraction,
        beta=beta,
        # the loss compares with a model that has no dropout
        lora=_lora(lora, lora_rank, lora_alpha, 0.0, lora_modules),
        heldout_fraction=heldout_fraction,
        template=template,
        system=system,
        skip_bad=skip_bad,
        activation_checkpointing=activation_checkpointing,
        seed=seed,
        device=device,
        track=tuple(track or ()),
    )
    found = _run(run_prefer, request, quiet=quiet)
    if json_:
        print_json(found)
        return
    if found["before"] is not None:
        before, after = (found[when]["chosen_likelier"] for when in ("before", "after"))
        print(f"of the held-out pairs the chosen answer is likelier in {before:.0%} -> {after:.0%}")
    print(f"{found['data']['training']:,} pairs, {found['steps']:,} steps, {_place(found)}")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or name.")],
    once: Annotated[str | None, typer.Option(help="Answer this question and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    template: Annotated[str, typer.Option(help="The tokenizer's own, or minichat.")] = "own",
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Share of probability to draw from.")] = 0.95,
    tokens: Annotated[int, typer.Option(help="Tokens of the longest answer.")] = 512,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answers.")] = 0,
    device: Device = "auto",
    trust_remote_code: TrustCode = False,
    json_: Json = False,
) -> None:
    """Talk to a model: /reset forgets what was said, /quit or Ctrl-D ends."""
    if json_ and once is None:
        raise UserError("--json goes with --once QUESTION")
    quieten_transformers()
    from capgap.machine import resolve_device
    from capgap.tune.chat import Sampling, load_chat

    sampling = Sampling(temperature, top_p, tokens, seed)
    sampling.check()
    talk = load_chat(
        model,
        template=template,
        system=system,
        sampling=sampling,
        device=resolve_device(device),
        trust_remote_code=trust_remote_code,
    )
    if once is None:
        _converse(talk)
    elif json_:
        answer = "".join(talk.answer(once))
        told = {"model": model, "question": once, "answer": answer}
        print_json(told | {"tokens": talk.num_tokens, "ended": talk.ended})
    else:
        _print_answer(talk, once)


def _lora(
    wanted: bool, rank: int, alpha: float, dropout: float, modules: str | None
) -> "Lora | None":
    from capgap.tune.settings import Lora

    if not wanted:
        if modules is not None:
            raise UserError(f"--lora-modules {modules} goes with --lora")
        return None
    names = None if modules is None else tuple(name.strip() for name in modules.split(","))
    return Lora(rank, alpha, dropout, names)


def _run(stage: Callable[..., dict[str, Any]], request: Any, *, quiet: bool) -> dict[str, Any]:
    from capgap.tune.libraries import check_libraries

    check_libraries()
    return run_stoppable(stage, request, out=request.out, quiet=quiet)


def _place(found: dict[str, Any]) -> str:
    return str(found["folder"])


def _converse(talk: "Chat") -> None:
    """Questions from standard input, one a line, until it ends."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        _edit_lines()
        print("/reset forgets what was said, /quit ends", file=sys.stderr)
    told = False
    while True:
        try:
            question = input("> " if on_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if question == "/quit":
            break
        if question == "/reset":
            talk.reset()
        elif question.startswith("/"):
            print(f"{question} is no command: /reset or /quit", file=sys.stderr)
        elif question:
            try:
                _print_answer(talk, question)
            except UserError as error:
                print(error, file=sys.stderr)
            if talk.num_dropped and not told:
                told = True
                print(
                    "(the oldest turns no longer fit; the model does not see them)",
                    file=sys.stderr,
                )
    if on_terminal:
        print()


def _print_answer(talk: "Chat", question: str) -> None:
    """As it comes; Ctrl-C ends the answer and not the conversation."""
    try:
        for piece in talk.answer(question):
            print(_harmless(piece), end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
    if talk.ended in ("tokens", "context"):
        limit = "as --tokens says" if talk.ended == "tokens" else "the model reads no more"
        print(f"(cut after {talk.num_tokens} tokens: {limit})", file=sys.stderr)


def _harmless(text: str) -> str:
    """Without what would steer a terminal: a model writes anything."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def _edit_lines() -> None:
    """Arrow keys and earlier questions, where the system has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
